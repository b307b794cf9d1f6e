# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""The filters: what they read on the controller, and that Ansible finds and documents each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.llmfleet.serving.plugins.filter import serving
from ansible_collections.llmfleet.serving.plugins.module_utils import _controller, _inventory, _models
from hypothesis import given
from hypothesis import strategies as st
from test_certbot import settings as certbot_settings
from test_litellm_config import settings as litellm_settings
from test_nginx_problems import settings as nginx_settings

ROOT = Path(__file__).parents[2]
ROLES = sorted(path.name for path in (ROOT / "roles").iterdir())


# --- what is read on the controller -------------------------------------------------------------------------


def test_models_to_be_copied_are_looked_for_on_the_controller(tmp_path: Path) -> None:
    model = {"name": "tiny", "source": str(tmp_path), "copy": True}
    (found,) = _controller.model_problems([model], "8000", {})
    assert f"{tmp_path}/config.json" in found
    (tmp_path / "config.json").write_text("{}")
    assert _controller.model_problems([model], 8000, {}) == []


def test_bytes_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "a").write_bytes(b"x" * 10)
    (tmp_path / "below/b").write_bytes(b"x" * 32)
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "broken").symlink_to("nowhere")
    # A link counts as what it leads to: the hub's cache is made of links.
    assert _controller.folder_bytes(str(tmp_path)) == 52
    assert _controller.folder_bytes(str(tmp_path / "missing")) == 0


def instance(name: str, copy_from: str = "") -> dict[str, Any]:
    return {"name": name, "path": f"/var/lib/vllm/models/{name}", "copy_from": copy_from}


def test_needs_are_what_is_not_there_yet(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"x" * 100)
    found = [instance("hub"), instance("new", str(tmp_path)), instance("old", str(tmp_path))]
    files = {"/var/lib/vllm/models/old/config.json": "{}", "/var/lib/vllm/models/new/config.json": None}
    needs = {"/opt/vllm": 7, "/var/lib/vllm/models": 100}
    assert _controller.disk_needs(found, {"files": files}, "/opt/vllm", 7) == needs
    assert _controller.disk_needs([], {"files": {}}, "/opt/vllm", 0) == {"/opt/vllm": 0, "/var/lib/vllm/models": 0}


# --- misspelled variables -----------------------------------------------------------------------------------


def declared() -> set[str]:
    options: set[str] = set()
    for role in ROLES:
        specs = yaml.safe_load((ROOT / f"roles/{role}/meta/argument_specs.yml").read_text())["argument_specs"]
        options.update(*(entry["options"] for entry in specs.values()))
    return options


def test_every_variable_of_a_role_is_known() -> None:
    assert declared() <= _inventory.known_variables()
    assert _inventory.unknown_variables(declared()) == []


@pytest.mark.parametrize("name", ["serving_secrets_dir", "vllm_instances"])
def test_variables_that_roles_do_not_declare(name: str) -> None:
    assert _inventory.unknown_variables([name]) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vllm_model", "vllm_model is no variable of this collection: do you mean vllm_models?"),
        ("vllm_api_keys", "vllm_api_keys is no variable of this collection: do you mean vllm_api_key?"),
        ("nginx_servername", "nginx_servername is no variable of this collection: do you mean nginx_server_name?"),
        ("certbot_emial", "certbot_emial is no variable of this collection: do you mean certbot_email?"),
        ("uv_zzzzzzzzzzzz", "uv_zzzzzzzzzzzz is no variable of this collection: rename it, or take it out."),
    ],
)
def test_misspelled_variable_is_told_with_the_nearest(name: str, expected: str) -> None:
    assert _inventory.unknown_variables(["vllm_port", name, "vllm_models"]) == [expected]


def test_each_misspelled_variable_is_told_once_and_in_order() -> None:
    found = _inventory.unknown_variables(["vllm_b", "vllm_a", "vllm_b"])
    assert [line.split()[0] for line in found] == ["vllm_a", "vllm_b"]


def test_demo_and_role_defaults_use_known_variables_only() -> None:
    prefixes = tuple(f"{name}_" for name in [*ROLES, "serving"])
    files = [*ROOT.glob("inventories/*/group_vars/**/*.yml"), *ROOT.glob("inventories/*/host_vars/**/*.yml")]
    files += ROOT.glob("roles/*/defaults/main.yml")
    names = [name for file in files for name in yaml.safe_load(file.read_text()) or {} if name.startswith(prefixes)]
    assert names
    assert _inventory.unknown_variables(names) == []


# --- backends -----------------------------------------------------------------------------------------------


def engine(*instances: tuple[str, str, int]) -> dict[str, Any]:
    kind = "completion"
    return {
        "vllm_instances": [
            {"model": model, "host": host, "port": port, "kind": kind} for model, host, port in instances
        ]
    }


def test_replicas_of_a_model_stand_together() -> None:
    engines = [
        engine(("tiny", "10.0.0.1", 8000), ("big", "10.0.0.1", 8001)),
        engine(("big", "fd77::2", 8000)),
        engine(),
    ]
    assert _models.backends(engines) == [
        {"model": "tiny", "servers": ["10.0.0.1:8000"], "kind": "completion"},
        {"model": "big", "servers": ["10.0.0.1:8001", "[fd77::2]:8000"], "kind": "completion"},
    ]
    assert _models.backends([]) == []


def test_gateway_that_does_not_know_all_engines_is_refused() -> None:
    with pytest.raises(ValueError, match="what runs on gpu2: a run with --limit must include all engines"):
        _models.backends([engine(("tiny", "10.0.0.1", 8000)), {"inventory_hostname": "gpu2"}])


def test_variables_of_other_collections_for_nginx_are_none_of_ours() -> None:
    assert _inventory.unknown_variables(["nginx_vhosts", "nginx_upstreams", "certbot_auto_renew_user"]) == []


hosts = st.sampled_from(["10.0.0.1", "10.0.0.2", "fd77::1"])
some_engines = st.lists(
    st.lists(st.tuples(st.sampled_from(["a", "b"]), hosts, st.integers(8000, 8002)), max_size=3, unique=True).map(
        lambda instances: engine(*instances)
    )
)


@given(some_engines)
def test_each_instance_is_a_server_of_its_model_and_of_no_other(engines: list[dict[str, Any]]) -> None:
    found = _models.backends(engines)
    assert len({backend["model"] for backend in found}) == len(found)
    given_instances = sorted(
        (each["model"], each["host"], str(each["port"])) for engine in engines for each in engine["vllm_instances"]
    )
    assert given_instances == sorted(
        (backend["model"], server.rpartition(":")[0].strip("[]"), server.rpartition(":")[2])
        for backend in found
        for server in backend["servers"]
    )


# --- as Ansible sees them -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", serving.FUNCTIONS)
def test_filter_has_documentation_with_its_own_parameters(name: str) -> None:
    doc = yaml.safe_load((ROOT / f"plugins/filter/{name}.yml").read_text())
    assert set(doc) == {"DOCUMENTATION", "EXAMPLES", "RETURN"}
    function = serving.function(name)
    code = function.__code__
    first, *others = code.co_varnames[: code.co_argcount]
    by_name = code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
    assert first
    documentation = doc["DOCUMENTATION"]
    assert documentation["name"] == name
    assert list(documentation["options"]) == ["_input", *others, *by_name]
    assert documentation.get("positional", "_input") == ", ".join(["_input", *others])
    assert f"llmfleet.serving.{name}" in doc["EXAMPLES"]
    assert yaml.safe_load(doc["EXAMPLES"])
    assert set(doc["RETURN"]) == {"_value"}


def test_a_filter_imports_nothing_before_it_is_called() -> None:
    """Each of Ansible's workers loads all filters, and compiles what they import."""
    program = f"import sys, {serving.__name__}; print(*(name for name in sys.modules if 'module_utils' in name))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT / "collections", capture_output=True, check=True)
    assert done.stdout.decode() == "\n"


def test_no_documentation_without_a_filter() -> None:
    sidecars = {path.stem for path in (ROOT / "plugins/filter").glob("*.yml")}
    assert sidecars == set(serving.FUNCTIONS)


def test_filters_run_in_templates(run_playbook: Any, tmp_path: Path) -> None:
    """All of them, chained as in the roles, in one play."""
    result = {
        "instances": "{{ found | map(attribute='port') }}",
        "endpoints": "{{ found | llmfleet.serving.endpoints(['10.0.0.9']) | map(attribute='model') }}",
        "probes": "{{ found | llmfleet.serving.probes | map(attribute='kind') }}",
        "watched": "{{ found | llmfleet.serving.watched('/etc/vllm', ['/unit']) | map(attribute='name') }}",
        "model_problems": "{{ models | llmfleet.serving.model_problems('8000', {}) }}",
        "disk_needs": "{{ found | llmfleet.serving.disk_needs(host, '/opt', 5) }}",
        "host_problems": "{{ found | llmfleet.serving.host_problems(host, {'/opt': 5}, 'cuda') | length }}",
        "client_problems": "{{ '127.0.0.1' | llmfleet.serving.client_problems(['10.0.0.1'], []) }}",
        "lookups": "{{ models | llmfleet.serving.lookups('', 'host1') | map(attribute='key') }}",
        "plan_request": "{{ (models | llmfleet.serving.plan_request(looked_up, host, {}, 5)).host }}",
        "plan_page": "{{ {'a': vllm_plans} | llmfleet.serving.plan_page | length > 1000 }}",
        "plan_refusals": "{{ {'a': vllm_plans} | llmfleet.serving.plan_refusals(72) | first }}",
        "plan_table": "{{ {'a': vllm_plans} | llmfleet.serving.plan_table(72) | last }}",
        "version_findings": "{{ '0.32.0' | llmfleet.serving.version_findings([], []) }}",
        "firewall_allow": "{{ ['gateways'] | llmfleet.serving.firewall_allow([], [80]) | map(attribute='ports') }}",
        "firewall_plan": "{{ firewall | llmfleet.serving.firewall_plan({}) | dict2items | length }}",
        "postgresql_host_problems": "{{ cluster | llmfleet.serving.postgresql_host_problems(wanted) | length }}",
        "postgresql_problems": "{{ database | llmfleet.serving.postgresql_problems }}",
        "postgresql_tuning": "{{ (0 | llmfleet.serving.postgresql_tuning(8589934592, 100)).shared_buffers }}",
        "tenant_names": "{{ tenants | llmfleet.serving.tenant_names }}",
        "tenant_probe": "{{ (keyed | llmfleet.serving.tenant_probe(['a', 'b'])).models }}",
        "tenant_problems": "{{ tenants | llmfleet.serving.tenant_problems(['b']) | length }}",
        "tenant_secrets": "{{ tenants | llmfleet.serving.tenant_secrets }}",
        "tenants_table": "{{ {'teams': [], 'keys': []} | llmfleet.serving.tenants_table(72) | length }}",
        "tenants_with_keys": "{{ keyed | map(attribute='keys') | flatten | map(attribute='name') }}",
        "unknown_variables": "{{ ['vllm_model'] | llmfleet.serving.unknown_variables | length }}",
        "certbot_problems": "{{ certbot | llmfleet.serving.certbot_problems }}",
        "litellm_config": "{{ (litellm | llmfleet.serving.litellm_config).model_list | map(attribute='model_name') }}",
        "litellm_database": "{{ (litellm.litellm_database_url | llmfleet.serving.litellm_database(5)).place }}",
        "litellm_problems": "{{ litellm | llmfleet.serving.litellm_problems }}",
        "nginx_name": "{{ ('fd77::1' | llmfleet.serving.nginx_name).host }}",
        "nginx_problems": "{{ nginx | llmfleet.serving.nginx_problems }}",
        "backends": "{{ [{'vllm_instances': found | llmfleet.serving.endpoints([])}] | llmfleet.serving.backends }}",
    }
    variables = {
        "models": [{"name": "a", "source": "org/a", "users": 4}, {"name": "b", "source": "/srv/b"}],
        "found": "{{ models | llmfleet.serving.instances('127.0.0.1', 8000, 120) }}",
        "looked_up": [
            {"item": {"where": where, "source": source, "revision": revision, "path": path}, "model": {"files": []}}
            for where, source, revision, path in (("hub", "org/a", "main", ""), ("host", "", "", "/srv/b"))
        ],
        "host": {
            "disks": {path: {"free_bytes": 9, "device": 1} for path in ("/opt", "/var/lib/vllm/models")},
            "memory_bytes": 7,
            "shm_bytes": 6,
            "files": {},
            "taken_ports": {"8001": "x"},
            "nvidia_driver_version": None,
        },
        "firewall": {
            "instances_known": False,
            "firewall_rollback_seconds": 60,
            "firewall_connections_per_source": 0,
            **{f"firewall_{name}": [] for name in ("ssh_ports", "ssh_sources", "allow", "allow_more")},
        },
        "certbot": certbot_settings(),
        "litellm": litellm_settings(),
        "nginx": nginx_settings(),
        "cluster": {"version": "", "system": "y"},
        "wanted": {"systems": ["x"]},
        "database": {
            "postgresql_listen_addresses": "",
            "postgresql_memory": 0,
            "postgresql_max_connections": 100,
        },
        "tenants": [{"team": "t", "models": ["a"], "keys": [{"name": "k"}]}],
        "keyed": "{{ tenants | llmfleet.serving.tenants_with_keys({'key_t_k': 'sk-0123456789-abcdefghij'}) }}",
        "vllm_plans": {"plans": [{"name": "a", "refusal": {"reason": "It does not fit."}}]},
        "result": result,
    }
    task = {"ansible.builtin.copy": {"content": "{{ result | to_json }}", "dest": str(tmp_path / "result")}}
    done = run_playbook([{"hosts": "all", "gather_facts": False, "vars": variables, "tasks": [task]}])
    assert done.returncode == 0, done.stdout
    assert set(result) == set(serving.FUNCTIONS)
    assert json.loads((tmp_path / "result").read_text()) == {
        "instances": [8000, 8001],
        "endpoints": ["a", "b"],
        "probes": ["completion", "completion"],
        "watched": ["a", "b"],
        "model_problems": [],
        "disk_needs": {"/opt": 5, "/var/lib/vllm/models": 0},
        "host_problems": 3,
        "client_problems": [],
        "lookups": ["org/a at main", "/srv/b on host1"],
        "plan_request": {"ram_bytes": 7, "shm_bytes": 6, "disk_bytes": 4},
        "plan_page": True,
        "plan_refusals": "1 instance does not fit.",
        "plan_table": "does not fit.",
        "firewall_allow": [["80"]],
        "firewall_plan": 5,
        "version_findings": {"problems": [], "warnings": []},
        "postgresql_host_problems": 1,
        "postgresql_problems": [],
        "postgresql_tuning": "512MB",
        "tenant_names": ["t", "t/k"],
        "tenant_probe": ["a"],
        "tenant_problems": 1,
        "tenant_secrets": ["key_t_k"],
        "tenants_table": 3,
        "tenants_with_keys": ["k"],
        "unknown_variables": 1,
        "certbot_problems": [],
        "litellm_config": ["qwen", "qwen", "embed"],
        "litellm_database": "litellm@/run/postgresql:5432/litellm",
        "litellm_problems": [],
        "nginx_name": "[fd77::1]",
        "nginx_problems": [],
        "backends": [
            {"model": "a", "servers": ["127.0.0.1:8000"], "kind": "completion"},
            {"model": "b", "servers": ["127.0.0.1:8001"], "kind": "completion"},
        ],
    }
