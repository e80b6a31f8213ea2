"""`smolforge serve`."""

import logging
import os
import sys
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path

from smolforge.errors import ConfigError, MissingResourceError

KEY_VARIABLE = "SMOLFORGE_API_KEY"
REQUIRED_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    slots: int = 8,
    context: int | None = None,
    queue: int = 64,
    cors_origin: list[str] | None = None,
    dtype: str = "float32",
    device: str = "auto",
    threads: int | None = None,
    random: bool = False,
) -> None:
    """Answer OpenAI's clients over HTTP: completions and chats, several at a time.

    The variable SMOLFORGE_API_KEY is the key they need; without it, none is. A page to chat with is at /.

        smolforge serve runs/mine --port 8000

    Parameters
    ----------
    model
        A Hub id, a model folder, a run folder or one of its checkpoints.
    host
        The address to listen on. Any but this machine's own needs a key.
    port
        0 takes one that is free.
    name
        What clients call the model; without it, the Hub id or the folder's name.
    slots
        Sequences answered at the same time; each has its part of the cache.
    context
        Longest prompt and answer together, in tokens; without it, what the model takes, or 2048 if that is less.
    queue
        Requests that may wait for a slot; more are told to come back.
    cors_origin
        A web page elsewhere that may ask, as https://example.org; may be given several times.
    dtype
        float32, bfloat16, float16 or float64.
    device
        cpu, cuda or mps; auto takes the fastest present.
    threads
        Of the processor; without it, one a core.
    random
        Let a preset answer with random weights.
    """
    key = os.environ.get(KEY_VARIABLE)
    check_options(host, port, slots, context=context, queue=queue, key=key)
    missing = [package for package in REQUIRED_PACKAGES if find_spec(package) is None]
    if missing:
        raise MissingResourceError(f"serve needs {', '.join(missing)}: pip install 'smolforge[server]'")
    import torch

    from smolforge.checkpoint.loading import load
    from smolforge.device import pick_device
    from smolforge.server.lifecycle import ServerConfig, build_server
    from smolforge.server.lifecycle import serve as answer
    from smolforge.server.middleware import AccessRules

    if threads is not None:
        torch.set_num_threads(threads)
    loaded = load(model, dtype, str(pick_device(device)), random=random)
    max_model_len = context or min(loaded.config.max_position_embeddings, 2048)
    config = ServerConfig(host, port, slots, max_model_len, queue, tuple(cors_origin or ()))
    served_name = name or (Path(model).resolve().name if Path(model).exists() else model)
    server, engine_thread = build_server(loaded, served_name, config, rules=AccessRules(key, local_only=is_local(host)))
    _log_to_stderr()

    def ready() -> None:
        has_template = loaded.tokenizer.template is not None
        bound_port = server.servers[0].sockets[0].getsockname()[1]
        print(
            client_examples(host, bound_port, served_name, needs_key=key is not None, has_template=has_template),
            flush=True,
        )

    answer(server, engine_thread, ready)
    print("smolforge: done", file=sys.stderr)


def check_options(host: str, port: int, slots: int, *, context: int | None, queue: int, key: str | None) -> None:
    """Raise ConfigError for wrong options, such as a server that anyone can use."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port is {port}; it should be a number from 0 to 65535")
    for flag, value, minimum in (("slots", slots, 1), ("context", context, 2), ("queue", queue, 0)):
        if value is not None and value < minimum:
            raise ConfigError(f"--{flag} is {value}; it should be at least {minimum}")
    if key is not None and (not key.isascii() or not key.isprintable() or len(key) < 8 or " " in key):
        raise ConfigError(f"{KEY_VARIABLE} should be eight or more visible ASCII characters")
    if key is None and not is_local(host):
        raise ConfigError(
            f"--host {host} lets other machines in, and there is no key to keep strangers out; "
            f"set one: {KEY_VARIABLE}=$(openssl rand -hex 16)"
        )


def is_local(host: str) -> bool:
    """Return whether only this machine reaches the host."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def client_examples(host: str, port: int, name: str, *, needs_key: bool, has_template: bool) -> str:
    """Return commands to copy: one line for a shell, a few for Python."""
    url_host = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    url = f"http://{url_host}:{port}"
    header = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if needs_key else ""
    key = f'os.environ["{KEY_VARIABLE}"]' if needs_key else '"none"'
    quoted = name.replace("\\", "\\\\").replace('"', '\\"')
    if has_template:
        route, fields = (
            "chat/completions",
            f'"model": "{quoted}", "messages": [{{"role": "user", "content": "Hello!"}}]',
        )
        messages = '[{"role": "user", "content": "Hello!"}]'
        call = f'client.chat.completions.create(model="%s", messages={messages}, max_tokens=64)'
        text_path = "choices[0].message.content"
    else:
        route, fields = "completions", f'"model": "{quoted}", "prompt": "Once upon a time"'
        call = 'client.completions.create(model="%s", prompt="Once upon a time", max_tokens=64)'
        text_path = "choices[0].text"
    body = f'{{{fields}, "max_tokens": 64}}'.replace("'", "'\\''")
    return f"""{name} is served at {url}/v1, and to be talked to at {url}/

curl {url}/v1/{route} -H "Content-Type: application/json"{header} -d '{body}'

{"import os" + chr(10) if needs_key else ""}from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key={key})
print({call % quoted}.{text_path})
"""


def _log_to_stderr() -> None:
    """Log a line per request: method, route, status, seconds, request id."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log = logging.getLogger("smolforge.server")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
