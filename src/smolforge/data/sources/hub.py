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
from smolforge.data.sources.types import Part, Row, Size
from smolforge.errors import InvalidFile, MissingResource, SettingError

log = logging.getLogger("smolforge.hub")
_WORD = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_ID = re.compile(rf"({_WORD}/{_WORD})(?:@([\w./+-]+))?(?::([\w.+-]+))?", re.ASCII)
PAUSES = (1.0, 5.0, 20.0)
"""Seconds before the next try, which is the first again once a row has come."""


class Name(NamedTuple):
    """What a source names."""

    repo: str
    revision: str | None
    config: str | None


def name_of(source: str) -> Name | None:
    """None for what is no id of a data set."""
    found = _ID.fullmatch(source)
    return Name(*found.groups()) if found and not any(word in source for word in ("--", "..")) else None


def commit(source: str) -> str:
    """What the revision means now. Raises as `rows`."""
    from huggingface_hub import HfApi

    name = name_of(source)
    assert name is not None
    if name.revision and re.fullmatch("[0-9a-f]{40}", name.revision):
        return name.revision
    with sentences(source):
        return str(patiently(lambda: HfApi().dataset_info(name.repo, revision=name.revision)).sha)


def size(source: str, data: Data) -> Size:
    """As its card tells."""
    with sentences(source):
        info = patiently(lambda: builder(source, commit(source)).info)
    split = (info.splits or {}).get(data.split)
    if split is None:
        return Size(None, None, info.download_size)
    alone = info.download_size if len(info.splits) == 1 else None
    return Size(split.num_examples or None, split.num_bytes or None, alone)


def parts(source: str, data: Data) -> list[Part]:
    """One for each of its files, as far as the library can tell them apart."""
    at = commit(source)
    with sentences(source):
        count = patiently(lambda: opened(source, at, data.split)).num_shards
    whole = size(source, data).text_bytes
    part = functools.partial(Part, "hub", source, at, size=whole // count if whole else None)
    return [part(start=number, stop=count) for number in range(count)]


def rows(part: Part, data: Data, skip: int = 0) -> Iterator[Row]:
    """The rows of a part.

    Raises SettingError for a data set, configuration or split that is not there, MissingResource where the Hub does
    not answer, InvalidFile where a file of it is broken.
    """
    name = part.source if part.stop == 1 else f"{part.source}, part {part.start}"
    number, pauses = skip, iter(PAUSES)
    while True:
        try:
            bound()
            stream = opened(part.source, part.place, data.split)
            for record in stream.shard(part.stop, part.start).skip(number):
                yield Row(record, f"{name}:{number}", f"{name}, row {number}")
                number, pauses = number + 1, iter(PAUSES)
            return
        except Exception as error:
            pause = next(pauses, None) if is_passing(error) else None
            if pause is None:
                with sentences(part.source):
                    raise
            log.warning("%s: %s; trying again in %g s", name, " ".join(str(error).split())[:120], pause)
            time.sleep(pause)


def builder(source: str, at: str) -> Any:
    datasets = library()
    name = name_of(source)
    assert name is not None
    return datasets.load_dataset_builder(name.repo, name.config, revision=at)


@functools.lru_cache(maxsize=8)
def opened(source: str, at: str, split: str) -> Any:
    """The stream, which reads nothing yet."""
    datasets = library()
    name = name_of(source)
    assert name is not None
    return datasets.load_dataset(name.repo, name.config, revision=at, split=split, streaming=True)


def library() -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingResource("the Hub's data sets need datasets; pip install 'smolforge[data]' brings it") from None
    return datasets


def bound() -> None:
    """Let no answer take longer than HF_HUB_DOWNLOAD_TIMEOUT: by itself the client waits for a listing for ever."""
    from huggingface_hub import get_session

    client = get_session()
    hooks = client.event_hooks
    if in_time not in hooks["request"]:
        client.event_hooks = {**hooks, "request": [*hooks["request"], in_time]}


def in_time(request: Any) -> None:
    """Give a request that may take for ever an end."""
    from huggingface_hub import constants

    if request.extensions.get("timeout", {}).get("read") is None:
        waits = ("connect", "read", "write", "pool")
        request.extensions["timeout"] = dict.fromkeys(waits, constants.HF_HUB_DOWNLOAD_TIMEOUT)


def patiently(action: Any) -> Any:
    """Ask again where the Hub is busy, or broken for the moment."""
    for pause in PAUSES:
        try:
            bound()
            return action()
        except Exception as error:
            if not is_passing(error):
                raise
            time.sleep(pause)
    return action()


def is_passing(error: BaseException) -> bool:
    """Whether the next try may go better: the server's fault, or the line's."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    if isinstance(error, OfflineModeIsEnabled | RepositoryNotFoundError):
        return False
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return error.response.status_code >= 500 or error.response.status_code in (408, 429)
    passing = isinstance(error, HTTPError | TimeoutError | ConnectionError)
    return passing or (error.__cause__ is not None and is_passing(error.__cause__))


@contextmanager
def sentences(source: str) -> Iterator[None]:
    """Whatever goes wrong, in one sentence."""
    try:
        yield
    except (SettingError, InvalidFile, MissingResource):
        raise
    except Exception as error:
        raise sentence(error, source) from None


def sentence(error: BaseException, source: str) -> Exception:
    """What a person should know of an error, and do."""
    from huggingface_hub import constants, errors

    datasets, name, said = library(), name_of(source), " ".join(str(error).split())[:200]
    assert name is not None
    match error:
        case errors.OfflineModeIsEnabled():
            return MissingResource(f"{source} is streamed from the Hub, which HF_HUB_OFFLINE forbids; unset that")
        case errors.GatedRepoError():
            return MissingResource(
                f"{name.repo} is gated: accept its terms at {constants.ENDPOINT}/datasets/{name.repo}, then run "
                "`hf auth login` or set HF_TOKEN"
            )
        case errors.RevisionNotFoundError():
            return SettingError(f"the data set {name.repo} has no revision {name.revision!r}")
        case errors.RepositoryNotFoundError() | datasets.exceptions.DatasetNotFoundError():
            return SettingError(
                f"there is no file, directory or match for the data source {source!r}, and no data set of that name on "
                "the Hub that you may see (if it is private, run `hf auth login` or set HF_TOKEN)"
            )
    if is_passing(error):
        return MissingResource(
            f"{source} cannot be read from {constants.ENDPOINT} ({said}); the same command goes on from where it was"
        )
    if isinstance(error, ValueError) and ("Config" in said or "split" in said.lower()):
        return SettingError(f"{source} cannot be opened: {said}")
    return InvalidFile(f"{source} cannot be read: {said}")
