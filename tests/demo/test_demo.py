"""`make demo` as a user runs it, what it leaves, and the built and installed collection on the same host."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parents[2]
HOSTS = [str(PROJECT / "tests/hosts/hosts.py")]


def run(*command: str, cwd: Path = PROJECT, **environment: Any) -> str:
    start = time.monotonic()
    done = subprocess.run(
        command,
        check=False,
        cwd=cwd,
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    print(f"{' '.join(command)}: {time.monotonic() - start:.1f} s")
    return done.stdout


def sudo() -> list[str]:
    return [] if os.geteuid() == 0 else ["sudo", "-E"]


@pytest.fixture(scope="module")
def demo() -> Iterator[str]:
    run(*sudo(), *HOSTS, "destroy", "--set", "demo")
    yield run("make", "demo")
    run(*sudo(), *HOSTS, "destroy", "--set", "demo")


def test_demo_ends_with_a_streamed_answer(demo: str) -> None:
    answer = demo.partition("The answer, as it streams")[2].partition("\n")[2].partition("\nUp in ")[0]
    assert len(answer.strip()) >= 20


def test_line_for_curl_works_as_it_is_printed(demo: str) -> None:
    line = re.search(r"^  (curl .*?completions)$", demo, re.DOTALL | re.MULTILINE)[1]
    assert '"object":"chat.completion"' in run("bash", "-c", f"{line} --silent")


@pytest.mark.usefixtures("demo")
def test_second_run_changes_nothing() -> None:
    output = run("ansible-playbook", "-i", "inventories/demo", "site.yml")
    assert "changed=0" in output
    print(f"no-change run of one host: {len(re.findall('^TASK', output, re.MULTILINE))} tasks")


@pytest.mark.usefixtures("demo")
def test_installed_collection_runs_from_anywhere(tmp_path: Path) -> None:
    run("ansible-galaxy", "collection", "build", "--output-path", str(tmp_path), str(PROJECT))
    archive = next(tmp_path.glob("llmfleet-serving-*.tar.gz"))
    # Not from the checkout, whose ansible.cfg would have galaxy find the collection installed already.
    anywhere = {"cwd": tmp_path, "ANSIBLE_COLLECTIONS_PATH": str(tmp_path / "collections")}
    run("ansible-galaxy", "collection", "install", str(archive), "--no-deps", **anywhere)
    output = run("ansible-playbook", "-i", str(PROJECT / "inventories/demo"), "llmfleet.serving.site", **anywhere)
    assert "changed=0" in output


def test_destroy_leaves_nothing() -> None:
    run(*sudo(), *HOSTS, "destroy", "--set", "demo")
    assert "demo1" not in run("ps", "-eo", "args")
    assert "lf-demo" not in run("ip", "-oneline", "link")
    assert "llmfleet-hosts:demo" not in run(*sudo(), "iptables-save")
    assert "/demo/" not in Path("/proc/mounts").read_text(encoding="utf-8")
