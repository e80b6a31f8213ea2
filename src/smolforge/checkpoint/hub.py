"""A Hub id -> a local folder with the files of a model that smolforge reads, and no others.

    org/name[@revision]  ->  one commit and its files  ->  those wanted that are not in the cache
    ->  enough room?  ->  download, large files resumed and held to their sha256  ->  the cache's snapshot

huggingface_hub does the talking and reads HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE;
its cache is shared with every other program that uses it.
"""

import logging
import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from smolforge.checkpoint import download
from smolforge.checkpoint.huggingface import CONFIG, GENERATION, INDEX, WEIGHTS, shard_names
from smolforge.errors import InvalidFile, MissingResource, SettingError
from smolforge.tokenizer import FILES

log = logging.getLogger("smolforge.hub")
BRANCH = "main"
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_ID = re.compile(rf"({_PART}/{_PART})(?:@([A-Za-z0-9_][\w./+-]*))?", re.ASCII)
_FILE_NAMES = (".toml", ".yaml", ".yml", ".json", ".jsonl", ".txt", ".gguf", ".safetensors")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


def is_id(model: str) -> bool:
    """Whether a name has the form org/name[@revision]. (A path that exists is a path all the same.)"""
    found = _ID.fullmatch(model)
    return (
        found is not None
        and not any(word in found[1] for word in ("--", ".."))
        and ".." not in (found[2] or "")
        and not found[1].endswith((".git", *_FILE_NAMES))
    )


def split_id(model_id: str) -> tuple[str, str]:
    """The repository and the revision of an id: a branch, tag, commit hash, or refs/pr/1; main where it names none."""
    found = _ID.fullmatch(model_id)
    if found is None or not is_id(model_id):
        raise SettingError(f"{model_id!r} is no Hub id; one has the form org/name or org/name@revision")
    return found[1], found[2] or BRANCH


def fetch(model_id: str, wanted: Sequence[str] | None = None) -> Path:
    """The folder of the cache that holds what smolforge reads of a model, downloaded where it is not there yet.

    `wanted` limits it to these names, of which the first must exist. Raises SettingError for a repository or
    revision that is not there, InvalidFile for one that is no model we read, MissingResource for everything
    that stands in the way: no network, no permission, no room.
    """
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    repo, revision = split_id(model_id)
    try:
        try:
            listing = download.patiently(partial(download.list_commit, repo, revision))
        except (HTTPError, OfflineModeIsEnabled) as error:
            if not _unreachable(error):
                raise
            folder = _cached(model_id, wanted)
            if folder is None:
                raise
            if isinstance(error, HTTPError):
                log.warning("%s comes from the cache as it is: %s", model_id, reason(error))
            return folder
        return _download(model_id, listing, wanted)
    except (InvalidFile, MissingResource):
        raise
    except (HTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise _sentence(error, model_id) from None


def refuse_pickled(what: str, names: Iterable[str]) -> None:
    """Raise InvalidFile where these files have weights, but only as pickles."""
    pickled = sorted(name for name in names if name.endswith(_PICKLED))
    if pickled and not {WEIGHTS, INDEX} & set(names):
        raise InvalidFile(
            f"{what} has only pickled weights ({pickled[0]}), which can run code when they are read; ask its owner for "
            "safetensors, or let the Space https://huggingface.co/spaces/safetensors/convert convert it"
        )


def _chosen(what: str, names: Iterable[str], wanted: Sequence[str] | None) -> list[str]:
    """The files to read among those there; shards are not among them yet, since their index names them."""
    there = set(names)
    if wanted is None and CONFIG in there and not {WEIGHTS, INDEX} & there:
        refuse_pickled(what, there)
        raise InvalidFile(f"{what} has no {WEIGHTS}, so it is no model that smolforge reads")
    weights = WEIGHTS if WEIGHTS in there else INDEX
    asked = wanted or (CONFIG, GENERATION, *FILES, weights)  # the weights last: where they are, all is
    if asked[0] not in there:
        raise InvalidFile(f"{what} has no {asked[0]}, so it is nothing that smolforge reads")
    return [name for name in asked if name in there]


def _cached(model_id: str, wanted: Sequence[str] | None) -> Path | None:
    """The snapshot that was downloaded last for this revision, if it is whole."""
    repo, revision = split_id(model_id)
    ref = download.storage(repo) / "refs" / revision
    commit = ref.read_text("utf-8").strip() if ref.is_file() else revision
    folder = download.snapshot(repo, commit)
    try:
        names = _chosen(model_id, [path.name for path in folder.iterdir()], wanted)
        if INDEX in names:
            names += shard_names(folder / INDEX)
    except (OSError, InvalidFile):
        return None
    return folder if all((folder / name).is_file() for name in names) else None


def _download(model_id: str, listing: download.Listing, wanted: Sequence[str] | None) -> Path:
    """Bring the files that are missing, all of one commit."""
    folder = download.snapshot(listing.repo, listing.commit)
    names = _chosen(model_id, listing.sizes, wanted)
    if INDEX in names:
        download.bring(model_id, listing, INDEX)
        names += shard_names(folder / INDEX)
        absent = [name for name in names if name not in listing.sizes]
        if absent:
            raise InvalidFile(f"{model_id} has no {absent[0]}, which its {INDEX} names")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        download.announce(model_id, listing, missing)
    for name in missing:
        download.bring(model_id, listing, name)
    download.remember(listing, split_id(model_id)[1], instead=wanted is None)
    return folder


def _unreachable(error: Exception) -> bool:
    """Whether the Hub did not answer at all, or only that it is broken."""
    from huggingface_hub.errors import HfHubHTTPError

    return not isinstance(error, HfHubHTTPError) or error.response.status_code in download.BUSY


def reason(error: BaseException) -> str:
    """Why the Hub did not do it, in a few words."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return f"{constants.ENDPOINT} answers with status {error.response.status_code}"
    return f"{constants.ENDPOINT} cannot be reached ({' '.join(str(error).split()) or type(error).__name__})"


def _sentence(error: BaseException, model_id: str) -> Exception:
    """What a person should know of an error, and do."""
    from huggingface_hub import constants, errors

    repo, revision = split_id(model_id)
    match error:
        case errors.OfflineModeIsEnabled():
            return MissingResource(
                f"{model_id} is no folder here, and as a model on the Hub it is not wholly in the cache "
                f"{constants.HF_HUB_CACHE}, where HF_HUB_OFFLINE forbids to look further; unset that to download it"
            )
        case errors.GatedRepoError():
            return MissingResource(
                f"{repo} is gated: accept its terms at {constants.ENDPOINT}/{repo}, then run `hf auth login` "
                "or set HF_TOKEN"
            )
        case errors.RevisionNotFoundError():
            return SettingError(f"{repo} has no revision {revision!r}{_branches(repo)}")
        case errors.RepositoryNotFoundError():
            return SettingError(
                f"there is no model {model_id!r}: neither a folder here nor a repository on the Hub that you may see "
                "(if it is private, run `hf auth login` or set HF_TOKEN)"
            )
        case errors.EntryNotFoundError() if not isinstance(error, errors.LocalEntryNotFoundError):
            return InvalidFile(f"{model_id} lost a file while it was downloaded; the same command begins again")
        case errors.HfHubHTTPError() if error.response.status_code == 401:
            return MissingResource(
                f"the Hub refuses the token for {repo}; run `hf auth login` again, or correct HF_TOKEN"
            )
        case errors.HTTPError():
            return MissingResource(
                f"{model_id} is no folder here, and as a model on the Hub it cannot be downloaded: {reason(error)}; "
                "the same command goes on from where it was"
            )
        case errors.LocalEntryNotFoundError() if error.__cause__ is not None:
            return _sentence(error.__cause__, model_id)
    said = " ".join(str(error).split())
    return MissingResource(f"{model_id} cannot be downloaded: {said}; the same command goes on from where it was")


def _branches(repo: str) -> str:
    """The names there are, if the Hub tells."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        refs = HfApi().list_repo_refs(repo)
    except (HTTPError, ValueError, KeyError):
        return ""
    names = [ref.name for ref in (*refs.branches, *refs.tags)]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"; it has {', '.join(names[:8])}{more}" if names else ""
