# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""Variables against the argument specs: alone, and by the lookup variable_problems in real ansible-playbook runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.parsing.vault import VaultLib, VaultSecret
from ansible_collections.llmfleet.serving.plugins.module_utils import _variables
from ansible_collections.llmfleet.serving.plugins.module_utils._inventory import declared_options
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
OPTIONS = declared_options()


def problems(**values: Any) -> list[str]:
    return _variables.problems(values, OPTIONS)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("litellm_workers", "many", "litellm_workers is 'many': write a whole number."),
        ("litellm_workers", "", "litellm_workers is '': write a whole number."),
        ("litellm_workers", 1.5, "litellm_workers is 1.5: write a whole number."),
        ("litellm_workers", True, "litellm_workers is True: write a whole number."),
        ("litellm_workers", "4.0", "litellm_workers is '4.0': write a whole number."),
        ("vllm_port", "8e3", "vllm_port is '8e3': write a whole number."),
        ("nginx_requests_per_second", 5.0, "nginx_requests_per_second is 5.0: write a whole number."),
        ("litellm_workers", "nan", "litellm_workers is 'nan': write a whole number."),
        ("litellm_workers", [4], "litellm_workers is a list: write a whole number."),
        ("litellm_workers", None, "litellm_workers is empty (null): write a whole number, or take it out."),
        ("vllm_hf_token", None, "vllm_hf_token is empty (null): write text, or take it out."),
        ("litellm_admin_ui", "perhaps", "litellm_admin_ui is 'perhaps': write true or false."),
        ("serving_backup_timer", "y", "serving_backup_timer is 'y': write true or false."),  # which | bool takes for no
        ("litellm_ports", 4000, "litellm_ports is 4000: write a list, as [a, b]."),
        ("litellm_ports", "4000,4001", "litellm_ports is text: write a list, as [a, b]."),
        ("litellm_ports", [4000, "b"], "litellm_ports[1] is 'b': write a whole number."),
        ("litellm_prices", [1], "litellm_prices is a list: write names with values, as {a: b}."),
        ("litellm_prices", "qwen=1", "litellm_prices is text: write names with values, as {a: b}."),
        ("litellm_version", ["1.0"], "litellm_version is a list: write text."),
        ("vllm_platform", "rocm", "vllm_platform is 'rocm': use cuda or cpu."),
        ("vllm_models", "qwen", "vllm_models is text: write a list, each entry with fields of name, source, copy, "),
        ("vllm_models", ["qwen"], "vllm_models[0] is text: write fields of name, source, copy, "),
    ],
)
def test_value_of_another_type_is_told_with_the_remedy(name: str, value: Any, says: str) -> None:
    (found,) = problems(**{name: value})
    assert found.startswith(says)


def test_a_long_value_is_cut() -> None:
    assert problems(litellm_workers="x" * 99) == [f"litellm_workers is '{'x' * 36}...: write a whole number."]


MODEL = {"name": "a", "source": "/a"}


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({**MODEL, "contxt": 5}, "vllm_models[0] (a) has contxt, which is no field of it: do you mean context?"),
        ({**MODEL, "zzzz": 5}, "vllm_models[0] (a) has zzzz, which is no field of it: it has context, copy, "),
        ({"source": "/a"}, "vllm_models[0] has no name: name is required."),
        ({**MODEL, "users": "many"}, "vllm_models[0] (a).users is 'many': write a whole number."),
        ({**MODEL, "flags": "x"}, "vllm_models[0] (a).flags is text: write names with values, as {a: b}."),
        (
            {**MODEL, "variants": [{"sorce": "b", "source": "c"}]},
            "vllm_models[0] (a).variants[0] has sorce, which is no field of it: do you mean source?",
        ),
    ],
)
def test_wrong_fields_are_told_with_their_entry(model: dict[str, Any], says: str) -> None:
    (found,) = problems(vllm_models=[model])
    assert found.startswith(says)


@pytest.mark.parametrize(
    "values",
    [
        {"litellm_workers": "4", "litellm_retries": " 2 ", "litellm_required_free_bytes": 3000000000},
        {"litellm_admin_ui": "yes", "firewall_enabled": "False", "vllm_plan": 0, "nginx_forward_key": "On"},
        {"litellm_ports": ["4000", 4001], "litellm_version": 1.9, "nginx_server_aliases": []},
        {"vllm_models": [{**MODEL, "users": "4", "context": 8192, "copy": "yes", "flags": {}, "revision": None}]},
        {"vllm_models": [{**MODEL, "variants": [{"source": "b/c"}]}]},
        # The role firewall takes these for lists.
        {"firewall_ssh_sources": "192.0.2.0/24, 10.0.0.1", "firewall_ssh_ports": 22, "firewall_allow": None},
        {"firewall_allow_more": {"ports": 9100, "sources": "10.0.0.5"}},
    ],
)
def test_what_a_role_takes_is_not_told(values: dict[str, Any]) -> None:
    assert problems(**values) == []


def test_defaults_and_inventories_are_of_their_types() -> None:
    files = [*ROOT.glob("roles/*/defaults/main.yml"), *ROOT.glob("inventories/*/group_vars/**/*.yml")]
    inventories = [*ROOT.glob("inventories/*/hosts.yml"), *ROOT.glob("molecule/*/inventory/hosts.yml")]
    assert (len(files) > 8, len(inventories) > 6) == (True, True)
    found = [yaml.safe_load(file.read_text()) for file in files]
    found += [values for file in inventories for values in variables(yaml.safe_load(file.read_text()))]
    looked_at = set()
    for values in found:
        plain = {name: value for name, value in values.items() if name in OPTIONS and "{{" not in str(value)}
        assert problems(**plain) == []
        looked_at |= set(plain)
    assert {"vllm_models", "litellm_prices", "litellm_environment", "certbot_dns_credentials"} <= looked_at


def variables(entry: Any) -> Iterator[dict[str, Any]]:
    """All that an inventory sets, of groups and of hosts."""
    for name, value in entry.items() if isinstance(entry, dict) else ():
        if name == "vars":
            yield value
        elif name == "hosts":
            yield from (own for own in value.values() if own)
        else:
            yield from variables(value)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
scalars |= st.sampled_from(["yes", "off", "TRUE", "1e3", "4.0", "-7", "a=b", "a,b", "{}", "[]"])
anything = scalars | st.lists(scalars, max_size=2) | st.dictionaries(st.sampled_from("ab"), scalars, max_size=2)
kinds = st.sampled_from(["str", "int", "bool", "dict"]).map(lambda kind: {"type": kind})
kinds |= st.sampled_from(["str", "int", "dict"]).map(lambda kind: {"type": "list", "elements": kind})


@given(kinds, anything)
def test_what_ansible_refuses_is_told(option: dict[str, Any], value: Any) -> None:
    refused = ArgumentSpecValidator({"it": option}).validate({"it": value}).error_messages
    assert _variables.problems({"it": value}, {"it": option}) or not refused


def secret_options(options: dict[str, Any], at: str = "") -> list[str]:
    return [
        name
        for key, option in options.items()
        for name in ([f"{at}{key}"] if option.get("no_log") else [])
        + secret_options(option.get("options", {}), f"{at}{key}.")
    ]


@pytest.mark.parametrize(
    "value", ["https://user:hush@example.org/x.whl", {"name": {"key": "hush"}}, [{"name": ["hush"]}]]
)
@pytest.mark.parametrize("name", ["vllm_extra_packages", "litellm_config", "nginx_keys", "vllm_models"])
def test_what_is_mistyped_may_have_a_secret_in_it(name: str, value: Any) -> None:
    assert "hush" not in str(problems(**{name: value}))


@pytest.mark.parametrize(
    "name", [name for name in secret_options(OPTIONS) if OPTIONS[name.partition(".")[0]]["type"] != "raw"]
)
@pytest.mark.parametrize("value", ["hush", 4711, ["hush"], {"hush": "hush"}, [["hush"]], [4711], {"a": ["hush"]}])
def test_no_secret_is_told(name: str, value: Any) -> None:
    variable, _, field = name.partition(".")
    found = problems(**{variable: [{"name": "a", "source": "/a", field: value}] if field else value})
    assert "hush" not in str(found).replace("has hush", "")  # a field's name is none
    assert "4711" not in str(found)


# --- the lookup ---------------------------------------------------------------------------------------------


def looked_up(run_playbook: Any, tmp_path: Path, *arguments: str, **variables: Any) -> list[str]:
    content = "{{ query('llmfleet.serving.variable_problems') | to_json }}"
    task = {"ansible.builtin.copy": {"content": content, "dest": str(tmp_path / "found")}}
    play = {"hosts": "all", "gather_facts": False, "vars": variables, "tasks": [task]}
    done = run_playbook([play], *arguments)
    assert done.returncode == 0, done.stdout
    return json.loads((tmp_path / "found").read_text())


def test_all_that_is_set_is_looked_at_as_it_is_meant(run_playbook: Any, tmp_path: Path) -> None:
    found = looked_up(
        run_playbook,
        tmp_path,
        litellm_workers="{{ 'ma' ~ 'ny' }}",
        litellm_retries="{{ 2 + 2 }}",
        serving_backup_keep="none",
        litellm_models="{{ serving_backends }}",  # nothing has set it yet
        nginx_backends=[{"model": "a", "servers": ["{{ nowhere }}"], "knd": "x"}],
        vllm_unknown="x",
    )
    assert found == [
        "litellm_workers is 'many': write a whole number.",
        "serving_backup_keep is 'none': write a whole number.",
    ]


def test_a_vaulted_value_is_looked_at_where_it_can_be(run_playbook: Any, tmp_path: Path) -> None:
    (tmp_path / "password").write_text("secret\n")
    (tmp_path / "inventory/group_vars").mkdir(parents=True)
    vaulted = VaultLib([("default", VaultSecret(b"secret"))]).encrypt("sk-hush-hush").decode()
    text = "".join(f"  {line}\n" for line in vaulted.splitlines())
    values = f"litellm_master_key: !vault |\n{text}litellm_ports: no\n"
    (tmp_path / "inventory/group_vars/all.yml").write_text(
        f"{values}litellm_environment: '{{{{ litellm_master_key }}}}'\n"
    )
    with_password = looked_up(run_playbook, tmp_path, "--vault-password-file", str(tmp_path / "password"))
    assert with_password == [
        "litellm_environment is text: write names with values, as {a: b}.",
        "litellm_ports is False: write a list, as [a, b].",
    ]
    assert looked_up(run_playbook, tmp_path) == with_password[1:]
