# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: names of variables and of their fields, by what the roles' argument specs declare.

No Ansible import; reads the specs, on the controller.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

OF_NO_ROLE = {
    *("serving_backends", "serving_plan_page", "serving_secrets_dir", "vllm_instances", "vllm_plans"),
    *("litellm_server", "litellm_keys", "litellm_unserved", "serving_restore_file", "serving_restore_replace"),
    *("serving_tenants", "serving_tenants_overlap", "serving_tenants_prune"),
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


def field_problems(values: Any, variable: str) -> list[str]:
    """What is wrong with the fields of a list of dictionaries, by what the argument specs say of ``variable``.

    Ansible's own check of them names neither the entry nor the nearest field.
    """
    return list(_entry_problems(values, variable, declared_options()[variable]["options"]))


def _entry_problems(values: Any, at: str, options: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    if not isinstance(values, list) or not all(isinstance(value, Mapping) for value in values):
        yield f"{at} is {values!r}: give a list, each entry of it with fields."
        return
    for index, entry in enumerate(values):
        where = f"{at}[{index}]" + (f" ({entry['name']})" if entry.get("name") else "")
        for name in sorted(map(str, entry.keys() - options.keys())):
            near = difflib.get_close_matches(name, options, n=1)
            remedy = f"do you mean {near[0]}?" if near else f"it has {', '.join(sorted(options))}."
            yield f"{where} has {name}, which is no field of it: {remedy}"
        for name, option in options.items():
            value = entry.get(name)
            if value is None:
                if option.get("required"):
                    yield f"{where} has no {name}: {name} is required."
            elif option["type"] == "int" and not re.fullmatch(r"-?\d+", str(value)):
                yield f"{where}.{name} is {value!r}: give a whole number."
            elif option["type"] == "dict" and not isinstance(value, Mapping):
                yield f"{where}.{name} is {value!r}: give a dictionary."
            elif "options" in option:
                yield from _entry_problems(value, f"{at}[{index}].{name}", option["options"])
