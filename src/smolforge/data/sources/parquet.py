"""Parquet files: a part is some row groups."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smolforge.config import Data
from smolforge.data.sources.columns import needed
from smolforge.data.sources.types import Part, Row
from smolforge.errors import InvalidFile, MissingResource

SUFFIX = ".parquet"
PART_BYTES = 64 << 20
ROWS = 1000
"""To hold at a time."""


def borders(path: Path) -> list[tuple[int, int, int]]:
    """First row group, the one after the last, and bytes of each part."""
    with opened(path) as file:
        sizes = [file.metadata.row_group(number).total_byte_size for number in range(file.metadata.num_row_groups)]
    found, start, held = [], 0, 0
    for number, size in enumerate(sizes):
        held += size
        if held >= PART_BYTES or number == len(sizes) - 1:
            found.append((start, number + 1, held))
            start, held = number + 1, 0
    return found


def rows(part: Part, data: Data, skip: int = 0) -> Iterator[Row]:
    """Of the columns that are needed only."""
    path = Path(part.place)
    with opened(path) as file:
        columns = needed(file.schema_arrow.names, data)
        before = sum(file.metadata.row_group(number).num_rows for number in range(part.start))
        number = before
        for batch in file.iter_batches(ROWS, row_groups=list(range(part.start, part.stop or 0)), columns=columns):
            if number + len(batch) > before + skip:
                for place, record in enumerate(batch.to_pylist(), number):
                    if place >= before + skip:
                        yield Row(record, f"{path.name}:{place}", f"{path}, row {place}")
            number += len(batch)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Raises InvalidFile where the file is no parquet, or not all of it."""
    try:
        import pyarrow as arrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise MissingResource(f"{path} needs pyarrow; pip install 'smolforge[data]' brings it") from None
    try:
        with ParquetFile(path) as file:
            yield file
    except (arrow.ArrowException, OSError) as error:
        said = " ".join(str(error).split())[:120]
        raise InvalidFile(f"{path} is no parquet file, or a broken one ({said}); get it again") from None
