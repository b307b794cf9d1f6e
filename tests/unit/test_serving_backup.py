# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""What the program llmfleet-backup decides by: which backups are kept, and which are refused."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.parsing.vault import VaultSecret

ROOT = Path(__file__).parents[2]
ROLE = ROOT / "roles/serving_backup"
FILE = ROLE / "files/llmfleet_backup.py"
spec = importlib.util.spec_from_file_location("llmfleet_backup", FILE)
backup: Any = importlib.util.module_from_spec(spec)
sys.modules["llmfleet_backup"] = backup  # for its dataclasses
spec.loader.exec_module(backup)

RunPlaybook = Callable[..., subprocess.CompletedProcess[str]]
KEYS = {"litellm_salt_key": "salt-of-the-earth", "litellm_master_key": "sk-master"}
MANIFEST = {"format": 1, "postgresql": "15.20", "litellm": "1.106.2", "made": "2026-11-21T20:00:00Z", "host": "gw"}
EMPTY = {"postgresql": "15.20", "litellm": "", "salt": "", "tables": 0}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("KEY=value", "value"),
        ('KEY="two words"', "two words"),
        ("# KEY=no\n; KEY=no\n\nOTHER=x\nKEY='a#b'\n", "a#b"),
        ("KEY=a=b", "a=b"),
        ("KEY=", ""),
    ],
)
def test_env_is_read_as_systemd_reads_it(text: str, value: str) -> None:
    assert backup.parse_env(text)["KEY"] == value


def test_newest_are_kept_and_other_files_are_not_ours() -> None:
    names = [f"llmfleet-2026112{day}T023000Z.age" for day in range(5)]
    other = ["backup.age", "llmfleet-20200101T000000Z.age.part", ".work-x", "llmfleet-x.age"]
    assert backup.surplus([*other, *names], 3) == [names[1], names[0]]
    assert backup.surplus(names, 14) == []


@pytest.mark.parametrize(
    "here", [EMPTY, {**EMPTY, "postgresql": "17.1", "litellm": "1.107.0", "salt": KEYS["litellm_salt_key"]}]
)
def test_an_empty_gateway_and_a_newer_one_are_fine(here: dict[str, Any]) -> None:
    assert backup.refusals(MANIFEST, KEYS, here, False) == []


@pytest.mark.parametrize(
    ("manifest", "here", "says"),
    [
        ({"format": 2}, {}, "newer release of this collection"),
        ({"postgresql": "17.2"}, {}, "of PostgreSQL 17.2, and this host has 15.20"),
        ({"litellm": "1.106.10"}, {"litellm": "1.106.9"}, "set litellm_version to 1.106.10 or newer"),
        ({}, {"salt": "another"}, "another salt key"),
        ({}, {"tables": 3}, "serving_restore_replace"),
    ],
)
def test_what_is_refused(manifest: dict[str, Any], here: dict[str, Any], says: str) -> None:
    (why,) = backup.refusals({**MANIFEST, **manifest}, KEYS, {**EMPTY, **here}, False)
    assert says in why
    assert not any(key in why for key in KEYS.values())
    assert "another" not in why.split() or "another salt key" in why


def test_tables_are_replaced_when_asked() -> None:
    assert backup.refusals(MANIFEST, KEYS, {**EMPTY, "tables": 3}, True) == []


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ("age: error: no identity matched any of the recipients", "another key than backup_key"),
        ("age: error: failed to decrypt and authenticate payload chunk", "damaged or not whole"),
        ("age: error: unexpected EOF", "damaged or not whole"),
        ('age: error: failed to read header: parsing age header: unexpected intro: "x"', "damaged or not whole"),
        ("age: error: failed to read header: failed to parse header: failed to read line: EOF", "damaged or not whole"),
        ('age: error: reading "-": failed to read "-": no secret keys found', "no key that age can use"),
        ('age: error: reading "-": malformed SSH identity in "-": ssh: no key found', "no key that age can use"),
        ("", "age ended early"),
    ],
)
def test_what_age_says_becomes_a_remedy(said: str, says: str) -> None:
    assert says in backup.explain(said)


# --- the archive, with a stand-in for age that encrypts nothing ------------------------------------------------

AGE = """#!/bin/sh
for argument; do last=$argument; done
case "$1" in
--decrypt) cat >/dev/null; cat "$last"; exit "${AGE_STATUS:-0}" ;;
*) cat > "${last#--output=}" ;;
esac
"""


@pytest.fixture
def age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "bin/age"
    program.parent.mkdir()
    program.write_text(AGE)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return tmp_path


def made(folder: Path) -> Path:
    dump, file = folder / "made.dump", folder / "backup.age"
    dump.write_bytes(b"PGDMP" * 100_000)
    manifest = json.dumps({**MANIFEST, "sha256": backup.digest(dump)}).encode()
    backup.encrypt(manifest, json.dumps(KEYS).encode(), dump, ["age1x"], file)
    return file


def test_what_is_written_is_read_back(age: Path) -> None:
    manifest, keys = backup.decrypt(made(age), "identity", age / "again.dump")
    assert (manifest["litellm"], keys) == ("1.106.2", KEYS)
    assert (age / "again.dump").read_bytes() == (age / "made.dump").read_bytes()


def test_what_age_found_damaged_is_refused_whatever_is_in_it(age: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = made(age)
    monkeypatch.setenv("AGE_STATUS", "1")
    with pytest.raises(backup.RefusalError, match="damaged"):
        backup.decrypt(file, "identity", age / "again.dump")


def test_another_dump_than_the_manifest_says_is_refused(age: Path) -> None:
    file = made(age)
    data = bytearray(file.read_bytes())
    data[200_000] ^= 1
    file.write_bytes(data)
    with pytest.raises(backup.RefusalError, match="damaged"):
        backup.decrypt(file, "identity", age / "again.dump")


@pytest.mark.parametrize("name", ["../../etc/passwd", "manifest.json"])
def test_other_archives_are_refused_and_write_nowhere(age: Path, name: str) -> None:
    file = age / "other.age"
    with tarfile.open(file, "w") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = 2
        archive.addfile(entry, io.BytesIO(b"{}"))
    before = sorted(age.rglob("*"))
    with pytest.raises(backup.RefusalError, match="no backup of this collection"):
        backup.decrypt(file, "identity", age / "again.dump")
    assert sorted(age.rglob("*")) == before


# --- a restore around what fails ---------------------------------------------------------------------------------

CONFIG = backup.Config(Path("/nowhere"), 1, "litellm", "litellm", (), "Made by a test", 77)
UNIT = "litellm@4000.service"


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What replace_database does, in its order."""
    done: list[str] = []
    monkeypatch.setattr(backup, "systemctl", lambda verb, _: done.append(verb))
    monkeypatch.setattr(backup, "create", lambda _: {"file": "before"})
    monkeypatch.setattr(backup, "fill", lambda *_: done.append("fill"))
    monkeypatch.setattr(backup, "drop", lambda name: done.append(f"drop {name[-3:]}"))
    monkeypatch.setattr(backup, "swap", lambda _, taken, aside: done.append(f"swap {taken[-3:]} {aside[-3:]}"))
    monkeypatch.setattr(backup, "await_ready", lambda unit, seconds: done.append(f"ready {unit} {seconds}"))
    monkeypatch.setattr(backup, "ignore_signals", lambda: done.append("ignore signals"))
    return done


def fail(*_: Any) -> None:
    raise backup.RefusalError("it failed")


def test_the_former_database_goes_once_litellm_is_ready(done: list[str]) -> None:
    assert backup.replace_database(CONFIG, Path("dump"), [UNIT]) == "before"
    assert done[done.index("swap new old") :] == ["swap new old", "drop new", "start", f"ready {UNIT} 77", "drop old"]


def test_a_litellm_that_dies_gets_its_former_database_back(done: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backup, "await_ready", fail)
    with pytest.raises(backup.RefusalError, match="gets its former one: it failed"):
        backup.replace_database(CONFIG, Path("dump"), [UNIT])
    after = [step for step in done[done.index("swap new old") :] if step != "ignore signals"]
    assert after == ["swap new old", "drop new", "start", "stop", "swap old new", "drop new", "start"]


def test_a_failing_restore_leaves_the_database_and_starts_litellm(
    done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backup, "fill", fail)
    with pytest.raises(backup.RefusalError, match="it failed"):
        backup.replace_database(CONFIG, Path("dump"), [UNIT])
    assert done == ["stop", "drop new", "drop old", "drop new", "ignore signals", "start"]


def test_what_ends_it_while_litellm_is_being_stopped_has_it_started_again(
    done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def systemctl(verb: str, _: list[str]) -> None:
        done.append(verb)
        if verb == "stop":
            backup.interrupted(backup.signal.SIGHUP, None)

    monkeypatch.setattr(backup, "systemctl", systemctl)
    with pytest.raises(backup.RefusalError, match="SIGHUP"):
        backup.replace_database(CONFIG, Path("dump"), [UNIT])
    assert done == ["stop", "ignore signals", "start"]


@pytest.mark.parametrize(
    ("status", "body", "why"),
    [
        (200, b'{"status": "healthy", "db": "connected"}', ""),
        (200, b'{"status": "healthy", "db": "Not connected"}', "has no connection to its database"),
        (503, b'{"status": "unhealthy", "db": "connected"}', "answers 503"),
        (200, b"[]", "does not answer"),
        (200, b"<html>", "does not answer"),
    ],
)
def test_readiness_is_litellms_own_word(status: int, body: bytes, why: str) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health/readiness" else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.handle_request).start()
        assert backup.unready(str(server.server_port)) == why


@pytest.mark.parametrize(
    ("restarts", "says"),
    [("1", f"{UNIT} has ended"), ("0", f"After 0 s {UNIT} does not answer; litellm_start_timeout")],
)
def test_what_died_or_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, restarts: str, says: str) -> None:
    monkeypatch.setattr(backup, "unready", lambda port: {"4000": "does not answer"}[port])
    monkeypatch.setattr(backup, "run", lambda *_, **__: f"{restarts}\n")
    monkeypatch.setattr(backup.time, "sleep", lambda _: None)
    with pytest.raises(backup.RefusalError, match=re.escape(says)):
        backup.await_ready(UNIT, 0)


def test_a_restored_database_bears_the_roles_comment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(backup, "psql", lambda _, statements: said.append(statements))
    monkeypatch.setattr(backup, "as_postgres", lambda *_, **__: "")
    (tmp_path / "dump").touch()
    backup.fill(CONFIG, tmp_path / "dump")
    assert "COMMENT ON DATABASE \"litellm_llmfleet_new\" IS 'Made by a test';" in said[0]


def test_a_host_without_postgresql_is_spoken_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any, **options: Any) -> None:
        raise KeyError(f"getpwnam(): name not found: {options['user']!r}")

    monkeypatch.setattr(backup, "run", run)
    with pytest.raises(backup.RefusalError, match="no user postgres: have the role"):
        backup.look(CONFIG)


# --- the playbooks and tasks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "part"), [("backup", "tasks"), ("restore", "pre_tasks")])
@pytest.mark.parametrize("url", ["", "postgresql://litellm@db.example.org/litellm?sslmode=require"])
def test_a_database_of_others_is_neither_backed_up_nor_restored(
    run_playbook: RunPlaybook, name: str, part: str, url: str
) -> None:
    (play,) = yaml.safe_load((ROOT / f"playbooks/{name}.yml").read_text())
    first = play[part][0]["ansible.builtin.import_tasks"]
    tasks = yaml.safe_load((ROOT / "playbooks" / first).read_text())
    variables = {"litellm_database_url": url} if url else {}
    done = run_playbook([{"hosts": "all", "gather_facts": False, "vars": variables, "tasks": tasks}])
    assert (done.returncode == 0) == (not url), done.stdout
    assert ("litellm_database_url is set: " in done.stdout) == bool(url)


@pytest.mark.parametrize(
    ("variable", "file", "says"),
    [
        ("", "", ""),
        ("", "another", "/litellm_salt_key is another salt key than the backup's"),
        (KEYS["litellm_salt_key"], "", ""),
        (KEYS["litellm_salt_key"], "another", ""),
        ("another", "", "litellm_salt_key in the inventory is another salt key than the backup's"),
    ],
)
def test_the_salt_key_that_litellm_will_have_is_the_backups(
    run_playbook: RunPlaybook, tmp_path: Path, variable: str, file: str, says: str
) -> None:
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    if file:
        (secrets / "litellm_salt_key").write_text(file)
    (block,) = (task["block"] for task in yaml.safe_load((ROLE / "tasks/restore.yml").read_text()) if "block" in task)
    first = next(number for number, task in enumerate(block) if task["name"].startswith("Bring the salt key"))
    variables = {
        "serving_secrets_dir": str(secrets),
        "__serving_backup_secrets_dir": str(secrets),
        "__serving_backup_checked": {"stdout": json.dumps({"keys": KEYS})},
        **({"litellm_salt_key": variable} if variable else {}),
    }
    play = {"hosts": "all", "gather_facts": False, "vars": variables, "tasks": block[first : first + 2]}
    done = run_playbook([play])
    assert (done.returncode == 0) == (not says), done.stdout
    assert says in " ".join(done.stdout.split())
    assert KEYS["litellm_salt_key"] not in done.stdout
    brought = "" if variable else KEYS["litellm_salt_key"]
    assert [path.read_text().strip() for path in secrets.iterdir()] == ([file or brought] if file or brought else [])


def variables(**changes: Any) -> dict[str, Any]:
    """Those of the role, as a play has them without it."""
    own = yaml.safe_load((ROLE / "defaults/main.yml").read_text()) | yaml.safe_load(
        (ROLE / "vars/main.yml").read_text()
    )
    return {**own, **changes}


def play(tasks: list[dict[str, Any]], **changes: Any) -> list[dict[str, Any]]:
    return [{"hosts": "all", "gather_facts": False, "vars": variables(**changes), "tasks": tasks}]


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("calendar", "says"),
    [
        ("*-*-* 02:30:00", ""),
        ("0 2 * * *", "serving_backup_calendar is 0 2 * * *: use a calendar event of systemd, such as *-*-* 02:30:00."),
        ("", "serving_backup_calendar is empty"),
    ],
)
def test_a_time_that_systemd_does_not_know_is_refused_before_anything_is_changed(
    run_playbook: RunPlaybook,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    calendar: str,
    says: str,
) -> None:
    stand_in(tmp_path, monkeypatch, "systemd-analyze", '[ "$1 $2" = "calendar --" ] && [ "$3" = "*-*-* 02:30:00" ]')
    tasks = yaml.safe_load((ROLE / "tasks/preflight.yml").read_text())
    for arguments in ([], ["--check"]):
        done = run_playbook(play(tasks, serving_backup_calendar=calendar), *arguments)
        assert (done.returncode == 0) == (not says), done.stdout
        assert says in " ".join(done.stdout.split())
        assert "changed=0" in done.stdout


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("echo litellm", ""),
        (
            ":",
            "host1 has no database litellm: there is nothing to back up before site.yml has run with serving_tenants.",
        ),
        ("echo no such user >&2; exit 1", "host1 has no database litellm: "),
        ("echo no such file >&2; exit 2", "PostgreSQL on host1 does not answer: "),
    ],
)
def test_a_host_where_tenants_never_ran_is_not_backed_up(
    run_playbook: RunPlaybook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, says: str
) -> None:
    stand_in(tmp_path, monkeypatch, "runuser", command)
    (book,) = yaml.safe_load((ROOT / "playbooks/backup.yml").read_text())
    imported = [task["ansible.builtin.import_tasks"] for task in book["tasks"][:-1]]
    assert "ansible.builtin.include_role" in book["tasks"][-1]
    tasks = [task for name in imported for task in yaml.safe_load((ROOT / "playbooks" / name).read_text())]
    done = run_playbook([{"hosts": "all", "gather_facts": False, "tasks": tasks}])
    assert (done.returncode == 0) == (not says), done.stdout
    assert says in " ".join(done.stdout.split())


@pytest.mark.parametrize(("timeout", "wanted"), [(None, 300), (600, 600)])
def test_the_program_waits_as_long_as_litellm_is_given(
    run_playbook: RunPlaybook, tmp_path: Path, timeout: int | None, wanted: int
) -> None:
    (tmp_path / "backup_key.pub").write_text("ssh-ed25519 AAAA\n")
    written = {"content": "{{ __serving_backup_settings | to_json }}", "dest": str(tmp_path / "backup.json")}
    given = {} if timeout is None else {"litellm_start_timeout": timeout}
    book = play([{"ansible.builtin.copy": written}], serving_secrets_dir=str(tmp_path), **given)
    done = run_playbook(book)
    assert done.returncode == 0, done.stdout
    settings = json.loads((tmp_path / "backup.json").read_text())
    assert settings["start_timeout"] == wanted
    assert set(settings) == set(backup.Config.__dataclass_fields__)


# --- the copies ---------------------------------------------------------------------------------------------------


def test_copies_are_those_of_the_gateway_and_for_their_owner_only(run_playbook: RunPlaybook, tmp_path: Path) -> None:
    on_host, copies = tmp_path / "on_host", tmp_path / "copies/host1"
    on_host.mkdir()
    copies.mkdir(parents=True)
    names = [f"llmfleet-2026112{day}T023000Z.age" for day in range(4)]
    for name in names[1:]:
        (on_host / name).write_text(name)
    (on_host / "other").write_text("none of ours")
    (copies / names[0]).write_text("older than the gateway keeps")
    (copies / names[1]).write_text(names[1])
    (copies / ".incoming").mkdir()
    (copies / ".incoming" / names[2]).write_text(names[2][:5])  # of a run that was cut short
    (copies / "notes").write_text("the operator's")
    newest = on_host / names[3]
    made = {"file": str(newest), "sha256": backup.digest(newest), "bytes": 9, "tables": 1, "litellm": "1"}
    tasks = yaml.safe_load((ROLE / "tasks/fetch.yml").read_text())
    assert not any("synchronize" in module for task in tasks for module in task)
    book = play(
        tasks,
        __serving_backup_folder=str(on_host),
        __serving_backup_made={"stdout": json.dumps(made)},
        serving_backup_dir="copies",
        serving_backup_keep=3,
    )
    done = run_playbook(book)
    assert done.returncode == 0, done.stdout
    assert sorted(path.name for path in copies.iterdir()) == [*names[1:], "notes"]
    assert {name: (copies / name).read_text() for name in names[1:]} == {name: name for name in names[1:]}
    assert {path.stat().st_mode & 0o777 for path in copies.glob("*.age")} == {0o600}
    fetched = re.findall(r"changed: \[host1\] => \(item=(\S+)\)", done.stdout)
    assert fetched[:2] == [str(on_host / name) for name in names[2:]]
    again = run_playbook(book)
    assert "changed=0" in again.stdout, again.stdout


def test_a_copy_that_is_not_what_was_made_fails_and_deletes_nothing(run_playbook: RunPlaybook, tmp_path: Path) -> None:
    on_host, copies = tmp_path / "on_host", tmp_path / "copies/host1"
    on_host.mkdir()
    copies.mkdir(parents=True)
    names = [f"llmfleet-2026112{day}T023000Z.age" for day in range(3)]
    for name in names:
        (on_host / name).write_text(name)
    made = {"file": str(on_host / names[2]), "sha256": "another", "bytes": 9, "tables": 1, "litellm": "1"}
    book = play(
        yaml.safe_load((ROLE / "tasks/fetch.yml").read_text()),
        __serving_backup_folder=str(on_host),
        __serving_backup_made={"stdout": json.dumps(made)},
        serving_backup_dir=str(copies.parent),
        serving_backup_keep=1,
    )
    done = run_playbook(book)
    assert done.returncode != 0
    assert "is not the file that the gateway has verified" in " ".join(done.stdout.split())
    assert sorted(path.name for path in copies.iterdir()) == names


# --- the key that opens them --------------------------------------------------------------------------------------


def public(key: str, folder: Path) -> str:
    """The public part that ssh-keygen makes of it."""
    file = folder / "opened"
    file.touch(0o600)
    file.write_text(key)
    done = subprocess.run(["ssh-keygen", "-y", "-f", file], check=True, capture_output=True, text=True)
    file.unlink()
    return done.stdout.split()[1]


@pytest.mark.parametrize(("vault", "hosts"), [(False, 2), (True, 1)])
def test_the_key_is_kept_as_secrets_are(run_playbook: RunPlaybook, tmp_path: Path, vault: bool, hosts: int) -> None:
    secrets, password = tmp_path / "secrets", tmp_path / "password"
    password.write_text("of the vault\n")
    arguments = ["--vault-password-file", str(password)] if vault else []
    book = play(yaml.safe_load((ROLE / "tasks/key.yml").read_text()), serving_secrets_dir=str(secrets))
    loader = DataLoader()
    loader.set_vault_secrets([("default", VaultSecret(b"of the vault"))])

    def made(hosts: int) -> tuple[str, str]:
        done = run_playbook(book, "-vvv", *arguments, hosts=hosts)
        assert done.returncode == 0, done.stdout
        assert sorted(path.name for path in secrets.iterdir()) == ["backup_key", "backup_key.pub"]
        assert (secrets / "backup_key").stat().st_mode & 0o777 == 0o600
        opened = loader.get_text_file_contents(str(secrets / "backup_key"))
        assert opened.splitlines()[2] not in done.stdout
        return opened, (secrets / "backup_key.pub").read_text()

    key, shared = made(hosts)
    kept = (secrets / "backup_key").read_text()
    assert kept.startswith("$ANSIBLE_VAULT" if vault else "-----BEGIN OPENSSH PRIVATE KEY-----")
    assert shared.startswith("ssh-ed25519 ")
    assert public(key, tmp_path) == shared.split()[1]
    # Without its public part, and beside what a killed run has left of another, it is the same.
    (secrets / "backup_key.pub").unlink()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", secrets / ".backup_key.plain"], check=True)
    assert made(1)[0] == key
    assert (secrets / "backup_key").read_text() == kept
    assert (secrets / "backup_key.pub").read_text().split()[1] == shared.split()[1]


# --- which backup is restored -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "found"),
    [
        (None, "copies/host1/llmfleet-20261122T023000Z.age"),
        ("", "copies/host1/llmfleet-20261122T023000Z.age"),
        ("safe/b.age", "safe/b.age"),
    ],
)
def test_a_backup_is_named_relative_to_the_current_folder(
    run_playbook: RunPlaybook, tmp_path: Path, named: str | None, found: str
) -> None:
    for name in (
        "copies/host1/llmfleet-20261121T023000Z.age",
        "copies/host1/llmfleet-20261122T023000Z.age",
        "safe/b.age",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    first = yaml.safe_load((ROLE / "tasks/restore.yml").read_text())[0]
    (tmp_path / "elsewhere").mkdir()
    shown = {"content": "{{ __serving_backup_file }}", "dest": str(tmp_path / "shown")}
    given = {} if named is None else {"serving_restore_file": named}
    book = play([first, {"ansible.builtin.copy": shown}], serving_backup_dir="copies", **given)
    done = run_playbook(book)
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "shown").read_text() == str(tmp_path / found)


def test_what_a_restore_brings_back_is_told(run_playbook: RunPlaybook) -> None:
    (block,) = (task["block"] for task in yaml.safe_load((ROLE / "tasks/restore.yml").read_text()) if "block" in task)
    restored = {"stdout": json.dumps({"litellm": "1.106.2"}), "stderr_lines": ["Restored."]}
    book = play([block[-1]], __serving_backup_restored=restored, __serving_backup_same_master_key=True)
    said = " ".join(run_playbook(book).stdout.split())
    assert "Run site.yml next: it brings LiteLLM 1.106.2 or newer" in said
    for word in ("revoked or replaced", "-e serving_tenants_overlap=0", "strangers"):
        assert word in said
