# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: which instance of LiteLLM serves, and what its answers mean.

No Ansible import and no I/O.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone

SHOWN = ("Id", "ActiveState", "UnitFileState", "ActiveEnterTimestamp", "NRestarts", "Result")
UNIT = re.compile(r"litellm@(?P<port>\d+)\.service")
TIMESTAMP = "%Y-%m-%d %H:%M:%S.%f UTC"  # of systemctl --timestamp=us+utc, without the day of the week
RUNNING = ("active", "activating", "reloading", "deactivating")


@dataclass(frozen=True)
class Unit:
    """What systemd says of one instance. ``since`` is when it was started, in seconds since the epoch, or 0."""

    port: int
    state: str
    enabled: bool
    since: float
    restarts: int
    result: str

    @property
    def running(self) -> bool:
        """Its processes are there, though perhaps only to end what they have."""
        return self.state in RUNNING

    @property
    def stopping(self) -> bool:
        return self.state == "deactivating"


def drained(config: str) -> list[str]:
    """The servers that the role has written into the head of the configuration."""
    match = re.search(r"^# drained: (.+)$", config, re.MULTILINE)
    return match[1].split() if match else []


def unit_name(port: int) -> str:
    return f"litellm@{port}.service"


def show(ports: Iterable[int]) -> list[str]:
    """The command whose output parse_show takes."""
    return ["systemctl", "show", "--timestamp=us+utc", "--property", ",".join(SHOWN), *map(unit_name, ports)]


def parse_show(text: str) -> dict[int, Unit]:
    """Units by port from the output of that command."""
    units = {}
    for block in text.strip().split("\n\n"):
        values = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        match = UNIT.fullmatch(values.get("Id", ""))
        if match:
            units[int(match["port"])] = Unit(
                port=int(match["port"]),
                state=values.get("ActiveState", "inactive"),
                enabled=values.get("UnitFileState") == "enabled",
                since=_seconds(values.get("ActiveEnterTimestamp", "")),
                restarts=int(values.get("NRestarts") or 0),
                result=values.get("Result", ""),
            )
    return units


def _seconds(text: str) -> float:
    try:
        return datetime.strptime(text.partition(" ")[2], TIMESTAMP).replace(tzinfo=timezone.utc).timestamp()
    except ValueError:
        return 0.0


def serving(units: Iterable[Unit]) -> Unit | None:
    """The enabled one. A switch that was cut short leaves two: then the one started last, which had answered."""
    return max((unit for unit in units if unit.enabled), key=lambda unit: unit.since, default=None)


def values(environment: str) -> dict[str, str]:
    """The variables of a systemd EnvironmentFile of ``NAME="value"`` lines, as the role writes them."""
    pairs = re.findall(r'^(\w+)="((?:[^"\\]|\\.)*)"$', environment, re.MULTILINE)
    return {name: re.sub(r"\\(.)", r"\1", value) for name, value in pairs}


def readiness(status: int, body: bytes) -> str:
    """Why LiteLLM is not ready by its answer to /health/readiness, or nothing."""
    try:
        answer = json.loads(body)
        database = answer.get("db", "")
    except (ValueError, AttributeError):
        return f"it answers {status} without saying how it is"
    if database != "connected":
        return f"its database is {str(database).lower() or 'not mentioned'}"
    return "" if status == 200 else f"it answers {status}"


def refusal(status: int, body: bytes) -> str:
    """LiteLLM's own words for a request that it did not answer."""
    try:
        error = json.loads(body)["error"]
        return f"{status}: {str(error['message']).splitlines()[0][:300]}"
    except (ValueError, LookupError, TypeError):
        return f"{status}: {body[:200].decode(errors='replace')}"


NOISE = re.compile(r"^\s|^\s*$|INFO")  # of a traceback what is not its end


def last_words(journal: str, most: int = 15) -> list[str]:
    """The lines of a journal that say what is wrong, as far as that can be told from outside."""
    lines = [line.rstrip() for line in journal.splitlines()]
    return ([line for line in lines if not NOISE.search(line)] or lines)[-most:]
