"""A model hub on localhost, so that the real client can upload and download without a network.

Only model repositories are served. Files live in memory; large ones go through the "basic" LFS transfer, which clients
use when the chunk-based one is switched off, as `HubServer.environment` does.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

USER = "tester"
LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".onnx")
REGULAR_LIMIT = 10 * 1024 * 1024


class RefusalError(Exception):
    """Ends a request with an HTTP error, which the client tells apart by `code`."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status = status
        # A message may quote a path, but a header holds only plain characters.
        plain = message.encode("ascii", "backslashreplace").decode()
        self.headers = {"X-Error-Message": plain, "X-Error-Code": code, **headers}


@dataclass
class Request:
    """One HTTP request, with its path split into unquoted segments."""

    method: str
    parts: list[str]
    query: dict[str, list[str]]
    headers: Message
    body: bytes


@dataclass
class Reply:
    """One HTTP response; its length is filled in when it is sent."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Blob:
    """The content of one file, and whether it was sent as a large one."""

    data: bytes
    lfs: bool = False

    @cached_property
    def oid(self) -> str:
        """Name the content as the client does to find unchanged files: by sha256 if large, else like git."""
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    def describe(self, path: str, path_key: str = "path", oid_key: str = "oid", lfs_key: str = "oid") -> dict[str, Any]:
        """Return a listing entry; the hub's two kinds of listing differ in their keys."""
        size = len(self.data)
        lfs = {"lfs": {lfs_key: self.oid, "size": size, "pointerSize": 134}} if self.lfs else {}
        return {"type": "file", path_key: path, "size": size, oid_key: self.oid, **lfs}


Tree = dict[str, Blob]


class Repo:
    """One repository: every commit with its files, the branch heads and the uploaded large objects."""

    def __init__(self) -> None:
        self.commits: dict[str, Tree] = {}
        self.branches: dict[str, str] = {}
        self.objects: dict[str, bytes] = {}
        self.record("main", {}, "initial commit")

    def record(self, branch: str, tree: Tree, summary: str) -> str:
        """Store `tree` as the new head of `branch` and return its commit hash."""
        listing = [(path, tree[path].oid) for path in sorted(tree)]
        # The running number keeps two equal commits apart.
        sha = hashlib.sha1(json.dumps([len(self.commits), summary, listing]).encode()).hexdigest()
        self.commits[sha] = tree
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> tuple[str, Tree]:
        """Return the commit hash and the files of a branch or commit hash."""
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, self.commits[sha]

    def apply(self, tree: Tree, key: str, value: dict[str, Any]) -> None:
        """Carry out one line of a commit on `tree`."""
        path: str = value["path"]
        if key == "file" and value["encoding"] == "base64":
            tree[path] = Blob(base64.b64decode(value["content"], validate=True))
        elif key == "lfsFile" and value["algo"] == "sha256":
            data = self.objects.get(value["oid"])
            # A server-side copy names no size, so only an announced one can be compared.
            if data is None or value.get("size", len(data)) != len(data):
                raise RefusalError(400, f"No object {value['oid']} of this size was uploaded for {path}")
            tree[path] = Blob(data, lfs=True)
        elif key in ("deletedFile", "deletedFolder"):
            folder = path.rstrip("/") + "/"
            doomed = [name for name in tree if (name == path if key == "deletedFile" else name.startswith(folder))]
            if not doomed:
                raise RefusalError(404, "A file with this name doesn't exist", "EntryNotFound")
            for name in doomed:
                del tree[name]
        else:
            raise RefusalError(400, f"Unknown commit line: {key}")


class HubServer:
    """Context manager which serves an empty hub; `endpoint` and `token` are what a client needs."""

    def __init__(self) -> None:
        self.token = f"token-{secrets.token_hex(8)}"
        self.requests: list[tuple[str, str]] = []
        self._repos: dict[str, Repo] = {}
        self._tickets: dict[str, tuple[str, str, int]] = {}
        self._lock = threading.Lock()
        self._listener = _Listener(self._answer)
        self.endpoint = f"http://127.0.0.1:{self._listener.server_port}"
        self._thread = threading.Thread(target=self._listener.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._listener.shutdown()
        self._thread.join()
        self._listener.server_close()

    def files(self, repo_id: str) -> dict[str, bytes]:
        """Return the files at the head of `main`."""
        return {path: blob.data for path, blob in self._repos[repo_id].resolve("main")[1].items()}

    def commits(self, repo_id: str) -> list[str]:
        """Return the commit hashes, oldest first; the first is the empty one of a new repository."""
        return list(self._repos[repo_id].commits)

    def environment(self, home: Path) -> dict[str, str]:
        """Return what a client process needs on top of `os.environ`, with its caches under `home`."""
        # An inherited cache folder would win over HF_HOME, and an inherited proxy would take the requests.
        places = {"HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "NO_PROXY": "*", "no_proxy": "*"}
        # Variables can be added but not removed; the client reads "0" as "online".
        switches = {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": self.token, **places, **switches, **quiet}

    def _answer(self, method: str, target: str, headers: Message, body: bytes) -> Reply:
        """Turn one request into one reply; requests are handled one at a time."""
        url = urlsplit(target)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        # HEAD is GET without the body, which the handler leaves out.
        request = Request("GET" if method == "HEAD" else method, parts, parse_qs(url.query), headers, body)
        with self._lock:
            self.requests.append((method, url.path))
            try:
                self._check_token(request)
                return self._route(request)
            except RefusalError as refusal:
                return _json({"error": str(refusal)}, refusal.status, **refusal.headers)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                return _json({"error": f"Malformed request: {error!r}"}, 400)

    def _check_token(self, request: Request) -> None:
        """Refuse a wrong token everywhere, and a missing one on everything but public reads."""
        given = request.headers.get("Authorization")
        if given is not None and given != f"Bearer {self.token}":
            raise RefusalError(401, "Invalid credentials in Authorization header")
        # The client sends no token with an object: like a signed storage address, its ticket is the permission.
        exempt = request.method == "PUT" or request.parts == ["api", "validate-yaml"]
        public = request.method == "GET" and request.parts != ["api", "whoami-v2"]
        if given is None and not exempt and not public:
            raise RefusalError(401, "Invalid username or password.")

    def _route(self, request: Request) -> Reply:
        """Send a request to its endpoint."""
        match request.method, request.parts:
            case "GET", ["api", "whoami-v2"]:
                auth = {"accessToken": {"displayName": USER, "role": "write"}}
                return _json({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": auth})
            case "POST", ["api", "validate-yaml"]:
                return _validate_card(json.loads(request.body)["content"])
            case "POST", ["api", "repos", "create"]:
                return self._create(json.loads(request.body))
            case _, ["api", "models", owner, name, *rest]:
                return self._model(f"{owner}/{name}", rest, request)
            case "POST", [owner, git, "info", "lfs", "objects", "batch"]:
                return self._lfs_batch(f"{owner}/{git.removesuffix('.git')}", json.loads(request.body))
            case "PUT", ["_lfs", ticket]:
                return self._lfs_put(ticket, request.body)
            case "POST", ["_lfs", ticket, "verify"]:
                return self._lfs_verify(ticket, json.loads(request.body))
            case "GET", [owner, name, "resolve", revision, *path]:
                return _resolve(*self._repo(f"{owner}/{name}").resolve(revision), "/".join(path), request)
        raise RefusalError(404, "No such endpoint")

    def _model(self, repo_id: str, rest: list[str], request: Request) -> Reply:
        """Answer the endpoints under one repository's API address."""
        repo = self._repo(repo_id)
        match request.method, rest:
            case "GET", [] | ["revision", _]:
                return _model_info(repo_id, *repo.resolve(rest[1] if rest else "main"), "blobs" in request.query)
            case "GET", ["tree", revision, *folder]:
                return _listing(repo.resolve(revision)[1], "/".join(folder), request.query.get("recursive") == ["true"])
            case "GET", ["refs"]:
                heads = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repo.branches.items()]
                return _json({"branches": heads, "converts": [], "tags": [], "pullRequests": []})
            case "POST", ["paths-info", revision]:
                tree = repo.resolve(revision)[1]
                paths = parse_qs(request.body.decode()).get("paths", [])
                return _json([tree[path].describe(path) for path in paths if path in tree])
            case "POST", ["preupload", revision]:
                return _preupload(repo.resolve(revision)[1], json.loads(request.body)["files"])
            case "POST", ["commit", branch] if branch in repo.branches and "create_pr" not in request.query:
                return self._commit(repo_id, branch, request.body)
        raise RefusalError(404, "No such endpoint or branch")

    def _repo(self, repo_id: str) -> Repo:
        """Return an existing repository."""
        if repo_id not in self._repos:
            raise RefusalError(404, "Repository not found", "RepoNotFound")
        return self._repos[repo_id]

    def _create(self, payload: dict[str, Any]) -> Reply:
        """Create a model repository, or say 409 if it exists."""
        repo_id = f"{payload.get('organization') or USER}/{payload['name']}"
        known = repo_id in self._repos
        self._repos.setdefault(repo_id, Repo())
        # A client which allows the repository to exist reads `url` from the refusal too.
        return _json({"url": f"{self.endpoint}/{repo_id}", "name": repo_id}, 409 if known else 200)

    def _commit(self, repo_id: str, branch: str, body: bytes) -> Reply:
        """Record a commit if every line of it can be carried out."""
        repo = self._repo(repo_id)
        header, *lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        if not repo.branches[branch].startswith(header["value"].get("parentCommit", "")):
            raise RefusalError(412, "The branch has moved since its parent commit")
        tree = dict(repo.resolve(branch)[1])
        for line in lines:
            repo.apply(tree, line["key"], line["value"])
        sha = repo.record(branch, tree, header["value"]["summary"])
        return _json({"success": True, "commitOid": sha, "commitUrl": f"{self.endpoint}/{repo_id}/commit/{sha}"})

    def _lfs_batch(self, repo_id: str, payload: dict[str, Any]) -> Reply:
        """Hand out an upload address for every announced object which is not stored yet."""
        repo = self._repo(repo_id)
        objects: list[dict[str, Any]] = []
        for item in payload["objects"]:
            entry: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in repo.objects:
                ticket = secrets.token_hex(16)
                self._tickets[ticket] = (repo_id, item["oid"], item["size"])
                place = f"{self.endpoint}/_lfs/{ticket}"
                entry["actions"] = {"upload": {"href": place}, "verify": {"href": f"{place}/verify"}}
            objects.append(entry)
        return _json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, ticket: str, data: bytes) -> Reply:
        """Store an object whose size and hash are those announced."""
        if ticket not in self._tickets:
            raise RefusalError(403, "This upload was not announced")
        repo_id, oid, size = self._tickets[ticket]
        if len(data) != size:
            raise RefusalError(400, f"Expected {size} bytes, got {len(data)}")
        if hashlib.sha256(data).hexdigest() != oid:
            raise RefusalError(400, "The content does not match its sha256")
        self._repo(repo_id).objects[oid] = data
        return Reply(b"")

    def _lfs_verify(self, ticket: str, payload: dict[str, Any]) -> Reply:
        """Confirm that the object of a ticket is stored as the client believes."""
        repo_id, oid, size = self._tickets[ticket]
        if (oid, size) != (payload["oid"], payload["size"]) or oid not in self._repo(repo_id).objects:
            raise RefusalError(404, "No such object")
        return _json({"success": True})


def _json(value: Any, status: int = 200, **headers: str) -> Reply:
    """Return `value` as a JSON reply."""
    return Reply(json.dumps(value).encode(), status, {"Content-Type": "application/json", **headers})


def _resolve(sha: str, tree: Tree, path: str, request: Request) -> Reply:
    """Serve a file, or the byte range of it which was asked for."""
    if path not in tree:
        raise RefusalError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": sha})
    blob, size = tree[path], len(tree[path].data)
    headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
    if blob.lfs:
        headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(size)}
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if wanted is None:
        return Reply(blob.data, headers=headers)
    start, stop = int(wanted[1]), min(size, int(wanted[2] or size) + 1)
    if start >= stop:
        raise RefusalError(416, "Range not satisfiable", **{"Content-Range": f"bytes */{size}"})
    return Reply(blob.data[start:stop], 206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"})


def _listing(tree: Tree, folder: str, recursive: bool) -> Reply:
    """List the folders directly inside `folder` and its files, those of all folders below if `recursive`."""
    prefix = f"{folder}/" if folder else ""
    inside = {path: path.removeprefix(prefix) for path in sorted(tree) if path.startswith(prefix)}
    if folder and not inside:
        raise RefusalError(404, f"{folder} does not exist", "EntryNotFound")
    folders = sorted({prefix + rest.split("/")[0] for rest in inside.values() if "/" in rest})
    entries = [tree[path].describe(path) for path, rest in inside.items() if recursive or "/" not in rest]
    return _json([{"type": "directory", "path": name, "size": 0, "oid": name} for name in folders] + entries)


def _model_info(repo_id: str, sha: str, tree: Tree, blobs: bool) -> Reply:
    """Describe a repository at one commit, with sizes and hashes if `blobs`."""
    full = [blob.describe(path, "rfilename", "blobId", "sha256") for path, blob in sorted(tree.items())]
    siblings = full if blobs else [{"rfilename": entry["rfilename"]} for entry in full]
    return _json({"id": repo_id, "sha": sha, "siblings": siblings, "private": False, "gated": False, "tags": []})


def _preupload(tree: Tree, files: list[dict[str, Any]]) -> Reply:
    """Tell for each file how to send it and, so that the client can skip equal ones, its present hash."""
    answers: list[dict[str, Any]] = []
    for item in files:
        path = item["path"]
        binary = b"\0" in base64.b64decode(item["sample"], validate=True)
        large = path.endswith(LFS_SUFFIXES) or item["size"] > REGULAR_LIMIT or binary
        known = {"oid": tree[path].oid} if path in tree else {}
        answers.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, **known})
    return _json({"files": answers})


def _validate_card(text: str) -> Reply:
    """Check the outline of a model card's metadata; without a YAML parser, its values are not judged."""
    if not re.match(r"---\s*\n", text):
        return _json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
    block = re.match(r"---\s*\n(.*?)^---\s*$", text, re.DOTALL | re.MULTILINE)
    if block is None or re.search(r"^\t", block[1], re.MULTILINE):
        return _json({"errors": [{"message": "the metadata is not closed or uses tabs"}], "warnings": []}, 400)
    return _json({"errors": [], "warnings": []})


class _Listener(ThreadingHTTPServer):
    """Listens on a free local port and passes every request to `answer`."""

    request_queue_size = 64

    def __init__(self, answer: Callable[[str, str, Message, bytes], Reply]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer


class _Handler(BaseHTTPRequestHandler):
    """Reads a whole request before it is answered, so that a kept-alive connection stays in step."""

    server: _Listener
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _serve(self) -> None:
        """Answer one request."""
        if "Transfer-Encoding" in self.headers:
            # A body of unknown length is not read; this error closes the connection.
            self.send_error(411)
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        reply = self.server.answer(self.command, self.path, self.headers, body)
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def log_message(self, format: str, *args: Any) -> None:
        """Keep test output quiet; `HubServer.requests` is the log."""
