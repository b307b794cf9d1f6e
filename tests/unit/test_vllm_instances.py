# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""vllm_instances run as a module, against real files and a stand-in for systemctl."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.llmfleet.serving.plugins.modules import vllm_instances

Module = Callable[..., dict[str, Any]]


@pytest.fixture
def module(run_module: Any, systemd: Any) -> Module:
    def run(*names: str, check: bool = False, paths: list[Path] | None = None) -> dict[str, Any]:
        folder = systemd.config_dir
        instances = [{"name": name, "paths": [str(path) for path in paths or files_of(folder, name)]} for name in names]
        return run_module(
            "vllm_instances",
            {"instances": instances, "config_dir": str(folder), "started_dir": str(started_dir(systemd))},
            patch={"WANTS": systemd.wants},
            environment=systemd.environment,
            check=check,
        )

    return run


def started_dir(systemd: Any) -> Path:
    return systemd.folder / "started"


def files_of(folder: Path, name: str) -> list[Path]:
    return [folder / f"{name}.yaml", folder / f"{name}.env"]


def write(systemd: Any, *names: str) -> None:
    for name in names:
        for path in files_of(systemd.config_dir, name):
            path.write_text("x\n")


def steps(answer: dict[str, Any]) -> list[tuple[str, str]]:
    return [(step["action"], step["name"]) for step in answer["steps"]]


def test_bare_host_to_running_in_four_runs(module: Module, systemd: Any) -> None:
    """Check mode, for real, check mode, for real."""
    write(systemd, "a", "b")
    foreseen = module("a", "b", check=True)
    assert foreseen["changed"]
    assert steps(foreseen) == [("start", "a"), ("enable", "a"), ("start", "b"), ("enable", "b")]
    assert foreseen["diff"]["before"] == ""
    assert foreseen["diff"]["after"].splitlines()[0] == "start vllm@a.service: it is not running"
    assert systemd.calls == []
    done = module("a", "b")
    assert (done["changed"], done["steps"]) == (True, foreseen["steps"])
    assert systemd.calls == [
        ["daemon-reload"],
        ["start", "vllm@a.service", "vllm@b.service"],
        ["enable", "vllm@a.service", "vllm@b.service"],
    ]
    systemd.forget_calls()
    for check in (True, False):
        again = module("a", "b", check=check)
        assert (again["changed"], again["steps"], again["diff"]["after"]) == (False, [], "")
    assert systemd.calls == []


def test_newer_file_restarts_its_instance_and_no_other(module: Module, systemd: Any) -> None:
    write(systemd, "a", "b")
    systemd.unit("a", started=time.time() + 60)
    systemd.unit("b", started=time.time() - 60)
    assert steps(module("a", "b")) == [("restart", "b")]
    assert systemd.calls == [["daemon-reload"], ["stop", "vllm@b.service"], ["start", "vllm@b.service"]]
    assert not module("a", "b")["changed"]


@pytest.mark.parametrize("how", ["write", "utime", "chmod", "replace", "add", "delete"])
def test_change_is_seen_whatever_its_date(module: Module, systemd: Any, tmp_path: Path, how: str) -> None:
    """rsync and cp -p bring old dates along."""
    file, folder = tmp_path / "recipe.txt", tmp_path / "model"
    folder.mkdir()
    file.write_text("1")
    (folder / "old").write_text("1")
    began = time.time() + 0.02
    time.sleep(0.05)
    systemd.unit("a", started=began)
    assert not module("a", paths=[file, folder])["changed"]
    match how:
        case "write":
            file.write_text("2")
        case "utime":
            file.write_text("2")
            os.utime(file, (0, 0))
        case "chmod":
            file.chmod(0o640)
        case "replace":
            (tmp_path / "new").write_text("2")
            os.utime(tmp_path / "new", (0, 0))
            (tmp_path / "new").rename(file)
        case "add":
            (folder / "new").write_text("1")
            os.utime(folder, (0, 0))
        case "delete":
            (folder / "old").unlink()
    assert steps(module("a", paths=[file, folder])) == [("restart", "a")]


def test_link_that_leads_elsewhere_restarts(module: Module, systemd: Any, tmp_path: Path) -> None:
    for name in ("v1", "v2"):
        (tmp_path / name).mkdir()
    (tmp_path / "current").symlink_to("v1")
    began = time.time() + 0.02
    time.sleep(0.05)
    systemd.unit("a", started=began)
    assert not module("a", paths=[tmp_path / "current"])["changed"]
    (tmp_path / "new").symlink_to("v2")
    (tmp_path / "new").rename(tmp_path / "current")
    assert steps(module("a", paths=[tmp_path / "current"])) == [("restart", "a")]


def test_change_behind_a_link_restarts(module: Module, systemd: Any, tmp_path: Path) -> None:
    (tmp_path / "v1").mkdir()
    (tmp_path / "current").symlink_to("v1")
    began = time.time() + 0.02
    time.sleep(0.05)
    systemd.unit("a", started=began)
    (tmp_path / "v1/config.json").write_text("{}")
    assert steps(module("a", paths=[tmp_path / "current"])) == [("restart", "a")]


def test_missing_files_are_no_change(module: Module, systemd: Any, tmp_path: Path) -> None:
    """A check run on a host that lacks some of them."""
    systemd.unit("a")
    assert module("a", check=True, paths=[tmp_path / "missing", tmp_path / "missing/below"])["steps"] == []


def test_undeclared_instances_go(module: Module, systemd: Any) -> None:
    """One with files and a unit, one with files only, one with a unit only; what is no instance of ours stays."""
    write(systemd, "a", "both.v1", "files")
    (systemd.config_dir / "hf_token").write_text("x")
    systemd.unit("a", started=time.time() + 60)
    systemd.unit("both.v1")
    systemd.unit("link")
    (systemd.wants / "ssh.service").symlink_to("/lib/systemd/system/ssh.service")
    expected = [("remove", name) for name in ("both.v1", "files", "link")]
    assert steps(module("a", check=True)) == expected
    assert (systemd.config_dir / "files.env").exists()
    assert steps(module("a")) == expected
    assert systemd.calls[0][:2] == ["disable", "--now"]
    assert {"vllm@both.v1.service", "vllm@link.service"} <= set(systemd.calls[0])
    assert {path.name for path in systemd.config_dir.iterdir()} == {"a.yaml", "a.env", "hf_token"}
    assert {path.name for path in systemd.wants.iterdir()} == {"vllm@a.service", "ssh.service"}
    assert not module("a")["changed"]


def test_no_instances_at_all(module: Module, systemd: Any) -> None:
    assert not module()["changed"]
    write(systemd, "a")
    systemd.unit("a")
    assert steps(module()) == [("remove", "a")]
    assert list(systemd.config_dir.iterdir()) == []


def test_removal_comes_before_starts_and_needs_the_unit_reread(module: Module, systemd: Any) -> None:
    write(systemd, "old", "new")
    systemd.unit("old")
    module("new")
    assert [call[0] for call in systemd.calls] == ["disable", "daemon-reload", "start", "enable"]


def test_process_that_nobody_has_measured_is_told_whoever_started_it(module: Module, systemd: Any) -> None:
    for name in ("known", "by-hand", "never"):
        systemd.unit(name, started=time.time() - 60)
    systemd.unit("stopped", ActiveState="inactive", SubState="dead")
    started_dir(systemd).mkdir()
    for name in ("known", "by-hand", "stopped"):
        (started_dir(systemd) / f"{name}.json").write_text("{}")
    os.utime(started_dir(systemd) / "by-hand.json", (time.time() - 120,) * 2)
    names = ("known", "by-hand", "never", "stopped")
    assert module(*names, check=True)["unmeasured"] == []
    answer = module(*names)
    assert steps(answer) == [("start", "stopped")]
    assert answer["unmeasured"] == ["by-hand", "never", "stopped"]


def test_what_was_planned_and_measured_goes_with_the_instance(module: Module, systemd: Any) -> None:
    write(systemd, "a", "gone")
    started_dir(systemd).mkdir()
    for name in ("a", "gone"):
        (systemd.config_dir / f"{name}.plan.json").write_text("{}")
        (started_dir(systemd) / f"{name}.json").write_text("{}")
        systemd.unit(name)
    module("a")
    assert {path.name for path in systemd.config_dir.iterdir()} == {"a.yaml", "a.env", "a.plan.json"}
    assert [path.name for path in started_dir(systemd).iterdir()] == ["a.json"]


def test_folders_that_are_not_there(module: Module, systemd: Any) -> None:
    """Check mode on a bare host."""
    systemd.config_dir.rmdir()
    systemd.wants.rmdir()
    assert steps(module("a", check=True)) == [("start", "a"), ("enable", "a")]


def test_failed_instance_is_started_again(module: Module, systemd: Any) -> None:
    write(systemd, "a")
    systemd.unit("a", ActiveState="failed", SubState="failed", Result="exit-code")
    answer = module("a")
    assert answer["steps"] == [{"name": "a", "action": "start", "why": "it has failed"}]
    assert ["reset-failed", "vllm@a.service"] in systemd.calls


@pytest.mark.parametrize("verb", ["start", "stop", "enable", "disable", "daemon-reload"])
def test_failure_of_systemctl_is_told_and_mended_by_the_next_run(module: Module, systemd: Any, verb: str) -> None:
    write(systemd, "start", "restart", "enable", "gone")
    systemd.unit("restart", started=time.time() - 60)
    systemd.unit("enable", started=time.time() + 60, UnitFileState="disabled")
    systemd.unit("gone")
    systemd.fail(verb, f"Failed to {verb}: not today.")
    answer = module("start", "restart", "enable")
    assert answer["failed"]
    assert f"Failed to {verb}: not today." in answer["msg"] + answer.get("stderr", "")
    systemd.fail(verb, None)
    assert module("start", "restart", "enable")["changed"]
    assert not module("start", "restart", "enable")["changed"]


def test_instance_can_go_where_the_unit_is_not_there(module: Module, systemd: Any) -> None:
    """After a run that was cut short before the unit was written; this is what systemd 252 and 257 then say."""
    write(systemd, "a")
    nowhere = {"LoadState": "not-found", "UnitFileState": "", "ExecMainStartTimestamp": ""}
    systemd.unit("a", ActiveState="inactive", SubState="dead", **nowhere)
    (systemd.wants / "vllm@a.service").symlink_to("/etc/systemd/system/vllm@.service")
    systemd.fail("disable", "Failed to disable unit: Unit file vllm@a.service does not exist.")
    assert steps(module()) == [("remove", "a")]
    assert list(systemd.config_dir.iterdir()) == []
    assert not module()["changed"]


def test_names_of_instances_come_from_files_and_links(systemd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write(systemd, "a.b-c_d")
    systemd.unit("e.f")
    (systemd.config_dir / "x.env").write_text("")
    monkeypatch.setattr(vllm_instances, "WANTS", systemd.wants)
    assert vllm_instances.present(systemd.config_dir) == {"a.b-c_d", "e.f"}


def test_models_that_change_ports_all_stop_before_one_starts(module: Module, systemd: Any) -> None:
    write(systemd, "a", "b")
    for name in ("a", "b"):
        systemd.unit(name, started=time.time() - 60)
    assert steps(module("a", "b")) == [("restart", "a"), ("restart", "b")]
    both = ["vllm@a.service", "vllm@b.service"]
    assert systemd.calls == [["daemon-reload"], ["stop", *both], ["start", *both]]


def test_check_mode_foresees_restarts_by_files_that_it_has_not_written(
    run_module: Any, systemd: Any, module: Module
) -> None:
    write(systemd, "a", "b")
    module("a", "b")
    instances = [{"name": name, "paths": [str(path) for path in files_of(systemd.config_dir, name)]} for name in "ab"]
    answer = run_module(
        "vllm_instances",
        {"instances": instances, "config_dir": str(systemd.config_dir), "changed": ["b"]},
        patch={"WANTS": systemd.wants},
        environment=systemd.environment,
        check=True,
    )
    assert steps(answer) == [("restart", "b")]
