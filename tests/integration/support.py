"""What the Molecule scenarios' tests share: running playbooks as a user would, and being a client of the service."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import testinfra
from openai import OpenAI
from testinfra.host import Host

PROJECT = Path(os.environ["MOLECULE_PROJECT_DIRECTORY"])
INVENTORY = Path(os.environ["MOLECULE_INVENTORY_FILE"]).parent
HOSTS = Path(os.environ.get("LLMFLEET_HOSTS_DIR", "/var/lib/llmfleet-hosts")) / os.environ["LLMFLEET_HOSTS_SET"]
NAME = "llm.example.test"
COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # Molecule forces them, unless NO_COLOR is set


def host(name: str) -> Host:
    """A test host, over SSH. Not pytest-testinfra's own fixture, which cannot read an inventory with lookups."""
    return testinfra.get_host(f"ssh://{name}", ssh_config=str(HOSTS / "ssh_config"))


@dataclass(frozen=True)
class Run:
    """A finished run of ansible-playbook."""

    code: int
    output: str
    seconds: float

    def total(self, what: str) -> int:
        """A column of the recap, over all hosts."""
        return sum(int(count) for count in re.findall(rf"\b{what}=(\d+)", self.output))

    @property
    def said(self) -> str:
        """The output on one line, for lines break where they will."""
        return " ".join(self.output.split())

    @property
    def tasks(self) -> int:
        return len(re.findall(r"^TASK \[", self.output, re.MULTILINE))


def command(playbook: str, *arguments: str, variables: dict[str, Any] | None = None) -> list[str]:
    """A playbook of the collection by its name, or another by its path."""
    name = playbook if playbook.endswith(".yml") else f"llmfleet.serving.{playbook}"
    extra = ["--extra-vars", json.dumps(variables)] if variables else []
    return ["ansible-playbook", "--inventory", str(INVENTORY), *extra, *arguments, name]


def play(playbook: str, *arguments: str, variables: dict[str, Any] | None = None) -> Run:
    start = time.monotonic()
    done = subprocess.run(
        command(playbook, *arguments, variables=variables),
        check=False,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=PROJECT,
    )
    return Run(done.returncode, COLOURS.sub("", done.stdout), time.monotonic() - start)


def apply(playbook: str = "site", *arguments: str, variables: dict[str, Any] | None = None) -> Run:
    """A run that must end well."""
    run = play(playbook, *arguments, variables=variables)
    assert run.code == 0, run.output
    return run


def cut_short(
    when: Callable[[], bool], seconds: float, playbook: str = "site", variables: dict[str, Any] | None = None
) -> None:
    """Run a playbook and kill it, with all its processes on the controller, as soon as ``when`` is true."""
    mark = f"LLMFLEET_CUT={uuid.uuid4()}"
    process = subprocess.Popen(
        command(playbook, variables=variables),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=PROJECT,
        env={**os.environ, **dict([mark.split("=")])},
    )
    try:
        wait_until(lambda: when() or process.poll() is not None, seconds)
        assert process.poll() is None, "the run has ended before it could be cut short"
    finally:
        while found := bearing(mark):
            for number in found:
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
        process.wait()


def bearing(mark: str) -> list[int]:
    """Processes of this machine with that in their environment: Ansible's workers have sessions of their own."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.3)


def secret(name: str) -> str:
    return (INVENTORY / ".secrets" / name).read_text(encoding="utf-8").strip()


@contextmanager
def client(
    address: str, authorities: Path = INVENTORY / ".secrets" / "ca.crt", key: str | None = None
) -> Iterator[OpenAI]:
    """The OpenAI client, as an application would use it, with the service's name resolving to ``address``."""
    ask = socket.getaddrinfo

    def resolve(host: Any, *arguments: Any, **options: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        return ask(address if name == NAME else host, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", resolve)
        patch.setenv("SSL_CERT_FILE", str(authorities))
        patch.delenv("SSL_CERT_DIR", raising=False)
        yield OpenAI(base_url=f"https://{NAME}/v1", api_key=key or secret("api_key"), max_retries=0, timeout=120)


def stream(api: OpenAI, model: str, tokens: int, begun: threading.Event | None = None) -> list[tuple[float, str]]:
    """When each piece of a streamed answer came, in seconds since the request, and what it was.

    The answer must be whole; ``begun`` is set when its first piece has come. It has fewer pieces than tokens, for the
    random model says tokens without text as well.
    """
    start = time.monotonic()
    chunks = api.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Say something."}],
        max_tokens=tokens,
        temperature=0.8,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    choices = []
    for chunk in chunks:
        if chunk.choices:
            choices.append((time.monotonic() - start, chunk.choices[0]))
            if begun:
                begun.set()
    assert choices[-1][1].finish_reason == "length", "the answer has been cut"
    return [(when, choice.delta.content) for when, choice in choices if choice.delta.content]


def fetch(host: Host, url: str) -> str:
    """What the host itself gets from there; empty where nothing answers. Bare hosts have no curl."""
    program = f"import urllib.request as u; print(u.urlopen({url!r}, timeout=30).read().decode())"
    return host.run("python3 -c %s", program).stdout


def metric(host: Host, url: str, name: str) -> float:
    """The sum of a Prometheus metric over its labels."""
    lines = fetch(host, url).splitlines()
    assert lines, f"{url} does not answer"
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))


def exposure(host: Host, unit: str) -> float:
    """systemd's own score of a unit's confinement: 0 is confined, 10 is not."""
    line = host.check_output(f"systemd-analyze security --no-pager {unit} | tail -1")
    return float(re.search(r"(\d+\.\d+)", line)[1])


def listeners(host: Host) -> set[int]:
    """Ports that are listened on by more than the loopback addresses."""
    rows = (line.split() for line in host.check_output("ss -Hltn").splitlines())
    return {
        int(local.rpartition(":")[2])
        for _, _, _, local, *_ in rows
        if not local.startswith(("127.", "[::1]", "[::ffff:127."))
    }
