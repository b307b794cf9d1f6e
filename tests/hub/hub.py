#!/usr/bin/env python3
# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""A stand-in for the Hugging Face hub: serves ROOT/<org>/<name>/ to whoever has it for HF_ENDPOINT.

Only what `hf download`, vLLM and model_info ask for: the commit and the files of a repository, and the files with
ranges. Large files can come from a CDN with a port of its own, as the real hub's do, and what can go wrong does so on
demand (``Fault``). Each repository has one branch, main, and one commit, which is a hash of the content. Standard
library only.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import json
import re
import socket
import sys
import threading
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field
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
class Fault:
    """What goes wrong with the first ``times`` requests whose path has ``path``."""

    path: str
    times: int = 1
    status: int = 0  # the answer, with ``code`` and ``headers``; 0 is the right one
    code: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None  # in place of the hub's own words
    delay: float = 0  # seconds before the answer
    cut: int | None = None  # bytes of a file after which the connection ends
    whole: bool = False  # ignores the range that was asked for


NO_FAULT = Fault("", 0)


@dataclass
class Request:
    """One that was answered. ``sent`` is the length of the body, as far as it was sent."""

    method: str
    path: str
    headers: dict[str, str]
    port: int
    status: int = 0
    sent: int = 0


@dataclass
class Hub:
    """``listed``: gated repositories show everybody which files they have, as on the real hub."""

    root: Path
    token: str | None = None
    gated: frozenset[str] = frozenset()
    bytes_per_second: int | None = None
    private: frozenset[str] = frozenset()
    outsider: str | None = None  # a token that is valid and opens nothing
    listed: bool = False
    cdn: str = ""  # where large files come from: http://host:port
    faults: list[Fault] = field(default_factory=list)
    requests: deque[Request] = field(default_factory=lambda: deque(maxlen=10_000))
    lock: threading.Lock = field(default_factory=threading.Lock)
    busy: int = 0  # requests that wait for their answer
    busiest: int = 0

    def folder(self, name: str) -> Path:
        folder = self.root / name
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) or not folder.is_dir():
            raise HubError(HTTPStatus.NOT_FOUND, "RepoNotFound", "Repository not found")
        return folder

    def repository(self, name: str, authorization: str | None, listing: bool = False) -> Repository:
        folder = self.folder(name)
        given = (authorization or "").removeprefix("Bearer ")
        known = bool(self.outsider) and given == self.outsider
        if self._opens(given) or (listing and self.listed and name not in self.private):
            return Repository(name, folder)
        if name in self.private:
            status = HTTPStatus.NOT_FOUND if known else HTTPStatus.UNAUTHORIZED
            raise HubError(status, "RepoNotFound", "Repository not found")
        if name in self.gated:
            message = f"Access to model {name} is restricted. You must have access to it and be authenticated."
            raise HubError(HTTPStatus.FORBIDDEN if known else HTTPStatus.UNAUTHORIZED, "GatedRepo", message)
        return Repository(name, folder)

    def _opens(self, given: str) -> bool:
        return bool(self.token) and hmac.compare_digest(given.encode(), (self.token or "").encode())

    def count(self, step: int) -> None:
        with self.lock:
            self.busy += step
            self.busiest = max(self.busiest, self.busy)

    def fault(self, path: str) -> Fault:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.path in path:
                    fault.times -= 1
                    return fault
        return NO_FAULT


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub
    request_seen: Request
    fault: Fault

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        self.request_seen.status = int(code)
        self.log_message("%s %d %s", self.requestline, code, self.headers["Range"] or "")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        port = self.server.server_address[1]
        self.request_seen = Request(self.command, self.path, dict(self.headers), port)
        self.hub.requests.append(self.request_seen)
        self.fault = self.hub.fault(self.path)
        # Before the answer: a client that has it may ask for the next thing at once.
        self.hub.count(1)
        time.sleep(self.fault.delay)
        self.hub.count(-1)
        self.answer()

    def answer(self) -> None:
        path = urlsplit(self.path).path
        if self.fault.status or self.fault.body is not None:
            self.send_fault(self.fault)
            return
        try:
            for pattern, answer in ROUTES:
                if match := pattern.fullmatch(path):
                    parts = {key: unquote(value or "") for key, value in match.groupdict().items()}
                    listing = path.startswith("/api/")
                    repository = self.hub.repository(parts.pop("repository"), self.headers["Authorization"], listing)
                    answer(self, repository, **parts)
                    return
            raise HubError(HTTPStatus.NOT_FOUND, "NotFound", f"This stand-in has no {path}")
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)}
            self.send_json(error.status, {"error": str(error)}, headers)

    def send_fault(self, fault: Fault) -> None:
        headers = {"X-Error-Code": fault.code} if fault.code else {}
        status = HTTPStatus(fault.status or HTTPStatus.OK)
        if fault.body is None:
            self.send_json(status, {"error": status.phrase}, {**headers, **fault.headers})
        else:
            self.send_head(status, {**headers, **fault.headers}, len(fault.body))
            self.send_body(fault.body)

    def commit(self, repository: Repository, revision: str) -> str:
        commit = repository.commit()
        if revision not in ("main", "refs/heads/main", commit):
            raise HubError(HTTPStatus.NOT_FOUND, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def information(self, repository: Repository, revision: str = "main") -> None:
        if parse_qs(urlsplit(self.path).query).get("blobs", ["false"])[0].lower() == "true":
            files = [sibling(entry) for entry in repository.tree()]
        else:
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
        if self.hub.cdn and "lfs" in entry:
            place = f"{repository.name}/{entry['lfs']['oid']}/{quote(name)}"
            headers.update({"Location": f"{self.hub.cdn}/cdn/{place}", "X-Linked-Size": str(entry["size"])})
            headers["X-Linked-ETag"] = headers["ETag"]
            self.send_empty(HTTPStatus.FOUND, headers)
            return
        self.send_file(path, entry["size"], headers)

    def send_file(self, path: Path, size: int, headers: dict[str, str]) -> None:
        first, end, status = 0, size, HTTPStatus.OK
        asked = "" if self.fault.whole else self.headers["Range"] or ""
        if wanted := re.fullmatch(r"bytes=(\d*)-(\d*)", asked):
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
                if self.fault.cut is not None and self.request_seen.sent + len(block) > self.fault.cut:
                    self.send_body(block[: self.fault.cut - self.request_seen.sent])
                    self.close_connection = True
                    return
                self.send_body(block)
                time.sleep(len(block) / speed if speed else 0)

    def send_body(self, block: bytes) -> None:
        if self.command != "HEAD":
            self.wfile.write(block)
            self.request_seen.sent += len(block)

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
        self.send_body(content)


def sibling(entry: dict[str, Any]) -> dict[str, Any]:
    """A file as the information on a repository has it; entry is as its tree has it."""
    found = {"rfilename": entry["path"], "size": entry["size"], "blobId": entry["oid"]}
    if lfs := entry.get("lfs"):
        found["lfs"] = {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
    return found


REPOSITORY = r"(?P<repository>[^/]+/[^/]+)"
ROUTES = (
    (re.compile(rf"/api/models/{REPOSITORY}"), Handler.information),
    (re.compile(rf"/api/models/{REPOSITORY}/revision/(?P<revision>[^/]+)"), Handler.information),
    (re.compile(rf"/api/models/{REPOSITORY}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?"), Handler.tree),
    (re.compile(rf"/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<name>.+)"), Handler.resolve),
)


class CdnHandler(Handler):
    """Where large files come from. A signature in the address opens it; as on S3, a token beside it is an error."""

    def answer(self) -> None:
        try:
            if self.headers["Authorization"]:
                raise HubError(HTTPStatus.BAD_REQUEST, "InvalidArgument", "Only one authorization is allowed")
            match = re.fullmatch(rf"/cdn/{REPOSITORY}/\w+/(?P<name>.+)", urlsplit(self.path).path)
            files = Repository("", self.hub.folder(match["repository"])).files() if match else {}
            path = files.get(unquote(match["name"])) if match else None
            if not path:
                raise HubError(HTTPStatus.NOT_FOUND, "NoSuchKey", "The key does not exist")
            self.send_file(path, path.stat().st_size, {"Accept-Ranges": "bytes"})
        except HubError as error:
            self.send_json(error.status, {"error": str(error)})


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Hub, address: str, port: int, handler: type[Handler] = Handler) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        super().__init__((address, port), type("HubHandler", (handler,), {"hub": hub}))

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
    parser.add_argument("--private", action="append", default=[], metavar="ORG/NAME")
    parser.add_argument("--outsider", metavar="TOKEN", help="one that is valid and opens nothing")
    parser.add_argument("--listed", action="store_true", help="gated repositories show their files to everybody")
    parser.add_argument("--cdn-port", type=int, help="send large files from this one, 0 takes a free one")
    parser.add_argument("--port-file", type=Path, help="where to write the port when ready")
    arguments = parser.parse_args()
    hub = Hub(
        arguments.root,
        arguments.token,
        frozenset(arguments.gated),
        arguments.slow,
        frozenset(arguments.private),
        arguments.outsider,
        arguments.listed,
    )
    with ExitStack() as servers:
        if arguments.cdn_port is not None:
            start_cdn(servers, hub, arguments.bind, arguments.cdn_port)
        server = servers.enter_context(Server(hub, arguments.bind, arguments.port))
        if arguments.port_file:
            arguments.port_file.write_text(f"{server.server_address[1]}\n")
        server.serve_forever()


def start_cdn(servers: ExitStack, hub: Hub, address: str, port: int = 0) -> Server:
    cdn = servers.enter_context(Server(hub, address, port, CdnHandler))
    threading.Thread(target=cdn.serve_forever, daemon=True).start()
    servers.callback(cdn.shutdown)
    host = f"[{address}]" if ":" in address else address
    hub.cdn = f"http://{host}:{cdn.server_address[1]}"
    return cdn


if __name__ == "__main__":
    main()
