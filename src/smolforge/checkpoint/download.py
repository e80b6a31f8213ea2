"""One commit on the Hub -> its files in the cache, where every program that uses huggingface_hub finds them.

listing (sizes, hashes)  ->  room for it?  ->  large: HASH.partial grows, over several tries if need be,
                                               is held to its hash and becomes the blob HASH
                                               small: hf_hub_download
                                           ->  snapshots/COMMIT/NAME
"""

import hashlib
import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from smolforge.errors import InvalidFileError, MissingResourceError
from smolforge.errors.hub import is_busy, with_retries
from smolforge.formatting import format_bytes

log = logging.getLogger("smolforge.hub")
RETRY_DELAYS = (0.5, 2.0)
"""Seconds between tries."""


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
        {sibling.rfilename: sibling.size or 0 for sibling in siblings},
        {sibling.rfilename: sibling.lfs.sha256 for sibling in siblings if sibling.lfs is not None},
    )


def announce_download(model_id: str, listing: Listing, missing: Sequence[str]) -> None:
    """Log what is about to be downloaded. Raises MissingResourceError where the disk has no space for it."""
    from huggingface_hub import constants

    partial_paths = [_partial_path(listing, name) for name in missing if name in listing.sha256]
    downloaded = sum(part.stat().st_size for part in partial_paths if part.is_file())
    needed = sum(listing.sizes[name] for name in missing) - downloaded
    cache = Path(constants.HF_HUB_CACHE)
    free_bytes = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
    if needed > free_bytes:
        raise MissingResourceError(
            f"{model_id} needs {needed:,} more bytes and {cache} has {free_bytes:,} free; make room, or let HF_HOME "
            "name a folder on another disk"
        )
    files = "file" if len(missing) == 1 else "files"
    log.info("%s: downloading %s in %d %s", model_id, format_bytes(needed), len(missing), files)


def download_file(model_id: str, listing: Listing, name: str) -> None:
    """Download one file into the cache: a large one first as a blob with the Hub's sha256, then the name for it."""
    from huggingface_hub import hf_hub_download

    if name in listing.sha256:
        retry_if_busy(partial(_download_blob, model_id, listing, name))
    retry_if_busy(partial(hf_hub_download, listing.repo, name, revision=listing.commit))


def _download_blob(model_id: str, listing: Listing, name: str) -> None:
    """Download a large file under its sha256, going on where an earlier try ended.

    huggingface_hub itself forgets what it has of a file when its process ends, and checks only the size.
    """
    from huggingface_hub.utils import WeakFileLock

    partial_file = _partial_path(listing, name)
    blob = partial_file.with_suffix("")
    lock = repo_cache_dir(listing.repo).parent / ".locks" / repo_cache_dir(listing.repo).name / f"{blob.name}.lock"
    for folder in (blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():
            return
        _resume_download(listing, name, partial_file)
        with partial_file.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != blob.name:
            partial_file.unlink()
            raise InvalidFileError(
                f"{name} of {model_id} came damaged: its sha256 is {digest[:12]}... where the Hub says "
                f"{blob.name[:12]}...; it was removed, and the same command downloads it again"
            )
        partial_file.rename(blob)


def _resume_download(listing: Listing, name: str, partial_file: Path) -> None:
    """Append what is still missing, as long as each connection brings some of it."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    url, size = hf_hub_url(listing.repo, name, revision=listing.commit), listing.sizes[name]
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    while True:
        with partial_file.open("ab") as file:
            start = file.tell()
            if start > size:
                file.truncate(start := 0)
                file.seek(0)
            try:
                http_get(url, file, resume_size=start, headers=headers, expected_size=size, displayed_filename=name)
                return
            except HTTPError:
                if file.tell() == start:
                    raise


def retry_if_busy(action: Callable[[], Any]) -> Any:
    """Call again where the Hub answers that it cannot now; a connection that fails is left to the caller."""
    return with_retries(action, RETRY_DELAYS, is_busy)


def repo_cache_dir(repo: str) -> Path:
    """Return the folder of a repository in the cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser().resolve() / f"models--{repo.replace('/', '--')}"


def snapshot_dir(repo: str, commit: str) -> Path:
    return repo_cache_dir(repo) / "snapshots" / commit


def _partial_path(listing: Listing, name: str) -> Path:
    """Return the path of a large file while it is downloaded."""
    return repo_cache_dir(listing.repo) / "blobs" / f"{listing.sha256[name]}.partial"


def write_ref(listing: Listing, revision: str, overwrite: bool) -> None:
    """Write which commit a revision is, for use without a network; `overwrite` says whether an earlier one is replaced.

    A commit of which only a part is here must not take the place of one that is here as a whole.
    """
    ref = repo_cache_dir(listing.repo) / "refs" / revision
    if revision == listing.commit or (ref.exists() and not overwrite):
        return
    with suppress(OSError):  # a cache that may only be read serves as well
        ref.parent.mkdir(parents=True, exist_ok=True)
        temporary = ref.with_name(f".{ref.name}.tmp")
        temporary.write_text(listing.commit, "utf-8", newline="\n")
        temporary.replace(ref)
