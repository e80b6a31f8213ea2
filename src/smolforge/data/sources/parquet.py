"""Parquet files: a part is some row groups."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smolforge.config import Data
from smolforge.data.sources.columns import needed_columns
from smolforge.data.sources.types import SourcePart, SourceRow
from smolforge.errors import InvalidFileError, MissingResourceError, install_command

SUFFIX = ".parquet"
PART_BYTES = 64 << 20
ROWS_PER_BATCH = 1000
"""To hold at a time."""


def borders(path: Path) -> list[tuple[int, int, int]]:
    """First row group, the one after the last, and bytes of each part."""
    with open_parquet(path) as file:
        sizes = [file.metadata.row_group(number).total_byte_size for number in range(file.metadata.num_row_groups)]
    parts, start, num_bytes = [], 0, 0
    for number, size in enumerate(sizes):
        num_bytes += size
        if num_bytes >= PART_BYTES or number == len(sizes) - 1:
            parts.append((start, number + 1, num_bytes))
            start, num_bytes = number + 1, 0
    return parts


def rows(part: SourcePart, data: Data, skip: int = 0) -> Iterator[SourceRow]:
    """Of the columns that are needed only."""
    path = Path(part.location)
    with open_parquet(path) as file:
        columns = needed_columns(file.schema_arrow.names, data)
        before = sum(file.metadata.row_group(number).num_rows for number in range(part.start))
        number = before
        for batch in file.iter_batches(
            ROWS_PER_BATCH, row_groups=list(range(part.start, part.stop or 0)), columns=columns
        ):
            if number + len(batch) > before + skip:
                for index, record in enumerate(batch.to_pylist(), number):
                    if index >= before + skip:
                        yield SourceRow(record, f"{path.name}:{index}", f"{path}, row {index}")
            number += len(batch)


@contextmanager
def open_parquet(path: Path) -> Iterator[Any]:
    """Open a file. Raises InvalidFileError where it is not parquet, or incomplete."""
    try:
        import pyarrow as arrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise MissingResourceError(f"{path} needs pyarrow; {install_command('data')} brings it") from None
    try:
        with ParquetFile(path) as file:
            yield file
    except (arrow.ArrowException, OSError) as error:
        message = " ".join(str(error).split())[:120]
        raise InvalidFileError(f"{path} is no parquet file, or a broken one ({message}); get it again") from None
