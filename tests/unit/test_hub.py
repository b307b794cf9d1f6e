# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""The stand-in for the hub speaks the hub's protocol. `hf download` against it is tried where that is installed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

HUB = Path(__file__).parents[1] / "hub" / "hub.py"
CONFIG = b'{"model_type": "llama"}\n'
WEIGHTS = bytes(range(256)) * 4096  # 1 MiB
TOKEN = "hf_right"


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


def test_huggingface_hub_downloads_a_snapshot(hub: str, root: Path, tmp_path: Path) -> None:
    """Where the library is installed. It is not in requirements-test.in, because vLLM's own is what counts."""
    pytest.importorskip("huggingface_hub")
    script = "import sys, huggingface_hub as h; h.snapshot_download('acme/tiny', local_dir=sys.argv[1])"
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "*"}
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "to")], env=environment, check=True)
    for path in (root / "acme/tiny").rglob("*.*"):
        assert (tmp_path / "to" / path.relative_to(root / "acme/tiny")).read_bytes() == path.read_bytes()
