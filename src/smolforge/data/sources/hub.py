"""Data sets on the Hub, streamed by the datasets library: nothing is kept of what was read.

    org/name[@revision][:config]  ->  the commit it means now, its size  ->  parts, a file or more each  ->  rows

The library itself asks again while it reads; where it gives up, the part is opened anew behind the rows it brought.
"""

import functools
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from smolforge.config import Data
from smolforge.data.sources.types import SourcePart, SourceRow, SourceSize
from smolforge.errors import ConfigError, InvalidFileError, MissingResourceError

log = logging.getLogger("smolforge.hub")
_NAME_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_ID = re.compile(rf"({_NAME_PART}/{_NAME_PART})(?:@([\w./+-]+))?(?::([\w.+-]+))?", re.ASCII)
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
    with one_line_errors(source):
        return str(retry_hub_call(lambda: HfApi().dataset_info(name.repo, revision=name.revision)).sha)


def size(source: str, data: Data) -> SourceSize:
    """Return the size that the data set's card gives."""
    with one_line_errors(source):
        info = retry_hub_call(lambda: dataset_builder(source, resolve_commit(source)).info)
    split = (info.splits or {}).get(data.split)
    if split is None:
        return SourceSize(None, None, info.download_size)
    download_size = info.download_size if len(info.splits) == 1 else None
    return SourceSize(split.num_examples or None, split.num_bytes or None, download_size)


def parts(source: str, data: Data) -> list[SourcePart]:
    """One for each of its files, as far as the library can tell them apart."""
    sha = resolve_commit(source)
    with one_line_errors(source):
        count = retry_hub_call(lambda: open_stream(source, sha, data.split)).num_shards
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
            log.warning("%s: %s; trying again in %g s", name, " ".join(str(error).split())[:120], pause)
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
        raise MissingResourceError(
            "the Hub's data sets need datasets; pip install 'smolforge[data]' brings it"
        ) from None
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


def retry_hub_call(action: Any) -> Any:
    """Call again where the Hub fails temporarily."""
    for pause in RETRY_SECONDS:
        try:
            set_timeout_hook()
            return action()
        except Exception as error:
            if not is_temporary(error):
                raise
            time.sleep(pause)
    return action()


def is_temporary(error: BaseException) -> bool:
    """Return whether a retry may succeed: an error of the server or the connection."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    if isinstance(error, OfflineModeIsEnabled | RepositoryNotFoundError):
        return False
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return error.response.status_code >= 500 or error.response.status_code in (408, 429)
    passing = isinstance(error, HTTPError | TimeoutError | ConnectionError)
    return passing or (error.__cause__ is not None and is_temporary(error.__cause__))


@contextmanager
def one_line_errors(source: str) -> Iterator[None]:
    """Turn any exception into a one-line error."""
    try:
        yield
    except (ConfigError, InvalidFileError, MissingResourceError):
        raise
    except Exception as error:
        raise user_error(error, source) from None


def user_error(error: BaseException, source: str) -> Exception:
    """Return an error that tells the user the cause and the fix."""
    from huggingface_hub import constants, errors

    datasets, name, message = import_datasets(), parse_name(source), " ".join(str(error).split())[:200]
    assert name is not None
    match error:
        case errors.OfflineModeIsEnabled():
            return MissingResourceError(f"{source} is streamed from the Hub, which HF_HUB_OFFLINE forbids; unset that")
        case errors.GatedRepoError():
            return MissingResourceError(
                f"{name.repo} is gated: accept its terms at {constants.ENDPOINT}/datasets/{name.repo}, then run "
                "`hf auth login` or set HF_TOKEN"
            )
        case errors.RevisionNotFoundError():
            return ConfigError(f"the data set {name.repo} has no revision {name.revision!r}")
        case errors.RepositoryNotFoundError() | datasets.exceptions.DatasetNotFoundError():
            return ConfigError(
                f"there is no file, directory or match for the data source {source!r}, and no data set of that name on "
                "the Hub that you may see (if it is private, run `hf auth login` or set HF_TOKEN)"
            )
    if is_temporary(error):
        return MissingResourceError(
            f"{source} cannot be read from {constants.ENDPOINT} ({message}); the same command goes on from where it was"
        )
    if isinstance(error, ValueError) and ("Config" in message or "split" in message.lower()):
        return ConfigError(f"{source} cannot be opened: {message}")
    return InvalidFileError(f"{source} cannot be read: {message}")
