#!/usr/bin/env python3
# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""A stand-in for the Hugging Face hub: serves ROOT/<org>/<name>/ to `hf download` and vLLM with HF_ENDPOINT.

Only what they ask for when they download: the commit and the files of a repository, and the files with ranges.
Each repository has one branch, main, and one commit, which is a hash of the content. Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import json
import re
import socket
import sys
import time
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

# The real hub keeps weights apart from git (LFS): their ETag is the sha256, not git's blob id.
LARGE = (".safetensors", ".bin", ".gguf", ".pt")
BLOCK = 64 * 1024


class HubError(Exception):
    """An answer in the hub's words. huggingface_hub tells the cases apart by the header X-Error-Code."""

    def __init__(self, status: HTTPStatus, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Blob:
    size: int
    git: str
    sha256: str


@cache
def blob(path: Path, size: int, _modified: int) -> Blob:
    """Hashes of a file; they are kept until it changes."""
    git, sha256 = hashlib.sha1(f"blob {size}\0".encode()), hashlib.sha256()  # noqa: S324 - git's own
    with path.open("rb") as file:
        while block := file.read(1024 * 1024):
            git.update(block)
            sha256.update(block)
    return Blob(size, git.hexdigest(), sha256.hexdigest())


@dataclass(frozen=True)
class Repository:
    name: str
    folder: Path

    def files(self) -> dict[str, Path]:
        found = {path.relative_to(self.folder).as_posix(): path for path in self.folder.rglob("*") if path.is_file()}
        return dict(sorted(found.items()))

    def entry(self, name: str, path: Path) -> dict[str, Any]:
        stat = path.stat()
        hashes = blob(path, stat.st_size, stat.st_mtime_ns)
        entry = {"type": "file", "path": name, "size": hashes.size, "oid": hashes.git}
        if name.endswith(LARGE):
            entry["lfs"] = {"oid": hashes.sha256, "size": hashes.size, "pointerSize": 134}
        return entry

    def tree(self) -> list[dict[str, Any]]:
        return [self.entry(name, path) for name, path in self.files().items()]

    def commit(self) -> str:
        return hashlib.sha1(json.dumps(self.tree()).encode()).hexdigest()  # noqa: S324 - as long as git's


@dataclass
class Hub:
    root: Path
    token: str | None = None
    gated: frozenset[str] = frozenset()
    bytes_per_second: int | None = None

    def repository(self, name: str, authorization: str | None) -> Repository:
        folder = self.root / name
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) or not folder.is_dir():
            raise HubError(HTTPStatus.NOT_FOUND, "RepoNotFound", "Repository not found")
        given = (authorization or "").removeprefix("Bearer ").encode()
        if name in self.gated and not (self.token and hmac.compare_digest(given, self.token.encode())):
            message = f"Access to model {name} is restricted. You must have access to it and be authenticated."
            raise HubError(HTTPStatus.UNAUTHORIZED, "GatedRepo", message)
        return Repository(name, folder)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        self.log_message("%s %d %s", self.requestline, code, self.headers["Range"] or "")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        try:
            for pattern, answer in ROUTES:
                if match := pattern.fullmatch(path):
                    parts = {key: unquote(value or "") for key, value in match.groupdict().items()}
                    repository = self.hub.repository(parts.pop("repository"), self.headers["Authorization"])
                    answer(self, repository, **parts)
                    return
            raise HubError(HTTPStatus.NOT_FOUND, "NotFound", f"This stand-in has no {path}")
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)}
            self.send_json(error.status, {"error": str(error)}, headers)

    def commit(self, repository: Repository, revision: str) -> str:
        commit = repository.commit()
        if revision not in ("main", "refs/heads/main", commit):
            raise HubError(HTTPStatus.NOT_FOUND, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def information(self, repository: Repository, revision: str = "main") -> None:
        files = [{"rfilename": name} for name in repository.files()]
        gated = "manual" if repository.name in self.hub.gated else False
        body = {"id": repository.name, "modelId": repository.name, "sha": self.commit(repository, revision)}
        self.send_json(HTTPStatus.OK, {**body, "private": False, "gated": gated, "tags": [], "siblings": files})

    def tree(self, repository: Repository, revision: str, folder: str) -> None:
        commit = self.commit(repository, revision)
        prefix = f"{folder}/" if folder else ""
        entries = [entry for entry in repository.tree() if entry["path"].startswith(prefix)]
        if parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() != "true":
            below = [entry["path"].removeprefix(prefix).split("/") for entry in entries]
            folders = sorted({parts[0] for parts in below if len(parts) > 1})
            entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(prefix)]
            entries += [{"type": "directory", "path": prefix + name, "size": 0, "oid": commit} for name in folders]
        self.send_json(HTTPStatus.OK, entries)

    def resolve(self, repository: Repository, revision: str, name: str) -> None:
        """As the hub does, a branch is answered with a redirect to the commit that it stands for."""
        commit = self.commit(repository, revision)
        path = repository.files().get(name)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not path:
            raise HubError(HTTPStatus.NOT_FOUND, "EntryNotFound", "Entry not found")
        entry = repository.entry(name, path)
        headers["ETag"] = f'"{entry.get("lfs", entry)["oid"]}"'
        if revision != commit:
            headers["Location"] = f"/{repository.name}/resolve/{commit}/{quote(name)}"
            headers["X-Linked-Size"] = str(entry["size"])
            self.send_empty(HTTPStatus.TEMPORARY_REDIRECT, headers)
            return
        self.send_file(path, entry["size"], headers)

    def send_file(self, path: Path, size: int, headers: dict[str, str]) -> None:
        first, end, status = 0, size, HTTPStatus.OK
        if wanted := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers["Range"] or ""):
            begin, last = wanted.groups()
            first = int(begin) if begin else max(0, size - int(last or 0))
            end = min(size, int(last) + 1) if begin and last else size
            if first >= end:
                headers["Content-Range"] = f"bytes */{size}"
                self.send_empty(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, headers)
                return
            status = HTTPStatus.PARTIAL_CONTENT
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{size}"
        self.send_head(status, {**headers, "Content-Type": "application/octet-stream"}, end - first)
        if self.command == "HEAD":
            return
        with path.open("rb") as file:
            file.seek(first)
            speed = self.hub.bytes_per_second
            while first < end:
                # A slow block is a tenth of a second's worth, so that a client sees data move.
                block = file.read(min(end - first, max(1, speed // 10) if speed else BLOCK))
                first += len(block)
                self.wfile.write(block)
                time.sleep(len(block) / speed if speed else 0)

    def send_head(self, status: HTTPStatus, headers: dict[str, str], length: int) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()

    def send_empty(self, status: HTTPStatus, headers: dict[str, str]) -> None:
        self.send_head(status, headers, 0)

    def send_json(self, status: HTTPStatus, body: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self.send_head(status, {"Content-Type": "application/json", **(headers or {})}, len(content))
        if self.command != "HEAD":
            self.wfile.write(content)


REPOSITORY = r"(?P<repository>[^/]+/[^/]+)"
ROUTES = (
    (re.compile(rf"/api/models/{REPOSITORY}"), Handler.information),
    (re.compile(rf"/api/models/{REPOSITORY}/revision/(?P<revision>[^/]+)"), Handler.information),
    (re.compile(rf"/api/models/{REPOSITORY}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?"), Handler.tree),
    (re.compile(rf"/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<name>.+)"), Handler.resolve),
)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Hub, address: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        super().__init__((address, port), type("HubHandler", (Handler,), {"hub": hub}))

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that goes away
            super().handle_error(request, client_address)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder with ORG/NAME/ folders")
    parser.add_argument("--bind", default="127.0.0.1", help="IPv4 or IPv6 address")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--token", help="what opens gated repositories")
    parser.add_argument("--gated", action="append", default=[], metavar="ORG/NAME")
    parser.add_argument("--slow", type=int, metavar="BYTES_PER_SECOND", help="for each file")
    parser.add_argument("--port-file", type=Path, help="where to write the port when ready")
    arguments = parser.parse_args()
    hub = Hub(arguments.root, arguments.token, frozenset(arguments.gated), arguments.slow)
    with Server(hub, arguments.bind, arguments.port) as server:
        if arguments.port_file:
            arguments.port_file.write_text(f"{server.server_address[1]}\n")
        server.serve_forever()


if __name__ == "__main__":
    main()
