"""Data sets on the Hub, streamed by the datasets library: nothing is kept of what was read.

    org/name[@revision][:config]  ->  the commit it means now, its size  ->  parts, a file or more each  ->  rows

The library itself asks again while it reads; where it gives up, the part is opened anew behind the rows it brought.
"""

import functools
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from smolforge.config import Data
from smolforge.data.sources.types import SourcePart, SourceRow, SourceSize
from smolforge.errors import ConfigError, InvalidFileError, MissingResourceError, install_command
from smolforge.errors.hub import REPO_PATTERN, is_temporary, one_line, status_code, user_errors, with_retries

log = logging.getLogger("smolforge.hub")
_ID = re.compile(rf"({REPO_PATTERN})(?:@([\w./+-]+))?(?::([\w.+-]+))?", re.ASCII)
RETRY_SECONDS = (1.0, 5.0, 20.0)
"""Seconds before the next try, which is the first again once a row has come."""


class DatasetName(NamedTuple):
    """What a source names."""

    repo: str
    revision: str | None
    config: str | None


def parse_name(source: str) -> DatasetName | None:
    """Parse org/name[@revision][:config]; return None for anything else."""
    match = _ID.fullmatch(source)
    return DatasetName(*match.groups()) if match and not any(part in source for part in ("--", "..")) else None


def resolve_commit(source: str) -> str:
    """Return the commit that the revision means now. Raises as `rows`."""
    from huggingface_hub import HfApi

    name = parse_name(source)
    assert name is not None
    if name.revision and re.fullmatch("[0-9a-f]{40}", name.revision):
        return name.revision
    return str(call_hub(source, lambda: HfApi().dataset_info(name.repo, revision=name.revision)).sha)


def size(source: str, data: Data) -> SourceSize:
    """Return the size that the data set's card gives."""
    info = call_hub(source, lambda: dataset_builder(source, resolve_commit(source)).info)
    split = (info.splits or {}).get(data.split)
    if split is None:
        return SourceSize(None, None, info.download_size)
    download_size = info.download_size if len(info.splits) == 1 else None
    return SourceSize(split.num_examples or None, split.num_bytes or None, download_size)


def parts(source: str, data: Data) -> list[SourcePart]:
    """One for each of its files, as far as the library can tell them apart."""
    sha = resolve_commit(source)
    count = call_hub(source, lambda: open_stream(source, sha, data.split)).num_shards
    total_bytes = size(source, data).text_bytes
    part = functools.partial(SourcePart, "hub", source, sha, size=total_bytes // count if total_bytes else None)
    return [part(start=number, stop=count) for number in range(count)]


def rows(part: SourcePart, data: Data, skip: int = 0) -> Iterator[SourceRow]:
    """The rows of a part.

    Raises ConfigError for a data set, configuration or split that is not there, MissingResourceError where the Hub does
    not answer, InvalidFileError where a file of it is broken.
    """
    name = part.source if part.stop == 1 else f"{part.source}, part {part.start}"
    number, pauses = skip, iter(RETRY_SECONDS)
    while True:
        try:
            set_timeout_hook()
            stream = open_stream(part.source, part.location, data.split)
            for record in stream.shard(part.stop, part.start).skip(number):
                yield SourceRow(record, f"{name}:{number}", f"{name}, row {number}")
                number, pauses = number + 1, iter(RETRY_SECONDS)
            return
        except Exception as error:
            pause = next(pauses, None) if is_temporary(error) else None
            if pause is None:
                with one_line_errors(part.source):
                    raise
            log.warning("%s: %s; trying again in %g s", name, one_line(error)[:120], pause)
            time.sleep(pause)


def dataset_builder(source: str, sha: str) -> Any:
    datasets = import_datasets()
    name = parse_name(source)
    assert name is not None
    return datasets.load_dataset_builder(name.repo, name.config, revision=sha)


@functools.lru_cache(maxsize=8)
def open_stream(source: str, sha: str, split: str) -> Any:
    """Open a data set as a stream, which reads nothing yet."""
    datasets = import_datasets()
    name = parse_name(source)
    assert name is not None
    return datasets.load_dataset(name.repo, name.config, revision=sha, split=split, streaming=True)


def import_datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingResourceError(f"the Hub's data sets need datasets; {install_command('data')} brings it") from None
    return datasets


def set_timeout_hook() -> None:
    """Apply HF_HUB_DOWNLOAD_TIMEOUT to every request: by itself the client waits for a listing forever."""
    from huggingface_hub import get_session

    client = get_session()
    hooks = client.event_hooks
    if add_timeout not in hooks["request"]:
        client.event_hooks = {**hooks, "request": [*hooks["request"], add_timeout]}


def add_timeout(request: Any) -> None:
    """Add a timeout to a request that has none."""
    from huggingface_hub import constants

    if request.extensions.get("timeout", {}).get("read") is None:
        waits = ("connect", "read", "write", "pool")
        request.extensions["timeout"] = dict.fromkeys(waits, constants.HF_HUB_DOWNLOAD_TIMEOUT)


def one_line_errors(source: str) -> AbstractContextManager[None]:
    """Turn any exception into one line. Raises as `rows`."""
    name = parse_name(source)
    assert name is not None
    hint, explain = "the same command goes on from where it was", functools.partial(explain_error, source, name)
    return user_errors(f"datasets/{name.repo}", f"{source} cannot be read", hint, explain=explain)


def call_hub(source: str, action: Callable[[], Any]) -> Any:
    """Call the Hub for a data set, again where it fails for a while. Raises as `rows`."""

    def attempt() -> Any:
        set_timeout_hook()  # each time: after an error the library may have a new client
        return action()

    with one_line_errors(source):
        return with_retries(attempt, RETRY_SECONDS)


def explain_error(source: str, name: DatasetName, error: BaseException) -> Exception | None:
    """Return what an error means of a data set; None for what passes."""
    from huggingface_hub import errors

    datasets, message = import_datasets(), one_line(error)[:200]
    match error:
        case errors.RevisionNotFoundError():
            return ConfigError(f"the data set {name.repo} has no revision {name.revision!r}")
        case errors.RepositoryNotFoundError() | datasets.exceptions.DatasetNotFoundError():
            return ConfigError(
                f"there is no file, directory or match for the data source {source!r}, and no data set of that name on "
                "the Hub that you may see (if it is private, run `hf auth login` or set HF_TOKEN)"
            )
    if is_temporary(error) or status_code(error) == 401 or isinstance(error, errors.OfflineModeIsEnabled):
        return None
    if isinstance(error, ValueError) and ("Config" in message or "split" in message.lower()):
        return ConfigError(f"{source} cannot be opened: {message}")
    return InvalidFileError(f"{source} cannot be read: {message}")
