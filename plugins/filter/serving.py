# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""Filters of the roles and playbooks: the inventory's models checked and turned into instances and backends."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import yaml
from ansible.errors import AnsibleFilterError
from ansible_collections.llmfleet.serving.plugins.module_utils import (
    _firewall,
    _models,
    _plans,
    _postgresql,
    _tenants,
)
from ansible_collections.llmfleet.serving.plugins.module_utils._planner import report

OF_NO_ROLE = {
    *("serving_backends", "serving_plan_page", "serving_secrets_dir", "vllm_instances", "vllm_plans"),
    *("litellm_server", "litellm_keys", "litellm_unserved", "serving_restore_file", "serving_restore_replace"),
}
SHARED = ("nginx_", "certbot_", "firewall_", "postgresql_")  # prefixes that other people's variables have, too


def model_problems(models: Sequence[Mapping[str, Any]], port: int, environment: Mapping[str, Any]) -> list[str]:
    problems = _models.model_problems(models, int(port), environment, lambda path: Path(path).is_file())
    if any(model.get("copy") for model in models) and not shutil.which("rsync"):
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


@cache
def declared_options() -> dict[str, dict[str, Any]]:
    """Every variable that a role's argument_specs declares, with what they say of it."""
    declared: dict[str, dict[str, Any]] = {}
    for path in (Path(__file__).parents[2] / "roles").glob("*/meta/argument_specs.yml"):
        for entry in yaml.safe_load(path.read_text(encoding="utf-8"))["argument_specs"].values():
            declared.update(entry.get("options", {}))
    return declared


def known_variables() -> set[str]:
    """Every variable that a role declares, and those that belong to none or that playbooks and roles set."""
    return {*declared_options(), *OF_NO_ROLE}


def unknown_variables(names: Iterable[str]) -> list[str]:
    """One line for each name that has a role's prefix and is none of its variables, with the nearest one that is.

    Others have variables with a prefix of SHARED: of these only what is nearly one of ours counts.
    """
    known = known_variables()
    found = []
    for name in sorted(set(names) - known):
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.8 if name.startswith(SHARED) else 0.6)
        if name.startswith(SHARED) and not near:
            continue
        remedy = f"do you mean {near[0]}?" if near else "rename it, or take it out."
        found.append(f"{name} is no variable of this collection: {remedy}")
    return found


def backends(engines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What nginx_backends takes, from the ``vllm_instances`` of all engines: an entry a model, with its replicas."""
    engines = list(engines)
    if unknown := [str(engine.get("inventory_hostname")) for engine in engines if "vllm_instances" not in engine]:
        raise AnsibleFilterError(
            f"A gateway has to know what runs on {', '.join(unknown)}: a run with --limit must include all engines."
        )
    found: dict[str, dict[str, Any]] = {}
    for instance in (each for engine in engines for each in engine["vllm_instances"]):
        host = f"[{instance['host']}]" if ":" in instance["host"] else instance["host"]
        entry = found.setdefault(
            instance["model"], {"model": instance["model"], "servers": [], "kind": instance["kind"]}
        )
        entry["servers"].append(f"{host}:{instance['port']}")
    return list(found.values())


def plan_table(hosts: Mapping[str, Mapping[str, Any]], width: int = 80) -> list[str]:
    return report.table(hosts, int(width))


def plan_refusals(hosts: Mapping[str, Mapping[str, Any]], width: int = 80) -> list[str]:
    return report.refusal_table(hosts, int(width))


def plan_page(hosts: Mapping[str, Mapping[str, Any]]) -> str:
    """Not by the module template, which escapes nothing: names and reasons are those of other people's models."""
    folder = Path(__file__).parents[2] / "playbooks/templates"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.get_template("plan.html.j2").render(report.page(hosts)) + "\n"


def tenants_table(report: Mapping[str, Any], width: int = 80) -> list[str]:
    return _tenants.table(report, int(width))


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {
            "backends": backends,
            "client_problems": _models.client_problems,
            "disk_needs": disk_needs,
            "endpoints": _models.endpoints,
            "firewall_allow": _firewall.allow,
            "firewall_plan": _firewall.plan,
            "host_problems": _models.host_problems,
            "instances": _models.instances,
            "lookups": _plans.lookups,
            "model_problems": model_problems,
            "plan_page": plan_page,
            "plan_refusals": plan_refusals,
            "plan_request": _plans.plan_request,
            "plan_table": plan_table,
            "postgresql_host_problems": _postgresql.host_problems,
            "postgresql_problems": _postgresql.problems,
            "postgresql_tuning": _postgresql.tuning,
            "probes": _models.probes,
            "tenant_names": _tenants.names,
            "tenant_probe": _tenants.probe,
            "tenant_problems": _tenants.inventory_problems,
            "tenant_secrets": _tenants.secret_names,
            "tenants_table": tenants_table,
            "tenants_with_keys": _tenants.with_keys,
            "unknown_variables": unknown_variables,
            "version_findings": _models.version_findings,
            "watched": _models.watched,
        }
