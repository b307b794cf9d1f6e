#!/usr/bin/python3
# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""Backs LiteLLM's database up together with the keys without which it is worth nothing, and restores both.

    llmfleet-backup create                    writes a backup, verified; tells what it wrote as JSON
    llmfleet-backup check FILE [--replace]    what is in it, keys included, and why it cannot be restored here
    llmfleet-backup restore FILE [--replace]  into a database beside the present one, then swaps the two

A backup is a tar archive of manifest.json, keys.json and database.dump (pg_dump's custom format), encrypted by age for
the recipients in backup.json. The key that opens it is not on this host: `check` and `restore` read it from stdin.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import http.client
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

CONFIG = Path("/etc/llmfleet/backup.json")
LOCK = Path("/run/llmfleet-backup.lock")
LITELLM = Path("/etc/litellm")  # a folder for each port, with env and venv in it
FORMAT = 1
NAME = re.compile(r"llmfleet-\d{8}T\d{6}Z\.age")
PARTS = ("manifest.json", "keys.json", "database.dump")
KEYS = {"litellm_salt_key": "LITELLM_SALT_KEY", "litellm_master_key": "LITELLM_MASTER_KEY"}
MIB = 1024**2
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TABLES = "SELECT count(*) FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"


class RefusalError(Exception):
    """Nothing has changed; the text says why and what to do."""


@dataclass(frozen=True)
class Config:
    folder: Path
    keep: int
    database: str
    owner: str
    recipients: tuple[str, ...]
    comment: str  # what the role postgresql knows its database by
    start_timeout: int

    @property
    def new(self) -> str:
        return f"{self.database}_llmfleet_new"

    @property
    def old(self) -> str:
        return f"{self.database}_llmfleet_old"


# --- what is decided ----------------------------------------------------------------------------------------


def parse_env(text: str) -> dict[str, str]:
    """An EnvironmentFile of systemd, as far as the roles write it."""
    lines = (line.strip() for line in text.splitlines())
    pairs = (line.partition("=") for line in lines if line and line[0] not in "#;" and "=" in line)
    return {name.strip(): "".join(shlex.split(value)) for name, _, value in pairs}


def version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text.split("+", maxsplit=1)[0])[:3])


def surplus(names: Sequence[str], keep: int) -> list[str]:
    """The backups that are older than the newest so many. Other files are none of ours."""
    return sorted((name for name in names if NAME.fullmatch(name)), reverse=True)[keep:]


def refusals(manifest: Mapping[str, Any], keys: Mapping[str, str], here: Mapping[str, Any], replace: bool) -> list[str]:
    """Why the backup cannot be restored on this host."""
    return list(_refusals(manifest, keys, here, replace))


def _refusals(
    manifest: Mapping[str, Any], keys: Mapping[str, str], here: Mapping[str, Any], replace: bool
) -> Iterator[str]:
    if manifest["format"] > FORMAT:
        yield "The backup was made by a newer release of this collection: use that one to restore it."
        return
    if version(manifest["postgresql"])[0] > version(here["postgresql"])[0]:
        yield (
            f"The backup is of PostgreSQL {manifest['postgresql']}, and this host has {here['postgresql']}: "
            "restore it on a host with the same release or a newer one."
        )
    if here["litellm"] and version(manifest["litellm"]) > version(here["litellm"]):
        yield (
            f"The backup is of LiteLLM {manifest['litellm']}, and this host has {here['litellm']}, which does not know "
            f"its tables: set litellm_version to {manifest['litellm']} or newer, and run site.yml first."
        )
    if here["salt"] and here["salt"] != keys["litellm_salt_key"]:
        yield (
            "LiteLLM on this host has another salt key than the backup: what is encrypted in the database could not be "
            "read. Use the inventory whose secret litellm_salt_key it was made with, or take LiteLLM away first."
        )
    if here["tables"] and not replace:
        yield (
            f"The database of this host has {here['tables']} tables already: set serving_restore_replace to true to "
            "have it replaced. It is backed up before."
        )


def explain(said: str) -> str:
    """Why age did not open the backup."""
    if "no identity matched" in said:
        return "It is encrypted for another key than backup_key in the secrets folder: put the one there that fits it."
    if 'reading "-"' in said:
        return "backup_key in the secrets folder is no key that age can use: take your copy of it."
    return f"It is damaged or not whole ({said or 'age ended early'}): take another backup (serving_restore_file)."


# --- programs -----------------------------------------------------------------------------------------------


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def size(count: float) -> str:
    return f"{count / MIB:.1f} MiB" if count >= MIB / 10 else f"{count / 1024:.1f} KiB"


def run(command: Sequence[str], *, what: str, **options: Any) -> str:
    """What the program prints. Its own words are in the message when it fails."""
    done = subprocess.run(
        command, check=False, text=True, stderr=subprocess.PIPE, **{"stdout": subprocess.PIPE} | options
    )
    if done.returncode:
        raise RefusalError(f"{what}: {' '.join(done.stderr.split()) or f'exit status {done.returncode}'}")
    return done.stdout or ""


def as_postgres(command: Sequence[str], *, what: str, **options: Any) -> str:
    try:
        return run(command, what=what, user="postgres", group="postgres", extra_groups=[], cwd="/", **options)
    except LookupError:
        raise RefusalError("This host has no user postgres: have the role postgresql make it first.") from None


def psql(database: str, statements: str) -> str:
    command = ["psql", "-XAtq", "--no-password", "--set=ON_ERROR_STOP=1", f"--dbname={database}", "--file=-"]
    return as_postgres(command, what="PostgreSQL", input=statements).strip()


def instances() -> list[Path]:
    """LiteLLM's folders on this host, the one that is enabled first."""
    found = sorted(path.parent for path in LITELLM.glob("*/env"))
    state = ("systemctl", "is-enabled", "--quiet")
    enabled = [path for path in found if subprocess.run([*state, f"litellm@{path.name}"], check=False).returncode == 0]
    return [*enabled, *(path for path in found if path not in enabled)]


def installed(instance: Path) -> str:
    """The version of LiteLLM in its venv."""
    found = [path.name for path in instance.glob("venv/lib/python3*/site-packages/litellm-*.dist-info")]
    return re.sub(r"^litellm-|\.dist-info$", "", found[0]) if found else ""


def look(config: Config) -> dict[str, Any]:
    """What this host has: versions, keys, tables."""
    exists = f"SELECT 1 FROM pg_database WHERE datname = '{config.database}'"  # noqa: S608 - the role's own name
    there = psql("postgres", f"SHOW server_version; SHOW data_directory; {exists}")
    lines = there.splitlines()
    if len(lines) < 3:
        raise RefusalError(f"This host has no database {config.database}: have the role postgresql make it first.")
    instance = next(iter(instances()), None)
    env = parse_env((instance / "env").read_text()) if instance else {}
    return {
        "postgresql": lines[0].split()[0],
        "data": lines[1],
        "litellm": installed(instance) if instance else "",
        "keys": {name: env[variable] for name, variable in KEYS.items() if env.get(variable)},
        "salt": env.get("LITELLM_SALT_KEY", ""),
        "tables": int(psql(config.database, TABLES)),
        "bytes": int(psql("postgres", f"SELECT pg_database_size('{config.database}')")),
    }


# --- the archive --------------------------------------------------------------------------------------------


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def add(archive: tarfile.TarFile, name: str, data: IO[bytes], length: int) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = length, 0o600, int(time.time())
    archive.addfile(entry, data)


def encrypt(manifest: bytes, keys: bytes, dump: Path, recipients: Sequence[str], target: Path) -> None:
    command = ["age", *(f"--recipient={recipient}" for recipient in recipients), f"--output={target}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as age:
        try:
            with tarfile.open(fileobj=age.stdin, mode="w|") as archive, dump.open("rb") as data:
                add(archive, PARTS[0], io.BytesIO(manifest), len(manifest))
                add(archive, PARTS[1], io.BytesIO(keys), len(keys))
                add(archive, PARTS[2], data, dump.stat().st_size)
        except OSError as error:
            said = age.communicate()[1].decode(errors="replace").strip()
            raise RefusalError(f"The backup could not be encrypted ({said or error}).") from None
        said = age.communicate()[1].decode(errors="replace").strip()
    if age.returncode:
        raise RefusalError(f"The backup could not be encrypted ({said}).")


def decrypt(file: Path, identity: str, dump: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Manifest and keys; the dump goes into a file. Only what age has found whole and unchanged is returned."""
    found: dict[str, bytes] = {}
    command = ["age", "--decrypt", "--identity=-", str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as age:
        with contextlib.suppress(BrokenPipeError):
            age.stdin.write(identity.encode())
            age.stdin.close()
        try:
            with tarfile.open(fileobj=age.stdout, mode="r|") as archive:
                for entry in archive:
                    data = archive.extractfile(entry)
                    if entry.name == PARTS[2] and data:
                        with dump.open("wb") as target:
                            shutil.copyfileobj(data, target, MIB)
                    elif entry.name in PARTS and data and entry.size < MIB:
                        found[entry.name] = data.read()
            while age.stdout.read(MIB):  # to the end, for age to say whether it is whole
                pass
        except (tarfile.TarError, EOFError):
            pass
        finally:
            age.stdout.close()
        said = age.stderr.read().decode(errors="replace").splitlines()
    if age.returncode:
        raise RefusalError(explain(next((line for line in said if "error" in line), "")))
    if set(found) != set(PARTS[:2]) or not dump.exists():
        raise RefusalError("It is no backup of this collection: take another (serving_restore_file).")
    manifest = json.loads(found[PARTS[0]])
    if digest(dump) != manifest["sha256"]:
        raise RefusalError(
            "It is damaged: the dump in it is not the one that was made. Take another (serving_restore_file)."
        )
    return manifest, json.loads(found[PARTS[1]])


def tables_in(dump: Path) -> int:
    """Reads all of the dump, as a restore would. The number of tables that it has data of."""
    with dump.open("rb") as data:
        run(["pg_restore", "--file=/dev/null"], what="pg_restore cannot read the dump", stdin=data)
    with dump.open("rb") as data:
        listed = run(["pg_restore", "--list"], what="pg_restore cannot read the dump", stdin=data)
    return len(re.findall(r"^\d.* TABLE DATA ", listed, re.MULTILINE))


@contextlib.contextmanager
def work_folder(config: Config) -> Iterator[Path]:
    """On the disk of the backups, and for root only, because the dump in it is in plain."""
    folder = Path(tempfile.mkdtemp(dir=config.folder, prefix=".work-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def need_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RefusalError(f"{folder} has {size(free)} free, and {size(needed)} may be needed: make room there.")


# --- create -------------------------------------------------------------------------------------------------


def create(config: Config) -> dict[str, Any]:
    here = look(config)
    if not here["tables"]:
        say(f"The database {config.database} has no tables yet: there is nothing to back up.")
        return {"file": "", "tables": 0}
    if set(here["keys"]) != set(KEYS):
        raise RefusalError(
            f"{LITELLM}/*/env names no {' and no '.join(KEYS[name] for name in KEYS if name not in here['keys'])}: "
            "without it the database is worth nothing. Have the role litellm set LiteLLM up first."
        )
    with work_folder(config) as work:
        need_room(work, here["bytes"] + 16 * MIB)
        return _create(config, here, work)


def _create(config: Config, here: Mapping[str, Any], work: Path) -> dict[str, Any]:
    began = time.monotonic()
    dump, partial = work / "database.dump", work / "backup.age"
    with dump.open("wb") as target:
        command = [
            "pg_dump",
            "--format=custom",
            "--no-password",
            "--lock-wait-timeout=60s",
            f"--dbname={config.database}",
        ]
        as_postgres(command, what="pg_dump", stdout=target)
    say(f"Dumped {config.database}: {size(here['bytes'])} in the server, {size(dump.stat().st_size)} as a dump.")
    tables = tables_in(dump)
    manifest = {
        "format": FORMAT,
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": socket.gethostname(),
        "database": config.database,
        "postgresql": here["postgresql"],
        "litellm": here["litellm"],
        "tables": tables,
        "bytes": here["bytes"],
        "sha256": digest(dump),
    }
    # A key for this once, to read back what has been written: the one that opens it for good is not here.
    once = run(["age-keygen"], what="age-keygen")
    public = re.search(r"public key: (\S+)", once)
    text = json.dumps(manifest, indent=1).encode()
    encrypt(text, json.dumps(here["keys"]).encode(), dump, [*config.recipients, public[1] if public else ""], partial)
    again = work / "again.dump"
    dump.unlink()
    if decrypt(partial, once, again) != (manifest, here["keys"]):
        raise RefusalError("What has been written is not what was to be written: is the disk sound?")
    file = publish(config, partial)
    dropped = surplus(os.listdir(config.folder), config.keep)
    for name in dropped:
        (config.folder / name).unlink()
    say(
        f"Wrote and verified {file}: {tables} tables, {size(file.stat().st_size)}, {time.monotonic() - began:.1f} s; "
        f"{len(dropped)} older than the newest {config.keep} deleted."
    )
    return {
        **{key: manifest[key] for key in ("made", "postgresql", "litellm", "tables")},
        "file": str(file),
        "bytes": file.stat().st_size,
        "sha256": digest(file),
        "dropped": dropped,
    }


def publish(config: Config, partial: Path) -> Path:
    """Under its name it is there whole, after a power cycle as well."""
    while True:
        file = config.folder / time.strftime("llmfleet-%Y%m%dT%H%M%SZ.age", time.gmtime())
        if not file.exists():
            break
        time.sleep(0.2)
    sync(partial)
    partial.rename(file)
    sync(config.folder)
    return file


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- restore ------------------------------------------------------------------------------------------------


def check(config: Config, file: Path, identity: str, replace: bool) -> dict[str, Any]:
    with work_folder(config) as work:
        manifest, keys = decrypt(file, identity, work / "database.dump")
    return {"manifest": manifest, "keys": keys, "refusals": refusals(manifest, keys, look(config), replace)}


def restore(config: Config, file: Path, identity: str, replace: bool) -> dict[str, Any]:
    began = time.monotonic()
    with work_folder(config) as work:
        dump = work / "database.dump"
        manifest, keys = decrypt(file, identity, dump)
        here = look(config)
        if why := refusals(manifest, keys, here, replace):
            raise RefusalError("\n".join(why))
        need_room(Path(here["data"]), manifest["bytes"] + 64 * MIB)
        say(
            f"Backup of {manifest['made']} on {manifest['host']}: LiteLLM {manifest['litellm']}, "
            f"{manifest['tables']} tables"
        )
        before = replace_database(config, dump, running())
    say(f"Restored {manifest['tables']} tables in {time.monotonic() - began:.1f} s.")
    return {"before": before, **{key: manifest[key] for key in ("made", "litellm", "tables")}}


def replace_database(config: Config, dump: Path, units: Sequence[str]) -> str:
    """The backup that was made before. What has been stopped for it runs again, whatever happens."""
    try:
        systemctl("stop", units)
        before = create(config)["file"]
        for name in (config.new, config.old):  # of a restore that was killed
            drop(name)
        try:
            fill(config, dump)
            ignore_signals()
            swap(config, config.new, config.old)
        finally:
            drop(config.new)
        try:
            systemctl("start", units)
            for unit in units:
                await_ready(unit, config.start_timeout)
        except RefusalError as error:
            systemctl("stop", units)
            swap(config, config.old, config.new)
            drop(config.new)
            raise RefusalError(
                f"LiteLLM does not start with the restored database, and gets its former one: {error}"
            ) from None
    except BaseException:
        ignore_signals()
        systemctl("start", units)
        raise
    drop(config.old)
    return str(before)


def ignore_signals() -> None:
    """What follows is not to be left in the middle."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def await_ready(unit: str, seconds: int) -> None:
    """systemd takes it for started as soon as there is a process."""
    deadline = time.monotonic() + seconds
    port = unit.removeprefix("litellm@").removesuffix(".service")
    while why := unready(port):
        restarts = run(["systemctl", "show", "--property=NRestarts", "--value", unit], what="systemctl show").strip()
        if restarts != "0":
            raise RefusalError(f"{unit} has ended. See: journalctl -u {unit}")
        if time.monotonic() > deadline:
            raise RefusalError(
                f"After {seconds} s {unit} {why}; litellm_start_timeout gives it longer. See: journalctl -u {unit}"
            )
        time.sleep(1)


def unready(port: str) -> str:
    """Why the LiteLLM at that port cannot serve, or nothing."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/health/readiness", timeout=10) as answer:
            database = json.load(answer).get("db")
    except urllib.error.HTTPError as error:
        return f"answers {error.code}"
    except (OSError, http.client.HTTPException, ValueError, AttributeError):
        return "does not answer"
    return "" if database == "connected" else "has no connection to its database"


def systemctl(verb: str, units: Sequence[str]) -> None:
    if units:
        say(f"systemctl {verb} {' '.join(units)}")
        run(["systemctl", verb, *units], what=f"systemctl {verb}")


def running() -> list[str]:
    states = "--state=active,activating,reloading"
    command = ["systemctl", "list-units", "--plain", "--no-legend", states, "litellm@*.service"]
    return [line.split()[0] for line in run(command, what="systemctl").splitlines()]


def drop(name: str) -> None:
    psql("postgres", f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')


def fill(config: Config, dump: Path) -> None:
    """The dump's tables, in a database beside the present one."""
    psql(
        "postgres",
        f'CREATE DATABASE "{config.new}" OWNER "{config.owner}" TEMPLATE template0 '
        "ENCODING 'UTF8' LC_COLLATE 'C' LC_CTYPE 'C.UTF-8';\n"
        f"COMMENT ON DATABASE \"{config.new}\" IS '{config.comment}';\n"
        f'REVOKE ALL ON DATABASE "{config.new}" FROM PUBLIC',
    )
    command = [
        "pg_restore",
        "--exit-on-error",
        "--no-owner",
        "--no-privileges",
        f"--role={config.owner}",
        "--no-password",
    ]
    with dump.open("rb") as data:
        as_postgres([*command, f"--dbname={config.new}"], what="pg_restore", stdin=data)
    psql(config.new, "ANALYZE")


def swap(config: Config, taken: str, aside: str) -> None:
    """Both names change at once, or neither does."""
    both = f"datname IN ('{config.database}', '{taken}')"
    psql(
        "postgres",
        f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE {both};\nBEGIN;\n"  # noqa: S608 - as above
        f'ALTER DATABASE "{config.database}" RENAME TO "{aside}";\n'
        f'ALTER DATABASE "{taken}" RENAME TO "{config.database}";\nCOMMIT',
    )


# --- the program --------------------------------------------------------------------------------------------


def interrupted(number: int, _frame: object) -> NoReturn:
    raise RefusalError(f"Interrupted by {signal.Signals(number).name}: what was there before is still there.")


@contextlib.contextmanager
def alone() -> Iterator[None]:
    with LOCK.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RefusalError(
                "Another backup or restore is at work on this host: wait for it, and try again."
            ) from None
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("create")
    for name in ("check", "restore"):
        command = commands.add_parser(name)
        command.add_argument("file", type=Path)
        command.add_argument("--replace", action="store_true")
    asked = parser.parse_args()
    os.umask(0o077)
    for number in SIGNALS:
        signal.signal(number, interrupted)
    try:
        settings = json.loads(CONFIG.read_text())
        config = Config(
            Path(settings["folder"]),
            settings["keep"],
            settings["database"],
            settings["owner"],
            tuple(settings["recipients"]),
            settings["comment"],
            settings["start_timeout"],
        )
        with alone():
            config.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for left in config.folder.glob(".work-*"):  # of one that was killed
                shutil.rmtree(left, ignore_errors=True)
            if asked.command == "create":
                result = create(config)
            else:
                action = {"check": check, "restore": restore}[asked.command]
                result = action(config, asked.file, sys.stdin.read(), asked.replace)
    except (RefusalError, OSError, ValueError) as error:
        say(str(error))
        return 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
