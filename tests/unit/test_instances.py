# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""What systemd shows of instances, and what follows from it."""

from __future__ import annotations

import calendar
import json
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2
import pytest
from ansible_collections.llmfleet.serving.plugins.module_utils import _instances
from ansible_collections.llmfleet.serving.plugins.module_utils._instances import Step, Unit
from hypothesis import given
from hypothesis import strategies as st

TEMPLATE = Path(__file__).parents[2] / "roles/vllm/templates/instance.env.j2"

# TZ=UTC systemctl show --timestamp=us --property Id,LoadState,... of five instances on real hosts: one that runs and is
# enabled, one that crashes every five seconds, one that crashed too often, one that was stopped, one never started.
# Debian 12 (systemd 252) prints the same, but for the time of start after `disable --now`.
DEBIAN_13 = """\
Result=success
NRestarts=0
ExecMainStartTimestamp=Sat 2026-11-21 09:46:37.264059 UTC
Id=vllm@my-model.v1_2.service
LoadState=loaded
ActiveState=active
SubState=running
UnitFileState=enabled

Result=exit-code
NRestarts=1
ExecMainStartTimestamp=Sat 2026-11-21 09:46:42.696220 UTC
Id=vllm@crash.service
LoadState=loaded
ActiveState=activating
SubState=auto-restart
UnitFileState=disabled

Result=exit-code
NRestarts=3
ExecMainStartTimestamp=Sat 2026-11-21 09:46:37.941082 UTC
Id=vllm@burst.service
LoadState=loaded
ActiveState=failed
SubState=failed
UnitFileState=disabled

Result=success
NRestarts=0
ExecMainStartTimestamp=
Id=vllm@stopped.service
LoadState=loaded
ActiveState=inactive
SubState=dead
UnitFileState=disabled

Result=success
NRestarts=0
ExecMainStartTimestamp=
Id=vllm@unknown.service
LoadState=loaded
ActiveState=inactive
SubState=dead
UnitFileState=disabled
"""
# Debian 12, after `systemctl disable --now`.
DEBIAN_12_STOPPED = """\
Result=success
NRestarts=0
ExecMainStartTimestamp=Sat 2026-11-21 09:46:37.590307 UTC
Id=vllm@my-model.v1_2.service
LoadState=loaded
ActiveState=inactive
SubState=dead
UnitFileState=disabled
"""
# Both, where the host has no vllm@.service yet.
NOT_FOUND = """\
Result=success
NRestarts=0
ExecMainStartTimestamp=
Id=vllm@gone.service
LoadState=not-found
ActiveState=inactive
SubState=dead
UnitFileState=
"""
BEGAN = datetime(2026, 11, 21, 9, 46, 37, 264059, tzinfo=timezone.utc).timestamp()


def unit(name: str = "a", **changes: Any) -> Unit:
    running = {"active": True, "failed": False, "enabled": True, "restarting": False, "started": 100.0}
    return Unit(**{"name": name, **running, "restarts": 0, "result": "success", **changes})


# --- systemctl show -----------------------------------------------------------------------------------------


def test_real_output_is_read() -> None:
    crashed = {"failed": False, "enabled": False, "result": "exit-code"}
    stopped = {"active": False, "enabled": False, "started": None}
    found = _instances.parse_show(DEBIAN_13)
    assert found == {
        "my-model.v1_2": unit("my-model.v1_2", started=BEGAN),
        "crash": unit("crash", **crashed, restarting=True, restarts=1, started=found["crash"].started),
        "burst": unit(
            *("burst",), **{**crashed, "failed": True}, active=False, restarts=3, started=found["burst"].started
        ),
        "stopped": unit("stopped", **stopped),
        "unknown": unit("unknown", **stopped),
    }
    assert found["crash"].started == pytest.approx(BEGAN + 5.432161, abs=1e-5)
    assert found["burst"].started == pytest.approx(BEGAN + 0.677023, abs=1e-5)


def test_other_real_outputs_are_read() -> None:
    stopped = _instances.parse_show(DEBIAN_12_STOPPED)["my-model.v1_2"]
    assert (stopped.active, stopped.enabled, stopped.failed) == (False, False, False)
    unknown = {"active": False, "enabled": False, "started": None, "loaded": False}
    assert _instances.parse_show(NOT_FOUND) == {"gone": unit("gone", **unknown)}


@pytest.mark.parametrize("text", ["", "\n", "Id=ssh.service\nActiveState=active\n", "Id=vllm.service\n"])
def test_other_units_are_no_instances(text: str) -> None:
    assert _instances.parse_show(text) == {}


@pytest.mark.parametrize("state", ["auto-restart", "auto-restart-queued"])
def test_both_states_between_crash_and_start_are_restarting(state: str) -> None:
    """systemd has the second one since version 254."""
    text = DEBIAN_13.replace("SubState=auto-restart", f"SubState={state}")
    assert _instances.parse_show(text)["crash"].restarting


@pytest.mark.parametrize(
    ("state", "active"),
    [("active", True), ("activating", True), ("reloading", True), ("deactivating", False), ("failed", False)],
)
def test_states_of_units(state: str, active: bool) -> None:
    found = _instances.parse_show(NOT_FOUND.replace("inactive", state))["gone"]
    assert (found.active, found.failed) == (active, state == "failed")


@pytest.mark.parametrize("text", ["", "n/a", "0", "Sat 2026-11-21 10:46:47.788694 CET", "Sat 2026-11-21 09:46:37 UTC"])
def test_no_time_of_start(text: str) -> None:
    assert _instances.parse_timestamp(text) is None


def test_time_of_start_does_not_depend_on_the_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd prints English days in every locale, and Ansible sets that of the user: `ssh` takes LANG along."""
    monkeypatch.setattr(calendar, "day_abbr", ["Mo", "Di", "Mi", "Do", "Fr", "Sa", "So"])
    monkeypatch.setattr("_strptime._getlang", lambda: ("de_DE", "UTF-8"))
    assert _instances.parse_timestamp("Sat 2026-11-21 09:46:37.264059 UTC") == BEGAN


def test_time_of_start_does_not_depend_on_the_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        assert _instances.parse_timestamp("Sat 2026-11-21 09:46:37.264059 UTC") == BEGAN
    finally:
        monkeypatch.undo()
        time.tzset()


# --- steps --------------------------------------------------------------------------------------------------

START, FAILED = Step("a", "start", "it is not running"), Step("a", "start", "it has failed")
RESTART = Step("a", "restart", "its files are newer than its process")
ENABLE = Step("a", "enable", "it is not started at boot")


@pytest.mark.parametrize(
    ("units", "changed", "expected"),
    [
        ({}, 50, [START, ENABLE]),
        ({"a": unit()}, 50, []),
        ({"a": unit()}, 100, []),
        ({"a": unit()}, 100.000001, [RESTART]),
        ({"a": unit(enabled=False)}, 50, [ENABLE]),
        ({"a": unit(enabled=False)}, 150, [RESTART, ENABLE]),
        ({"a": unit(active=False)}, 50, [START]),
        ({"a": unit(active=False)}, 150, [START]),
        ({"a": unit(active=False, started=None, enabled=False)}, 50, [START, ENABLE]),
        ({"a": unit(active=False, failed=True, restarts=5)}, 50, [FAILED]),
        ({"a": unit(active=False, failed=True, enabled=False)}, 150, [FAILED, ENABLE]),
        ({"a": unit(restarting=True, restarts=2)}, 50, []),
        ({"a": unit(restarting=True, restarts=2)}, 150, [RESTART]),
        ({"a": unit(started=None)}, 50, [RESTART]),
    ],
)
def test_steps_of_one_instance(units: dict[str, Unit], changed: float, expected: list[Step]) -> None:
    assert _instances.steps({"a": changed}, units, ["a"]) == expected
    assert _instances.steps({"a": changed}, units, []) == expected


def test_what_is_no_longer_declared_goes_first() -> None:
    plan = _instances.steps({"c": 150, "a": 50}, {"c": unit("c")}, ["b", "c", "0", "b"])
    assert [(step.action, step.name) for step in plan] == [
        ("remove", "0"),
        ("remove", "b"),
        ("restart", "c"),
        ("start", "a"),
        ("enable", "a"),
    ]
    assert plan[0].why == "it is no longer declared"


names = st.sampled_from("abc")
units_of = st.builds(
    lambda name, active, failed, enabled, started: unit(
        name, active=active, failed=failed and not active, enabled=enabled, started=started
    ),
    *(names, st.booleans(), st.booleans(), st.booleans(), st.one_of(st.none(), st.floats(0, 9))),
)


@given(st.dictionaries(names, st.floats(0, 9)), st.lists(units_of), st.sets(names))
def test_after_the_steps_there_are_none(wanted: dict[str, float], found: list[Unit], there: set[str]) -> None:
    units = {each.name: each for each in found}
    plan = _instances.steps(wanted, units, there)
    assert len({(step.name, step.action) for step in plan}) == len(plan)
    for step in plan:
        old = units.get(step.name, unit(step.name, active=False, enabled=False))
        changes = {"active": True, "failed": False, "started": 10.0} if step.action in ("start", "restart") else {}
        changes |= {"enabled": True} if step.action == "enable" else {}
        units[step.name] = Unit(**{**vars(old), **changes})
    there = there - {step.name for step in plan if step.action == "remove"}
    assert _instances.steps(wanted, units, there) == []
    assert there <= set(wanted)


# --- probes and answers -------------------------------------------------------------------------------------


def test_probes_ask_for_as_little_as_makes_an_engine_compute() -> None:
    completion, embedding = (_instances.probe("tiny", kind) for kind in ("completion", "embedding"))
    assert completion.path == "/v1/completions"
    assert json.loads(completion.body) == {"model": "tiny", "prompt": "Hello", "max_tokens": 1, "temperature": 0}
    assert embedding.path == "/v1/embeddings"
    assert json.loads(embedding.body) == {"model": "tiny", "input": "Hello"}


@pytest.mark.parametrize(
    ("kind", "body", "expected"),
    [
        ("completion", b'{"choices": [{"text": ""}], "usage": {"completion_tokens": 1}}', True),
        ("completion", b'{"choices": [{"text": ""}], "usage": {"completion_tokens": 0}}', False),
        ("completion", b'{"choices": []}', False),
        ("completion", b'{"usage": null}', False),
        ("completion", b'{"usage": {"completion_tokens": null}}', False),
        ("completion", b"", False),
        ("completion", b"<html>200</html>", False),
        ("completion", b"[]", False),
        ("completion", b"null", False),
        ("completion", b'{"data": [{"embedding": [0.1]}]}', False),
        ("completion", b"\xff", False),
        ("embedding", b'{"data": [{"embedding": [0.1, 0.2]}]}', True),
        ("embedding", b'{"data": [{"embedding": []}]}', False),
        ("embedding", b'{"data": []}', False),
        ("embedding", b'{"data": [{"embedding": 1}]}', False),
        ("embedding", b'{"usage": {"completion_tokens": 1}}', False),
        ("embedding", b"", False),
    ],
)
def test_answers(kind: str, body: bytes, expected: bool) -> None:
    assert _instances.answered(kind, body) is expected


# --- the end of a journal -----------------------------------------------------------------------------------


def test_causes_are_the_exceptions_without_what_vllm_puts_before_them() -> None:
    core = "(EngineCore pid=41) ERROR 11-21 09:47:22 [core.py:953]"
    server = "(APIServer pid=1) "
    log = "\n".join(
        [
            "INFO 11-21 09:47:20 [api_server.py:100] ValueError: no exception, but said in a line of its own",
            f"{core} EngineCore failed to start.",
            f"{core} Traceback (most recent call last):",
            f'{core}   File "/opt/vllm/core.py", line 940, in run_engine_core',
            f"{core} torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
            f"{server}Traceback (most recent call last):",
            f"{server}RuntimeError: Engine core initialization failed. See root cause above.",
        ]
    )
    assert _instances.causes(log)[-2:] == [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        "RuntimeError: Engine core initialization failed. See root cause above.",
    ]


def test_causes_are_few_and_none_where_there_are_none() -> None:
    log = "\n".join(f"ValueError: {number}" for number in range(9))
    assert _instances.causes(log) == ["ValueError: 0", "ValueError: 1", "ValueError: 2"]
    assert _instances.causes("") == []
    assert _instances.causes("INFO 11-21 09:47:20 [x.py:1] Starting\nError: \n  raise ValueError(x)\n") == []


# --- environment files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('# managed\nVLLM_API_KEY="sk-1"\nOTHER="2"\n', "sk-1"),
        ('OTHER="VLLM_API_KEY=no"\nVLLM_API_KEY="a=b+c/d=="\n', "a=b+c/d=="),
        ("VLLM_API_KEY=plain\n", "plain"),
        ('VLLM_API_KEY=""\n', ""),
        ('VLLM_API_KEYS="no"\n', None),
        ('#VLLM_API_KEY="no"\n', None),
        ("VLLM_API_KEY\n", None),
        ("", None),
    ],
)
def test_values_of_environment_files(text: str, expected: str | None) -> None:
    assert _instances.environment_value(text, "VLLM_API_KEY") == expected


def test_last_value_counts_as_for_systemd() -> None:
    assert _instances.environment_value('KEY="1"\nKEY="2"\n', "KEY") == "2"


@given(st.text("abcXYZ019._~+/=-", min_size=1))
def test_key_that_the_role_writes_is_read_back(value: str) -> None:
    """Of the characters that nginx_problems lets through."""
    (line,) = (line for line in TEMPLATE.read_text().splitlines() if line.startswith("VLLM_API_KEY="))
    line = jinja2.Environment(autoescape=False).from_string(line).render(vllm_api_key=value)  # noqa: S701 - no HTML
    assert _instances.environment_value(f"# managed\n{line}\nOTHER=1\n", "VLLM_API_KEY") == value
