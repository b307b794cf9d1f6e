# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: variables against what the argument specs say of them. No Ansible import and no I/O."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ansible_collections.llmfleet.serving.plugins.module_utils._values import listed, switch

LISTED = "firewall_"  # that role takes one item alone, or text with commas, for a list
SHOWN = 40


def problems(values: Mapping[str, Any], options: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence for each value that is not of its option's type, with place and remedy; never a secret's value.

    A module is given what Ansible makes of a value, a role what is written: text with commas is no list here.
    """
    return [problem for name in sorted(values) for problem in _problems(name, values[name], options[name])]


def _problems(at: str, value: Any, option: Mapping[str, Any]) -> Iterator[str]:
    kind = option["type"]
    if kind == "list" and at.startswith(LISTED):
        value = listed(value)
    if not _fits(kind, value):
        without = ", or take it out" if value is None else ""
        yield f"{at} is {_shown(value, option)}: {_remedy(kind, option)}{without}."
    elif kind == "list":
        for index, entry in enumerate(value):
            yield from _problems(f"{at}[{index}]", entry, {**option, "type": option["elements"]})
    elif kind == "dict" and "options" in option:
        yield from _field_problems(at, value, option["options"])
    elif "choices" in option and str(value) not in option["choices"]:
        yield f"{at} is {_shown(value, option)}: use {' or '.join(option['choices'])}."


def _field_problems(at: str, entry: Mapping[str, Any], options: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    where = at + (f" ({entry['name']})" if isinstance(entry.get("name"), str) else "")
    for name in sorted(map(str, entry.keys() - options.keys())):
        near = difflib.get_close_matches(name, options, n=1)
        remedy = f"do you mean {near[0]}?" if near else f"it has {', '.join(sorted(options))}."
        yield f"{where} has {name}, which is no field of it: {remedy}"
    for name, option in options.items():
        if entry.get(name) is not None:
            yield from _problems(f"{where}.{name}", entry[name], option)
        elif option.get("required"):
            yield f"{where} has no {name}: {name} is required."


def _fits(kind: str, value: Any) -> bool:
    if kind == "list":
        return isinstance(value, (list, tuple))
    if kind == "dict":
        return isinstance(value, Mapping)
    if value is None or isinstance(value, (list, tuple, Mapping)):
        return kind == "raw"
    if kind == "int":
        return bool(re.fullmatch(r"\s*-?\d+\s*", str(value)))
    return kind != "bool" or switch(value) is not None


def _remedy(kind: str, option: Mapping[str, Any]) -> str:
    if "options" in option:
        fields = ", ".join(option["options"])
        return f"write a list, each entry with fields of {fields}" if kind == "list" else f"write fields of {fields}"
    return {
        "int": "write a whole number",
        "bool": "write true or false",
        "list": "write a list, as [a, b]",
        "dict": "write names with values, as {a: b}",
    }.get(kind, "write text")


def _shown(value: Any, option: Mapping[str, Any]) -> str:
    if value is None:
        return "empty (null)"
    if isinstance(value, (list, tuple, Mapping)):
        return "a dictionary" if isinstance(value, Mapping) else "a list"
    if isinstance(value, str) and (option.get("no_log") or option["type"] in ("list", "dict")):
        return "text"  # of a secret, or with one in it
    if option.get("no_log"):
        return "true or false" if isinstance(value, bool) else "a number"
    text = repr(str(value)) if isinstance(value, str) else str(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
