# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""The stand-in for the hub speaks the hub's protocol: asked by hand, and by the hub's own client."""

from __future__ import annotations

import hashlib
import http.client
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

HUB = Path(__file__).parents[1] / "hub" / "hub.py"
CONFIG = b'{"model_type": "llama"}\n'
WEIGHTS = bytes(range(256)) * 4096  # 1 MiB
TOKEN = "hf_right"
OUTSIDER = "hf_other"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    for name in ("acme/tiny", "acme/closed"):
        (root / name / "sub").mkdir(parents=True)
        (root / name / "config.json").write_bytes(CONFIG)
        (root / name / "model.safetensors").write_bytes(WEIGHTS)
        (root / name / "sub" / "a b.txt").write_text("in a folder\n")
    (tmp_path / "secret.txt").write_text("not below the root\n")
    return root


@contextmanager
def running(root: Path, *arguments: str) -> Iterator[str]:
    """The hub as a program of its own, as the tests of the roles start it."""
    port_file = root.parent / "port"
    port_file.unlink(missing_ok=True)
    command = [sys.executable, str(HUB), "--root", str(root), "--port-file", str(port_file), *arguments]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        for _ in range(500):
            if port_file.exists() and (port := port_file.read_text()).endswith("\n"):
                break
            assert process.poll() is None, "the hub has ended"
            time.sleep(0.02)
        host = "[::1]" if "::1" in arguments else "127.0.0.1"
        yield f"http://{host}:{port.strip()}"
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture
def hub(root: Path) -> Iterator[str]:
    with running(root, "--token", TOKEN, "--gated", "acme/closed") as url:
        yield url


class Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_args: Any) -> None:
        return None


OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), Stay)


def ask(url: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        with OPENER.open(urllib.request.Request(url, method=method, headers=names), timeout=10) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read()


def commit(hub: str) -> str:
    return json.loads(ask(f"{hub}/api/models/acme/tiny")[2])["sha"]


def test_information(hub: str) -> None:
    status, _, body = ask(f"{hub}/api/models/acme/tiny/revision/main?blobs=True")
    answer = json.loads(body)
    assert status == 200
    assert answer["id"] == "acme/tiny"
    assert len(answer["sha"]) == 40
    assert [file["rfilename"] for file in answer["siblings"]] == ["config.json", "model.safetensors", "sub/a b.txt"]
    assert ask(f"{hub}/api/models/acme/tiny/revision/{answer['sha']}")[0] == 200
    assert ask(f"{hub}/api/models/acme/tiny/revision/refs%2Fheads%2Fmain")[0] == 200


def test_tree_has_sizes_and_hashes(hub: str) -> None:
    entries = json.loads(ask(f"{hub}/api/models/acme/tiny/tree/main?recursive=True&expand=False")[2])
    by_path = {entry["path"]: entry for entry in entries}
    blob = hashlib.sha1(b"blob %d\0" % len(CONFIG) + CONFIG).hexdigest()  # noqa: S324
    assert by_path["config.json"] == {"type": "file", "path": "config.json", "size": len(CONFIG), "oid": blob}
    large = {"oid": hashlib.sha256(WEIGHTS).hexdigest(), "size": len(WEIGHTS), "pointerSize": 134}
    assert by_path["model.safetensors"]["lfs"] == large
    folder = json.loads(ask(f"{hub}/api/models/acme/tiny/tree/main/sub?recursive=True")[2])
    assert [entry["path"] for entry in folder] == ["sub/a b.txt"]
    top = json.loads(ask(f"{hub}/api/models/acme/tiny/tree/main?recursive=false")[2])
    kinds = [(entry["type"], entry["path"]) for entry in top]
    assert kinds == [("file", "config.json"), ("file", "model.safetensors"), ("directory", "sub")]


def test_commit_is_that_of_the_content(hub: str, root: Path) -> None:
    before = commit(hub)
    assert commit(hub) == before
    (root / "acme/tiny/config.json").write_bytes(CONFIG.replace(b"llama", b"qwen3"))
    after = commit(hub)
    assert after != before
    assert ask(f"{hub}/acme/tiny/resolve/{before}/config.json")[1]["X-Error-Code"] == "RevisionNotFound"
    (root / "acme/tiny/config.json").write_bytes(CONFIG)
    assert commit(hub) == before


def test_branch_redirects_to_the_commit(hub: str) -> None:
    for method in ("HEAD", "GET"):
        status, headers, body = ask(f"{hub}/acme/tiny/resolve/main/sub/a%20b.txt", method)
        assert (status, body) == (307, b"")
        assert headers["Location"] == f"/acme/tiny/resolve/{commit(hub)}/sub/a%20b.txt"
        assert headers["X-Repo-Commit"] == commit(hub)
        assert headers["ETag"]
    assert ask(hub + headers["Location"])[2] == b"in a folder\n"


def test_file(hub: str) -> None:
    url = f"{hub}/acme/tiny/resolve/{commit(hub)}/model.safetensors"
    status, headers, body = ask(url, "HEAD")
    assert (status, body) == (200, b"")
    assert headers["Content-Length"] == str(len(WEIGHTS))
    assert headers["X-Repo-Commit"] == commit(hub)
    assert headers["ETag"] == f'"{hashlib.sha256(WEIGHTS).hexdigest()}"'
    assert ask(url)[2] == WEIGHTS


@pytest.mark.parametrize(
    ("wanted", "first", "end"),
    [("0-7", 0, 8), ("8-", 8, None), ("-5", -5, None), ("1048570-9999999", 1048570, None), ("1048575-", -1, None)],
)
def test_range(hub: str, wanted: str, first: int, end: int | None) -> None:
    url = f"{hub}/acme/tiny/resolve/{commit(hub)}/model.safetensors"
    status, headers, body = ask(url, Range=f"bytes={wanted}")
    part = WEIGHTS[first:end]
    start = first % len(WEIGHTS)
    assert status == 206
    assert body == part
    assert headers["Content-Length"] == str(len(part))
    assert headers["Content-Range"] == f"bytes {start}-{start + len(part) - 1}/{len(WEIGHTS)}"


def test_range_after_the_end(hub: str) -> None:
    url = f"{hub}/acme/tiny/resolve/{commit(hub)}/model.safetensors"
    status, headers, _ = ask(url, Range=f"bytes={len(WEIGHTS)}-")
    assert status == 416
    assert headers["Content-Range"] == f"bytes */{len(WEIGHTS)}"


@pytest.mark.parametrize("path", ["api/models/acme/closed/revision/main", "acme/closed/resolve/main/config.json"])
def test_gated(hub: str, path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer hf_wrong"}, {"Authorization": "Bearer "}):
        status, answer, _ = ask(f"{hub}/{path}", **headers)
        assert (status, answer["X-Error-Code"]) == (401, "GatedRepo")
    assert ask(f"{hub}/{path}", Authorization=f"Bearer {TOKEN}")[0] in (200, 307)


def test_gated_without_a_token_opens_to_nobody(root: Path) -> None:
    with running(root, "--gated", "acme/closed") as hub:
        assert ask(f"{hub}/api/models/acme/closed", Authorization="Bearer ")[0] == 401


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("api/models/acme/none/revision/main", "RepoNotFound"),
        ("acme/none/resolve/main/config.json", "RepoNotFound"),
        ("api/models/acme/tiny/revision/v9", "RevisionNotFound"),
        ("api/models/acme/tiny/tree/v9", "RevisionNotFound"),
        ("acme/tiny/resolve/v9/config.json", "RevisionNotFound"),
        ("acme/tiny/resolve/main/none.json", "EntryNotFound"),
        ("acme/tiny/resolve/main/sub", "EntryNotFound"),
        ("acme/tiny/resolve/main/../../../secret.txt", "EntryNotFound"),
        ("acme/tiny/resolve/main/..%2F..%2F..%2Fsecret.txt", "EntryNotFound"),
        ("api/models/acme/%2E%2E/revision/main", "RepoNotFound"),
        ("api/whoami-v2", "NotFound"),
    ],
)
def test_missing(hub: str, path: str, code: str) -> None:
    status, headers, body = ask(f"{hub}/{path}")
    assert (status, headers["X-Error-Code"]) == (404, code)
    assert json.loads(body)["error"] == headers["X-Error-Message"]


def test_ipv6(root: Path) -> None:
    with running(root, "--bind", "::1") as hub:
        assert ask(f"{hub}/acme/tiny/resolve/{commit(hub)}/config.json")[2] == CONFIG


def test_slow(root: Path) -> None:
    with running(root, "--slow", str(2 * len(WEIGHTS))) as hub:
        url = f"{hub}/acme/tiny/resolve/{commit(hub)}/model.safetensors"
        start = time.monotonic()
        assert ask(url)[2] == WEIGHTS
        assert time.monotonic() - start >= 0.4  # half a second, less the rounding of the sleeps


def test_information_with_sizes(hub: str) -> None:
    """`?blobs=true` is how a client learns the sizes without a request for each file."""
    files = {
        file.pop("rfilename"): file for file in json.loads(ask(f"{hub}/api/models/acme/tiny?blobs=true")[2])["siblings"]
    }
    blob = hashlib.sha1(b"blob %d\0" % len(CONFIG) + CONFIG).hexdigest()  # noqa: S324
    assert files["config.json"] == {"size": len(CONFIG), "blobId": blob}
    large = {"sha256": hashlib.sha256(WEIGHTS).hexdigest(), "size": len(WEIGHTS), "pointerSize": 134}
    assert files["model.safetensors"]["lfs"] == large
    assert all(set(file) == {"rfilename"} for file in json.loads(ask(f"{hub}/api/models/acme/tiny")[2])["siblings"])


@pytest.mark.parametrize(
    ("token", "closed", "private"),
    [("", (401, "GatedRepo"), (401, "RepoNotFound")), (OUTSIDER, (403, "GatedRepo"), (404, "RepoNotFound"))],
)
def test_who_may_not_read(token: str, closed: tuple[int, str], private: tuple[int, str], root: Path) -> None:
    """The hub does not tell strangers that a private repository exists."""
    (root / "acme/closed").rename(root / "acme/private")
    (root / "acme/tiny").rename(root / "acme/closed")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    arguments = ("--token", TOKEN, "--outsider", OUTSIDER, "--gated", "acme/closed", "--private", "acme/private")
    with running(root, *arguments, "--listed") as hub:
        for name, expected in (("closed", closed), ("private", private)):
            status, answer, _ = ask(f"{hub}/acme/{name}/resolve/main/config.json", **headers)
            assert (status, answer["X-Error-Code"]) == expected
            assert ask(f"{hub}/acme/{name}/resolve/main/config.json", Authorization=f"Bearer {TOKEN}")[0] == 307
        assert ask(f"{hub}/api/models/acme/closed", **headers)[0] == 200, "--listed"
        assert ask(f"{hub}/api/models/acme/private", **headers)[0] == private[0]


def test_large_files_come_from_the_cdn(root: Path) -> None:
    with running(root, "--token", TOKEN, "--gated", "acme/tiny", "--cdn-port", "0") as hub:
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        base = f"{hub}/acme/tiny/resolve/{json.loads(ask(f'{hub}/api/models/acme/tiny', **bearer)[2])['sha']}"
        assert ask(f"{base}/config.json", **bearer)[2] == CONFIG
        status, headers, body = ask(f"{base}/model.safetensors", **bearer)
        assert (status, body) == (302, b"")
        assert headers["X-Linked-Size"] == str(len(WEIGHTS))
        assert headers["X-Linked-ETag"] == f'"{hashlib.sha256(WEIGHTS).hexdigest()}"'
        elsewhere = headers["Location"]
        assert not elsewhere.startswith(f"{hub}/")
        assert ask(elsewhere)[2] == WEIGHTS
        assert ask(elsewhere, Range="bytes=3-5")[2] == WEIGHTS[3:6]
        assert ask(elsewhere, **bearer)[0] == 400, "the token is not for others"
        assert ask(elsewhere.replace("acme/tiny", "acme/none"))[0] == 404
        assert ask(elsewhere.replace("model.safetensors", "none"))[0] == 404


@pytest.fixture
def standin(root: Path) -> Iterator[Any]:
    """The stand-in in this process, where its faults and what it was asked can be reached; ``url`` leads to it."""
    spec = importlib.util.spec_from_file_location("hub", HUB)
    assert spec
    assert spec.loader
    program = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = program  # dataclasses look themselves up there
    spec.loader.exec_module(program)
    program.Handler.log_message = lambda *_: None
    program.hub = program.Hub(root)
    with ExitStack() as servers:
        server = servers.enter_context(program.Server(program.hub, "127.0.0.1", 0))
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        servers.callback(thread.join)
        servers.callback(server.shutdown)
        program.url = f"http://127.0.0.1:{server.server_address[1]}"
        yield program


def test_what_goes_wrong_on_demand(standin: Any) -> None:
    file = f"{standin.url}/acme/tiny/resolve/{commit(standin.url)}/model.safetensors"
    standin.hub.faults = [
        standin.Fault("model.safetensors", 2, 429, "Busy", {"Retry-After": "7"}),
        standin.Fault("model.safetensors", body=b"<html>"),
        standin.Fault("model.safetensors", whole=True),
        standin.Fault("model.safetensors", delay=0.2),
        standin.Fault("model.safetensors", cut=70_000),
    ]
    for _ in range(2):
        status, headers, _ = ask(file)
        assert (status, headers["Retry-After"], headers["X-Error-Code"]) == (429, "7", "Busy")
        assert ask(f"{standin.url}/api/models/acme/tiny")[0] == 200, "another path"
    assert ask(file)[::2] == (200, b"<html>")
    assert ask(file, Range="bytes=0-7")[::2] == (200, WEIGHTS)
    began = time.monotonic()
    assert ask(file, Range="bytes=0-7")[::2] == (206, WEIGHTS[:8])
    assert time.monotonic() - began >= 0.2
    with pytest.raises(http.client.IncompleteRead) as error:
        ask(file)
    assert error.value.partial == WEIGHTS[:70_000]
    assert ask(file)[::2] == (200, WEIGHTS), "all faults are used up"


def test_what_was_asked_is_kept(standin: Any) -> None:
    file = f"/acme/tiny/resolve/{commit(standin.url)}/model.safetensors"
    standin.hub.requests.clear()
    ask(standin.url + file, Range="bytes=0-7", Authorization="Bearer x")
    ask(standin.url + file, "HEAD")
    get, head = standin.hub.requests
    assert (get.method, get.path, get.status, get.sent) == ("GET", file, 206, 8)
    assert (get.headers["Authorization"], get.headers["Range"]) == ("Bearer x", "bytes=0-7")
    assert (head.method, head.status, head.sent) == ("HEAD", 200, 0)


def test_requests_at_a_time_are_counted(standin: Any) -> None:
    standin.hub.faults = [standin.Fault("/api/", 2, delay=0.5)]
    with ThreadPoolExecutor() as pool:
        assert [answer[0] for answer in pool.map(ask, [f"{standin.url}/api/models/acme/tiny"] * 2)] == [200, 200]
    ask(f"{standin.url}/api/models/acme/tiny")
    assert (standin.hub.busy, standin.hub.busiest) == (0, 2)


@pytest.mark.parametrize("cdn", [[], ["--cdn-port", "0"]], ids=["", "cdn"])
def test_huggingface_hub_downloads_a_snapshot(cdn: list[str], root: Path, tmp_path: Path) -> None:
    """The version that model_info has; on engine hosts it is that of vLLM, which the fleet scenario runs."""
    script = "import sys, huggingface_hub as h; h.snapshot_download('acme/closed', local_dir=sys.argv[1])"
    with running(root, "--token", TOKEN, "--gated", "acme/closed", *cdn) as hub:
        environment = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN, "NO_PROXY": "*"}
        command = [sys.executable, "-c", script, str(tmp_path / "to")]
        subprocess.run(command, env={**os.environ, **environment}, check=True)
    for path in (root / "acme/closed").rglob("*.*"):
        assert (tmp_path / "to" / path.relative_to(root / "acme/closed")).read_bytes() == path.read_bytes()
