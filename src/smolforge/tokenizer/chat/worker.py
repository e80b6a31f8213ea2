"""The process a chat template runs in, alone: requests come in on stdin, answers go out on stdout, one JSON a line.

A template comes with a model, from anyone. Jinja's sandbox keeps it from Python's insides, but not from
`'a' * 10**9` or a loop without end, so this process is small, limited, and its parent kills it when it is late.
Run as a script; it imports nothing of smolforge that imports much, so that it starts in a tenth of a second.
"""

import html  # noqa: F401  (this and what is marked alike: a filter would import it when no file can be opened any more)
import json
import os
import pprint  # noqa: F401
import random  # noqa: F401
import sys
import textwrap  # noqa: F401
from datetime import datetime
from typing import Any, NoReturn

sys.path += sys.argv[1:]  # an isolated script does not know where packages are
import jinja2
import jinja2.constants
import jinja2.debug
import jinja2.ext
import jinja2.sandbox
import jinja2.utils

from smolforge import operating_system

MAX_CACHED_TEMPLATES = 8


class TemplateRefusalError(Exception):
    """The template refused the messages, with raise_exception."""


class OutputTooLongError(Exception):
    """The template wrote more than it may."""


class EscapedText(str):
    """A text that is written with its special tokens escaped, and compares as it was.

    So `message.name` finds a key, and `role == 'im_end'` holds, though what is written cannot become a special token.
    """

    _plain: str

    def __eq__(self, other: object) -> bool:
        return self._plain == plain_text(other)

    def __ne__(self, other: object) -> bool:
        return self._plain != plain_text(other)

    def __lt__(self, other: Any) -> bool:
        return self._plain < plain_text(other)

    def __gt__(self, other: Any) -> bool:
        return self._plain > plain_text(other)

    def __hash__(self) -> int:
        return hash(self._plain)


def plain_text(value: Any) -> Any:
    return value._plain if isinstance(value, EscapedText) else value


class GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; the text is the same without."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Set up as Transformers does, but a forbidden attribute is an error at once, not an empty text."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise jinja2.exceptions.SecurityError(f"{attribute!r} of a {type(obj).__name__} is not for templates")


class Namespace(jinja2.utils.Namespace):
    """Jinja's, which can be assigned to, without names that Python gives a meaning."""

    def __init__(*args: Any, **values: Any) -> None:  # a template may call a value `self`
        for name in dict(*args[1:], **values):
            check_name(name)
        jinja2.utils.Namespace.__init__(*args, **values)

    def __setitem__(self, name: str, value: Any) -> None:
        check_name(name)
        super().__setitem__(name, value)


class Dictionary:
    """`dict` in a template makes one; the class itself has too much to offer."""

    def __call__(self, *pairs: Any, **values: Any) -> dict[Any, Any]:
        return dict(*pairs, **values)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


def check_name(name: object) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may not hold {name!r}")


def refuse(message: object = "") -> NoReturn:
    raise TemplateRefusalError(str(message))


def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own escapes HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def mark_escaped(value: Any, table: dict[int, str]) -> Any:
    """Return a copy of a value whose escaped texts, keys included, are EscapedText; the table restores a text."""
    if isinstance(value, dict):
        return {mark_escaped(key, table): mark_escaped(item, table) for key, item in value.items()}
    if isinstance(value, list):
        return [mark_escaped(item, table) for item in value]
    if not isinstance(value, str) or (plain := value.translate(table)) == value:
        return value
    text = EscapedText(value)
    text._plain = plain
    return text


def compile_template(source: str) -> jinja2.Template:
    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, jinja2.ext.loopcontrols])
    sandbox.filters["tojson"] = to_json
    template_globals: dict[str, Any] = {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": Dictionary(),
        "namespace": Namespace,
    }
    sandbox.globals.update(template_globals)
    return sandbox.from_string(source)


def render(template: jinja2.Template, variables: dict[str, Any], characters: int) -> str:
    pieces, written = [], 0
    for piece in template.generate(variables):
        pieces.append(piece)
        written += len(piece)
        if written > characters:
            raise OutputTooLongError
    return "".join(pieces)


def handle_request(request: dict[str, Any], cache: dict[str, jinja2.Template]) -> dict[str, str]:
    """{"text": ...}, or {"error": kind, "says": why}. The kinds are put into sentences by the parent."""
    try:
        if request["source"] not in cache:
            if len(cache) >= MAX_CACHED_TEMPLATES:
                cache.clear()
            cache[request["source"]] = compile_template(request["source"])
        variables = mark_escaped(request["variables"], {ord(key): text for key, text in request["escapes"].items()})
        return {"text": render(cache[request["source"]], variables, request["characters"])}
    except TemplateRefusalError as error:
        return {"error": "refused", "says": str(error)}
    except jinja2.TemplateSyntaxError as error:
        return {"error": "syntax", "says": f"line {error.lineno}: {error.message}"}
    except SyntaxError as error:  # Python's own, of the code that Jinja made of it
        return {"error": "syntax", "says": str(error.msg)}
    except (jinja2.exceptions.SecurityError, OSError, ImportError) as error:
        return {"error": "forbidden", "says": str(error)}
    except jinja2.UndefinedError as error:
        return {"error": "undefined", "says": str(error.message)}
    except OutputTooLongError:
        return {"error": "long", "says": ""}
    except (MemoryError, RecursionError, OverflowError) as error:
        return {"error": "large", "says": type(error).__name__}
    except Exception as error:  # whatever a template's arithmetic can raise
        return {"error": "failed", "says": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Serve until stdin ends."""
    cache: dict[str, jinja2.Template] = {}
    first = json.loads(sys.stdin.buffer.readline())
    # Once through everything that is imported or opened at first use.
    source = "{{ strftime_now('%d %b %Y') }}{{ [1]|tojson }}"
    handle_request({"source": source, "variables": {}, "escapes": {}, "characters": 99}, {})
    operating_system.limit_resources(first["memory_bytes"])
    sys.stdout.buffer.write(b"{}\n")
    sys.stdout.buffer.flush()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        # Should the parent be gone, nobody else ends a loop without end.
        operating_system.exit_after(2 * request["seconds"])
        reply = handle_request(request, cache)
        operating_system.exit_after(0)
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()
        if reply.get("error") == "large":
            os._exit(0)  # memory that ran out once is not trusted again


if __name__ == "__main__":
    main()
