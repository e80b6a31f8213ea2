"""A local Hub: files in, the Hub's protocol out, faults on demand.

    add(id, files)  ->  repositories: revision -> commit -> files  ->  /api/..., /ID/resolve/REVISION/FILE
                        fail(...) makes the next requests fail; `requests` lists all requests

The real huggingface_hub and datasets download from it, and upload to it, when HF_ENDPOINT is its `url` and Xet is off
(HF_HUB_DISABLE_XET=1). A repository that an upload made is private where that was asked for.
"""

import json
import re
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from smolforge.testing.hub_repository import READ_TOKEN, TOKEN, Repository, StoredFile, Uploads, store

__all__ = ["READ_TOKEN", "TOKEN", "Fault", "HubMirror", "RecordedRequest"]

_API = re.compile(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/(revision|tree|paths-info|refs)(?:/([^/]+))?)?(?:/(.+))?")
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass(frozen=True)
class RecordedRequest:
    """A request that the mirror received."""

    method: str
    path: str
    range: str | None


@dataclass
class Fault:
    """What goes wrong with the next requests whose path contains a text."""

    times: int
    status: int | None
    cut_after: int | None
    delay: float | None
    path_contains: str
    method: str | None


class HubMirror:
    """A Hub on this machine, as a context manager."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[RecordedRequest] = []
        self.faults: list[Fault] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.uploads = Uploads(root, self.repositories, self.url)

    def __enter__(self) -> "HubMirror":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(
        self,
        name: str,
        files: Mapping[str, bytes | Path] | Path,
        revision: str = "main",
        *,
        kind: str = "model",
        gated: bool = False,
        private: bool = False,
    ) -> str:
        """Make a revision of a repository consist of these files, or of a folder's; returns its commit."""
        if isinstance(files, Path):
            files = {path.relative_to(files).as_posix(): path for path in files.rglob("*") if path.is_file()}
        repository = self.repositories.setdefault((kind, name), Repository())
        repository.gated, repository.private = gated, private
        return repository.commit({path: store(self.root, path, files[path]) for path in sorted(files)}, revision)

    def fail(
        self,
        times: int = 1,
        status: int | None = None,
        cut_after: int | None = None,
        *,
        delay: float | None = None,
        path_contains: str = "",
        method: str | None = None,
    ) -> None:
        """Let the next requests be answered with a status, cut after some bytes of the file, or kept waiting.

        A PUT is cut while the file is sent.
        """
        method = "GET" if cut_after is not None and method is None else method
        self.faults.append(Fault(times, status, cut_after, delay, path_contains, method))

    def clear(self) -> None:
        """Forget repositories, faults and requests."""
        self.repositories.clear()
        self.faults.clear()
        self.requests.clear()
        self.uploads.arrived.clear()

    def next_fault(self, request: RecordedRequest) -> Fault | None:
        """The fault that meets a request, one time less of it left."""
        for fault in self.faults:
            if fault.times > 0 and fault.path_contains in request.path and fault.method in (None, request.method):
                fault.times -= 1
                return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    """Answers for one mirror; every connection serves one request (HTTP/1.0)."""

    def __init__(self, mirror: HubMirror, *connection: Any) -> None:
        self.mirror = mirror
        self.fault: Fault | None = None
        self.body = b""
        super().__init__(*connection)  # which serves the request

    def do_GET(self) -> None:
        request = RecordedRequest(self.command, unquote(self.path), self.headers["Range"])
        self.mirror.requests.append(request)
        self.fault = self.mirror.next_fault(request)
        if self.fault and self.fault.delay:
            threading.Event().wait(self.fault.delay)  # not sleep, which tests of retries take away
        with suppress(ConnectionError):  # a client that waits no longer
            if self.command in ("POST", "PUT"):
                self.receive()
            else:
                self.answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def log_message(self, format: str, *_: object) -> None:  # noqa: A002
        pass

    def receive(self) -> None:
        """Read the body of a request, or its first bytes if the fault cuts it, and answer."""
        length = int(self.headers["Content-Length"] or 0)
        if self.fault and self.fault.cut_after is not None:
            self.rfile.read(min(length, self.fault.cut_after))
            return
        self.body = self.rfile.read(length)
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ") or None
        failing = self.fault is not None and self.fault.status is not None
        response = None if failing else self.mirror.uploads.answer(urlsplit(self.path).path, token, self.body)
        if response is None:
            self.answer()
        else:
            self.json(response[1], response[0])

    def answer(self) -> None:
        """Find what the path means: a listing of a repository, or one of its files."""
        path = urlsplit(self.path).path
        if self.fault and self.fault.status:
            self.reply(self.fault.status)
        elif match := _API.fullmatch(path):
            self.answer_about(
                match[1], match[2], match[3], revision=unquote(match[4] or "main"), path=unquote(match[5] or "")
            )
        elif match := _FILE.fullmatch(path):
            kind = "dataset" if match[1] else "model"
            self.answer_about(kind, match[2], "resolve", revision=unquote(match[3]), path=unquote(match[4]))
        else:
            self.reply(404)

    def answer_about(self, kind: str, name: str, verb: str | None, *, revision: str, path: str) -> None:
        """Answer for one repository: its branches, a file, a folder, some paths, or all metadata."""
        repository = self.mirror.repositories.get((kind, name))
        if repository is None or (repository.private and self.headers["Authorization"] is None):
            return self.refuse(404, "RepoNotFound")
        if verb == "refs":
            pairs = [(branch, commit) for branch, commit in repository.revisions.items() if "/" not in branch]
            branches = [
                {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": commit} for branch, commit in pairs
            ]
            return self.json({"branches": branches, "tags": [], "converts": []})
        commit = repository.revisions.get(revision, revision)
        if commit not in repository.commits:
            return self.refuse(404, "RevisionNotFound")
        files = repository.commits[commit]
        if verb == "resolve":
            closed = repository.gated and self.headers["Authorization"] != f"Bearer {TOKEN}"
            return self.send_file(commit, files.get(path), closed)
        entries = _tree(files)
        if verb == "tree":
            deep = parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() in ("true", "1")
            return self.json([entry for entry in entries if _within(entry["path"], path, deep)])
        if verb == "paths-info":
            paths = parse_qs(self.body.decode())["paths"]
            return self.json([entry for entry in entries if entry["path"] in paths])
        siblings = [{"rfilename": entry["path"]} | entry for entry in entries if entry["type"] == "file"]
        return self.json({"id": name, "sha": commit, "private": repository.private, "tags": [], "siblings": siblings})

    def send_file(self, commit: str, file: StoredFile | None, closed: bool) -> None:
        """A file or the part of it that is asked for, with what the client builds its cache on."""
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if closed:
            return self.refuse(403 if self.headers["Authorization"] else 401, "GatedRepo")
        if file is None:
            return self.refuse(404, "EntryNotFound", headers)
        headers["ETag"] = f'"{file.sha256 or file.oid}"'
        if file.sha256:
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(file.size)}
        data = file.path.read_bytes()
        range_match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if range_match is None:
            return self.reply(200, data, headers)
        first, last = int(range_match[1]), min(int(range_match[2] or file.size), file.size - 1)
        if first > last:
            return self.reply(416, b"", {"Content-Range": f"bytes */{file.size}"})
        return self.reply(206, data[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{file.size}"})

    def refuse(self, status: int, code: str, headers: Mapping[str, str] | None = None) -> None:
        self.reply(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

    def json(self, content: Any, status: int = 200) -> None:
        self.reply(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def reply(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: self.fault.cut_after] if self.fault else body)


def _tree(files: Mapping[str, StoredFile]) -> list[dict[str, Any]]:
    """Every folder on the way to a file, and every file, as the Hub's listings have them."""
    folders = {parent.as_posix() for path in files for parent in Path(path).parents} - {"."}
    entries: list[dict[str, Any]] = [
        {"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders
    ]
    for path, file in files.items():
        entry = {"type": "file", "path": path, "oid": file.oid, "blobId": file.oid, "size": file.size}
        lfs = {"oid": file.sha256, "sha256": file.sha256, "size": file.size, "pointerSize": 134}
        entries.append(entry | ({"lfs": lfs} if file.sha256 else {}))
    return entries


def _within(path: str, folder: str, deep: bool) -> bool:
    relative = path.removeprefix(f"{folder}/") if folder else path
    return (not folder or relative != path) and (deep or "/" not in relative)
