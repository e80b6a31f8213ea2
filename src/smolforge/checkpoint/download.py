"""One commit on the Hub -> its files in the cache, where every program that uses huggingface_hub finds them.

listing (sizes, hashes)  ->  room for it?  ->  large: HASH.partial grows, over several tries if need be,
                                               is held to its hash and becomes the blob HASH
                                               small: hf_hub_download
                                           ->  snapshots/COMMIT/NAME
"""

import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from smolforge.errors import InvalidFile, MissingResource

log = logging.getLogger("smolforge.hub")
BUSY, PAUSES = (408, 429, 500, 502, 503, 504), (0.5, 2.0)
"""Answers that may be another in a moment, and the seconds between asking again."""


@dataclass(frozen=True)
class Listing:
    """One commit of a repository: the size of every file, and the sha256 of those kept with LFS."""

    repo: str
    commit: str
    sizes: dict[str, int]
    sha256: dict[str, str]


def list_commit(repo: str, revision: str) -> Listing:
    """Ask the Hub once for the commit a revision means now, and for its files."""
    from huggingface_hub import HfApi, constants

    info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    siblings = info.siblings or []
    if info.sha is None:
        raise ValueError(f"{constants.ENDPOINT} names no commit of {repo}")
    return Listing(
        repo,
        info.sha,
        {each.rfilename: each.size or 0 for each in siblings},
        {each.rfilename: each.lfs.sha256 for each in siblings if each.lfs is not None},
    )


def announce(model_id: str, listing: Listing, missing: Sequence[str]) -> None:
    """Say what is about to be downloaded, if there is room for it."""
    from huggingface_hub import constants

    large = [_partial(listing, name) for name in missing if name in listing.sha256]
    begun = sum(part.stat().st_size for part in large if part.is_file())
    needed = sum(listing.sizes[name] for name in missing) - begun
    cache = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
    if needed > free:
        raise MissingResource(
            f"{model_id} needs {needed:,} more bytes and {cache} has {free:,} free; make room, or let HF_HOME name "
            "a folder on another disk"
        )
    size = f"{needed / 1e6:,.0f} MB" if needed >= 1e6 else f"{needed / 1e3:,.0f} kB"
    log.info("%s: downloading %s in %d file%s", model_id, size, len(missing), "" if len(missing) == 1 else "s")


def bring(model_id: str, listing: Listing, name: str) -> None:
    """One file into the cache: a large one first as a blob that is as the Hub says, then the name for it."""
    from huggingface_hub import hf_hub_download

    if name in listing.sha256:
        patiently(partial(_bring_blob, model_id, listing, name))
    patiently(partial(hf_hub_download, listing.repo, name, revision=listing.commit))


def _bring_blob(model_id: str, listing: Listing, name: str) -> None:
    """Download a large file under its sha256, going on where an earlier try ended.

    huggingface_hub itself forgets what it has of a file when its process ends, and checks only the size.
    """
    from huggingface_hub.utils import WeakFileLock

    partial_file = _partial(listing, name)
    blob = partial_file.with_suffix("")
    lock = storage(listing.repo).parent / ".locks" / storage(listing.repo).name / f"{blob.name}.lock"
    for folder in (blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():
            return
        _bring_rest(listing, name, partial_file)
        with partial_file.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != blob.name:
            partial_file.unlink()
            raise InvalidFile(
                f"{name} of {model_id} came damaged: its sha256 is {found[:12]}... where the Hub says "
                f"{blob.name[:12]}...; it was removed, and the same command downloads it again"
            )
        partial_file.rename(blob)


def _bring_rest(listing: Listing, name: str, partial_file: Path) -> None:
    """Append what is still missing, as long as each connection brings some of it."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    url, size = hf_hub_url(listing.repo, name, revision=listing.commit), listing.sizes[name]
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    while True:
        with partial_file.open("ab") as file:
            have = file.tell()
            if have > size:
                file.truncate(have := 0)
                file.seek(0)
            try:
                http_get(url, file, resume_size=have, headers=headers, expected_size=size, displayed_filename=name)
                return
            except HTTPError:
                if file.tell() == have:
                    raise


def patiently(action: Callable[[], Any]) -> Any:
    """Ask again where the Hub says that it is busy, or broken for the moment."""
    from huggingface_hub.errors import HfHubHTTPError

    for pause in PAUSES:
        try:
            return action()
        except HfHubHTTPError as error:
            if error.response.status_code not in BUSY:
                raise
            time.sleep(pause)
    return action()


def storage(repo: str) -> Path:
    """Where the cache keeps a repository."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser().resolve() / f"models--{repo.replace('/', '--')}"


def snapshot(repo: str, commit: str) -> Path:
    return storage(repo) / "snapshots" / commit


def _partial(listing: Listing, name: str) -> Path:
    """Where a large file grows."""
    return storage(listing.repo) / "blobs" / f"{listing.sha256[name]}.partial"


def remember(listing: Listing, revision: str, instead: bool) -> None:
    """Write down which commit the revision meant, for times without a network; `instead` of an earlier one or not.

    A commit of which only a part is here must not take the place of one that is here as a whole.
    """
    ref = storage(listing.repo) / "refs" / revision
    if revision == listing.commit or (ref.exists() and not instead):
        return
    with suppress(OSError):  # a cache that may only be read serves as well
        ref.parent.mkdir(parents=True, exist_ok=True)
        temporary = ref.with_name(f".{ref.name}.tmp")
        temporary.write_text(listing.commit, "utf-8")
        temporary.replace(ref)
