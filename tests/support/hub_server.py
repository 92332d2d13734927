"""A small Hub over real HTTP, for tests: what `huggingface_hub` asks for when it pushes, lists and fetches a model.

`with HubServer() as hub:` starts one in this process. `hub.fail(…)` makes the next requests go wrong, `hub.requests`
tells what was asked.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "SecretOfTheTestsDoNotPrintThis"
LARGE = (".safetensors", ".png", ".bin", ".model")


@dataclass
class Repo:
    """A repository: whole trees by commit, commits by branch."""

    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    trees: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, tree: dict[str, bytes], message: str) -> str:
        """Puts a tree on a branch; gives the commit's hash."""
        content = [f"{path}:{_sha(data)}" for path, data in sorted(tree.items())]
        sha = hashlib.sha1("\n".join([message, str(len(self.messages)), *content]).encode()).hexdigest()
        self.trees[sha], self.branches[branch] = tree, sha
        self.messages.append(message)
        return sha


@dataclass
class Failure:
    """What goes wrong, and how often: a status with headers, or (`cut`) a connection that ends amid the request."""

    method: str
    path: re.Pattern[str]
    times: int
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False


class HubServer:
    """The server; a context manager.

    Attributes:
        endpoint: What `HF_ENDPOINT` must be.
        repos: Repository id → `Repo`.
        requests: `METHOD /path` of every request, in order.
        writers: Names that `TOKEN` may write under.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.failures: list[Failure] = []
        self.writers = {"me"}
        self.lock = threading.RLock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Environment variables for a process that shall use this Hub, with a cache of its own."""
        found = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        return {**found, "HF_DATASETS_OFFLINE": "0", "HF_TOKEN": TOKEN}

    def add(self, repo_id: str, folder: str | Path) -> str:
        """Publishes a folder as it is; gives the commit's hash."""
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
        return self.repos.setdefault(repo_id, Repo()).commit("main", files, "As it is")

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        """What lies on a branch."""
        repo = self.repos[repo_id]
        return repo.trees[repo.branches[branch]]

    def fail(self, method: str, path: str, status: int = 0, times: int = 1, cut: bool = False, **headers: str) -> None:
        """Makes the next `times` requests to paths that match go wrong; `Retry_After="0"` becomes `Retry-After: 0`."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.failures.append(Failure(method, re.compile(path), times, status, named, cut))

    def take_failure(self, method: str, path: str) -> Failure | None:
        """The failure that is due for this request, if one is."""
        with self.lock:
            for failure in self.failures:
                if failure.times and failure.method == method and failure.path.search(path):
                    failure.times -= 1
                    return failure
        return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: HubServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""

    def do_GET(self) -> None:
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        with hub.lock:
            hub.requests.append(f"{self.command} {path}")
        failure = hub.take_failure(self.command, path)
        if failure is not None and failure.cut:
            self._cut()
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if failure is not None:
            self._answer({"error": "as the test wants it"}, failure.status, failure.headers)
            return
        for method, pattern, action in ROUTES:
            if self.command in method.split() and (found := re.fullmatch(pattern, path)):
                with hub.lock:
                    action(self, body, **found.groupdict())
                return
        self._answer({"error": f"no such page: {path}"}, 404, {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 (http.server names them so)

    def _cut(self) -> None:
        """Reads a little, then resets the connection."""
        self.rfile.read(min(64, int(self.headers.get("Content-Length") or 0)))
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    # -- answers ----------------------------------------------------------------------------------------------------

    def _answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _may_write(self, repo_id: str) -> bool:
        """Answers 401 or 403 itself."""
        if not self._known():
            self._answer({"error": "401"}, 401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif repo_id.split("/")[0] not in self.server.hub.writers:
            self._answer({"error": "forbidden"}, 403, {"X-Error-Message": "You have no right to write here"})
        else:
            return True
        return False

    def _repo(self, repo_id: str) -> Repo | None:
        """Answers 404 itself; a private repository is not there for strangers."""
        repo = self.server.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self._known()):
            self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return None
        return repo

    def _tree(self, repo_id: str, revision: str) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Commit and tree, or nothing after answering 404 itself."""
        if (repo := self._repo(repo_id)) is None:
            return
        sha = repo.branches.get(revision, revision)
        if sha not in repo.trees:
            self._answer({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
            return
        yield sha, repo.trees[sha]

    # -- what can be asked ------------------------------------------------------------------------------------------

    def whoami(self, body: bytes) -> None:
        if not self._known():
            self._answer({"error": "Invalid credentials"}, 401)
            return
        auth = {"accessToken": {"role": "write"}}
        self._answer({"name": "me", "type": "user", "orgs": [], "auth": auth})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo_id = f"{asked['organization'] or 'me'}/{asked['name']}"
        if not self._may_write(repo_id):
            return
        url = {"url": f"{self.server.hub.endpoint}/{repo_id}", "name": repo_id}
        if repo_id in self.server.hub.repos:
            self._answer({"error": "You already created this model repo", **url}, 409)
            return
        private = asked.get("private") or asked.get("visibility") == "private"
        repo = self.server.hub.repos[repo_id] = Repo(private=bool(private))
        repo.commit("main", {}, "initial commit")
        self._answer(url)

    def branch(self, body: bytes, repo_id: str, revision: str) -> None:
        if self._may_write(repo_id) and (repo := self._repo(repo_id)) is not None:
            if revision in repo.branches:
                self._answer({"error": "Reference already exists"}, 409)
                return
            repo.branches[revision] = repo.branches["main"]
            self._answer({}, 201)

    def validate_yaml(self, body: bytes) -> None:
        self._answer({"errors": [], "warnings": []})

    def auth_check(self, body: bytes, repo_id: str) -> None:
        if self._repo(repo_id) is not None and self._may_write(repo_id):
            self._answer({})

    def preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        if not self._may_write(repo_id):
            return
        for _, tree in self._tree(repo_id, revision):
            files = []
            for file in json.loads(body)["files"]:
                mode = "lfs" if file["path"].endswith(LARGE) else "regular"
                held = tree.get(file["path"])
                oid = None if held is None else _sha(held) if mode == "lfs" else _blob(held)
                files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            self._answer({"files": files})

    def batch(self, body: bytes, repo_id: str) -> None:
        if not self._may_write(repo_id) or self._repo(repo_id) is None:
            return
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"], "authenticated": True}
            if wanted["oid"] not in self.server.hub.objects:
                href = f"{self.server.hub.endpoint}/lfs/{wanted['oid']}"
                entry["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(entry)
        self._answer({"transfer": "basic", "objects": objects})

    def put_object(self, body: bytes, oid: str) -> None:
        if _sha(body) != oid:
            self._answer({"error": "the bytes are not those that were announced"}, 400)
            return
        self.server.hub.objects[oid] = body
        self._answer({})

    def verify(self, body: bytes, oid: str) -> None:
        found = oid in self.server.hub.objects
        self._answer({"message": "found" if found else "missing"}, 200 if found else 404)

    def commit(self, body: bytes, repo_id: str, revision: str) -> None:
        if not self._may_write(repo_id):
            return
        for _, tree in self._tree(repo_id, revision):
            changed, message = dict(tree), ""
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    message = value["summary"]
                elif line["key"] == "file":
                    changed[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    changed[value["path"]] = self.server.hub.objects[value["oid"]]
                elif line["key"] == "deletedFile":
                    changed.pop(value["path"], None)
            sha = self.server.hub.repos[repo_id].commit(revision, changed, message)
            url = f"{self.server.hub.endpoint}/{repo_id}/commit/{sha}"
            self._answer({"success": True, "commitUrl": url, "commitOid": sha})

    def info(self, body: bytes, repo_id: str, revision: str | None = None) -> None:
        for sha, tree in self._tree(repo_id, revision or "main"):
            siblings = [{"rfilename": path} for path in sorted(tree)]
            private = self.server.hub.repos[repo_id].private
            self._answer({"_id": sha[:24], "id": repo_id, "sha": sha, "private": private, "siblings": siblings})

    def tree(self, body: bytes, repo_id: str, revision: str) -> None:
        for _, tree in self._tree(repo_id, revision):
            entries = []
            for path, data in sorted(tree.items()):
                entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _blob(data)}
                if path.endswith(LARGE):
                    entry["lfs"] = {"oid": _sha(data), "size": len(data), "pointerSize": 130}
                entries.append(entry)
            self._answer(entries)

    def resolve(self, body: bytes, repo_id: str, revision: str, path: str) -> None:
        for sha, tree in self._tree(repo_id, revision):
            if path not in tree:
                self._answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
                continue
            data = tree[path]
            etag = _sha(data) if path.endswith(LARGE) else _blob(data)
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "X-Linked-Size": str(len(data))}
            start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            if start and 0 < int(start[1]) < len(data):
                headers["Content-Range"] = f"bytes {start[1]}-{len(data) - 1}/{len(data)}"
                self._answer(data[int(start[1]) :], 206, headers)
            else:
                self._answer(data, 200, headers)


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


REPO = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
ROUTES = (
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("GET", rf"/api/models/{REPO}/auth-check/write", _Handler.auth_check),
    ("POST", rf"/api/models/{REPO}/branch/(?P<revision>.+)", _Handler.branch),
    ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", rf"/api/models/{REPO}/commit/(?P<revision>.+)", _Handler.commit),
    ("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)/?", _Handler.tree),
    ("GET", rf"/api/models/{REPO}/revision/(?P<revision>[^/]+)", _Handler.info),
    ("GET", rf"/api/models/{REPO}", _Handler.info),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", _Handler.put_object),
    ("POST", r"/lfs/(?P<oid>\w+)/verify", _Handler.verify),
    ("GET HEAD", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
)
