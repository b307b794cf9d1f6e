# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: which variables there are, by what the roles' argument specs declare.

No Ansible import; reads the specs, on the controller.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import yaml

OF_NO_ROLE = {
    *("serving_backends", "serving_plan_page", "serving_secrets_dir", "vllm_instances", "vllm_plans"),
    *("litellm_server", "litellm_keys", "litellm_unserved", "serving_restore_file", "serving_restore_replace"),
}
SHARED = ("nginx_", "certbot_", "firewall_", "postgresql_")  # prefixes that other people's variables have, too


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
