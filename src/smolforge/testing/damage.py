"""Files as a bad disk gives them back: a bit turned over, a page of zeros, an end missing, the wrong content."""

import os
from pathlib import Path

PAGE = 4096


def flip_bit(path: Path, bit: int) -> None:
    """Change one bit of a file in place."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def truncate(path: Path, size: int) -> None:
    """Leave the first bytes of a file; of a negative size, all but as many."""
    os.truncate(path, size if size >= 0 else max(0, path.stat().st_size + size))


def zero_page(path: Path, page: int = 0) -> None:
    """Make one page of a file zeros, or what there is of it; the size stays."""
    left = path.stat().st_size - page * PAGE
    with path.open("r+b") as file:
        file.seek(page * PAGE)
        file.write(bytes(max(0, min(PAGE, left))))


def swap(one: Path, other: Path) -> None:
    """Let two files or folders have each other's name."""
    aside = one.with_name(f".swapped-{one.name}")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
