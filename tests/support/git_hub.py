"""A local Hub that can be written to: real git repositories behind the routes that huggingface_hub 2.4 calls.

Commits, trees and tags are git's own; large files go through the LFS protocol to a second origin, as on the Hub.
Written from what the client sends and reads; it was never compared with the real service. No pull requests, no Xet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from support.git_repositories import POINTER, GitHub

LARGE_BYTES = 1 << 20
LARGE_NAMES = (".safetensors", ".pt2", ".bin")
CHUNK_BYTES = 1 << 20


@contextmanager
def running() -> Iterator[GitHub]:
    """Serve on free ports of the loopback interface until the block ends."""
    hub = GitHub(Path(tempfile.mkdtemp(prefix="tandem-hub-")))
    (hub.root / "lfs").mkdir()
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, hub.root, ignore_errors=True)
        hub.endpoint = stack.enter_context(_serving(Api, hub))
        hub.cdn = stack.enter_context(_serving(Cdn, hub))
        yield hub


@contextmanager
def _serving(kind: type[Handler], hub: GitHub) -> Iterator[str]:
    class Bound(kind):  # type: ignore[valid-type, misc]
        state = hub

    class Server(ThreadingHTTPServer):
        request_queue_size = 64
        daemon_threads = True

    server = Server(("127.0.0.1", 0), Bound)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Refused(Exception):
    """An answer that is not 200."""

    def __init__(self, status: int, code: str = "", message: str = "", url: str = "") -> None:
        self.status, self.code, self.message, self.url = status, code, message, url


class Handler(BaseHTTPRequestHandler):
    """What both origins share."""

    state: GitHub
    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Keep the test's output clean."""

    def do_GET(self) -> None:
        self.handle_it()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def handle_it(self) -> None:
        self.body_read, parts = False, urlsplit(self.path)  # a connection serves many requests
        self.path_only, self.query = unquote(parts.path), parse_qs(parts.query)
        self.raw_path = parts.path
        self.state.log.append(f"{self.command} {self.path_only}")
        try:
            self.route()
        except Refused as refused:
            self.read_body()
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            headers = {name: value for name, value in headers.items() if value}
            self.answer(refused.status, {"error": refused.message, "url": refused.url}, headers)

    def route(self) -> None:
        raise NotImplementedError

    def read_body(self) -> bytes:
        if self.body_read:
            return b""
        self.body_read = True
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def json_body(self) -> Any:
        return json.loads(self.read_body() or b"{}")

    def answer(self, status: int, data: Any = None, headers: dict[str, str] | None = None) -> None:
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_file(self, path: Path, headers: dict[str, str]) -> None:
        size, first, last, status = path.stat().st_size, 0, path.stat().st_size - 1, 200
        ranged = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if ranged:
            first, last, status = int(ranged[1]), min(int(ranged[2] or size - 1), size - 1), 206
            headers = headers | {"Content-Range": f"bytes {first}-{last}/{size}"}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        if self.command == "HEAD":
            return
        with path.open("rb") as file:
            self.wfile.flush()
            os.lseek(file.fileno(), first, os.SEEK_SET)
            left, offset = last - first + 1, first
            while left:
                sent = os.sendfile(self.connection.fileno(), file.fileno(), offset, left)
                if not sent:
                    break
                offset, left = offset + sent, left - sent


class Cdn(Handler):
    """Where large files lie. It must never see the Hub's token."""

    def route(self) -> None:
        if "Authorization" in self.headers:
            self.state.leaked.append(self.path)
        oid = self.path_only.rpartition("/")[2]
        if float(self.query["until"][0]) < time.time():
            raise Refused(403, message="expired")
        if self.command in ("GET", "HEAD"):
            self.send_file(self.state.blob(oid), {"ETag": f'"{oid}"'})
            return
        self.store(oid)
        self.answer(200, b"")

    def store(self, oid: str) -> None:
        self.body_read = True
        digest, left = hashlib.sha256(), int(self.headers["Content-Length"])
        with tempfile.NamedTemporaryFile(dir=self.state.root / "lfs", delete=False) as file:
            while left and (piece := self.rfile.read(min(left, CHUNK_BYTES))):
                digest.update(piece)
                file.write(piece)
                left -= len(piece)
        if left or digest.hexdigest() != oid:
            Path(file.name).unlink()
            raise Refused(400, message="wrong bytes")
        with self.state.lock:
            self.state.uploaded += self.state.root.joinpath("lfs", file.name).stat().st_size
        Path(file.name).rename(self.state.blob(oid))
        self.state.known.add((self.query["repo"][0], oid))


class Api(Handler):
    """The routes of the Hub itself."""

    def route(self) -> None:
        for method, pattern, name in ROUTES:
            match = re.fullmatch(pattern, self.raw_path)
            if match and self.command in method.split():
                call: Callable[..., None] = getattr(self, name)
                call(**{key: unquote(value) for key, value in match.groupdict().items() if value})
                return
        raise Refused(404, message="no such route")

    def who(self) -> str | None:
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if given and given not in (self.state.token, self.state.reader):
            raise Refused(401, message="Invalid credentials in Authorization header")
        return given or None

    def may(self, repo: str, *, write: bool = False) -> str:
        """The repository's name, if it is there and the caller may use it."""
        who = self.who()
        hidden = repo in self.state.private and who is None
        if not self.state.repo(repo).is_dir() or hidden:
            raise Refused(404 if who else 401, "RepoNotFound", "Repository not found")
        if repo in self.state.gated and who is None:
            raise Refused(401, "GatedRepo", "Access is restricted")
        if write and who != self.state.token:
            raise Refused(403 if who else 401, message="You may not write here")
        return repo

    def at(self, repo: str, revision: str) -> str:
        commit = self.state.resolve(repo, revision)
        if commit is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def whoami(self) -> None:
        if self.who() is None:
            raise Refused(401, message="Invalid username or password.")
        self.answer(200, {"name": "tester", "type": "user", "orgs": [], "auth": {}})

    def create_repo(self) -> None:
        body = self.json_body()
        if self.who() != self.state.token:
            raise Refused(403 if self.who() else 401, message="You may not write here")
        name = f"{body.get('organization') or 'tester'}/{body['name']}"
        with self.state.lock:
            if self.state.repo(name).is_dir():
                raise Refused(409, message="You already created this", url=f"{self.state.endpoint}/{name}")
            self.state.create(name)
        self.answer(200, {"url": f"{self.state.endpoint}/{name}"})

    def validate_yaml(self) -> None:
        self.json_body()
        self.answer(200, {"errors": [], "warnings": []})

    def models(self) -> None:
        names = [
            p.relative_to(self.state.root / "repos").as_posix()[:-4] for p in self.state.root.glob("repos/*/*.git")
        ]
        org = self.query.get("author", [""])[0]
        self.answer(200, [{"id": name, "tags": ["tandem"]} for name in sorted(names) if name.startswith(f"{org}/")])

    def preupload(self, repo: str, revision: str) -> None:
        body = self.json_body()
        tree = self.state.tree(self.may(repo, write=True), self.at(repo, revision))
        answers = []
        for one in body["files"]:
            large = one["size"] > LARGE_BYTES or one["path"].endswith(LARGE_NAMES)
            there = tree.get(one["path"])
            oid = (there["lfs"]["oid"] if "lfs" in there else there["oid"]) if there else None
            answers.append({"path": one["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False,
                            **({"oid": oid} if oid else {})})  # fmt: skip
        self.answer(200, {"files": answers})

    def lfs_batch(self, repo: str) -> None:
        body = self.json_body()
        self.may(repo, write=True)
        objects = []
        for one in body["objects"]:
            answer: dict[str, Any] = {"oid": one["oid"], "size": one["size"]}
            if (repo, one["oid"]) not in self.state.known:  # as on the Hub, a repository shares only with itself
                answer["actions"] = {"upload": {"href": f"{self.signed(one['oid'])}&repo={repo}"}}
            objects.append(answer)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def signed(self, oid: str) -> str:
        return f"{self.state.cdn}/objects/{oid}?until={time.time() + 3600}"

    def commit(self, repo: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.read_body().splitlines() if line.strip()]
        self.may(repo, write=True)
        header = lines[0]["value"]
        with self.state.lock:
            head = self.at(repo, revision)
            if header.get("parentCommit") not in (None, head):
                raise Refused(412, message="A commit has happened since. Please refresh and try again.")
            tree, files, gone = self.state.tree(repo, head), {}, []
            for line in lines[1:]:
                key, value = line["key"], line["value"]
                if key == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    blob = self.state.blob(value["oid"])
                    if not blob.is_file():
                        raise Refused(400, message="LFS object was not uploaded")
                    files[value["path"]] = POINTER.format(value["oid"], blob.stat().st_size).encode()
                elif key == "deletedFile":
                    gone.append(value["path"])
                elif key == "deletedFolder":
                    gone += [path for path in tree if path.startswith(value["path"].rstrip("/") + "/")]
            made = self.state.commit(repo, revision, header["summary"], files, gone, head)
        url = f"{self.state.endpoint}/{repo}/commit/{made}"
        self.answer(200, {"success": True, "commitOid": made, "commitUrl": url})

    def tag(self, repo: str, revision: str) -> None:
        body = self.json_body()
        self.create_ref(repo, f"refs/tags/{body['tag']}", revision)

    def branch(self, repo: str, name: str) -> None:
        body = self.json_body()
        self.create_ref(repo, f"refs/heads/{name}", body.get("startingPoint") or "main")

    def create_ref(self, repo: str, ref: str, revision: str) -> None:
        commit = self.at(self.may(repo, write=True), revision)
        try:
            self.state.git(repo, "update-ref", ref, commit, "0" * 40)
        except subprocess.CalledProcessError as error:
            raise Refused(409, message="Reference already exists") from error
        self.answer(200, {})

    def refs(self, repo: str) -> None:
        kinds: dict[str, list[dict[str, str]]] = {"branches": [], "tags": [], "converts": []}
        shown = self.state.git(self.may(repo), "for-each-ref", "--format=%(refname) %(objectname)").decode()
        for line in shown.splitlines():
            ref, commit = line.split()
            kind = "branches" if ref.startswith("refs/heads/") else "tags"
            kinds[kind].append({"name": ref.split("/", 2)[2], "ref": ref, "targetCommit": commit})
        self.answer(200, kinds)

    def info(self, repo: str, revision: str = "main") -> None:
        commit = self.at(self.may(repo), revision)
        siblings = [{"rfilename": path} for path in self.state.tree(repo, commit)]
        self.answer(200, {"id": repo, "sha": commit, "private": False, "siblings": siblings, "tags": []})

    def list_tree(self, repo: str, revision: str) -> None:
        entries = list(self.state.tree(self.may(repo), self.at(repo, revision)).values())
        page, size = int(self.query.get("cursor", ["0"])[0]), 1000
        headers = {}
        if (page + 1) * size < len(entries):
            url = f"{self.state.endpoint}{self.raw_path}?recursive=true&cursor={page + 1}"
            headers["Link"] = f'<{url}>; rel="next"'
        self.answer(200, entries[page * size : (page + 1) * size], headers)

    def paths_info(self, repo: str, revision: str) -> None:
        body = self.read_body().decode()
        wanted = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
        tree = self.state.tree(self.may(repo), self.at(repo, revision))
        self.answer(200, [tree[path] for path in wanted if path in tree])

    def commits(self, repo: str, revision: str) -> None:
        shown = self.state.git(
            self.may(repo), "log", "--format=%H%x09%cI%x09%an%x09%s", self.at(repo, revision)
        ).decode()
        rows = [line.split("\t", 3) for line in shown.splitlines()]
        self.answer(200, [{"id": oid, "title": title, "message": "", "authors": [{"user": who}],
                           "date": time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(_seconds(when)))}
                          for oid, when, who, title in rows])  # fmt: skip

    def send_resolved(self, repo: str, revision: str, path: str) -> None:
        commit = self.at(self.may(repo), revision)
        entry = self.state.tree(repo, commit).get(path)
        if entry is None:
            raise Refused(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{entry["oid"]}"', "Accept-Ranges": "bytes"}
        if "lfs" in entry:
            oid = entry["lfs"]["oid"]
            headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(entry["size"]), "Location": self.signed(oid)}
            self.answer(302, b"", headers)
            return
        with tempfile.NamedTemporaryFile(dir=self.state.root) as file:
            file.write(self.state.git(repo, "cat-file", "blob", entry["oid"]))
            file.flush()
            self.send_file(Path(file.name), headers)


def _seconds(text: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(text).timestamp()


REPO = r"(?P<repo>[^/]+/[^/]+?)"
REV = r"(?P<revision>[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create_repo"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("GET", r"/api/models", "models"),
    ("POST", rf"/api/models/{REPO}/preupload/{REV}", "preupload"),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("POST", rf"/api/models/{REPO}/commit/{REV}", "commit"),
    ("POST", rf"/api/models/{REPO}/tag/{REV}", "tag"),
    ("POST", rf"/api/models/{REPO}/branch/(?P<name>[^/]+)", "branch"),
    ("GET", rf"/api/models/{REPO}/refs", "refs"),
    ("GET", rf"/api/models/{REPO}/tree/{REV}", "list_tree"),
    ("POST", rf"/api/models/{REPO}/paths-info/{REV}", "paths_info"),
    ("GET", rf"/api/models/{REPO}/commits/{REV}", "commits"),
    ("GET HEAD", rf"/{REPO}/resolve/{REV}/(?P<path>.+)", "send_resolved"),
    ("GET", rf"/api/models/{REPO}(/revision/{REV})?", "info"),
]
