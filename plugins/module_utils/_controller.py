# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: what filters read of the controller: models that are to be copied, and the plan's page.

No Ansible import.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from ansible_collections.llmfleet.serving.plugins.module_utils import _models
from ansible_collections.llmfleet.serving.plugins.module_utils._planner import report


def model_problems(models: Sequence[Mapping[str, Any]], port: int, environment: Mapping[str, Any]) -> list[str]:
    problems = _models.model_problems(models, int(port), environment, lambda path: Path(path).is_file())
    if any(map(_models.is_copied, models)) and not shutil.which("rsync"):
        problems.append("vllm_models has a model with copy: true, but the controller has no rsync: install it there.")
    return problems


def folder_bytes(folder: str) -> int:
    """Bytes of all files below a folder of the controller."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def disk_needs(
    found: Sequence[Mapping[str, Any]], host: Mapping[str, Any], root: str, install_bytes: int
) -> dict[str, int]:
    """Bytes that a run will write below each folder: vLLM where there is none yet, and models still to be copied."""
    copies = [instance for instance in found if instance["copy_from"]]
    return {
        root: install_bytes,
        _models.MODELS_DIR: sum(
            folder_bytes(instance["copy_from"])
            for instance in copies
            if host["files"].get(f"{instance['path']}/config.json") is None
        ),
    }


def plan_page(hosts: Mapping[str, Mapping[str, Any]]) -> str:
    """Not by the module template, which escapes nothing: names and reasons are those of other people's models."""
    folder = Path(__file__).parents[2] / "playbooks/templates"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.get_template("plan.html.j2").render(report.page(hosts)) + "\n"
