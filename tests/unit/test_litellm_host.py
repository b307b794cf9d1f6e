# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""litellm_host_info and litellm_switch run as modules, with stand-ins for systemctl and journalctl and a server."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.llmfleet.serving.plugins.module_utils import _litellm_host

KEY = "sk-of-the-administrator"
SALT = "the-salt-key-of-this-host"
SYSTEMCTL = """#!{python} -IS
import json, pathlib, sys
file = pathlib.Path({state!r})
state = json.loads(file.read_text())
verb, names = sys.argv[1], [word for word in sys.argv[2:] if word.startswith("litellm@")]
unit = lambda name: state["units"].setdefault(name, dict(Id=name, ActiveState="inactive", UnitFileState="disabled"))
if verb == "show":
    assert "--timestamp=us+utc" in sys.argv
    print("\\n\\n".join("\\n".join(f"{{key}}={{value}}" for key, value in unit(name).items()) for name in names))
else:
    if verb == state.get("refused"):
        sys.exit("Job for it failed.\\nSee the journal.")
    state["calls"].append(" ".join([verb, *(name.split("@")[1].split(".")[0] for name in names)]))
    change = {{"start": state["started"], "stop": dict(ActiveState="inactive"),
               "enable": dict(UnitFileState="enabled"), "disable": dict(UnitFileState="disabled")}}
    for name in names:
        unit(name).update(change.get(verb, {{}}))
file.write_text(json.dumps(state))
"""


@dataclass
class Host:
    folder: Path
    run_module: Any

    def __post_init__(self) -> None:
        for path in (self.bin, self.folder / "lists", self.folder / "proc/net", self.config, self.root):
            path.mkdir(parents=True)
        self.state = self.folder / "systemd.json"
        self.write({"units": {}, "calls": [], "started": {"ActiveState": "active"}})
        self.command("systemctl", SYSTEMCTL.format(python=sys.executable, state=str(self.state)))
        self.command("journalctl", "#!/bin/sh\necho '  File \"a.py\", line 1'\necho 'KeyError: no such model'\n")
        self.command("dpkg-query", "#!/bin/sh\nexit 1\n")

    @property
    def bin(self) -> Path:
        return self.folder / "bin"

    @property
    def config(self) -> Path:
        return self.folder / "etc"

    @property
    def root(self) -> Path:
        return self.folder / "opt"

    def command(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def read(self) -> dict[str, Any]:
        return json.loads(self.state.read_text())

    def write(self, state: dict[str, Any]) -> None:
        self.state.write_text(json.dumps(state))

    def unit(self, port: int, *, since: str = "10:00:00", **properties: str) -> None:
        state = self.read()
        shown = {"ActiveState": "active", "UnitFileState": "enabled", "NRestarts": "0", "Result": "success"}
        times = {"ActiveEnterTimestamp": f"Sat 2026-11-21 {since}.000000 UTC"}
        name = f"litellm@{port}.service"
        state["units"][name] = {"Id": name, **shown, **times, **properties}
        self.write(state)

    def files(self, port: int, salt: str = SALT) -> None:
        folder = self.config / str(port)
        folder.mkdir()
        (folder / "config.yaml").write_text("model_list: []\n")
        (folder / "env").write_text(f'# managed\nLITELLM_SALT_KEY="{salt}"\n')
        (folder / "venv").symlink_to(self.root / "1.0-0123abcd")

    def run(self, module: str, asked: dict[str, Any], **options: Any) -> dict[str, Any]:
        environment = {"PATH": f"{self.bin}:/bin:/usr/bin"}
        return self.run_module(module, asked, environment=environment, **options)

    def look(self, **options: Any) -> dict[str, Any]:
        paths = {
            "PROC": self.folder / "proc",
            "APT_LISTS": self.folder / "lists",
            "REDIS_UNIT": self.folder / "litellm-redis.service",
        }
        asked = {
            "ports": [4000, 4001],
            "salt_key": SALT,
            "packages": ["redis-server"],
            **{name: str(path) for name, path in (("config_dir", self.config), ("root", self.root))},
            "unit": str(self.folder / "litellm@.service"),
            **options,
        }
        return self.run("litellm_host_info", asked, patch=paths)


@pytest.fixture
def host(tmp_path: Path, run_module: Any) -> Host:
    return Host(tmp_path, run_module)


# --- the look at a host -------------------------------------------------------------------------------------


def test_bare_host(host: Host) -> None:
    found = host.look()
    nothing = {"running": False, "stopping": False, "enabled": False, "config": "", "environment": "", "venv": ""}
    assert found["instances"] == [{"port": port, **nothing} for port in (4000, 4001)]
    assert (found["serving"], found["unfinished"], found["salt_key_differs"]) == (0, False, False)
    assert (found["environments"], found["migrated"], found["unit"], found["redis"]) == ({}, "", "", False)
    assert (found["missing_packages"], found["missing_programs"]) == (["redis-server"], [])
    assert found["free_bytes"] > 0
    assert found["changed"] is False


def test_the_enabled_instance_serves(host: Host) -> None:
    host.files(4001)
    host.unit(4001)
    (host.root / "1.0-0123abcd").mkdir()
    (host.root / "1.0-0123abcd/recipe.txt").touch()
    (host.root / "1.1-4567abcd").mkdir()
    for name in ("1.0-0123abcd", "1.1-4567abcd"):
        (host.root / name / "pyvenv.cfg").touch()
    for name in ("python", "postgres-data", "1.2-89abcdef"):  # the last is no environment
        (host.root / name).mkdir()
    (host.config / "migrated").write_text("to this\n")
    found = host.look()
    assert (found["serving"], found["unfinished"]) == (4001, False)
    assert found["instances"][1] == {
        "port": 4001,
        "running": True,
        "stopping": False,
        "enabled": True,
        "config": hashlib.sha256(b"model_list: []\n").hexdigest(),
        "environment": hashlib.sha256(f'# managed\nLITELLM_SALT_KEY="{SALT}"\n'.encode()).hexdigest(),
        "venv": str(host.root / "1.0-0123abcd"),
    }
    assert found["environments"] == {"1.0-0123abcd": True, "1.1-4567abcd": False}
    assert found["migrated"] == "to this"


def test_what_somebody_else_has_put_there_is_told(host: Host) -> None:
    assert host.look()["foreign"] == []
    (host.root / "postgres-data").mkdir()
    (host.config / "config.yaml").touch()
    assert host.look()["foreign"] == [str(host.root), str(host.config)]
    (host.root / ".lock").touch()
    assert host.look()["foreign"] == []


def test_programs_that_are_missing_are_told(host: Host) -> None:
    host.command("there", "#!/bin/sh\n")
    host.command("closed", "#!/bin/sh\n")
    (host.bin / "closed").chmod(0o644)
    (host.bin / "folder").mkdir()
    (host.bin / "dangling").symlink_to("nowhere")
    asked = [str(host.bin / name) for name in ("there", "closed", "folder", "dangling", "none", "there/below")]
    assert host.look(programs=asked)["missing_programs"] == asked[1:]
    host.bin.chmod(0o700)
    assert host.look(programs=asked)["missing_programs"] == asked
    host.bin.chmod(0o755)


def test_no_secret_is_said(host: Host) -> None:
    host.files(4000)
    found = host.look()
    assert SALT not in json.dumps({key: value for key, value in found.items() if key != "invocation"})


def test_of_two_enabled_ones_the_younger_serves_and_the_switch_is_unfinished(host: Host) -> None:
    host.unit(4000, since="11:00:00")
    host.unit(4001, since="10:00:00")
    found = host.look()
    assert (found["serving"], found["unfinished"]) == (4000, True)


def test_an_enabled_one_that_does_not_run_is_unfinished(host: Host) -> None:
    host.unit(4000, ActiveState="failed")
    found = host.look()
    assert (found["serving"], found["unfinished"]) == (4000, True)


def test_a_former_instance_that_ends_what_it_has(host: Host) -> None:
    host.unit(4000, ActiveState="deactivating", UnitFileState="disabled")
    host.unit(4001)
    found = host.look()
    assert (found["instances"][0]["running"], found["instances"][0]["stopping"]) == (True, True)
    assert (found["serving"], found["unfinished"]) == (4001, False)


def test_an_instance_with_a_port_of_before_is_seen(host: Host) -> None:
    host.files(4500)
    host.unit(4500)
    found = host.look()
    assert (found["serving"], [each["port"] for each in found["instances"]]) == (4500, [4000, 4001, 4500])


def test_another_salt_key_is_seen(host: Host) -> None:
    host.files(4000, salt="another salt key")
    assert host.look()["salt_key_differs"] is True


def test_values_are_read_as_they_were_written() -> None:
    text = '# managed\nA="b"\nPASSWORD="a \\"quoted\\" \\\\ one"\nnot a line\n'
    assert _litellm_host.values(text) == {"A": "b", "PASSWORD": 'a "quoted" \\ one'}


# --- readiness ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "why"),
    [
        (200, b'{"status": "healthy", "db": "connected"}', ""),
        (200, b'{"status": "healthy", "db": "Not connected"}', "its database is not connected"),
        (503, b'{"status": "unhealthy", "db": "disconnected"}', "its database is disconnected"),
        (503, b'{"status": "unhealthy", "db": "connected"}', "it answers 503"),
        (200, b"{}", "its database is not mentioned"),
        (502, b"<html>", "it answers 502 without saying how it is"),
        (200, b"[]", "it answers 200 without saying how it is"),
    ],
)
def test_readiness(status: int, body: bytes, why: str) -> None:
    assert _litellm_host.readiness(status, body) == why


def test_last_words_leave_out_tracebacks() -> None:
    log = "INFO: started\nTraceback:\n  File \"a.py\", line 1\n    ^^^\nKeyError: 'x'\n\n"
    assert _litellm_host.last_words(log) == ["Traceback:", "KeyError: 'x'"]
    assert _litellm_host.last_words("INFO: a\nINFO: b") == ["INFO: a", "INFO: b"]


# --- the switch ---------------------------------------------------------------------------------------------


@dataclass
class LiteLLM:
    """What the server does, and what it was asked."""

    database: list[str] = field(default_factory=lambda: ["connected"])  # one a call, the last one ever after
    broken: tuple[str, ...] = ()
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    port: int = 0


class Handler(BaseHTTPRequestHandler):
    litellm: LiteLLM

    def log_message(self, *_args: object) -> None:
        pass

    def do_GET(self) -> None:
        states = self.litellm.database
        state = states.pop(0) if len(states) > 1 else states[0]
        self.reply(200 if state == "connected" else 503, {"db": state})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.litellm.asked.append((self.path, body["model"], self.headers["Authorization"]))
        if body["model"] in self.litellm.broken:
            self.reply(500, {"error": {"message": "no engine answers\n\nand more"}})
        elif self.path == "/v1/embeddings":
            self.reply(200, {"data": [{"embedding": [0.5]}]})
        else:
            self.reply(200, {"usage": {"completion_tokens": 1}})

    def reply(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def litellm() -> Iterator[LiteLLM]:
    state = LiteLLM()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"litellm": state}))
    state.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


def switch(host: Host, litellm: LiteLLM, **options: Any) -> dict[str, Any]:
    check = options.pop("check", False)
    asked = {"port": litellm.port, "others": [4999], "restart": True, "models": ["qwen"], "master_key": KEY, **options}
    return host.run("litellm_switch", asked, check=check)


def test_the_new_instance_is_enabled_once_it_has_answered(host: Host, litellm: LiteLLM) -> None:
    host.unit(4999)
    litellm.database = ["disconnected", "connected"]
    done = switch(host, litellm)
    assert (done["changed"], done["answered"]) == (True, "qwen")
    port = litellm.port
    assert host.read()["calls"] == [
        f"stop {port}",
        f"reset-failed {port}",
        f"start {port}",
        f"enable {port}",
        "disable 4999",
    ]
    assert litellm.asked == [("/v1/completions", "qwen", f"Bearer {KEY}")]
    assert host.read()["units"]["litellm@4999.service"]["ActiveState"] == "active"


def test_an_unfinished_switch_is_ended_without_a_restart(host: Host, litellm: LiteLLM) -> None:
    host.unit(litellm.port, NRestarts="1")  # it was killed once
    assert "failed" not in switch(host, litellm, restart=False)
    assert host.read()["calls"] == [f"start {litellm.port}", f"enable {litellm.port}", "disable 4999"]


def test_one_model_that_answers_is_enough(host: Host, litellm: LiteLLM) -> None:
    litellm.broken = ("a",)
    assert switch(host, litellm, models=["a"], embedding_models=["b"])["answered"] == "b"


def test_without_models_to_be_ready_is_enough(host: Host, litellm: LiteLLM) -> None:
    assert switch(host, litellm, models=[])["answered"] == ""


def test_where_no_model_answers_the_former_serves_on(host: Host, litellm: LiteLLM) -> None:
    host.unit(4999)
    litellm.broken = ("a", "b")
    failed = switch(host, litellm, models=["a", "b"])
    assert failed["failed"] is True
    assert "a: 500: no engine answers; b: 500: no engine answers" in failed["msg"]
    assert "It was stopped. What served before serves on." in failed["msg"]
    calls = host.read()["calls"]
    assert calls[-2:] == [f"stop {litellm.port}", f"reset-failed {litellm.port}"]
    assert not any(call.startswith(("enable", "disable")) for call in calls)
    assert failed["journal"] == ["KeyError: no such model"]


def test_an_instance_that_ends_is_not_waited_for(host: Host, litellm: LiteLLM) -> None:
    state = host.read()
    host.write({**state, "started": {"ActiveState": "failed", "Result": "exit-code"}})
    failed = switch(host, litellm)
    assert "it has ended (exit-code). It was stopped. See:" in failed["msg"]


def test_a_unit_that_cannot_be_started_is_stopped_and_explained(host: Host, litellm: LiteLLM) -> None:
    host.unit(4999)
    host.write({**host.read(), "refused": "start"})
    failed = switch(host, litellm)
    assert "cannot serve: systemd could not start it (Job for it failed. See the journal.)." in failed["msg"]
    assert "It was stopped. What served before serves on." in failed["msg"]
    assert failed["journal"] == ["KeyError: no such model"]
    assert host.read()["calls"] == [f"{verb} {litellm.port}" for verb in ("stop", "reset-failed") * 2]


def test_an_instance_without_a_database_is_given_its_time(host: Host, litellm: LiteLLM) -> None:
    litellm.database = ["disconnected"]
    failed = switch(host, litellm, timeout=1)
    assert "after 1 s its database is disconnected; litellm_start_timeout gives it longer" in failed["msg"]


def test_what_already_serves_is_not_stopped_where_it_does_not_answer(host: Host, litellm: LiteLLM) -> None:
    litellm.broken = ("qwen",)
    failed = switch(host, litellm, restart=False)
    assert "It was stopped" not in failed["msg"]
    assert host.read()["calls"] == [f"start {litellm.port}"]


def test_nothing_is_done_in_check_mode(host: Host, litellm: LiteLLM) -> None:
    assert switch(host, litellm, check=True)["changed"] is True
    assert host.read()["calls"] == []
    assert litellm.asked == []
