"""`smolforge serve`."""

import logging
import os
import sys
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path

from smolforge.errors import MissingResource, SettingError

KEY = "SMOLFORGE_API_KEY"
NEEDS = ("fastapi", "uvicorn", "prometheus_client")


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
    key = os.environ.get(KEY)
    check(host, port, slots, context, queue, key)
    missing = [each for each in NEEDS if find_spec(each) is None]
    if missing:
        raise MissingResource(f"serve needs {', '.join(missing)}: pip install 'smolforge[server]'")
    import torch

    from smolforge.checkpoint.loading import load
    from smolforge.device import pick_device
    from smolforge.server.lifecycle import Place, made
    from smolforge.server.lifecycle import serve as answer
    from smolforge.server.middleware import Rules

    if threads is not None:
        torch.set_num_threads(threads)
    loaded = load(model, dtype, str(pick_device(device)), random)
    room = context or min(loaded.config.max_position_embeddings, 2048)
    place = Place(host, port, slots, room, queue, tuple(cors_origin or ()))
    called = name or (Path(model).resolve().name if Path(model).exists() else model)
    server, desk = made(loaded, called, place, Rules(key, local_only=is_local(host)))
    _log_to_stderr()

    def ready() -> None:
        chats = loaded.tokenizer.template is not None
        at = server.servers[0].sockets[0].getsockname()[1]
        print(told(host, at, called, key is not None, chats), flush=True)

    answer(server, desk, ready)
    print("smolforge: done", file=sys.stderr)


def check(host: str, port: int, slots: int, context: int | None, queue: int, key: str | None) -> None:
    """Raises SettingError for what cannot be meant, a server that anyone can use among it."""
    if not 0 <= port <= 65535:
        raise SettingError(f"--port is {port}; it should be a number from 0 to 65535")
    for flag, value, least in (("slots", slots, 1), ("context", context, 2), ("queue", queue, 0)):
        if value is not None and value < least:
            raise SettingError(f"--{flag} is {value}; it should be at least {least}")
    if key is not None and (not key.isascii() or not key.isprintable() or len(key) < 8 or " " in key):
        raise SettingError(f"{KEY} should be eight or more visible ASCII characters")
    if key is None and not is_local(host):
        raise SettingError(
            f"--host {host} lets other machines in, and there is no key to keep strangers out; "
            f"set one: {KEY}=$(openssl rand -hex 16)"
        )


def is_local(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def told(host: str, port: int, name: str, keyed: bool, chats: bool) -> str:
    """What to type, as it stands: one line for a shell, a few for Python."""
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{port}"
    header = f' -H "Authorization: Bearer ${KEY}"' if keyed else ""
    key = f'os.environ["{KEY}"]' if keyed else '"none"'
    quoted = name.replace("\\", "\\\\").replace('"', '\\"')
    if chats:
        route, ask = "chat/completions", f'"model": "{quoted}", "messages": [{{"role": "user", "content": "Hello!"}}]'
        turn = '[{"role": "user", "content": "Hello!"}]'
        call = f'client.chat.completions.create(model="%s", messages={turn}, max_tokens=64)'
        said = "choices[0].message.content"
    else:
        route, ask = "completions", f'"model": "{quoted}", "prompt": "Once upon a time"'
        call = 'client.completions.create(model="%s", prompt="Once upon a time", max_tokens=64)'
        said = "choices[0].text"
    body = f'{{{ask}, "max_tokens": 64}}'.replace("'", "'\\''")
    return f"""{name} is served at {url}/v1, and to be talked to at {url}/

curl {url}/v1/{route} -H "Content-Type: application/json"{header} -d '{body}'

{"import os" + chr(10) if keyed else ""}from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key={key})
print({call % quoted}.{said})
"""


def _log_to_stderr() -> None:
    """A line for each request: method, route, status, seconds, number."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log = logging.getLogger("smolforge.server")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
