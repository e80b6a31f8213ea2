"""What a Hub keeps: revisions, commits, files, and large files that arrived before their commit."""

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

_LARGE = (".safetensors", ".bin")


@dataclass(frozen=True)
class StoredFile:
    """One file of a commit. A large one is kept with Git LFS, so the Hub names its sha256."""

    path: Path
    size: int
    oid: str
    sha256: str | None


@dataclass
class Repository:
    """Revisions are names of commits; a commit is its files."""

    gated: bool = False
    private: bool = False
    revisions: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, StoredFile]] = field(default_factory=dict)

    def commit(self, files: Mapping[str, StoredFile], revision: str = "main") -> str:
        """Let a revision consist of these files; returns its commit."""
        files = dict(sorted(files.items()))
        name = hashlib.sha1("".join(f"{path} {file.oid}\n" for path, file in files.items()).encode()).hexdigest()
        self.commits[name] = files
        self.revisions[revision] = name
        return name


def is_large(name: str) -> bool:
    """Whether the Hub keeps a file with Git LFS."""
    return name.endswith(_LARGE)


def store(root: Path, name: str, content: bytes | Path) -> StoredFile:
    """Keep a copy, so that the source may change later."""
    copy = root / hashlib.sha256(f"{len(list(root.iterdir()))} {name}".encode()).hexdigest()
    if isinstance(content, Path):
        shutil.copyfile(content, copy)
    else:
        copy.write_bytes(content)
    data = copy.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest() if is_large(name) else None
    return StoredFile(copy, len(data), hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), sha256)
