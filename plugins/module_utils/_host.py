# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: what the modules that look at a host ask of it. No Ansible import here."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LISTEN = "0A"  # TCP_LISTEN in the kernel's include/net/tcp_states.h
PROC = Path("/proc")
OS_RELEASE = Path("/etc/os-release")
APT_LISTS = Path("/var/lib/apt/lists")
DPKG = ("dpkg-query", "--show", "--showformat", "${Package} ${db:Status-Status}\n")
UNSEEN = "a program that is not to be seen"


def content(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def system(os_release: Path = OS_RELEASE) -> str:
    """Name and version of the distribution, as ``debian 12``."""
    values = dict(re.findall(r'^(ID|VERSION_ID)="?([^"\n]*)', content(os_release) or "", re.MULTILINE))
    return f"{values.get('ID', 'unknown')} {values.get('VERSION_ID', '')}".strip()


def run(module: Any, *command: str) -> tuple[int, str]:
    """The command's exit status and what it prints; on a host without it 127, as a shell has it, and nothing."""
    try:
        return module.run_command(list(command), handle_exceptions=False, expand_user_and_vars=False)[:2]
    except OSError:
        return 127, ""


def output(module: Any, *command: str) -> str:
    """What the command prints; nothing on a host without it, which the role then refuses for its system."""
    return run(module, *command)[1]


def units(module: Any, *names: str) -> dict[str, dict[str, str]]:
    """Properties of systemd's units by name, where it does not tell those of a unit that is not there."""
    shown = output(module, "systemctl", "show", "--property", "Id,LoadState,ActiveState,UnitFileState,Listen", *names)
    found = [dict(re.findall(r"^(\w+)=(.*)$", block, re.MULTILINE)) for block in shown.split("\n\n")]
    none = {"LoadState": "not-found", "ActiveState": "inactive", "UnitFileState": "", "Listen": ""}
    return {name: none | next((unit for unit in found if unit.get("Id") == name), {}) for name in names}


def missing_packages(module: Any, wanted: Iterable[str]) -> list[str]:
    lines = set(output(module, *DPKG, *wanted).splitlines())
    return [package for package in wanted if f"{package} installed" not in lines]


def has_package_lists(lists: Path = APT_LISTS) -> bool:
    return any(lists.glob("*_Packages*"))


def memory_bytes(proc: Path = PROC) -> int:
    """The host's memory, used or not; 0 where the kernel does not tell."""
    match = re.search(r"^MemTotal:\s+(\d+) kB$", content(proc / "meminfo") or "", re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def free_bytes(folder: Path) -> int:
    """What is free where the folder lies or would lie."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free


def changed(path: str) -> float:
    """When the file was put in its place, or 0, in seconds since the epoch: a rename changes ctime, not mtime."""
    try:
        return os.lstat(path).st_ctime
    except OSError:
        return 0.0


def processes(proc: Path = PROC) -> Iterator[Path]:
    """The folders of all processes. One may be gone before it is looked into."""
    return (path for path in proc.iterdir() if path.name.isdigit())


@dataclass(frozen=True)
class Stat:
    """Of /proc/<pid>/stat the parent, and the start in clock ticks since the boot."""

    parent: int
    start: int


def stat(process: Path) -> Stat:
    # What stands before the last parenthesis is the command's name, with anything in it.
    fields = (process / "stat").read_text(errors="replace").rpartition(")")[2].split()
    return Stat(parent=int(fields[1]), start=int(fields[19]))


@dataclass(frozen=True)
class Program:
    """A process that listens on a port. ``groups`` is the text of its control groups."""

    pid: int
    name: str
    groups: str


def listening(table: str) -> dict[str, int]:
    """Local port by socket inode of the listening rows of /proc/net/tcp or tcp6. A port may have several sockets."""
    rows = [line.split() for line in table.splitlines()[1:]]
    return {row[9]: int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == LISTEN}


def holders(inodes: Collection[str], proc: Path = PROC) -> dict[str, list[Program]]:
    """By socket inode the processes that hold the socket, as far as they are to be seen."""
    found: dict[str, list[Program]] = {inode: [] for inode in inodes}
    for process in processes(proc) if inodes else ():
        for inode in found.keys() & set(_sockets(process)):
            with contextlib.suppress(OSError):
                name = (process / "comm").read_text(errors="replace").strip()
                found[inode].append(Program(int(process.name), name, (process / "cgroup").read_text()))
    return found


def _sockets(process: Path) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for descriptor in os.listdir(process / "fd"):
            with contextlib.suppress(OSError):
                kind, _, inode = os.readlink(process / "fd" / descriptor).partition(":")
                if kind == "socket":
                    yield inode.strip("[]")


def taken_ports(ports: Collection[int], ours: Callable[[Program], bool], proc: Path = PROC) -> dict[str, str]:
    """By port the program that listens there and is not ours, on whatever address."""
    tables = [content(proc / "net" / name) or "" for name in ("tcp", "tcp6")]
    sockets = {inode: port for table in tables for inode, port in listening(table).items() if port in ports}
    programs = holders(sockets, proc)
    return {
        str(port): f"{programs[inode][0].name} (pid {programs[inode][0].pid})" if programs[inode] else UNSEEN
        for inode, port in sockets.items()
        if not any(map(ours, programs[inode]))
    }
