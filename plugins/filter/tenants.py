# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""Filters of the tenants: the inventory's checked, with their keys, and LiteLLM's as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ansible_collections.llmfleet.serving.plugins.module_utils import _tenants


def tenant_problems(tenants: Any, models: Sequence[str] | None = None) -> list[str]:
    return _tenants.tenant_problems(tenants, None if models is None else list(models))


def tenants_table(report: Mapping[str, Any], width: int = 80) -> list[str]:
    return _tenants.table(report, int(width))


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {
            "tenant_names": _tenants.names,
            "tenant_probe": _tenants.probe,
            "tenant_problems": tenant_problems,
            "tenant_secrets": _tenants.secret_names,
            "tenants_table": tenants_table,
            "tenants_with_keys": _tenants.with_keys,
        }
