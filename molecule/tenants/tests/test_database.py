"""PostgreSQL on the gateway, its backups, and a gateway that is brought back from one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import support
from service import BATCH_SECONDS, GATEWAY, ask, key, settled, spend, sql
from testinfra.host import Host

SECRETS = support.INVENTORY / ".secrets"
COPIES = support.INVENTORY / ".backups/gw"
ON_HOST = "/var/backups/llmfleet"
# Of every table the number of rows, and a digest of them; but for one that each worker writes its time to.
DIGEST = r"""
SELECT format('SELECT %L, count(*), md5(string_agg(t::text, chr(10) ORDER BY t::text)) FROM %I t;', relname, relname)
FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace
AND relname <> 'LiteLLM_ProxyWorkerHeartbeat' ORDER BY relname \gexec
"""
# What the database has of a team and its keys. site.yml verifies with a key of the other team, and spends by that.
LEDGER = """
SELECT spend, max_budget, budget_duration, budget_reset_at, models FROM "LiteLLM_TeamTable" WHERE team_id = 'research';
SELECT key_alias, token, spend, max_parallel_requests, models, blocked, expires
FROM "LiteLLM_VerificationToken" WHERE team_id = 'research' ORDER BY 1
"""


@pytest.fixture(scope="module")
def role(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The role alone, on the hosts that the variable `where` names."""
    play = tmp_path_factory.mktemp("plays") / "postgresql.yml"
    play.write_text(
        "- hosts: '{{ where | default(\"gateways\") }}'\n  gather_facts: false\n  become: true\n  tasks:\n"
        "    - ansible.builtin.include_role:\n        name: llmfleet.serving.postgresql\n"
        "        tasks_from: '{{ step | default(\"main\") }}'\n"
    )
    return play


def digest(host: Host) -> str:
    found = sql(host, DIGEST)
    assert found.count("\n") >= 1, "there are too few tables to compare"
    return found


def started(host: Host) -> str:
    return sql(host, "SELECT pg_postmaster_start_time()", "postgres")


def unit(host: Host) -> str:
    return host.check_output("systemctl list-units --plain --no-legend 'postgresql@*' | cut -d' ' -f1")


def newest() -> Path:
    return max(COPIES.glob("*.age"))


def on_host(host: Host) -> list[str]:
    return host.check_output(f"ls -A {ON_HOST}").split()


# --- the server ---------------------------------------------------------------------------------------------


def test_it_listens_nowhere(gateway: Host) -> None:
    assert gateway.run("ss -Hltnp | grep -E 'postgres|:5432'").stdout == ""
    assert gateway.file("/run/postgresql/.s.PGSQL.5432").is_socket


def test_only_its_own_system_user_is_let_in(gateway: Host) -> None:
    """By peer: also root is not, for this database and this role."""
    ask = "psql -XAtq --no-password -h /run/postgresql -U litellm -d litellm -c 'SELECT current_user'"
    for user, opens in (("litellm", True), ("root", False), ("nobody", False), ("www-data", False)):
        assert (gateway.run(f"su -s /bin/sh {user} -c %s", ask).rc == 0) == opens, user
    assert sql(gateway, "SELECT rolpassword IS NULL FROM pg_authid WHERE rolname = 'litellm'", "postgres") == "t"
    assert sql(gateway, "SELECT has_database_privilege('pg_monitor', 'litellm', 'CONNECT')", "postgres") == "f"
    assert sql(gateway, "SHOW data_checksums", "postgres") == "on"


def test_it_is_confined(gateway: Host) -> None:
    assert support.exposure(gateway, unit(gateway)) < 2
    assert support.exposure(gateway, "llmfleet-backup.service") < 2


@pytest.mark.long
def test_a_setting_is_reloaded_or_restarted_as_it_needs(gateway: Host, role: Path) -> None:
    before = started(gateway)
    check = support.apply(str(role), "--check", "--diff", variables={"postgresql_max_connections": 120})
    assert "+max_connections = 120" in check.output
    assert started(gateway) == before
    support.apply(str(role), variables={"postgresql_max_connections": 120})
    assert sql(gateway, "SHOW max_connections", "postgres") == "120"
    assert started(gateway) != before
    support.apply(str(role))
    before = started(gateway)
    assert support.apply(str(role)).total("changed") == 0
    # What a run that was cut short has left out is made up for.
    gateway.check_output("sed -i 's/^log_min_duration_statement.*//' /etc/postgresql/*/main/conf.d/llmfleet.conf")
    run = support.apply(str(role))
    assert run.total("changed") == 2
    assert started(gateway) == before


@pytest.mark.long
def test_bad_input_is_refused_before_anything_is_changed(role: Path) -> None:
    variables = {"postgresql_memory": 1, "postgresql_listen_addresses": "*'"}
    run = support.play(str(role), variables=variables)
    assert run.code != 0
    assert all(f"{variable} is" in run.said for variable in variables), run.output
    assert run.total("changed") == 0


@pytest.mark.long
def test_what_others_have_is_left_alone(role: Path) -> None:
    """On a host with a cluster that is in use: no setting and no unit of it is touched, and it is not restarted."""
    host = support.host("eng")
    host.check_output(
        "apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq postgresql >/dev/null 2>&1"
    )
    try:
        sql(host, "CREATE DATABASE wiki", "postgres")
        before = started(host)
        run = support.play(str(role), variables={"where": "eng"})
        assert run.code != 0
        assert "has other databases (wiki)" in run.said
        assert run.total("changed") == 0
        variables = {"where": "eng", "postgresql_listen_addresses": "localhost"}
        support.apply(str(role), variables=variables)
        assert support.apply(str(role), variables=variables).total("changed") == 0
        assert sql(host, "SELECT current_database()") == "litellm"
        support.apply(str(role), variables={**variables, "step": "remove", "postgresql_remove_data": True})
        assert (
            sql(host, "SELECT datname FROM pg_database WHERE NOT datistemplate ORDER BY 1", "postgres")
            == "postgres\nwiki"
        )
        assert started(host) == before
        assert (
            host.check_output(
                "ls /etc/postgresql/*/main/conf.d; grep llmfleet /etc/postgresql/*/main/pg_hba.conf | cat"
            )
            == ""
        )
    finally:
        host.check_output(
            "DEBIAN_FRONTEND=noninteractive apt-get purge -qq 'postgresql*' >/dev/null 2>&1; rm -rf /var/lib/postgresql"
        )


# --- backups ------------------------------------------------------------------------------------------------


def test_a_backup_is_made_verified_and_fetched(gateway: Host) -> None:
    run = support.apply("backup", "-vvv")
    assert "Wrote and verified" in run.said
    assert newest().stat().st_mode & 0o777 == 0o600
    content = newest().read_bytes()
    assert content.startswith(b"age-encryption.org/v1")
    for name in ("litellm_salt_key", "litellm_master_key"):
        assert support.secret(name).encode() not in content
        assert support.secret(name) not in run.output
    opens = support.secret("backup_key").splitlines()[2]
    assert opens not in run.output
    listed = gateway.check_output(f"stat -c '%a %U %n' {ON_HOST} {ON_HOST}/*").splitlines()
    assert listed[0] == f"700 root {ON_HOST}"
    assert all(line.startswith("600 root") and line.endswith(".age") for line in listed[1:])
    # what opens it is not on the gateway
    places = f"{ON_HOST} /etc/llmfleet /var/tmp /tmp /root /run/llmfleet*"
    assert gateway.run(f"grep -rlF -e %s {places}", opens).stdout == ""


def test_the_timer_makes_one_in_its_confinement(gateway: Host) -> None:
    assert gateway.service("llmfleet-backup.timer").is_running
    before = len(on_host(gateway))
    gateway.check_output("systemctl start llmfleet-backup.service")
    assert len(on_host(gateway)) == before + 1


@pytest.mark.long
def test_the_newest_are_kept(gateway: Host) -> None:
    for _ in range(2):
        support.apply("backup", variables={"serving_backup_keep": 2})
    assert len(on_host(gateway)) == 2
    assert sorted(path.name for path in COPIES.iterdir()) == sorted(on_host(gateway))


@pytest.mark.long
def test_a_backup_that_fails_replaces_nothing(gateway: Host) -> None:
    before = on_host(gateway)
    program = gateway.check_output("readlink -f /usr/bin/age-keygen")
    gateway.check_output(f"mv {program} {program}.away")
    try:
        run = support.play("backup", variables={"serving_backup_keep": 1})
    finally:
        gateway.check_output(f"mv {program}.away {program}")
    assert run.code != 0
    assert "There is no new backup, and the older ones are untouched." in run.said
    assert on_host(gateway) == before


@pytest.mark.long
def test_what_cannot_be_restored_is_refused_and_changes_nothing(gateway: Host, tmp_path: Path) -> None:
    before, content = digest(gateway), newest().read_bytes()
    tampered = tmp_path / "tampered.age"
    tampered.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    secrets = tmp_path / "secrets"
    shutil.copytree(SECRETS, secrets)
    (secrets / "litellm_salt_key").write_text("another-salt-key-another-salt-key\n")
    keyless = tmp_path / "keyless"
    shutil.copytree(SECRETS, keyless, ignore=shutil.ignore_patterns("backup_key*"))
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", keyless / "backup_key"], check=True)
    replace = {"serving_restore_replace": True}
    for variables, says in (
        ({}, "set serving_restore_replace to true"),
        ({**replace, "serving_restore_file": "/nowhere.age"}, "There is no file /nowhere.age"),
        ({**replace, "serving_restore_file": str(tampered)}, "damaged or not whole"),
        ({**replace, "serving_secrets_dir": str(secrets)}, "is another salt key than the backup's"),
        ({**replace, "serving_secrets_dir": str(keyless)}, "encrypted for another key than backup_key"),
    ):
        run = support.play("restore", variables=variables)
        assert run.code != 0, says
        assert says in run.said
        assert digest(gateway) == before
    assert gateway.check_output("ls -A /root | grep -c age | cat") == "0"
    support.apply("backup")  # with the key of the scenario again


@pytest.mark.long
def test_a_restore_replaces_what_is_there_and_keeps_a_backup_of_it(gateway: Host) -> None:
    """LiteLLM serves before and afterwards."""
    support.apply("backup")
    before, made = digest(gateway), len(on_host(gateway))
    sql(gateway, "CREATE TABLE later (n int); INSERT INTO later VALUES (1); ALTER TABLE later OWNER TO litellm")
    support.apply("restore", variables={"serving_restore_replace": True})
    assert digest(gateway) == before
    assert len(on_host(gateway)) == made + 1
    assert "_llmfleet_" not in sql(gateway, "SELECT string_agg(datname, ' ') FROM pg_database", "postgres")
    with support.client(GATEWAY, key="none") as api:
        support.wait_until(lambda: ask(api, key("apps", "chat")) == 200, 300)


# --- the disk is full -----------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(gateway: Host) -> Iterator[str]:
    """The cluster's folder, for a while on a disk in memory with 64 MiB to spare."""
    data, aside, service = "/var/lib/postgresql", "/var/lib/postgresql.aside", unit(gateway)
    gateway.check_output(
        f"systemctl stop {service} && mv {data} {aside} && mkdir {data} && "
        f"mount -t tmpfs -o size=$(($(du -sm {aside} | cut -f1) + 64))m tmpfs {data} && cp -a {aside}/. {data}/ && "
        f"systemctl start {service}"
    )
    yield data
    gateway.check_output(
        f"systemctl stop {service} && rm -rf {data}/filler {aside} && cp -a {data} {aside} && umount {data} && "
        f"rmdir {data} && mv {aside} {data} && systemctl start {service}"
    )


@pytest.mark.long
def test_a_full_disk_stops_no_client_and_loses_no_spend(gateway: Host, small_disk: str) -> None:
    """PostgreSQL ends, for longer than LiteLLM tries again by itself, and comes back once there is room."""
    user, answers, ended = "apps/chat", Counter[int](), threading.Event()
    before = settled(lambda: spend(gateway, user))

    def in_use() -> None:
        """By several at once, which meet both workers: each forgets within a minute a key that it does not meet."""
        with ThreadPoolExecutor(4) as pool:
            while not ended.wait(2):
                answers.update(pool.map(lambda _: ask(api, key("apps", "chat")), range(4)))

    def answering() -> bool:
        return gateway.run("su - postgres -c 'psql -c \"SELECT 1\"'").rc == 0

    with support.client(GATEWAY, key="none") as api:
        assert ask(api, key("apps", "chat")) == 200
        support.wait_until(lambda: spend(gateway, user) > before, 18 * BATCH_SECONDS)
        cost = spend(gateway, user) - before
        client = threading.Thread(target=in_use)
        client.start()
        try:
            support.wait_until(lambda: answers.total() >= 12, 120)
            sql(gateway, "CHECKPOINT")  # none that frees segments while the disk is filled
            gateway.check_output(f"fallocate -l $(df -B1 --output=avail {small_disk} | tail -1) {small_disk}/filler")
            fill = "psql -Xqc \"SELECT pg_logical_emit_message(false, '', ''), pg_switch_wal()\""
            gateway.check_output("timeout 300 su - postgres -c %s", f"while {fill}; do :; done >/dev/null 2>&1")
            assert not answering()
            with_database = answers.total()
            time.sleep(45)
            assert not answering()
        finally:
            ended.set()
            client.join()
        print("while the disk was filled and full:", dict(answers))
        assert set(answers) == {200}
        assert answers.total() >= with_database + 5
        gateway.check_output(f"rm {small_disk}/filler")
        support.wait_until(answering, 180)
        wanted = before + (1 + answers[200]) * cost
        support.wait_until(lambda: spend(gateway, user) > wanted - cost / 2, 30 * BATCH_SECONDS)
        assert settled(lambda: spend(gateway, user)) == pytest.approx(wanted)


# --- the gateway is gone --------------------------------------------------------------------------------------


def report() -> list[str]:
    """The same team and its keys, as tenants_report.yml shows them; but not how long ago they were used."""
    shown = re.findall(r"^ {8}(.{66})", support.apply("tenants_report").output, re.MULTILINE)
    return shown[next(number for number, line in enumerate(shown) if line.startswith("research")) :]


def test_a_destroyed_gateway_comes_back(gateway: Host) -> None:
    """What is left is the backup on the controller, which has lost the salt key as well."""
    users = {("research", "ci"): "tiny", ("research", "alice"): "tiny", ("apps", "chat"): "second"}
    keys = {user: key(*user) for user in users}
    spent = {user: spend(gateway, "/".join(user)) for user in users}
    with support.client(GATEWAY, key="none") as api:
        assert [ask(api, keys[user], model, 32) for user, model in users.items()] == [200] * 3
    support.wait_until(lambda: all(spend(gateway, "/".join(user)) > spent[user] for user in users), 18 * BATCH_SECONDS)
    settled(lambda: digest(gateway))
    support.apply("backup")
    before, entries, shown, salt = digest(gateway), sql(gateway, LEDGER), report(), support.secret("litellm_salt_key")

    start = time.monotonic()
    for verb in ("destroy", "start"):
        subprocess.run([support.PROJECT / "tests/hosts/hosts.py", verb, "--set", support.HOSTS.name, "gw"], check=True)
    prepare = Path(os.environ["MOLECULE_SCENARIO_DIRECTORY"]) / "prepare.yml"
    support.apply(str(prepare), "--limit", "gw")
    (SECRETS / "litellm_salt_key").unlink()
    bare = time.monotonic()
    restored = support.apply("restore")
    assert "Run site.yml next" in restored.said
    assert support.secret("litellm_salt_key") == salt
    assert digest(gateway) == before
    assert sql(gateway, "SELECT DISTINCT tableowner FROM pg_tables WHERE schemaname = 'public'") == "litellm"
    site = support.apply("site")
    print(
        f"a bare gateway after {bare - start:.0f} s, the database back after {restored.seconds:.0f} s more, "
        f"everything after {site.seconds:.0f} s more"
    )
    assert sql(gateway, LEDGER) == entries
    assert report() == shown
    with support.client(GATEWAY, key="none") as api:
        assert {user: key(*user) for user in users} == keys
        assert [ask(api, keys[user], model) for user, model in users.items()] == [200] * 3
        assert ask(api, keys["research", "ci"], "second") in (401, 403)
