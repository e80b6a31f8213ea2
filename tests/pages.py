"""Pages as a reader meets them: the blocks in fences, what each is said to print, and links.

A block of `python` or `bash` is run by tests, in the order of its page; a block of `text` right behind one is what it
prints, where `...` stands for anything. A block of `sh` shows commands that a test cannot run; so does one without a
language that begins with a command.
"""

import doctest
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
PROGRAMS = (
    "smolforge",
    "docker",
    "git",
    "make",
    "pip",
    "python",
    "torchrun",
    "hf",
    "cd",
    "tensorboard",
    "#!/bin/bash",
    "curl",
    "export",
)
FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    page: str
    """From the repository's root."""
    line: int
    language: str
    content: str
    printed: str | None = None
    """What the page says that it prints."""
    file: str | None = None
    """What the page calls it, as in "`theta.toml`:"."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """Its lines, continued ones joined, without comments."""
        lines = self.content.replace("\\\n", " ").splitlines()
        return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def blocks(page: Path) -> Iterator[Block]:
    """Every block of a page."""
    content = page.read_text("utf-8")
    found = list(FENCED.finditer(content))
    for place, each in enumerate(found):
        language, inner = each[2], each[3]
        if not language and inner.lstrip().startswith(PROGRAMS):
            language = "sh"
        after = found[place + 1] if place + 1 < len(found) else None
        follows = after is not None and after[2] == "text" and not content[each.end() : after.start()].strip()
        line = content.count("\n", 0, each.start()) + 1
        printed = after[3] if after is not None and follows else None
        named = re.search(r"`([\w./-]+\.(?:toml|jsonl|py))`:\s*$", content[: each.start()])
        yield Block(str(page.relative_to(ROOT)), line, language, inner, printed, named[1] if named else None)


def is_as_shown(shown: str, printed: str) -> bool:
    """Whether this was printed, but for spaces at ends of lines."""
    lines = ["\n".join(line.rstrip() for line in each.strip().splitlines()) + "\n" for each in (shown, printed)]
    return doctest.OutputChecker().check_output(*lines, optionflags=doctest.ELLIPSIS)


def commands_in_prose(page: Path) -> Iterator[tuple[str, str]]:
    """(where, command) of every `command` within a sentence, as far as it is one of ours."""
    content = FENCED.sub(lambda found: "\n" * found[0].count("\n"), page.read_text("utf-8"))
    for found in re.finditer(r"(?<!`)`((?:smolforge|make) [^`]+)`", content):
        yield f"{page.relative_to(ROOT)}:{content.count(chr(10), 0, found.start()) + 1}", " ".join(found[1].split())


def anchors(page: Path) -> set[str]:
    """Where a link into a page may lead, as GitHub names its headings."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
