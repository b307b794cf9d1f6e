# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""The collection's filters, and which function of module_utils each is.

Ansible loads the filters of a collection, and compiles all that they import, in each worker that uses any of them: so
that is a moment for each task. What a filter needs is therefore imported when it is called.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

MODULE_UTILS = "ansible_collections.llmfleet.serving.plugins.module_utils"
FUNCTIONS = {
    "backends": "_models.backends",
    "certbot_problems": "_certbot_problems.problems",
    "client_problems": "_models.client_problems",
    "disk_needs": "_controller.disk_needs",
    "endpoints": "_models.endpoints",
    "firewall_allow": "_firewall.allow",
    "firewall_plan": "_firewall.plan",
    "host_problems": "_models.host_problems",
    "instances": "_models.instances",
    "litellm_config": "_litellm_config.config",
    "litellm_database": "_litellm_config.database",
    "litellm_problems": "_litellm_config.problems",
    "lookups": "_plans.lookups",
    "model_problems": "_controller.model_problems",
    "nginx_name": "_names.nginx_name",
    "nginx_problems": "_nginx_problems.problems",
    "plan_page": "_controller.plan_page",
    "plan_refusals": "_planner.report.refusal_table",
    "plan_request": "_plans.plan_request",
    "plan_table": "_planner.report.table",
    "postgresql_host_problems": "_postgresql.host_problems",
    "postgresql_problems": "_postgresql.problems",
    "postgresql_tuning": "_postgresql.tuning",
    "probes": "_models.probes",
    "tenant_names": "_tenants.names",
    "tenant_probe": "_tenants.probe",
    "tenant_problems": "_tenants.inventory_problems",
    "tenant_secrets": "_tenants.secret_names",
    "tenants_table": "_tenants.table",
    "tenants_with_keys": "_tenants.with_keys",
    "unknown_variables": "_inventory.unknown_variables",
    "version_findings": "_models.version_findings",
    "watched": "_models.watched",
}


def function(name: str) -> Callable[..., Any]:
    """What the filter of that name is."""
    module, _, attribute = FUNCTIONS[name].rpartition(".")
    return getattr(import_module(f"{MODULE_UTILS}.{module}"), attribute)


def imported_when_called(name: str) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        return function(name)(*arguments, **options)

    return call


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {name: imported_when_called(name) for name in FUNCTIONS}
