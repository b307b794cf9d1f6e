# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: vLLM instances as systemd units, compared with the files that they run from.

No Ansible import and no I/O here: the modules read systemd and files, these functions decide.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone

UNIT = re.compile(r"vllm@(?P<name>.+)\.service")
# `systemctl show` prints timestamps like this, behind the day of the week, with TZ=UTC and --timestamp=us.
TIMESTAMP = "%Y-%m-%d %H:%M:%S.%f UTC"
SHOWN = (
    "Id",
    "LoadState",
    "ActiveState",
    "SubState",
    "UnitFileState",
    "ExecMainStartTimestamp",
    "NRestarts",
    "Result",
    "InvocationID",
)


@dataclass(frozen=True)
class Unit:
    """What systemd says of one instance.

    ``started`` is when its main process began, in seconds since the epoch; ``restarting`` says that it has ended
    by itself and systemd is about to start it again; ``restarts`` counts how often that has been. ``invocation`` is
    what the journal knows this process by.
    """

    name: str
    active: bool
    failed: bool
    enabled: bool
    restarting: bool
    started: float | None
    restarts: int
    result: str
    loaded: bool = True
    invocation: str = ""


def unit_name(name: str) -> str:
    return f"vllm@{name}.service"


def parse_show(text: str) -> dict[str, Unit]:
    """Units by instance name from the output of ``systemctl show --timestamp=us -p SHOWN vllm@a vllm@b``."""
    units = {}
    for block in text.strip().split("\n\n"):
        values = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        match = UNIT.fullmatch(values.get("Id", ""))
        if match:
            units[match["name"]] = Unit(
                name=match["name"],
                loaded=values.get("LoadState") == "loaded",
                active=values.get("ActiveState") in ("active", "activating", "reloading"),
                failed=values.get("ActiveState") == "failed",
                enabled=values.get("UnitFileState") == "enabled",
                restarting=values.get("SubState", "").startswith("auto-restart"),
                started=parse_timestamp(values.get("ExecMainStartTimestamp", "")),
                restarts=int(values.get("NRestarts") or 0),
                result=values.get("Result", ""),
                invocation=values.get("InvocationID", ""),
            )
    return units


def parse_timestamp(text: str) -> float | None:
    """Seconds since the epoch; None for a process that has never been started."""
    try:
        return datetime.strptime(text.partition(" ")[2], TIMESTAMP).replace(tzinfo=timezone.utc).timestamp()
    except ValueError:
        return None


@dataclass(frozen=True)
class Step:
    """One thing to do: ``action`` is start, restart, enable or remove; ``why`` is shown to the operator."""

    name: str
    action: str
    why: str


def steps(wanted: Mapping[str, float], units: Mapping[str, Unit], present: Iterable[str]) -> list[Step]:
    """What brings the host from what is there to what is wanted.

    ``wanted`` maps each declared instance to the newest change of any file that it runs from (seconds since
    the epoch). ``present`` names the instances that the host has files or enabled units of. Removals come
    first: they free the ports and the memory that the others start with.
    """
    plan = [Step(name, "remove", "it is no longer declared") for name in sorted(set(present) - set(wanted))]
    for name, changed in wanted.items():
        unit = units.get(name)
        if unit is None or not unit.active:
            plan.append(
                Step(name, "start", "it is not running" if unit is None or not unit.failed else "it has failed")
            )
        elif unit.started is None or changed > unit.started:
            plan.append(Step(name, "restart", "its files are newer than its process"))
        if unit is None or not unit.enabled:
            plan.append(Step(name, "enable", "it is not started at boot"))
    return plan


def unmeasured(
    wanted: Iterable[str], units: Mapping[str, Unit], plan: Iterable[Step], measured: Mapping[str, float]
) -> list[str]:
    """The instances whose process, as ``plan`` leaves it, has begun since it was last written down what it measured.

    ``measured`` maps instances to when that was.
    """
    begun = {step.name for step in plan if step.action in ("start", "restart")}
    return [
        name
        for name in wanted
        if name in begun or (name in units and (units[name].started or 0.0) > measured.get(name, 0.0))
    ]


@dataclass(frozen=True)
class Probe:
    """The smallest request that makes an engine compute, and where to send it."""

    path: str
    body: bytes


def probe(name: str, kind: str) -> Probe:
    """``kind`` is ``completion`` for a model that generates, ``embedding`` for one that does not."""
    if kind == "embedding":
        return Probe("/v1/embeddings", json.dumps({"model": name, "input": "Hello"}).encode())
    body = {"model": name, "prompt": "Hello", "max_tokens": 1, "temperature": 0}
    return Probe("/v1/completions", json.dumps(body).encode())


def answered(kind: str, body: bytes) -> bool:
    """Whether the body is an answer that an engine has computed, not just any 200."""
    try:
        answer = json.loads(body)
        if kind == "embedding":
            return len(answer["data"][0]["embedding"]) > 0
        return answer["usage"]["completion_tokens"] >= 1
    except (ValueError, KeyError, IndexError, TypeError):
        return False


# vLLM starts each line with "(EngineCore pid=1) ERROR 11-21 09:47:22 [core.py:953] ".
LOG_PREFIX = re.compile(r"^(\(\S+ pid=\d+\) )?(\w+ \d\d-\d\d \d\d:\d\d:\d\d \[[^]]+\] ?)?")
EXCEPTION = re.compile(r"(\w+\.)*\w*(Error|Exception|Interrupt): .+")


def causes(log: str, most: int = 3) -> list[str]:
    """The exceptions that a log ends with, the first and so most likely root cause first."""
    lines = (LOG_PREFIX.sub("", line).strip() for line in log.splitlines())
    return list(dict.fromkeys(line for line in lines if EXCEPTION.fullmatch(line)))[:most]


def environment_value(text: str, name: str) -> str | None:
    """A variable's value in a systemd EnvironmentFile of ``NAME="value"`` lines; the last one counts."""
    lines = (line.partition("=") for line in text.splitlines())
    values = [value.strip().strip('"') for key, found, value in lines if found and key.strip() == name]
    return values[-1] if values else None
