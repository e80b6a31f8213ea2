"""The repositories of a local Hub, and the half of the Hub's protocol that writes to them.

POST /api/repos/create  ->  POST /api/models/ID/preupload/REVISION    lfs or regular, and the ids of existing files
->  POST /ID.git/info/lfs/objects/batch  ->  PUT /lfs/SHA256          large files that did not arrive before
->  POST /api/models/ID/commit/REVISION                               lines of JSON, atomic
"""

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

_LARGE = (".safetensors", ".bin")
TOKEN = "hf_a_token_that_opens_gated_repositories"
READ_TOKEN = "hf_a_token_that_may_only_read"
Response = tuple[int, Any]
"""Status, and what is sent as JSON."""


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


def needs_lfs(name: str) -> bool:
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
    sha256 = hashlib.sha256(data).hexdigest() if needs_lfs(name) else None
    return StoredFile(copy, len(data), hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), sha256)


class Uploads:
    """Handlers of uploads. `arrived` has the large files by their sha256, committed or not."""

    def __init__(self, root: Path, repositories: dict[tuple[str, str], Repository], url: str) -> None:
        self.root, self.repositories, self.url = root, repositories, url
        self.arrived: dict[str, bytes] = {}

    def answer(self, path: str, token: str | None, body: bytes) -> Response | None:
        """Return the response to a POST or a PUT; None for a path that writes nothing."""
        routes: dict[str, Callable[..., Response]] = {
            r"/api/repos/create": self.create,
            r"/api/validate-yaml": validate_card,
            r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)": self.preupload,
            r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch": self.batch,
            r"/lfs/([0-9a-f]{64})": self.put,
            r"/api/models/([^/]+/[^/]+)/commit/([^/]+)": self.commit,
        }
        for pattern, route in routes.items():
            if match := re.fullmatch(pattern, path):
                if token not in (TOKEN, READ_TOKEN) and route not in (validate_card, self.put):
                    return 401, {"error": "Invalid username or password."}
                if token == READ_TOKEN and route not in (validate_card, self.put):
                    return 403, {"error": "Forbidden: you need the right to write."}
                return route(body, *match.groups())
        return None

    def create(self, body: bytes) -> Response:
        """Create a repository with the one file that the Hub puts into each."""
        request = json.loads(body)
        name = f"{request['organization']}/{request['name']}"
        if ("model", name) in self.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
        private = request.get("visibility") == "private" or bool(request.get("private"))
        repository = self.repositories[("model", name)] = Repository(private=private)
        repository.commit({".gitattributes": store(self.root, ".gitattributes", b"*.safetensors filter=lfs\n")})
        return 200, {"url": f"{self.url}/{name}", "id": name}

    def preupload(self, body: bytes, name: str, revision: str) -> Response:
        """Return which files are kept with LFS, and the ids of existing files."""
        files = self._files(name, revision)
        paths = [entry["path"] for entry in json.loads(body)["files"]]
        modes = [{"path": path, "uploadMode": "lfs" if needs_lfs(path) else "regular"} for path in paths]
        oids = {path: file.sha256 or file.oid for path, file in files.items()}
        return 200, {"files": [mode | {"shouldIgnore": False, "oid": oids.get(mode["path"])} for mode in modes]}

    def batch(self, body: bytes, name: str) -> Response:
        """Return where to send each large file, unless it arrived before."""
        objects = [{"oid": entry["oid"], "size": entry["size"]} for entry in json.loads(body)["objects"]]
        for entry in objects:
            if entry["oid"] not in self.arrived:
                entry["actions"] = {"upload": {"href": f"{self.url}/lfs/{entry['oid']}"}}
        return 200, {"transfer": "basic", "objects": objects}

    def put(self, body: bytes, sha256: str) -> Response:
        """Store one large file, if it is complete."""
        if hashlib.sha256(body).hexdigest() != sha256:
            return 400, {"error": "the content is not what its name says"}
        self.arrived[sha256] = body
        return 200, {}

    def commit(self, body: bytes, name: str, revision: str) -> Response:
        """Apply all operations, or none if a large file never arrived."""
        files = dict(self._files(name, revision))
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "header" if value.get("parentCommit", head := self._head(name, revision)) != head:
                    return 412, {"error": "A commit has happened since. Please refresh and try again."}
                case "file":
                    files[value["path"]] = store(self.root, value["path"], base64.b64decode(value["content"]))
                case "lfsFile" if value["oid"] in self.arrived:
                    files[value["path"]] = store(self.root, value["path"], self.arrived[value["oid"]])
                case "lfsFile":
                    return 400, {"error": f"{value['path']} was never uploaded"}
                case "deletedFile":
                    del files[value["path"]]
        commit = self.repositories["model", name].commit(files, revision)
        return 200, {"success": True, "commitOid": commit, "commitUrl": f"{self.url}/{name}/commit/{commit}"}

    def _head(self, name: str, revision: str) -> str:
        return self.repositories["model", name].revisions[revision]

    def _files(self, name: str, revision: str) -> dict[str, StoredFile]:
        return self.repositories["model", name].commits[self._head(name, revision)]


def validate_card(body: bytes) -> Response:
    """Return whether the head of a model card is valid YAML."""
    match = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
    try:
        metadata = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        return 400, {"errors": [{"message": str(error)}], "warnings": []}
    if not isinstance(metadata, dict):
        return 400, {"errors": [{"message": "empty or missing yaml metadata in repo card"}], "warnings": []}
    return 200, {"errors": [], "warnings": []}
