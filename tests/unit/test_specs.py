# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""Every role has the same shape, and its defaults, its argument specs and its README say the same."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
ROLES = sorted((ROOT / "roles").iterdir())
ENTRY_POINTS = {"main", "preflight", "remove"}
# A role that runs something on the host has both of the latter; one that only brings a program has neither.
STEPS = ("preflight", "install", "configure", "service")
TYPES = {"str": str, "path": str, "int": int, "float": float, "bool": bool, "list": list, "dict": dict}
IMPORTS = ("import_tasks", "include_tasks")

pytestmark = pytest.mark.parametrize("role", ROLES, ids=lambda path: path.name)


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def specs(role: Path) -> dict[str, Any]:
    return load(role / "meta/argument_specs.yml")["argument_specs"]


def defaults(role: Path) -> dict[str, Any]:
    return load(role / "defaults/main.yml")


def templated(value: object) -> bool:
    return "{{" in str(value) or "{%" in str(value)


def flat(tasks: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for task in tasks:
        yield task
        for part in ("block", "rescue", "always"):
            yield from flat(task.get(part, []))


def imports(path: Path) -> list[str]:
    """The task files that this one goes on to, in their order; one named by an expression as it stands there."""
    return [
        str(task[f"ansible.builtin.{word}"]).removesuffix(".yml")
        for task in flat(load(path))
        for word in IMPORTS
        if f"ansible.builtin.{word}" in task
    ]


# --- defaults and argument specs ----------------------------------------------------------------------------


def test_defaults_are_declared_and_declared_ones_have_defaults(role: Path) -> None:
    assert set(defaults(role)) == set(specs(role)["main"]["options"])


def test_plain_defaults_are_the_declared_ones(role: Path) -> None:
    for name, value in defaults(role).items():
        option = specs(role)["main"]["options"][name]
        if templated(value):
            assert "default" not in option, f"{name} has an expression for a default: describe it in words"
        else:
            assert option["default"] == value, name
            assert isinstance(option["default"], type(value)), name


def test_options_are_described_and_of_their_type(role: Path) -> None:
    def check(options: dict[str, Any], where: str) -> None:
        for name, option in options.items():
            at = f"{where}.{name}"
            assert option["description"], at
            assert option["type"] in {*TYPES, "raw"}, at
            assert ("elements" in option) == (option["type"] == "list"), at
            assert not (option.get("required") and "default" in option), at
            if "default" in option and option["type"] != "raw":
                assert type(option["default"]) is TYPES[option["type"]], at
            if "choices" in option and "default" in option:
                assert option["default"] in option["choices"], at
            check(option.get("options", {}), at)

    for entry in specs(role).values():
        assert entry["short_description"]
        assert entry["description"]
        check(entry["options"], role.name)


def test_entry_points_take_the_same_options(role: Path) -> None:
    """But for one that tells of variables that are no role's."""
    main = specs(role)["main"]["options"]
    others = [entry["options"] for entry in specs(role).values() if entry["options"] != main]
    assert [set(options) for options in others] == (
        [{"serving_tenants", "serving_tenants_overlap", "serving_tenants_prune"}] if role.name == "litellm" else []
    )


def test_public_variables_bear_the_name_of_the_role(role: Path) -> None:
    assert all(name.startswith(f"{role.name}_") for name in defaults(role))


def test_internal_variables_bear_it_too(role: Path) -> None:
    internal = [name for path in (role / "vars").glob("*.yml") for name in load(path)]
    tasks = [task for path in (role / "tasks").glob("*.yml") for task in flat(load(path))]
    internal += [task["register"] for task in tasks if "register" in task]
    assert internal
    assert [name for name in internal if not name.startswith(f"__{role.name}_")] == []


def test_every_variable_is_used(role: Path) -> None:
    files = [path for path in role.rglob("*") if path.is_file() and path.parent.name not in ("defaults", "meta")]
    text = "\n".join(path.read_text() for path in files if path.name != "README.md")
    own = "\n".join(str(value) for value in defaults(role).values())
    used = set(re.findall(r"\w+", f"{text}\n{own}"))
    assert set(defaults(role)) - used == set()
    internal = {name for path in (role / "vars").glob("*.yml") for name in load(path)}
    assert {name for name in internal if len(re.findall(rf"\b{name}\b", f"{text}\n{own}")) < 2} == set()


def test_switches_are_read_as_such(role: Path) -> None:
    """What -e sets is text, and "false" is true without the filter."""
    files = [path for folder in ("tasks", "vars", "templates") for path in (role / folder).glob("*")]
    expressions = [part for path in files for part in re.findall(r"\{[{%].*?[%}]\}", path.read_text(), re.DOTALL)]
    tasks = [task for path in (role / "tasks").glob("*.yml") for task in flat(load(path))]
    words = ("when", "failed_when", "changed_when", "until")
    bare = [str(task[word]) for task in tasks for word in words if word in task]
    bare += [str(task["ansible.builtin.assert"]["that"]) for task in tasks if "ansible.builtin.assert" in task]
    code = re.sub(r"'[^']*'", "", "\n".join([*expressions, *bare]))
    switches = [name for name, option in specs(role)["main"]["options"].items() if option["type"] == "bool"]
    assert [name for name in switches if re.search(rf"\b{name}\b(?! \| bool\b)", code)] == []


def test_readme_mentions_every_variable(role: Path) -> None:
    """Or says where they are described."""
    readme = role / "README.md"
    if not readme.exists():
        pytest.skip("no README.md")
    words = set(re.findall(r"\w+", readme.read_text()))
    linked = all(f"({name})" in readme.read_text() for name in ("meta/argument_specs.yml", "defaults/main.yml"))
    assert linked or set(defaults(role)) - words == set()
    # What it calls a variable of the role is one: a renamed or removed one is not left behind.
    assert {word for word in words if word.startswith(f"{role.name}_")} <= set(defaults(role)) | outputs(role)


def outputs(role: Path) -> set[str]:
    """Facts that the role sets for others."""
    tasks = [task for path in (role / "tasks").glob("*.yml") for task in flat(load(path))]
    return {name for task in tasks for name in task.get("ansible.builtin.set_fact", {})}


def test_no_variable_of_the_user_is_set_as_a_fact(role: Path) -> None:
    assert outputs(role) & set(defaults(role)) == set()


# --- shape --------------------------------------------------------------------------------------------------


def test_files_of_a_role(role: Path) -> None:
    for name in ("defaults/main.yml", "meta/argument_specs.yml", "meta/main.yml", "vars/main.yml"):
        assert (role / name).is_file(), name
    tasks = {path.stem for path in (role / "tasks").iterdir()}
    assert tasks >= {*ENTRY_POINTS, "install"}
    assert ("configure" in tasks) == ("service" in tasks)
    assert (role / "handlers").is_dir() == any(
        "notify" in task for path in (role / "tasks").glob("*.yml") for task in flat(load(path))
    )


def test_entry_points_have_task_files(role: Path) -> None:
    assert set(specs(role)) >= ENTRY_POINTS
    for name in specs(role):
        assert (role / f"tasks/{name}.yml").is_file(), name


def test_main_takes_the_steps_in_their_order(role: Path) -> None:
    taken = [name for name in imports(role / "tasks/main.yml") if name in STEPS]
    assert taken == [name for name in STEPS if (role / f"tasks/{name}.yml").is_file()]


def test_main_begins_with_preflight_unless_the_playbook_did(role: Path) -> None:
    first = load(role / "tasks/main.yml")[0]
    assert "preflight.yml" in (first.get(f"ansible.builtin.{word}") for word in IMPORTS)
    assert first["when"] == "not (__serving_preflight_done | default(false))"


def test_every_task_file_is_reached(role: Path) -> None:
    tasks = {path.stem: path for path in (role / "tasks").glob("*.yml")}
    reached: set[str] = set()
    ahead = [name for name in specs(role) if name in tasks]
    while ahead:
        name = ahead.pop()
        reached.add(name)
        for target in imports(tasks[name]):
            pattern = ".+".join(re.escape(part) for part in re.split(r"\{\{.*?\}\}", target))
            found = {other for other in tasks if re.fullmatch(pattern, other)}
            assert found, f"{name}.yml goes on to {target}.yml, which is not there"
            ahead += found - reached
    assert reached == set(tasks)


def test_templates_and_files_are_used_and_there(role: Path) -> None:
    tasks = [task for path in (role / "tasks").glob("*.yml") for task in flat(load(path))]
    text = "\n".join(path.read_text() for path in (role / "tasks").glob("*.yml"))
    kept = {
        path.name for folder in ("templates", "files") if (role / folder).is_dir() for path in (role / folder).iterdir()
    }
    templates = "\n".join(path.read_text() for path in (role / "templates").glob("*"))
    imported = set(re.findall(r"\{%-? from '(.+?)' import ", templates))
    assert {name for name in kept if name not in text} == imported
    named = {task["ansible.builtin.template"]["src"] for task in tasks if "ansible.builtin.template" in task}
    assert named <= kept


def test_tasks_have_names_and_conditions_are_no_templates(role: Path) -> None:
    for path in (role / "tasks").glob("*.yml"):
        for task in flat(load(path)):
            assert task.get("name"), f"{path.name}: {task}"
            for key in ("when", "failed_when", "changed_when", "until"):
                assert "{{" not in str(task.get(key, "")), task["name"]


def test_files_on_hosts_have_a_mode_and_an_owner(role: Path) -> None:
    for path in (role / "tasks").glob("*.yml"):
        for task in flat(load(path)):
            for module in ("template", "copy"):
                arguments = task.get(f"ansible.builtin.{module}")
                if arguments and "delegate_to" not in task:
                    assert {"owner", "group", "mode"} <= set(arguments), task["name"]
                    assert isinstance(arguments["mode"], str), task["name"]
