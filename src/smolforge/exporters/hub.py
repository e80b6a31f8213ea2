"""A folder -> a repository on the Hub, in one commit: all of it is there, or what was there before.

name, token  ->  is there something else already?  ->  repository (private)  ->  large files  ->  the commit

huggingface_hub does the talking. What was interrupted goes on: large files that arrived are not sent again, with Xet
not even the parts of one that did, and a repository whose files are these already gets no commit.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolforge.checkpoint.hub import is_id, reason
from smolforge.errors import InvalidFile, MissingResource, SettingError

MESSAGE = "Upload by smolforge export"
OF_GIT = ".gitattributes"
"""The Hub's own, in every repository."""


@dataclass(frozen=True)
class Uploaded:
    """Where it is now."""

    url: str
    commit: str
    private: bool
    changed: list[str]
    """Files that are new or other than before."""


def check_name(repo: str) -> None:
    """Raises SettingError for what no repository can be called."""
    if not is_id(repo) or "@" in repo:
        like = f"you/{Path(repo).name}".partition("@")[0]
        raise SettingError(
            f"{repo!r} is no name of a repository; --out takes org/name, as in {like if is_id(like) else 'you/mine'}"
        )


def check_token(repo: str) -> None:
    """Raises MissingResource where there is none to write with."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise MissingResource(f"there is no token to write {repo} with; run `hf auth login`, or set HF_TOKEN")


def upload(folder: Path, repo: str, public: bool = False, replace: bool = False) -> Uploaded:
    """Make a repository's files be a folder's; `replace` says that others there may go (its history keeps them).

    Raises SettingError for a name that is none, or a repository that has other contents or readers than was said to be
    meant; InvalidFile for a card the Hub does not take; MissingResource for all that stands in the way.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    check_name(repo)
    check_token(repo)
    api = HfApi()
    with _sentences(repo):
        there = _there(api, repo)
        changed, others = _compare(folder, repo, there, public, replace)
        if there is None:
            api.create_repo(repo, private=not public, exist_ok=True)
        url = f"{api.endpoint}/{repo}"
        if there is not None and not changed and not others:
            return Uploaded(url, there.sha, bool(there.private), [])
        adds = [CommitOperationAdd(name, str(folder / name)) for name in sorted(_files(folder))]
        removes = [CommitOperationDelete(name) for name in others]
        seen = there.sha if there is not None else None
        done = api.create_commit(repo, [*adds, *removes], commit_message=MESSAGE, parent_commit=seen)
        private = not public if there is None else bool(there.private)
        return Uploaded(url, done.oid, private, changed)


def _there(api: Any, repo: str) -> Any:
    """What the Hub has under this name; None for nothing."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return api.model_info(repo, files_metadata=True)
    except RepositoryNotFoundError as error:
        if error.response.status_code == 401:
            raise
        return None


def _compare(folder: Path, repo: str, there: Any, public: bool, replace: bool) -> tuple[list[str], list[str]]:
    """Names of our files that are not there as they are here, and of files there that are none of ours."""
    siblings = [] if there is None else [each for each in there.siblings or [] if each.rfilename != OF_GIT]
    theirs = {each.rfilename: each.lfs.sha256 if each.lfs else each.blob_id for each in siblings}
    ours = _files(folder)
    changed = sorted(name for name, path in ours.items() if theirs.get(name) not in _hashes(path))
    others = sorted(theirs.keys() - ours.keys())
    if there is not None and bool(there.private) == public:
        meant = "--public says that this is meant" if not public else "leave --public out, or open it in its settings"
        raise SettingError(f"{repo} is there already, and {'private' if public else 'public'}; {meant}")
    other = others + [name for name in changed if name in theirs]
    if other and not replace:
        raise SettingError(
            f"{repo} is there already with other contents ({', '.join(other[:3])}{', ...' if len(other) > 3 else ''}); "
            "name another --out, or --replace them (its history keeps what was)"
        )
    return changed, others


def _files(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def _hashes(path: Path) -> tuple[str, str]:
    """What the Hub may call a file's content: git's hash of a small one, the sha256 of a large one."""
    blob = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        while part := file.read(1 << 20):
            blob.update(part)
    return blob.hexdigest(), sha256


@contextmanager
def _sentences(repo: str) -> Iterator[None]:
    """What goes wrong on the way to the Hub, as what a person should know of it, and do."""
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    try:
        yield
    except (SettingError, InvalidFile, MissingResource):
        raise
    except (HTTPError, OfflineModeIsEnabled, OSError, ValueError, RuntimeError) as error:
        raise _sentence(error, repo) from None


def _sentence(error: BaseException, repo: str) -> Exception:
    from huggingface_hub import errors

    again = "what arrived is kept, and the same command goes on"
    match error:
        case errors.OfflineModeIsEnabled():
            return MissingResource(f"{repo} cannot be written while HF_HUB_OFFLINE is set; unset it to upload")
        case errors.HfHubHTTPError() if error.response.status_code == 401:
            return MissingResource(
                f"the Hub refuses the token for {repo}; run `hf auth login` again, or correct HF_TOKEN"
            )
        case errors.HfHubHTTPError() if error.response.status_code == 403:
            return MissingResource(
                f"the token may not write {repo}: it needs the right to write, and you to be {repo.partition('/')[0]} "
                "or one of its members"
            )
        case errors.HfHubHTTPError() if error.response.status_code == 412:
            return MissingResource(f"{repo} was changed while this was sent; the same command looks at it again")
        case errors.HTTPError():
            return MissingResource(f"{repo} was not uploaded: {reason(error)}; {again}")
        case RuntimeError() if error.__cause__ is not None:  # which file it was, around why
            return _sentence(error.__cause__, repo)
        case ValueError() if "metadata" in str(error):
            return InvalidFile(f"the Hub does not take the card: {' '.join(str(error).split())}")
    return MissingResource(f"{repo} was not uploaded: {' '.join(str(error).split())}; {again}")
