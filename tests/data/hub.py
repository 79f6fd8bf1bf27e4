"""The Hugging Face hub as far as its Python clients ask it for public dataset repositories, on a local port."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_FROM = 2000  # bytes; the real hub decides by name and size


class File:
    """A file's bytes, and the names that git and LFS give them."""

    def __init__(self, content: bytes | Path):
        self.content = content if isinstance(content, bytes) else content.read_bytes()
        self.size = len(self.content)
        self.oid = hashlib.sha1(f"blob {self.size}\0".encode() + self.content).hexdigest()
        self.sha256 = hashlib.sha256(self.content).hexdigest() if self.size >= LFS_FROM else ""

    def sibling(self, path: str) -> dict[str, Any]:
        return {"rfilename": path, "size": self.size, "blobId": self.oid} | self.lfs("sha256")

    def entry(self, path: str) -> dict[str, Any]:
        return {"type": "file", "path": path, "size": self.size, "oid": self.oid} | self.lfs("oid")

    def lfs(self, key: str) -> dict[str, Any]:
        return {"lfs": {key: self.sha256, "size": self.size, "pointerSize": 134}} if self.sha256 else {}


class Repo:
    def __init__(self, contents: Mapping[str, bytes | Path]):
        self.files = {path: File(content) for path, content in sorted(contents.items())}

    @cached_property
    def commit(self) -> str:
        return hashlib.sha1(json.dumps({p: f.oid for p, f in self.files.items()}).encode()).hexdigest()

    def tree(self, folder: str, recursive: bool) -> list[dict[str, Any]]:
        prefix = f"{folder}/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for path, file in self.files.items():
            if path.startswith(prefix):
                parts = path.removeprefix(prefix).split("/")
                parents = [prefix + "/".join(parts[:i]) for i in range(1, len(parts))]
                for parent in parents if recursive else parents[:1]:
                    oid = hashlib.sha1(parent.encode()).hexdigest()
                    entries[parent] = {"type": "directory", "path": parent, "size": 0, "oid": oid}
                if recursive or not parents:
                    entries[path] = file.entry(path)
        return list(entries.values())


@dataclass
class Hub:
    """A running hub, what it was asked, and how it misbehaves."""

    endpoint: str
    requests: list[str] = field(default_factory=list)  # "METHOD path", and the Range where one was asked for
    fail_after: int | None = None  # bytes of a file after which the connection drops
    failures: int = 1  # how often it does so
    reset: bool = False  # by a reset, which the client does not resume, not by a close, which it does
    lock: Lock = field(default_factory=Lock)

    def downloads(self) -> list[str]:
        """The files asked for since the last call, sorted, each with its Range where one was given."""
        asked = [r.split("/resolve/", 1)[1].split("/", 1)[1] for r in self.requests if r.startswith("GET /datasets/")]
        self.requests.clear()
        return sorted(asked)

    def fails(self, size: int) -> bool:
        with self.lock:
            if self.fail_after is None or not self.failures or size <= self.fail_after:
                return False
            self.failures -= 1
            return True


@contextmanager
def hub(repos: Mapping[str, Mapping[str, bytes | Path]]) -> Iterator[Hub]:
    """Serve repositories, "owner/name" to {path: content}, each with the one revision main."""
    known = {name: Repo(contents) for name, contents in repos.items()}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            asked = self.headers.get("Range", "")
            here.requests.append(f"{self.command} {self.path} {asked}".strip())
            url = urlsplit(self.path)
            query = parse_qs(url.query)
            match [unquote(part) for part in url.path.strip("/").split("/")]:
                case ["api", "datasets", owner, name, *rest]:
                    if repo := self.repo(owner, name, rest[1] if len(rest) > 1 else "main"):
                        self.api(repo, f"{owner}/{name}", rest, query)
                case ["datasets", owner, name, "resolve", revision, *path]:
                    if repo := self.repo(owner, name, revision):
                        self.resolve(repo, "/".join(path), asked)
                case _:
                    self.refuse("")

        do_HEAD = do_POST = do_GET

        def repo(self, owner: str, name: str, revision: str) -> Repo | None:
            repo = known.get(f"{owner}/{name}")
            if repo is None:
                self.refuse("RepoNotFound")
            elif revision not in ("main", repo.commit):
                self.refuse("RevisionNotFound")
            else:
                return repo
            return None

        def api(self, repo: Repo, name: str, rest: list[str], query: dict[str, list[str]]) -> None:
            match rest:
                case [] | ["revision", _]:
                    blobs = query.get("blobs", ["false"])[0].lower() == "true"
                    siblings = [f.sibling(p) if blobs else {"rfilename": p} for p, f in repo.files.items()]
                    info = {"sha": repo.commit, "siblings": siblings, "private": False, "gated": False, "tags": []}
                    self.answer({"id": name} | {k: info[k] for k in query.get("expand", info)})
                case ["tree", _, *folder]:
                    entries = repo.tree("/".join(folder), query.get("recursive", ["false"])[0].lower() == "true")
                    self.answer(entries) if entries or not folder else self.refuse("EntryNotFound")
                case ["paths-info", _]:
                    paths = parse_qs(self.body)["paths"]
                    self.answer([repo.files[path].entry(path) for path in paths if path in repo.files])
                case _:
                    self.refuse("")

        def resolve(self, repo: Repo, path: str, asked: str) -> None:
            if (file := repo.files.get(path)) is None:
                return self.refuse("EntryNotFound")
            first, last = 0, file.size - 1
            if asked:
                begin, _, end = asked.removeprefix("bytes=").partition("-")
                first, last = int(begin), min(int(end or last), last)
            if asked and first > last:
                return self.refuse("", 416)
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("Content-Range", f"bytes {first}-{last}/{file.size}")
            self.send_header("ETag", f'"{file.sha256 or file.oid}"')
            self.send_header("X-Repo-Commit", repo.commit)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(last + 1 - first))
            self.end_headers()
            if self.command == "HEAD":
                return None
            body = file.content[first : last + 1]
            if not here.fails(len(body)):
                self.wfile.write(body)
                return None
            self.wfile.write(body[: here.fail_after])
            self.close_connection = True
            if here.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            return None

        def answer(self, value: Any) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def refuse(self, code: str, status: int = 404) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        here = Hub(f"http://127.0.0.1:{server.server_port}")
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield here
        finally:
            server.shutdown()
            thread.join()
