# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""Which variables and hosts the role postgresql takes, and what it tunes."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

PLUGINS = "ansible_collections.llmfleet.serving.plugins"
postgresql = importlib.import_module(f"{PLUGINS}.module_utils._postgresql")
filters = importlib.import_module(f"{PLUGINS}.filter.serving").FilterModule().filters()

ROLES = Path(__file__).parents[2] / "roles"
MIB = 1024**2
SETTINGS: dict[str, Any] = {
    "systems": ["debian 12", "debian 13"],
    "disk_bytes": 2048 * MIB,
    "database": "litellm",
    "user": "litellm",
    "postgresql_listen_addresses": "",
    "postgresql_memory": 0,
    "postgresql_max_connections": 100,
}
CLUSTER = {"version": "15", "name": "main", "port": 5432, "status": "online", "data": "/var/lib/postgresql/15/main"}
SERVER: dict[str, Any] = {
    "settings": {"listen_addresses": "localhost", "max_connections": "100"},
    "file_errors": [],
    "hba_errors": [],
    "others": [],
    "database": None,
    "role": None,
}
BARE: dict[str, Any] = {
    "system": "debian 12",
    "version": "15",
    "cluster": {},
    "other_clusters": [],
    "server": {},
    "server_error": "",
    "tuned": False,
    "ours": True,
    "free_bytes": 8192 * MIB,
    "memory_bytes": 8192 * MIB,
}
RUNNING = {**BARE, "cluster": {**CLUSTER, "online": True}, "server": SERVER}
SHARED = {**RUNNING, "ours": False, "server": {**SERVER, "others": ["wiki"]}}


# --- the variables ------------------------------------------------------------------------------------------


def test_defaults_are_fine() -> None:
    assert postgresql.problems(SETTINGS) == []


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("postgresql_listen_addresses", "localhost'; x = '"),
        ("postgresql_listen_addresses", "localhost\nport = 1"),
        ("postgresql_memory", -1),
        ("postgresql_memory", 1024),
        ("postgresql_max_connections", 5),
        ("postgresql_max_connections", 100000),
    ],
)
def test_bad_variables_are_named(variable: str, value: Any) -> None:
    (problem,) = postgresql.problems({**SETTINGS, variable: value})
    assert problem.startswith(f"{variable} is ")


@pytest.mark.parametrize("addresses", ["", "localhost", "*", "10.0.0.1, ::1"])
def test_addresses_to_listen_at(addresses: str) -> None:
    assert postgresql.problems({**SETTINGS, "postgresql_listen_addresses": addresses}) == []


# --- the host -----------------------------------------------------------------------------------------------


def test_clusters_are_read() -> None:
    text = (
        "15 main 5432 online postgres /var/lib/postgresql/15/main /var/log/postgresql/postgresql-15-main.log\n"
        "14 old  5433 down,binaries_missing postgres /srv/pg /var/log/x.log\n\nnonsense\n"
    )
    first, second = postgresql.parse_clusters(text)
    assert (first.label, first.port, first.online, first.data) == ("15/main", 5432, True, "/var/lib/postgresql/15/main")
    assert (second.label, second.online) == ("14/old", False)


@pytest.mark.parametrize("host", [BARE, RUNNING])
def test_a_bare_host_and_a_fresh_cluster_are_fine(host: dict[str, Any]) -> None:
    assert postgresql.host_problems(host, SETTINGS) == []


def test_tables_in_the_database_that_every_cluster_has_are_somebodys() -> None:
    assert postgresql.others([], 0) == []
    assert postgresql.others(["wiki"], 1) == ["wiki", "postgres with 1 table"]
    assert postgresql.others([], 3) == ["postgres with 3 tables"]


@pytest.mark.parametrize(("tables", "ours"), [(0, True), (2, False)])
def test_a_cluster_with_such_tables_is_left_alone(
    run_module: Callable[..., dict[str, Any]], tmp_path: Path, tables: int, ours: bool
) -> None:
    said = {**SERVER, "settings": {**SERVER["settings"], "hba_file": "/nowhere"}, "loaded": 1, "started": 1}
    answer = json.dumps({**said, "databases": [], "tables": tables})
    listed = "15 main 5432 online postgres /var/lib/postgresql/15/main /var/log/x.log"
    for program, text in (("pg_lsclusters", listed), ("runuser", answer), ("systemctl", ""), ("dpkg-query", "")):
        (tmp_path / program).write_text(f"#!/bin/sh\ncat <<'E'\n{text}\nE\n")
        (tmp_path / program).chmod(0o755)
    asked = {"config": "/nowhere", "dropin": "/nowhere", "database": "litellm", "user": "litellm"}
    found = run_module(
        "postgresql_host_info",
        {**asked, "versions": {"debian 12": "15"}},
        patch={"system": lambda: "debian 12", "DATA": tmp_path, "free_bytes": lambda _: 0},
        environment={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert (found["ours"], found["server"]["others"]) == (ours, postgresql.others([], tables))


def server(**changes: Any) -> dict[str, Any]:
    return {**RUNNING, "server": {**SERVER, **changes}}


OLD = {**CLUSTER, "version": "14", "label": "14/main"}
DATABASE = {"owner": "litellm", "encoding": "UTF8"}


@pytest.mark.parametrize(
    ("host", "says"),
    [
        ({**BARE, "system": "fedora 42", "version": ""}, "supports debian 12, debian 13"),
        ({**BARE, "other_clusters": [OLD]}, "cluster 14/main (port 5432)"),
        ({**BARE, "other_clusters": [{**OLD, "port": 5433}]}, "pg_upgradecluster"),
        ({**RUNNING, "cluster": {**CLUSTER, "online": True, "port": 5433}}, "has port 5433"),
        ({**RUNNING, "server": {}, "server_error": "peer failed"}, "does not let its own superuser in"),
        ({**BARE, "cluster": {**CLUSTER, "online": False, "status": "down"}}, "systemctl start postgresql@15-main"),
        (
            {**BARE, "cluster": {**CLUSTER, "online": False, "status": "down,binaries_missing"}},
            "apt-get install postgresql-15",
        ),
        (server(hba_errors=["pg_hba.conf line 3: x"]), "pg_hba.conf line 3: x"),
        (server(file_errors=["/etc/x line 1: y"]), "would not take its own configuration"),
        (server(role={"powers": ["SUPERUSER"]}), "(ALTER ROLE litellm NOSUPERUSER)"),
        (server(database={**DATABASE, "owner": "bob"}), "belongs to bob"),
        (server(database={**DATABASE, "encoding": "SQL_ASCII"}), "a database litellm in SQL_ASCII"),
        (SHARED, "set postgresql_listen_addresses to 'localhost'"),
        ({**BARE, "free_bytes": 100 * MIB}, "make room"),
        ({**RUNNING, "free_bytes": 100 * MIB}, "make room"),
    ],
)
def test_hosts_that_are_refused(host: dict[str, Any], says: str) -> None:
    (problem,) = postgresql.host_problems(host, SETTINGS)
    assert says in problem


def test_a_stopped_cluster_of_the_role_is_started() -> None:
    host = {**BARE, "tuned": True, "cluster": {**CLUSTER, "online": False, "status": "down"}}
    assert postgresql.host_problems(host, SETTINGS) == []


def test_a_cluster_of_others_is_taken_as_it_is() -> None:
    settings = {**SETTINGS, "postgresql_listen_addresses": "localhost"}
    assert postgresql.host_problems(SHARED, settings) == []
    (problem,) = postgresql.host_problems(SHARED, {**settings, "postgresql_max_connections": 200})
    assert "lower postgresql_max_connections (200)" in problem


def test_memory_that_the_host_does_not_have() -> None:
    (problem,) = postgresql.host_problems(RUNNING, {**SETTINGS, "postgresql_memory": 6144 * MIB})
    assert problem.startswith("postgresql_memory is ")


def test_connections_suffice_for_two_instances_of_litellm() -> None:
    """By default: its most workers, each with its pool; and 10 more for backups, monitoring and you."""
    litellm, own = (
        yaml.safe_load((ROLES / f"{role}/defaults/main.yml").read_text()) for role in ("litellm", "postgresql")
    )
    most = yaml.safe_load((ROLES / "litellm/vars/main.yml").read_text())["__litellm_most_workers"]
    workers = int(re.fullmatch(r".*, (\d+)\] \| min \}\}", most)[1])
    assert own["postgresql_max_connections"] >= 2 * workers * litellm["litellm_database_connections"] + 10


# --- its configuration --------------------------------------------------------------------------------------


def megabytes(text: str) -> int:
    return int(text.removesuffix("MB"))


@pytest.mark.parametrize("host", [0, 512 * MIB, 2048 * MIB, 8192 * MIB, 1024 * 1024 * MIB])
@pytest.mark.parametrize("memory", [0, 128 * MIB, 4096 * MIB])
def test_settings_stay_within_the_memory(host: int, memory: int) -> None:
    found = postgresql.tuning(memory, host, 100)
    budget = (memory or min(max(host // 8, 128 * MIB), 1024 * MIB)) // MIB
    assert found["max_connections"] == "100"
    assert megabytes(found["shared_buffers"]) + megabytes(found["maintenance_work_mem"]) <= budget
    assert 2 <= megabytes(found["work_mem"]) <= 16


# --- its removal --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "data", "refused"),
    [
        (RUNNING, True, False),
        (BARE, True, False),
        ({**BARE, "cluster": {**CLUSTER, "status": "down"}}, True, True),
        ({**BARE, "cluster": {**CLUSTER, "status": "down"}}, False, False),
    ],
)
def test_data_that_cannot_be_deleted_is_spoken_of(
    run_playbook: Callable[..., subprocess.CompletedProcess[str]], host: dict[str, Any], data: bool, refused: bool
) -> None:
    tasks = yaml.safe_load((ROLES / "postgresql/tasks/remove.yml").read_text())
    check = next(task for task in tasks if "ansible.builtin.assert" in task)
    variables = {"__postgresql_host": host, "postgresql_remove_data": data}
    files = [str(ROLES / "postgresql/vars/main.yml")]
    play = {"hosts": "all", "gather_facts": False, "vars_files": files, "vars": variables, "tasks": [check]}
    done = run_playbook([play])
    assert (done.returncode != 0) == refused, done.stdout
    assert ("does not answer (down)" in done.stdout) == refused
    assert ("systemctl start postgresql@15-main.service" in " ".join(done.stdout.split())) == refused


MADE = yaml.safe_load((ROLES / "postgresql/vars/main.yml").read_text())["__postgresql_comment"]
OWN = {**DATABASE, "comment": MADE}
ELSEWHERE = {"litellm_database_url": "postgresql://litellm@localhost/litellm?host=/run/postgresql"}
ASKED = {"postgresql_remove_data": True, "postgresql_remove_package": True}


@pytest.mark.parametrize(
    ("database", "role", "variables", "done"),
    [
        (OWN, MADE, ASKED, ["database", "owner", "cluster"]),
        (OWN, "", ASKED, ["database", "cluster"]),
        (None, MADE, ASKED, ["database", "owner", "cluster"]),
        (OWN, MADE, {}, ["postgresql_remove_data=true deletes it"]),
        ({**OWN, "comment": ""}, "", ASKED, ["the role postgresql has not made it"]),
        ({**OWN, "comment": ""}, MADE, {}, ["the role postgresql has not made it"]),
        (OWN, MADE, {**ASKED, **ELSEWHERE}, ["litellm_database_url is set"]),
        (OWN, MADE, ELSEWHERE, ["litellm_database_url is set"]),
    ],
)
def test_only_what_the_role_has_made_is_deleted(
    run_playbook: Callable[..., subprocess.CompletedProcess[str]],
    database: dict[str, Any] | None,
    role: str,
    variables: dict[str, Any],
    done: list[str],
) -> None:
    """With what deletes replaced by words."""
    deletes = {
        "Delete the database": "database",
        "Delete its owner": "owner",
        "Drop the cluster": "cluster",
        "Remove the packages": "packages",
    }
    tasks = yaml.safe_load((ROLES / "postgresql/tasks/remove.yml").read_text())
    kept = [task for task in tasks if "block" in task or task["name"].startswith("Tell ")]
    for block in (task for task in kept if "block" in task):
        block.pop("become", None)
        block["block"] = [
            {"name": task["name"], "when": task.get("when", True), "ansible.builtin.debug": {"msg": "It goes."}}
            for task in block["block"]
        ]
    found = server(database=database, role={"login": True, "powers": [], "comment": role})
    defaults = {"postgresql_remove_data": False, "postgresql_remove_package": False}
    play = {
        "hosts": "all",
        "gather_facts": False,
        "vars_files": [str(ROLES / "postgresql/vars/main.yml")],
        "vars": {**defaults, "__postgresql_host": found, **variables},
        "tasks": kept,
    }
    ran = run_playbook([play])
    assert ran.returncode == 0, ran.stdout
    went = [name for name, text in re.findall(r"TASK \[(.+?)\] \**\n(.*)", ran.stdout) if text.startswith("ok")]
    said = " ".join(ran.stdout.split())
    assert [deletes[name] for name in went if name in deletes and name != "Remove the packages"] == [
        word for word in done if word in deletes.values()
    ]
    assert said.count("The database litellm stays") == sum(" " in word or "=" in word for word in done)
    assert all(word in said for word in done if word not in deletes.values())


def test_backups_are_restored_into_a_database_that_the_role_knows_again() -> None:
    settings = yaml.safe_load((ROLES / "serving_backup/vars/main.yml").read_text())["__serving_backup_settings"]
    own = yaml.safe_load((ROLES / "postgresql/vars/main.yml").read_text())
    wanted = [own[f"__postgresql_{name}"] for name in ("database", "user", "comment")]
    assert [settings[name] for name in ("database", "owner", "comment")] == wanted


def test_what_the_role_makes_it_knows_again() -> None:
    text = (ROLES / "postgresql/tasks/service.yml").read_text()
    (made,) = (task["block"] for task in yaml.safe_load(text) if "block" in task)
    comments = {
        module: arguments["comment"]
        for task in made
        for module, arguments in task.items()
        if isinstance(arguments, dict) and "comment" in arguments
    }
    assert set(comments) == {"community.postgresql.postgresql_user", "community.postgresql.postgresql_db"}
    assert all("__postgresql_comment" in comment for comment in comments.values())
