# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""What the roles' removals leave to others, with the tasks themselves."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
# What names a drop-in's folder, by the role whose drop-in is in it.
DROP_INS = {
    "nginx": {"__nginx_dropin_dir": "{folder}"},
    "postgresql": {"__postgresql_dropin_file": "{folder}/llmfleet.conf", "__postgresql_version": "17"},
    "certbot": {
        "__certbot_dropin_dir": "{folder}",
        **dict.fromkeys(("certbot_webroot", "__certbot_state_dir"), "{folder}-none"),
    },
}


@pytest.mark.parametrize("role", DROP_INS)
def test_folder_of_a_drop_in_goes_where_it_is_empty(
    run_playbook: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, role: str
) -> None:
    tasks: list[dict[str, Any]] = yaml.safe_load((ROOT / f"roles/{role}/tasks/remove.yml").read_text())
    files = str([task["loop"] for task in tasks if "ansible.builtin.file" in task])
    assert "_dropin_file" in files
    assert "_dropin_dir" not in files
    assert "dirname" not in files
    (remove,) = [task for task in tasks if "-empty" in str(task)]
    empty, shared, missing = (tmp_path / name for name in ("empty", "shared", "missing"))
    empty.mkdir()
    shared.mkdir()
    (shared / "operators.conf").touch()
    plays = [
        {
            "hosts": "all",
            "gather_facts": False,
            "vars": {name: value.format(folder=folder) for name, value in DROP_INS[role].items()},
            "tasks": [remove],
        }
        for folder in (empty, shared, missing)
    ]
    done = run_playbook(plays)
    assert done.returncode == 0, done.stdout
    assert "changed=1 " in done.stdout
    assert (empty.exists(), (shared / "operators.conf").exists()) == (False, True)
    assert run_playbook(plays, "--check").returncode == 0
