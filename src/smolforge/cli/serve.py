"""`smolforge serve`."""

import logging
import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path

from cyclopts import Parameter

from smolforge import operating_system
from smolforge.cli.flags import LoadingFlags, Model, check_at_least
from smolforge.errors import ConfigError, MissingResourceError, install_command

KEY_VARIABLE = "SMOLFORGE_API_KEY"
REQUIRED_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


@Parameter(name="*")
@dataclass(frozen=True)
class ServeFlags:
    """Flags for the address, the clients and the sequences."""

    host: str = "127.0.0.1"
    """The address to listen on. Any but this machine's own needs a key."""
    port: int = 8000
    """0 takes one that is free."""
    name: str | None = None
    """What clients call the model; without it, the Hub id or the folder's name."""
    slots: int = 8
    """Sequences answered at the same time; each has its part of the cache."""
    context: int | None = None
    """Longest prompt and answer together, in tokens; without it, what the model takes, or 2048 if that is less."""
    queue: int = 64
    """Requests that may wait for a slot; more are told to come back."""
    cors_origin: list[str] | None = None
    """A web page elsewhere that may ask, as https://example.org; may be given several times."""
    parse_special: bool = False
    """Read special tokens (<|im_end|>) in the text of a prompt as such, unless a request says otherwise. For programs
    that render chats themselves, as lm_eval --apply_chat_template; not for texts of strangers."""

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the host."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def check(self, key: str | None) -> None:
        """Raise ConfigError for wrong flags, such as those of a server that anyone can use."""
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port is {self.port}; it should be a number from 0 to 65535")
        check_at_least(1, slots=self.slots)
        check_at_least(2, context=self.context)
        check_at_least(0, queue=self.queue)
        if key is not None and (not key.isascii() or not key.isprintable() or len(key) < 8 or " " in key):
            raise ConfigError(f"{KEY_VARIABLE} should be eight or more visible ASCII characters")
        if key is None and not self.is_local:
            raise ConfigError(
                f"--host {self.host} lets other machines in, and there is no key to keep strangers out; "
                f"set one: {KEY_VARIABLE}=$(openssl rand -hex 16)"
            )


def serve(
    model: Model, *, flags: ServeFlags | None = None, loading: LoadingFlags | None = None, threads: int | None = None
) -> None:
    """Answer OpenAI's clients over HTTP: completions and chats, several at a time.

    The variable SMOLFORGE_API_KEY is the key they need; without it, none is. A page to chat with is at /.

        smolforge serve runs/mine --port 8000

    Parameters
    ----------
    threads
        Of the processor; without it, one a core.
    """
    flags, key = flags or ServeFlags(), os.environ.get(KEY_VARIABLE)
    flags.check(key)
    missing = [package for package in REQUIRED_PACKAGES if find_spec(package) is None]
    if missing:
        raise MissingResourceError(f"serve needs {', '.join(missing)}: {install_command('server')}")
    import torch

    from smolforge.server.lifecycle import ServerConfig, build_server
    from smolforge.server.lifecycle import serve as answer
    from smolforge.server.middleware import AccessRules

    if threads is not None:
        torch.set_num_threads(threads)
    loaded = (loading or LoadingFlags()).load(model)
    max_model_len = flags.context or min(loaded.config.max_position_embeddings, 2048)
    origins = tuple(flags.cors_origin or ())
    config = ServerConfig(flags.host, flags.port, flags.slots, max_model_len, flags.queue, origins, flags.parse_special)
    name = flags.name or (Path(model).resolve().name if Path(model).exists() else model)
    server, engine_thread = build_server(loaded, name, config, rules=AccessRules(key, local_only=flags.is_local))
    _log_to_stderr()

    def ready() -> None:
        port = server.servers[0].sockets[0].getsockname()[1]
        chats = loaded.tokenizer.template is not None
        print(client_examples(flags.host, port, name, needs_key=key is not None, chats=chats), flush=True)

    answer(server, engine_thread, ready)
    print("smolforge: done", file=sys.stderr)


def client_examples(host: str, port: int, name: str, *, needs_key: bool, chats: bool) -> str:
    """Return commands to copy: one line for a shell, a few for Python."""
    url_host = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    url = f"http://{url_host}:{port}"
    header = f' -H "Authorization: Bearer {operating_system.shell_variable(KEY_VARIABLE)}"' if needs_key else ""
    key = f'os.environ["{KEY_VARIABLE}"]' if needs_key else '"none"'
    field, value = (
        ("messages", '[{"role": "user", "content": "Hello!"}]') if chats else ("prompt", '"Once upon a time"')
    )
    route, answer = ("chat/completions", "message.content") if chats else ("completions", "text")
    quoted = name.replace("\\", "\\\\").replace('"', '\\"')
    body = f'{{"model": "{quoted}", "{field}": {value}, "max_tokens": 64}}'
    call = f'client.{route.replace("/", ".")}.create(model="{quoted}", {field}={value}, max_tokens=64)'
    return f"""{name} is served at {url}/v1, and to be talked to at {url}/

curl {url}/v1/{route} -H "Content-Type: application/json"{header} -d {operating_system.shell_word(body)}

{"import os" + chr(10) if needs_key else ""}from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key={key})
print({call}.choices[0].{answer})
"""


def _log_to_stderr() -> None:
    """Log a line per request: method, route, status, seconds, request id."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log = logging.getLogger("smolforge.server")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
