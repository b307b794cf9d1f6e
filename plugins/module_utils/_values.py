# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: values as people write them in an inventory. No Ansible import and no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SWITCH = {**dict.fromkeys(("true", "yes", "on", "1"), True), **dict.fromkeys(("false", "no", "off", "0"), False)}


def switch(value: Any) -> bool | None:
    """What it says, where it is true or false in one of Ansible's ways to write them."""
    return SWITCH.get(str(value).lower())


def amount(value: Any) -> float | None:
    """As a number, which Ansible's templates may have made text of; nothing where it is none."""
    try:
        return None if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def listed(value: Any) -> list[Any]:
    """A list as Ansible takes it for a module: one item alone, or a text with commas, is one as well."""
    if value is None:
        return []
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, Sequence) else [value]
