# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""The collection as a whole: metadata, documentation, playbooks, and where secrets may stand."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import ansible_collections
import pytest
import yaml
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).parents[2]
ROLES = sorted((ROOT / "roles").iterdir())
PLAYBOOKS = sorted((ROOT / "playbooks").glob("*.yml"))
SECRETS = {
    *("vllm_api_key", "vllm_hf_token", "nginx_keys", "nginx_backend_key"),
    *("certbot_dns_credentials", "certbot_eab_hmac_key"),
    *("__serving_backup_salt_key", "__serving_backup_master_key"),
    *("litellm_backend_key", "litellm_master_key", "litellm_salt_key", "litellm_database_url", "litellm_redis_url"),
    *("litellm_alert_slack_url", "litellm_alert_webhook_url", "litellm_environment"),
}
WITHOUT_JAMMY = {"nginx", "certbot", "postgresql", "litellm", "serving_backup"}  # it has no njs: no gateway runs it
SYSTEMS = {("Debian", "bookworm"), ("Debian", "trixie"), ("Ubuntu", "jammy"), ("Ubuntu", "noble")}
# What the collection's archive holds. The rest of the checkout is for those who work on it.
KEPT = {
    *("meta", "plugins", "roles", "playbooks", "changelogs", "docs"),
    *(
        "README.md",
        "CONTRIBUTING.md",
        "CODE_OF_CONDUCT.md",
        "LICENSE",
        "CHANGELOG.md",
        "CHANGELOG.rst",
        "galaxy.yml",
        "requirements.in",
        "requirements.txt",
    ),
}


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


# --- metadata -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def galaxy() -> dict[str, Any]:
    return load(ROOT / "galaxy.yml")


def required_ansible() -> SpecifierSet:
    return SpecifierSet(load(ROOT / "meta/runtime.yml")["requires_ansible"])


def lowest_ansible() -> Version:
    (lowest,) = (Version(specifier.version) for specifier in required_ansible() if specifier.operator == ">=")
    return lowest


def test_galaxy_is_what_galaxy_takes(galaxy: dict[str, Any]) -> None:
    assert (galaxy["namespace"], galaxy["name"]) == ("llmfleet", "serving")
    assert re.fullmatch(r"[1-9]\d*\.\d+\.\d+", galaxy["version"])
    assert galaxy["license"] == ["GPL-3.0-or-later"]
    assert set(galaxy["tags"]) & {"application", "cloud", "database", "infrastructure", "linux", "monitoring", "tools"}
    assert len(galaxy["tags"]) <= 20
    assert (ROOT / galaxy["readme"]).name == "README.md"


def test_archive_holds_the_collection_only(galaxy: dict[str, Any]) -> None:
    """`ansible-galaxy collection build` does not ask git what to leave out."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    there = {line.split("/")[0] for line in listed.stdout.splitlines()}
    there |= {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if "*" not in line}
    there -= {"__pycache__"}  # nested; Ansible itself leaves *.pyc out
    stray = {
        name for name in there - KEPT if not any(fnmatch.fnmatch(name, pattern) for pattern in galaxy["build_ignore"])
    }
    assert stray == set()


def test_dependencies_are_installed_in_a_fitting_version(galaxy: dict[str, Any]) -> None:
    for name, wanted in galaxy["dependencies"].items():
        (manifest,) = (
            path
            for folder in ansible_collections.__path__
            if (path := Path(folder) / name.replace(".", "/") / "MANIFEST.json").is_file()
        )
        found = json.loads(manifest.read_text())["collection_info"]["version"]
        assert SpecifierSet(wanted).contains(found), name


def test_collections_in_use_are_dependencies(galaxy: dict[str, Any]) -> None:
    text = "\n".join(path.read_text() for folder in ("roles", "playbooks") for path in (ROOT / folder).rglob("*.yml"))
    used = set(re.findall(r"\b((?:ansible|community)\.\w+)\.\w+", text)) - {"ansible.builtin"}
    assert used == set(galaxy["dependencies"])


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-test.txt"])
def test_pinned_ansible_core_is_a_required_one(name: str) -> None:
    (pinned,) = re.findall(r"^ansible-core==(\S+)", (ROOT / name).read_text(), re.MULTILINE)
    assert required_ansible().contains(pinned)


def test_required_ansible_is_stated_in_one_place() -> None:
    pattern = re.compile(r"requires_ansible\s*:|ansible[-_]core\W{0,3}[<>~!]=?")
    files = [*ROOT.glob("*.yml"), *ROOT.glob("*.toml"), *ROOT.glob("*.in"), *ROOT.glob("*.cfg"), *ROOT.glob("*.md")]
    files += [path for folder in ("meta", "roles", "playbooks", "plugins") for path in (ROOT / folder).rglob("*.*")]
    stating = [
        path
        for path in files
        if path.is_file() and path.suffix not in (".pyc", ".md") and pattern.search(path.read_text())
    ]
    assert [str(path.relative_to(ROOT)) for path in stating] == ["meta/runtime.yml"]


def test_readme_names_the_lowest_ansible_core() -> None:
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("no README.md")
    named = re.findall(r"ansible-core\D{0,12}(\d+\.\d+)", readme.read_text())
    assert named
    assert {Version(version) for version in named} == {Version(f"{lowest_ansible().major}.{lowest_ansible().minor}")}


@pytest.mark.parametrize("role", ROLES, ids=lambda path: path.name)
def test_roles_say_the_same_ansible_and_systems(role: Path) -> None:
    info = load(role / "meta/main.yml")["galaxy_info"]
    assert isinstance(info["min_ansible_version"], str)
    assert Version(info["min_ansible_version"]) == lowest_ansible()
    assert info["license"] == "GPL-3.0-or-later"
    systems = {(platform["name"], version) for platform in info["platforms"] for version in platform["versions"]}
    without = {("Ubuntu", "jammy")} if role.name in WITHOUT_JAMMY else set()
    assert systems == SYSTEMS - without
    assert load(role / "meta/main.yml")["dependencies"] == []


def test_links() -> None:
    assert os.readlink(ROOT / "site.yml") == "playbooks/site.yml"
    assert (ROOT / "collections/ansible_collections/llmfleet/serving").resolve() == ROOT.resolve()


def test_python_files_have_the_licence_on_top() -> None:
    for path in [*(ROOT / "plugins").rglob("*.py"), *(ROOT / "tests/unit").glob("*.py")]:
        head = path.read_text().splitlines()[:3]
        assert "# Copyright: llmfleet developers" in head, path
        assert "# GNU General Public License v3.0+ (see LICENSE)" in head, path


# --- documentation ------------------------------------------------------------------------------------------

FILTERS = {path.stem for path in (ROOT / "plugins/filter").glob("*.yml")} | {
    path.stem for path in (ROOT / "plugins/filter").glob("*.py") if "DOCUMENTATION" in path.read_text()
}
PLUGINS = {
    "module": {path.stem for path in (ROOT / "plugins/modules").glob("*.py")},
    "lookup": {path.stem for path in (ROOT / "plugins/lookup").glob("*.py")},
    "filter": FILTERS,
}


@pytest.mark.parametrize("kind", PLUGINS)
def test_documentation_is_whole(kind: str, galaxy: dict[str, Any]) -> None:
    names = sorted(f"llmfleet.serving.{name}" for name in PLUGINS[kind])
    command = [sys.executable, "-m", "ansible", "doc", "--json", "-t", kind, *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert sorted(found) == names
    for name, entry in found.items():
        doc = entry["doc"]
        assert doc["author"], name
        assert Version(doc["version_added"]) <= Version(galaxy["version"]), name
        assert not doc["short_description"].endswith("."), name
        assert all(option["description"] and option["type"] for option in doc.get("options", {}).values()), name
        assert name in entry["examples"], name
        assert isinstance(yaml.safe_load(entry["examples"]), list), name
        assert entry["return"], name
        assert all(value["description"] for value in entry["return"].values()), name
        if kind == "module":
            assert {"check_mode", "diff_mode", "idempotent"} <= set(doc["attributes"]), name
            assert all(attribute["support"] for attribute in doc["attributes"].values()), name


# --- playbooks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PLAYBOOKS, ids=lambda path: path.name)
def test_plays_say_that_they_gather_no_facts(path: Path) -> None:
    for play in load(path):
        assert play["name"]
        if "ansible.builtin.import_playbook" not in play:
            assert play["gather_facts"] is False, play["name"]


def test_site_takes_playbooks_that_are_there() -> None:
    for play in load(ROOT / "playbooks/site.yml"):
        name = play["ansible.builtin.import_playbook"]
        assert (ROOT / "playbooks" / f"{name.removeprefix('llmfleet.serving.')}.yml").is_file(), name


def test_playbooks_enter_roles_where_their_specs_say() -> None:
    """Without a spec of that name Ansible checks nothing."""
    text = "\n".join(path.read_text() for path in PLAYBOOKS)
    entered = re.findall(r"name: llmfleet\.serving\.(\w+)\n\s+tasks_from: (\w+)", text)
    assert entered
    for role, entry in entered:
        assert entry in load(ROOT / f"roles/{role}/meta/argument_specs.yml")["argument_specs"], f"{role}: {entry}"


# --- secrets ------------------------------------------------------------------------------------------------


def test_specs_say_which_variables_are_secret() -> None:
    """By that playbooks/preflight.yml leaves their values out of its messages."""
    specs = [load(role / "meta/argument_specs.yml")["argument_specs"]["main"]["options"] for role in ROLES]
    masked = {name for options in specs for name, option in options.items() if option.get("no_log")}
    assert {name for name in SECRETS if not name.startswith("__")} <= masked


# A task's result shows its arguments and loop items, not its conditions and variables. Those of an assertion are safe
# as long as its message is: nginx_problems returns no part of a key, and a test of its own says so.
SILENT = {"name", "when", "register", "notify", "no_log", "block", "rescue", "always"}


def tasks_of(tasks: list[dict[str, Any]], no_log: bool = False) -> Iterator[tuple[dict[str, Any], bool]]:
    """Every task with whether it, or a block around it, has no_log."""
    for task in tasks:
        hidden = task.get("no_log", no_log) is True
        yield task, hidden
        for part in ("block", "rescue", "always"):
            yield from tasks_of(task.get(part, []), hidden)


def all_tasks() -> Iterator[tuple[Path, dict[str, Any], bool]]:
    for path in sorted(ROOT.glob("roles/*/*/*.yml")):
        if path.parent.name in ("tasks", "handlers"):
            for task, hidden in tasks_of(load(path)):
                yield path, task, hidden
    for path in PLAYBOOKS:
        for play in load(path):
            for part in ("pre_tasks", "tasks", "post_tasks", "handlers"):
                for task, hidden in tasks_of(play.get(part, []), play.get("no_log", False)):
                    yield path, task, hidden


def words(value: object) -> set[str]:
    if isinstance(value, (dict, list)):
        return set().union(*map(words, value.values() if isinstance(value, dict) else value))
    text = str(value)
    if expressions := re.search(r"\{[{%].*[%}]\}", text, re.DOTALL):
        text = expressions[0]  # what is before the first and after the last is only said
    text = re.sub(r"\b\w+ (\| length|is (not )?defined)\b", "", text)  # which says whether there is one
    text = re.sub(r"\b__litellm_database\.place\b", "", text)  # its URL without the password
    text = re.sub(r"/\w+", "", text)  # the name of a file
    # Not those of a sentence in an expression, which only speaks of a secret.
    text = re.sub(r"'[^']*'", lambda quoted: "" if " " in quoted[0] else quoted[0], text)
    return set(re.findall(r"\w+", text))


@cache
def carriers() -> frozenset[str]:
    """The secrets, and the internal variables and templates that are made of them."""
    made_of = {name: words(value) for path in ROOT.glob("roles/*/vars/*.yml") for name, value in load(path).items()}
    made_of |= {path.name: words(path.read_text()) for path in ROOT.glob("roles/*/templates/*")}
    found = set(SECRETS)
    while more := {name for name, of in made_of.items() if of & found} - found:
        found |= more
    return frozenset(found)


def shown(task: dict[str, Any]) -> dict[str, Any]:
    silent = SILENT | ({"vars"} if "ansible.builtin.assert" in task else set())
    return {key: unmasked(key, value) for key, value in task.items() if key not in silent}


def unmasked(module: str, arguments: Any) -> Any:
    """The arguments that a module of ours does not mask by itself: its spec says no_log of the others."""
    source = ROOT / f"plugins/modules/{module.rpartition('.')[2]}.py"
    if not module.startswith("llmfleet.serving.") or not isinstance(arguments, dict):
        return arguments
    masked = set(re.findall(r'"(\w+)": \{[^}]*"no_log": True', source.read_text()))
    return {name: value for name, value in arguments.items() if name not in masked}


def secrets_in(value: object) -> set[str]:
    return words(value) & carriers() | {name for name in carriers() if "." in name and name in json.dumps(value)}


def test_templates_with_secrets_are_those() -> None:
    """If this finds too few, the test below finds nothing."""
    assert {name for name in carriers() if name.endswith(".j2")} == {
        "instance.env.j2",
        "keys.json.j2",
        "secrets.conf.j2",
        "dns.ini.j2",
        "llmfleet.ini.j2",
        "env.j2",
    }


def test_tasks_with_secrets_have_no_log_and_no_diff() -> None:
    with_secrets = [(path, task, hidden) for path, task, hidden in all_tasks() if secrets_in(shown(task))]
    assert len(with_secrets) >= 4  # hf_token, instance.env.j2, keys.json.j2, secrets.conf.j2
    assert [f"{path}: {task['name']}" for path, task, hidden in with_secrets if not hidden] == []


def test_no_secret_is_in_a_command_or_an_environment() -> None:
    """Each process of the host can read the one, and -vvv shows the other even with no_log."""
    for path, task, _ in all_tasks():
        for key in ("ansible.builtin.command", "ansible.builtin.shell", "environment"):
            assert secrets_in(task.get(key, "")) == set(), f"{path}: {task['name']}"


def test_files_with_secrets_are_for_root_only() -> None:
    for path, task, _ in all_tasks():
        for key in ("ansible.builtin.template", "ansible.builtin.copy"):
            if secrets_in(task.get(key, "")):
                assert task[key]["mode"] == "0600", f"{path}: {task['name']}"
                assert task[key]["owner"] == "root", f"{path}: {task['name']}"


def test_debug_shows_no_secret() -> None:
    for path, task, _ in all_tasks():
        for key in ("ansible.builtin.debug", "ansible.builtin.fail", "ansible.builtin.assert"):
            assert secrets_in(task.get(key, "")) == set(), f"{path}: {task['name']}"
