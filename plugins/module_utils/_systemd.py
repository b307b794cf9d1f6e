# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: what the instance modules ask of systemd."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ansible_collections.llmfleet.serving.plugins.module_utils._instances import (
    SHOWN,
    Unit,
    causes,
    parse_show,
    unit_name,
)

# AnsibleModule.run_command: (command, **options) -> (return code, stdout, stderr)
Run = Callable[..., tuple[int, str, str]]


def show(run: Run, names: Iterable[str]) -> dict[str, Unit]:
    names = list(names)
    if not names:
        return {}
    command = ["systemctl", "show", "--timestamp=us", "--property", ",".join(SHOWN), *map(unit_name, names)]
    _, output, _ = run(command, check_rc=True, environ_update={"TZ": "UTC"})
    return parse_show(output)


def journal(run: Run, name: str, lines: int) -> str:
    """The last lines that the instance has logged."""
    command = ["journalctl", "--no-pager", "--output=cat", "--lines", str(lines), "--unit", unit_name(name)]
    return run(command)[1]


def journal_since_start(run: Run, unit: Unit) -> str:
    """All that the instance has logged since its process began; empty where there is none."""
    if not unit.invocation:
        return ""
    return run(["journalctl", "--no-pager", "--output=cat", f"_SYSTEMD_INVOCATION_ID={unit.invocation}"])[1]


def failure(run: Run, name: str, what: str) -> dict[str, Any]:
    """What a module fails with when an instance does: the likely cause in the message, and the end of the journal."""
    log = journal(run, name, 300)
    why = "; ".join(causes(log)) or "the journal names no exception"
    where = f"See: journalctl -u {unit_name(name)}"
    return {"msg": f"{unit_name(name)} {what}: {why}. {where}", "journal": log.splitlines()[-20:]}
