# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""What the unit tests share: the collection made importable, modules and plays run, a stand-in for systemd."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args
from hypothesis import settings

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "collections"))

# The tests share two cores with whatever else runs: no test fails for being slow once. The same examples each time, so
# that a change is what makes a test fail; HYPOTHESIS_PROFILE=search looks for others.
settings.register_profile("house", deadline=None, database=None, derandomize=True)
settings.register_profile("search", deadline=None, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "house"))


def warned(answer: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> str:
    """A module's warnings: in its answer, or on stderr where something before has made this process a controller."""
    return f"{answer.get('warnings')} {capfd.readouterr().err}"


# A stand-in for systemctl: plays the units of systemd.json, changes them as systemd would, and records each call.
SYSTEMCTL = """#!{python} -IS
import datetime, json, os, pathlib, sys
state_file = pathlib.Path({state!r})
state = json.loads(state_file.read_text())
verb, words = sys.argv[1], [word for word in sys.argv[2:] if word.startswith("vllm@")]
state["calls"].append([word for word in sys.argv[1:]])
units = state["units"]
def unit(name):
    return units.setdefault(name, dict(
        Result="success", NRestarts="0", ExecMainStartTimestamp="", Id=name, LoadState="loaded",
        ActiveState="inactive", SubState="dead", UnitFileState="disabled"))
code = 0
if verb in state["fail"]:
    print(state["fail"][verb], file=sys.stderr)
    code = 1
elif verb == "show":
    state["shows"] += 1
    for number, name, change in state["later"]:
        if state["shows"] >= number:
            unit(name).update(change)
    asked = sys.argv[sys.argv.index("--property") + 1].split(",")
    assert "--timestamp=us" in sys.argv and os.environ["TZ"] == "UTC", "what parse_show relies on"
    blocks = [[key + "=" + value for key, value in unit(name).items() if key in asked] for name in words]
    print("\\n\\n".join("\\n".join(block) for block in blocks))
elif verb == "stop":
    for name in words:
        unit(name).update(ActiveState="inactive", SubState="dead")
elif verb == "start":
    now = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=1)
    for name in words:
        unit(name).update(ActiveState="active", SubState="running",
                          ExecMainStartTimestamp=now.strftime("%a %Y-%m-%d %H:%M:%S.%f UTC"))
elif verb == "enable":
    for name in words:
        unit(name)["UnitFileState"] = "enabled"
        (pathlib.Path(state["wants"]) / name).symlink_to("/etc/systemd/system/vllm@.service")
elif verb == "disable":
    for name in words:
        unit(name).update(ActiveState="inactive", SubState="dead", UnitFileState="disabled")
        (pathlib.Path(state["wants"]) / name).unlink(missing_ok=True)
elif verb not in ("daemon-reload", "reset-failed"):
    sys.exit("the stand-in has no " + verb)
state_file.write_text(json.dumps(state))
sys.exit(code)
"""

# A stand-in for journalctl: the last lines of the unit's file, or all lines of a process of it.
JOURNALCTL = """#!/bin/sh
lines=+1
while [ $# -gt 0 ]; do
  case $1 in --lines) lines=$2; shift;; --unit) unit=$2; shift;; _SYSTEMD_INVOCATION_ID=*) unit=${{1#*=}};; esac
  shift
done
tail -n "$lines" "{folder}/$unit.journal" 2>/dev/null
"""


@dataclass
class Systemd:
    """A host with stand-ins for systemctl and journalctl, and real folders."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path in (self.bin, self.wants, self.config_dir):
            path.mkdir()
        self._write({"units": {}, "fail": {}, "later": [], "calls": [], "shows": 0, "wants": str(self.wants)})
        self._script("systemctl", SYSTEMCTL.format(python=sys.executable, state=str(self.state_file)))
        self._script("journalctl", JOURNALCTL.format(folder=self.folder))
        self.environment = {"PATH": f"{self.bin}:{os.environ['PATH']}"}

    @property
    def bin(self) -> Path:
        return self.folder / "bin"

    @property
    def wants(self) -> Path:
        return self.folder / "wants"

    @property
    def config_dir(self) -> Path:
        return self.folder / "vllm"

    @property
    def state_file(self) -> Path:
        return self.folder / "systemd.json"

    def _script(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def _read(self) -> dict[str, Any]:
        return json.loads(self.state_file.read_text())

    def _write(self, state: dict[str, Any]) -> None:
        self.state_file.write_text(json.dumps(state))

    def unit(self, name: str, started: float | None = None, **properties: str) -> None:
        """An instance as systemd shows it: running since ``started`` (long ago by default) unless told otherwise."""
        started = time.time() - 3600 if started is None else started
        began = datetime.fromtimestamp(started, timezone.utc).strftime("%a %Y-%m-%d %H:%M:%S.%f UTC")
        shown = {
            "Result": "success",
            "NRestarts": "0",
            "ExecMainStartTimestamp": began,
            "Id": f"vllm@{name}.service",
            "LoadState": "loaded",
            "ActiveState": "active",
            "SubState": "running",
            "UnitFileState": "enabled",
            "InvocationID": f"process-of-{name}",
        }
        state = self._read()
        state["units"][shown["Id"]] = {**shown, **properties}
        self._write(state)
        if state["units"][shown["Id"]]["UnitFileState"] == "enabled":
            (self.wants / shown["Id"]).symlink_to("/etc/systemd/system/vllm@.service")

    def fail(self, verb: str, message: str | None) -> None:
        state = self._read()
        state["fail"] = {verb: message} if message else {}
        self._write(state)

    def later(self, shows: int, name: str, **properties: str) -> None:
        """From that many calls of ``systemctl show`` on, the unit has these properties."""
        state = self._read()
        state["later"].append([shows, f"vllm@{name}.service", properties])
        self._write(state)

    def log(self, name: str, *lines: str, before: tuple[str, ...] = ()) -> None:
        """What its process has logged, and in the unit's journal what processes ``before`` it have."""
        (self.folder / f"process-of-{name}.journal").write_text("".join(f"{line}\n" for line in lines))
        both = (*before, *lines)
        (self.folder / f"vllm@{name}.service.journal").write_text("".join(f"{line}\n" for line in both))

    @property
    def calls(self) -> list[list[str]]:
        """What was asked of systemctl, without the looking."""
        return [call for call in self._read()["calls"] if call[0] != "show"]

    def forget_calls(self) -> None:
        self._write({**self._read(), "calls": []})


@pytest.fixture
def systemd(tmp_path: Path) -> Systemd:
    return Systemd(tmp_path)


@pytest.fixture
def run_module(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs a module of the collection as Ansible does, and returns what it says. ``patch`` moves its own paths."""

    def run(
        name: str,
        args: dict[str, Any],
        *,
        patch: dict[str, object] | None = None,
        environment: dict[str, str] | None = None,
        check: bool = False,
    ) -> dict[str, Any]:
        module = importlib.import_module(f"ansible_collections.llmfleet.serving.plugins.modules.{name}")
        output = io.StringIO()
        with monkeypatch.context() as patched, contextlib.redirect_stdout(output):
            for attribute, value in (patch or {}).items():
                patched.setattr(module, attribute, value)
            for variable, value in (environment or {}).items():
                patched.setenv(variable, value)
            with patch_module_args({**args, "_ansible_check_mode": check}), pytest.raises(SystemExit) as ended:
                module.main()
        answer = json.loads(output.getvalue())
        assert ended.value.code == (1 if answer.get("failed") else 0)
        return answer

    return run


@pytest.fixture
def run_playbook(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a play with the real ansible-playbook on hosts that are this machine."""

    def run(
        play: list[dict[str, Any]] | str, *arguments: str, hosts: int = 1, inventory: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        inventory = inventory or tmp_path / "inventory"
        inventory.mkdir(exist_ok=True)
        (inventory / "hosts").write_text("".join(f"host{n} ansible_connection=local\n" for n in range(1, hosts + 1)))
        book = tmp_path / "play.yml"
        book.write_text(play if isinstance(play, str) else json.dumps(play))
        return subprocess.run(
            [sys.executable, "-m", "ansible", "playbook", "-i", str(inventory), str(book), *arguments],
            cwd=tmp_path,
            env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run
