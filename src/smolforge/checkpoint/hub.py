"""A Hub id -> a local folder with the files of a model that smolforge reads, and no others.

    org/name[@revision]  ->  one commit and its files  ->  those wanted that are not in the cache
    ->  enough room?  ->  download, large files resumed and held to their sha256  ->  the cache's snapshot

The cache is huggingface_hub's, shared with every other program that uses it.
"""

import logging
import re
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

from smolforge import operating_system
from smolforge.checkpoint import download
from smolforge.checkpoint.huggingface import CONFIG, GENERATION, INDEX, WEIGHTS, shard_names, unlisted_shards
from smolforge.errors import ConfigError, InvalidFileError, MissingResourceError
from smolforge.errors.hub import REPO_PATTERN, failure_reason, is_temporary, user_errors
from smolforge.tokenizer import FILES

log = logging.getLogger("smolforge.hub")
DEFAULT_BRANCH = "main"
_ID = re.compile(rf"({REPO_PATTERN})(?:@([A-Za-z0-9_][\w./+-]*))?", re.ASCII)
_FILE_NAMES = (".toml", ".yaml", ".yml", ".json", ".jsonl", ".txt", ".gguf", ".safetensors")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


def is_hub_id(model: str) -> bool:
    """Whether a name has the form org/name[@revision]. (A path that exists is a path all the same.)"""
    match = _ID.fullmatch(model)
    return (
        match is not None
        and not any(part in match[1] for part in ("--", ".."))
        and ".." not in (match[2] or "")
        and not match[1].endswith((".git", *_FILE_NAMES))
    )


def split_hub_id(model_id: str) -> tuple[str, str]:
    """The repository and the revision of an id: a branch, tag, commit hash, or refs/pr/1; main where it names none."""
    match = _ID.fullmatch(model_id)
    if match is None or not is_hub_id(model_id):
        raise ConfigError(f"{model_id!r} is no Hub id; one has the form org/name or org/name@revision")
    return match[1], match[2] or DEFAULT_BRANCH


def fetch(model_id: str, file_names: Sequence[str] | None = None) -> Path:
    """The folder of the cache that holds what smolforge reads of a model, downloaded where it is not there yet.

    `file_names` limits it to these names, of which the first must exist. Raises ConfigError for a repository or
    revision that is not there, InvalidFileError for one that is no model we read, MissingResourceError for everything
    that stands in the way: no network, no permission, no room.
    """
    from huggingface_hub.errors import OfflineModeIsEnabled

    repo, revision = split_hub_id(model_id)
    failure = f"{model_id} is no folder here, and as a model on the Hub it cannot be downloaded"
    hint, explain = "the same command goes on from where it was", partial(_explain, model_id=model_id)
    with user_errors(repo, failure, hint, explain=explain):
        try:
            listing = download.retry_if_busy(partial(download.list_commit, repo, revision))
        except Exception as error:
            is_offline = isinstance(error, OfflineModeIsEnabled)
            folder = _cached_snapshot(model_id, file_names) if is_offline or is_temporary(error) else None
            if folder is None:
                raise
            if not is_offline:
                log.warning("%s comes from the cache as it is: %s", model_id, failure_reason(error))
            return folder
        return _download_missing(model_id, listing, file_names)


def refuse_pickled(source: str, names: Collection[str]) -> None:
    """Raise InvalidFileError where these files have weights, but only as pickles, with the command that converts them
    where the source is a folder.
    """
    pickled = sorted(name for name in names if name.endswith(_PICKLED) and "model" in name)
    if not pickled or any(name.endswith(".safetensors") for name in names):
        return
    hint = "ask its owner for safetensors, or let https://huggingface.co/spaces/safetensors/convert convert it"
    if Path(source).is_dir():
        hint = f"this converts them, and runs no code of theirs: {conversion_command(Path(source), pickled[0])}"
    raise InvalidFileError(
        f"{source} has only pickled weights ({pickled[0]}), which can run code when they are read; {hint}"
    )


def conversion_command(folder: Path, name: str) -> str:
    """Return the command that writes safetensors next to a folder's pickled weights; one of them has this name."""
    code = (
        "import pathlib, sys, torch, safetensors.torch as s; "
        "[s.save_file({k: v.contiguous().clone() for k, v in torch.load(p, 'cpu', weights_only=True).items()}, "
        "p.with_name(p.stem.replace('pytorch_', '') + '.safetensors'), {'format': 'pt'}) "
        f"for p in pathlib.Path(sys.argv[1]).glob('*model*{Path(name).suffix}')]"
    )
    return f'python -c "{code}" {operating_system.shell_word(str(folder))}'


def _select_files(source: str, available: Collection[str], file_names: Sequence[str] | None) -> list[str]:
    """Select the files to read from the available ones; shards are among them only if no index names them."""
    weights = [WEIGHTS] if WEIGHTS in available else [INDEX] if INDEX in available else []
    if file_names is None and not weights:
        weights = unlisted_shards(source, available)
    if file_names is None and CONFIG in available and not weights:
        refuse_pickled(source, available)
        raise InvalidFileError(f"{source} has no {WEIGHTS}, so it is no model that smolforge reads")
    requested = file_names or (CONFIG, GENERATION, *FILES, *weights)  # the weights last: where they are, all is
    if requested[0] not in available:
        raise InvalidFileError(f"{source} has no {requested[0]}, so it is nothing that smolforge reads")
    return [name for name in requested if name in available]


def _cached_snapshot(model_id: str, file_names: Sequence[str] | None) -> Path | None:
    """Return the snapshot that was downloaded last for this revision, or None where a file of it is missing."""
    repo, revision = split_hub_id(model_id)
    ref = download.repo_cache_dir(repo) / "refs" / revision
    commit = ref.read_text("utf-8").strip() if ref.is_file() else revision
    folder = download.snapshot_dir(repo, commit)
    try:
        names = _select_files(model_id, [path.name for path in folder.iterdir()], file_names)
        if INDEX in names:
            names += shard_names(folder / INDEX)
    except (OSError, InvalidFileError):
        return None
    return folder if all((folder / name).is_file() for name in names) else None


def _download_missing(model_id: str, listing: download.Listing, file_names: Sequence[str] | None) -> Path:
    """Download the files that are missing, all of one commit; return their folder."""
    folder = download.snapshot_dir(listing.repo, listing.commit)
    names = _select_files(model_id, listing.sizes, file_names)
    if INDEX in names:
        download.download_file(model_id, listing, INDEX)
        names += shard_names(folder / INDEX)
        not_listed = [name for name in names if name not in listing.sizes]
        if not_listed:
            raise InvalidFileError(f"{model_id} has no {not_listed[0]}, which its {INDEX} names")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        download.announce_download(model_id, listing, missing)
    for name in missing:
        download.download_file(model_id, listing, name)
    download.write_ref(listing, split_hub_id(model_id)[1], overwrite=file_names is None)
    return folder


def _explain(error: BaseException, model_id: str) -> Exception | None:
    """Return what an error means of a model; None for what it means of any repository."""
    from huggingface_hub import constants, errors

    repo, revision = split_hub_id(model_id)
    match error:
        case errors.OfflineModeIsEnabled():
            return MissingResourceError(
                f"{model_id} is no folder here, and as a model on the Hub it is not wholly in the cache "
                f"{constants.HF_HUB_CACHE}, where HF_HUB_OFFLINE forbids to look further; unset that to download it"
            )
        case errors.RevisionNotFoundError():
            return ConfigError(f"{repo} has no revision {revision!r}{_list_branches(repo)}")
        case errors.RepositoryNotFoundError():
            return ConfigError(
                f"there is no model {model_id!r}: neither a folder here nor a repository on the Hub that you may see "
                "(if it is private, run `hf auth login` or set HF_TOKEN)"
            )
        case errors.EntryNotFoundError() if not isinstance(error, errors.LocalEntryNotFoundError):
            return InvalidFileError(f"{model_id} lost a file while it was downloaded; the same command begins again")
    return None


def _list_branches(repo: str) -> str:
    """Return a clause with the names of branches and tags; empty where the Hub gives none."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        refs = HfApi().list_repo_refs(repo)
    except (HTTPError, ValueError, KeyError):
        return ""
    names = [ref.name for ref in (*refs.branches, *refs.tags)]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"; it has {', '.join(names[:8])}{more}" if names else ""
