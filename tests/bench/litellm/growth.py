#!/usr/bin/env python3
# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""Prints how long tenants.yml takes with more and more teams: the first run, and the run that changes nothing.

    tests/bench/litellm/growth.py --inventory inventories/mine [--teams 1 20 200]

On a gateway that serves tenants. Its own teams, of two keys each, stand beside what is there, and are deleted at last.
"""

from __future__ import annotations

import argparse
import json
import re
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def run(inventory: str, tenants: list[dict[str, Any]]) -> tuple[float, int]:
    """Seconds, and how many tasks changed something."""
    # The keys are no secret, for they open nothing for longer than this takes; but an argument cannot be so long.
    with tempfile.NamedTemporaryFile("w", suffix=".json") as variables:
        json.dump({"serving_tenants": tenants, "serving_tenants_prune": False}, variables)
        variables.flush()
        command = ["ansible-playbook", "--inventory", inventory, "--extra-vars", f"@{variables.name}"]
        start = time.monotonic()
        done = subprocess.run([*command, "llmfleet.serving.tenants"], check=False, text=True, capture_output=True)
        seconds = time.monotonic() - start
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return seconds, sum(map(int, re.findall(r"\bchanged=(\d+)", done.stdout)))


def teams(count: int) -> list[dict[str, Any]]:
    def key(name: str) -> dict[str, str]:
        return {"name": name, "key": f"sk-{secrets.token_urlsafe(32)}"}

    return [{"team": f"bench-{number}", "max_budget": 5, "keys": [key("a"), key("b")]} for number in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inventory", required=True, type=Path)
    parser.add_argument("--teams", type=int, nargs="+", default=[1, 20, 200])
    arguments = parser.parse_args()
    inventory = str(arguments.inventory)
    print("| teams | keys | first run, s | no change, s |\n|---|---|---|---|")
    for count in arguments.teams:
        mine = teams(count)
        try:
            first, _ = run(inventory, mine)
            again, changed = run(inventory, mine)
        finally:
            run(inventory, [{"team": each["team"], "state": "absent"} for each in mine])
        if changed:
            sys.exit(f"{count} teams: the second run changed something")
        print(f"| {count} | {2 * count} | {first:.1f} | {again:.1f} |", flush=True)


if __name__ == "__main__":
    main()
