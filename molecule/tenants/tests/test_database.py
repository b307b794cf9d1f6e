"""PostgreSQL on the gateway, its backups, and a gateway that is brought back from one."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import support
from testinfra.host import Host

SECRETS = support.INVENTORY / ".secrets"
COPIES = support.INVENTORY / ".backups/gw"
ON_HOST = "/var/backups/llmfleet"
# Of every table the number of rows, and a digest of them.
DIGEST = r"""
SELECT format('SELECT %L, count(*), md5(string_agg(t::text, chr(10) ORDER BY t::text)) FROM %I t;', relname, relname)
FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace ORDER BY relname \gexec
"""


@pytest.fixture(scope="module")
def gateway() -> Host:
    return support.host("gw")


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


@pytest.fixture
def quiet(gateway: Host) -> Iterator[None]:
    """LiteLLM writes nothing meanwhile."""
    units = gateway.check_output("systemctl list-units --plain --no-legend --state=active 'litellm@*' | cut -d' ' -f1")
    names = " ".join(units.split())
    if names:
        gateway.check_output(f"systemctl stop {names}")
    yield
    if names:
        gateway.check_output(f"systemctl start {names}")


def sql(host: Host, statements: str, database: str = "litellm") -> str:
    return host.check_output("echo %s | su - postgres -c 'psql -XAtq -v ON_ERROR_STOP=1 %s'", statements, database)


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


def said(run: support.Run) -> str:
    return " ".join(run.output.split())


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


def test_second_run_changes_nothing(gateway: Host, role: Path) -> None:
    before = started(gateway)
    run = support.apply(str(role), "-vvv")
    assert run.total("changed") == 0
    assert support.secret("postgresql_password") not in run.output
    assert started(gateway) == before


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
    # What a run that was cut short has left out is made up for.
    gateway.check_output("sed -i 's/^log_min_duration_statement.*//' /etc/postgresql/*/main/conf.d/llmfleet.conf")
    run = support.apply(str(role))
    assert run.total("changed") == 2
    assert started(gateway) == before


def test_another_password_takes_effect_and_the_old_one_comes_back(gateway: Host, role: Path) -> None:
    before = started(gateway)
    other = {"postgresql_password": "another-password-for-a-while"}
    run = support.apply(str(role), "-vvv", variables=other)
    assert (run.total("changed"), started(gateway)) == (1, before)
    assert support.apply(str(role)).total("changed") == 1
    logs = gateway.run("grep -rF another-password /var/log").stdout
    assert logs == ""


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"postgresql_user": "x'; DROP ROLE postgres; --"}, "postgresql_user is"),
        ({"postgresql_database": "postgres"}, "a name that PostgreSQL has for itself"),
        ({"postgresql_password": "short"}, "postgresql_password is not 16 to 256"),
        ({"postgresql_memory": 1}, "postgresql_memory is 1"),
        ({"postgresql_listen_addresses": "*'"}, "postgresql_listen_addresses is"),
    ],
)
def test_bad_input_is_refused_before_anything_is_changed(role: Path, variables: dict[str, Any], says: str) -> None:
    run = support.play(str(role), variables=variables)
    assert run.code != 0
    assert says in said(run)
    assert run.total("changed") == 0


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
        assert "has other databases (wiki)" in said(run)
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
    assert "Wrote and verified" in said(run)
    assert newest().stat().st_mode & 0o777 == 0o600
    content = newest().read_bytes()
    assert content.startswith(b"age-encryption.org/v1")
    for name in ("litellm_salt_key", "litellm_master_key"):
        assert support.secret(name).encode() not in content
        assert support.secret(name) not in run.output
    assert "PRIVATE KEY" not in run.output
    listed = gateway.check_output(f"stat -c '%a %U %n' {ON_HOST} {ON_HOST}/*").splitlines()
    assert listed[0] == f"700 root {ON_HOST}"
    assert all(line.startswith("600 root") and line.endswith(".age") for line in listed[1:])
    # what opens it is not on the gateway
    assert gateway.run("grep -rlF 'PRIVATE KEY' /var/backups /etc/llmfleet /var/tmp /tmp /run/llmfleet*").stdout == ""


def test_the_timer_makes_one_in_its_confinement(gateway: Host) -> None:
    assert gateway.service("llmfleet-backup.timer").is_running
    before = len(on_host(gateway))
    gateway.check_output("systemctl start llmfleet-backup.service")
    assert len(on_host(gateway)) == before + 1


def test_the_newest_are_kept(gateway: Host) -> None:
    for _ in range(2):
        support.apply("backup", variables={"serving_backup_keep": 2})
    assert len(on_host(gateway)) == 2
    assert sorted(path.name for path in COPIES.iterdir()) == sorted(on_host(gateway))


def test_a_backup_that_fails_replaces_nothing(gateway: Host) -> None:
    before = on_host(gateway)
    program = gateway.check_output("readlink -f /usr/bin/age-keygen")
    gateway.check_output(f"mv {program} {program}.away")
    try:
        run = support.play("backup", variables={"serving_backup_keep": 1})
    finally:
        gateway.check_output(f"mv {program}.away {program}")
    assert run.code != 0
    assert "There is no new backup, and the older ones are untouched." in said(run)
    assert on_host(gateway) == before


@pytest.mark.usefixtures("quiet")
def test_what_cannot_be_restored_is_refused_and_changes_nothing(gateway: Host, tmp_path: Path) -> None:
    before, content = digest(gateway), newest().read_bytes()
    truncated, tampered, other = (tmp_path / f"{name}.age" for name in ("truncated", "tampered", "other"))
    truncated.write_bytes(content[: len(content) // 2])
    tampered.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    other.write_bytes(b"no backup at all")
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
        ({**replace, "serving_restore_file": str(truncated)}, "damaged or not whole"),
        ({**replace, "serving_restore_file": str(tampered)}, "damaged or not whole"),
        ({**replace, "serving_restore_file": str(other)}, "damaged or not whole"),
        ({**replace, "serving_secrets_dir": str(secrets)}, "is another salt key than the backup's"),
        ({**replace, "serving_secrets_dir": str(keyless)}, "encrypted for another key than backup_key"),
    ):
        run = support.play("restore", variables=variables)
        assert run.code != 0, says
        assert says in said(run)
        assert digest(gateway) == before
    assert gateway.check_output("ls -A /root | grep -c age | cat") == "0"
    support.apply("backup")  # with the key of the scenario again


def test_a_restore_replaces_what_is_there_and_keeps_a_backup_of_it(gateway: Host, quiet: None) -> None:
    support.apply("backup")
    before, made = digest(gateway), len(on_host(gateway))
    sql(gateway, "CREATE TABLE later (n int); INSERT INTO later VALUES (1); ALTER TABLE later OWNER TO litellm")
    support.apply("restore", variables={"serving_restore_replace": True})
    assert digest(gateway) == before
    assert len(on_host(gateway)) == made + 1
    assert "_llmfleet_" not in sql(gateway, "SELECT string_agg(datname, ' ') FROM pg_database", "postgres")


def test_an_emptied_gateway_comes_back(gateway: Host) -> None:
    """Its cluster, LiteLLM's files and its backups are gone, and the controller has lost the salt key."""
    units = "systemctl list-units --all --plain --no-legend 'litellm@*' | cut -d' ' -f1"
    gateway.check_output(f"systemctl stop llmfleet-backup.timer $({units})")
    support.apply("backup")
    before, salt = digest(gateway), support.secret("litellm_salt_key")
    gateway.check_output(
        "v=$(ls /etc/postgresql) && pg_dropcluster --stop $v main && DEBIAN_FRONTEND=noninteractive "
        "apt-get purge -qq 'postgresql*' >/dev/null 2>&1; mv /etc/litellm /var/tmp/litellm-away; "
        f"rm -rf /var/lib/postgresql /etc/postgresql {ON_HOST} /etc/llmfleet /usr/local/sbin/llmfleet-backup"
    )
    (SECRETS / "litellm_salt_key").unlink()
    try:
        start = time.monotonic()
        run = support.apply("restore")
        print(f"restored in {time.monotonic() - start:.0f} s")
    finally:
        gateway.check_output("rm -rf /etc/litellm; mv /var/tmp/litellm-away /etc/litellm")
    assert "Run site.yml next" in said(run)
    assert digest(gateway) == before
    assert support.secret("litellm_salt_key") == salt
    assert sql(gateway, "SELECT DISTINCT tableowner FROM pg_tables WHERE schemaname = 'public'") == "litellm"
    gateway.check_output("cd /etc/systemd/system/multi-user.target.wants && systemctl start litellm@*.service")
