"""A folder -> a repository on the Hub, in one commit: all of it is there, or what was there before.

name, token  ->  is there something else already?  ->  repository (private)  ->  large files  ->  the commit

huggingface_hub does the talking. What was interrupted goes on: large files that arrived are not sent again, with Xet
not even the parts of one that did, and a repository whose files are these already gets no commit.
"""

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from smolforge.checkpoint.hub import is_hub_id
from smolforge.errors import ConfigError, InvalidFileError, MissingResourceError
from smolforge.errors.hub import one_line, status_code, user_errors

COMMIT_MESSAGE = "Upload by smolforge export"
GIT_ATTRIBUTES = ".gitattributes"
"""The Hub's own, in every repository."""


@dataclass(frozen=True)
class UploadResult:
    """Where it is now."""

    url: str
    commit: str
    private: bool
    changed: list[str]
    """Files that are new or other than before."""


def check_repo_name(repo: str) -> None:
    """Raises ConfigError for what no repository can be called."""
    if not is_hub_id(repo) or "@" in repo:
        example = f"you/{Path(repo).name}".partition("@")[0]
        if not is_hub_id(example):
            example = "you/mine"
        raise ConfigError(f"{repo!r} is no name of a repository; --out takes org/name, as in {example}")


def check_token(repo: str) -> None:
    """Raises MissingResourceError where there is none to write with."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise MissingResourceError(f"there is no token to write {repo} with; run `hf auth login`, or set HF_TOKEN")


def upload(folder: Path, repo: str, public: bool = False, *, replace: bool = False) -> UploadResult:
    """Make a repository's files be a folder's; `replace` says that others there may go (its history keeps them).

    Raises ConfigError for a name that is none, or a repository that has other contents or readers than was said to be
    meant; InvalidFileError for a card the Hub does not take; MissingResourceError for all that stands in the way.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    check_repo_name(repo)
    check_token(repo)
    api = HfApi()
    hint = "what arrived is kept, and the same command goes on"
    with user_errors(repo, f"{repo} was not uploaded", hint, explain=partial(_explain, repo=repo)):
        repo_info = _repo_info(api, repo)
        changed, extra = _compare_files(folder, repo, repo_info, public=public, replace=replace)
        if repo_info is None:
            api.create_repo(repo, private=not public, exist_ok=True)
        url = f"{api.endpoint}/{repo}"
        if repo_info is not None and not changed and not extra:
            return UploadResult(url, repo_info.sha, bool(repo_info.private), [])
        additions = [CommitOperationAdd(name, str(folder / name)) for name in sorted(_list_files(folder))]
        deletions = [CommitOperationDelete(name) for name in extra]
        parent = repo_info.sha if repo_info is not None else None
        commit = api.create_commit(repo, [*additions, *deletions], commit_message=COMMIT_MESSAGE, parent_commit=parent)
        private = not public if repo_info is None else bool(repo_info.private)
        return UploadResult(url, commit.oid, private, changed)


def _repo_info(api: Any, repo: str) -> Any:
    """What the Hub has under this name; None for nothing."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return api.model_info(repo, files_metadata=True)
    except RepositoryNotFoundError as error:
        if error.response.status_code == 401:
            raise
        return None


def _compare_files(
    folder: Path, repo: str, repo_info: Any, *, public: bool, replace: bool
) -> tuple[list[str], list[str]]:
    """Names of our files that are not there as they are here, and of files there that are none of ours."""
    siblings = (
        []
        if repo_info is None
        else [sibling for sibling in repo_info.siblings or [] if sibling.rfilename != GIT_ATTRIBUTES]
    )
    remote_hashes = {sibling.rfilename: sibling.lfs.sha256 if sibling.lfs else sibling.blob_id for sibling in siblings}
    local_files = _list_files(folder)
    changed = sorted(name for name, path in local_files.items() if remote_hashes.get(name) not in _file_hashes(path))
    extra = sorted(remote_hashes.keys() - local_files.keys())
    if repo_info is not None and bool(repo_info.private) == public:
        hint = "--public says that this is meant" if not public else "leave --public out, or open it in its settings"
        raise ConfigError(f"{repo} is there already, and {'private' if public else 'public'}; {hint}")
    conflicting = extra + [name for name in changed if name in remote_hashes]
    if conflicting and not replace:
        names = ", ".join(conflicting[:3]) + (", ..." if len(conflicting) > 3 else "")
        raise ConfigError(
            f"{repo} is there already with other contents ({names}); "
            "name another --out, or --replace them (its history keeps what was)"
        )
    return changed, extra


def _list_files(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def _file_hashes(path: Path) -> tuple[str, str]:
    """What the Hub may call a file's content: git's hash of a small one, the sha256 of a large one."""
    blob = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        while chunk := file.read(1 << 20):
            blob.update(chunk)
    return blob.hexdigest(), sha256


def _explain(error: BaseException, repo: str) -> Exception | None:
    """Return what an error means of an upload; None for what it means of any call."""
    match status_code(error):
        case 403:
            return MissingResourceError(
                f"the token may not write {repo}: it needs the right to write, and you to be {repo.partition('/')[0]} "
                "or one of its members"
            )
        case 412:
            return MissingResourceError(f"{repo} was changed while this was sent; the same command looks at it again")
    if isinstance(error, ValueError) and "metadata" in str(error):
        return InvalidFileError(f"the Hub does not take the card: {one_line(error)}")
    return None
