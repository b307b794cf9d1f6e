# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""vllm_host_info run as a module: real files, real file systems, real sockets on loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.llmfleet.serving.plugins.module_utils import _host
from ansible_collections.llmfleet.serving.plugins.modules import vllm_host_info

ROOT = Path(__file__).parents[2]
CLOSED_PORT_TABLE = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F40 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 11 1 0 100 0 0 10 0
   1: 0100007F:1F41 0100007F:C350 01 00000000:00000000 00:00000000 00000000     0        0 12 1 0 100 0 0 10 0
"""


@pytest.fixture
def listener() -> socket.socket:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def port_of(server: socket.socket) -> int:
    return server.getsockname()[1]


def test_nothing_asked(run_module: Any) -> None:
    found = run_module("vllm_host_info", {})
    assert found["changed"] is False
    assert (found["disks"], found["files"], found["taken_ports"]) == ({}, {}, {})


@pytest.mark.parametrize("check", [False, True])
def test_files(run_module: Any, tmp_path: Path, check: bool) -> None:
    (tmp_path / "text").write_text("vllm==0.32.0\nä\n")
    (tmp_path / "empty").write_text("")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    names = ["text", "empty", "binary", "missing", ".", "text/below"]
    found = run_module("vllm_host_info", {"files": [str(tmp_path / name) for name in names]}, check=check)
    assert [found["files"][str(tmp_path / name)] for name in names] == [
        *("vllm==0.32.0\nä\n", ""),
        *(None, None, None, None),
    ]
    assert found["changed"] is False


def test_folder_that_is_not_there_yet_counts_for_its_parent(run_module: Any, tmp_path: Path) -> None:
    there, missing = str(tmp_path), str(tmp_path / "a/b/c")
    found = run_module("vllm_host_info", {"paths": [there, missing, "/proc"]})["disks"]
    stat = os.statvfs(tmp_path)
    assert found[there]["free_bytes"] == pytest.approx(stat.f_bavail * stat.f_frsize, rel=0.05)
    assert found[there]["device"] == found[missing]["device"] == tmp_path.stat().st_dev
    assert found["/proc"]["device"] != found[there]["device"]
    assert not (tmp_path / "a").exists()


def test_memory_and_shared_memory(run_module: Any, tmp_path: Path) -> None:
    found = run_module("vllm_host_info", {})
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert found["memory_bytes"] == pytest.approx(total, rel=0.01)
    mounted = os.statvfs("/dev/shm")  # noqa: S108 - measured, not written to
    assert found["shm_bytes"] == mounted.f_blocks * mounted.f_frsize
    assert run_module("vllm_host_info", {}, patch={"SHARED_MEMORY": tmp_path / "no"})["shm_bytes"] == 0
    assert _host.memory_bytes(tmp_path) == 0


def test_taken_port_is_told_with_the_program(run_module: Any, listener: socket.socket) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        free = port_of(other)
    found = run_module("vllm_host_info", {"ports": [port_of(listener), free]})["taken_ports"]
    name = Path("/proc/self/comm").read_text().strip()
    assert found == {str(port_of(listener)): f"{name} (pid {os.getpid()})"}


def test_taken_port_on_ipv6(run_module: Any) -> None:
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    try:
        server = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with server:
        found = run_module("vllm_host_info", {"ports": [port_of(server)]})["taken_ports"]
        assert list(found) == [str(port_of(server))]


def test_connection_to_another_port_takes_none(run_module: Any, listener: socket.socket) -> None:
    with socket.create_connection(listener.getsockname()) as client:
        found = run_module("vllm_host_info", {"ports": [port_of(client)]})["taken_ports"]
    assert found == {}


def test_program_that_is_not_to_be_seen(run_module: Any, listener: socket.socket) -> None:
    """Without root, the sockets of others have no owner."""
    if os.geteuid() != 0:
        pytest.skip("it takes root to become somebody else")
    code = "import os; os.setgid(65534); os.setuid(65534)"
    program = (
        Path(vllm_host_info.__file__).read_text().replace("def main() -> None:", f"def main() -> None:\n    {code}")
    )
    # The same module, once it has become nobody; what it imports was read as root before.
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=f'{{"ANSIBLE_MODULE_ARGS": {{"ports": [{port_of(listener)}]}}}}',
        env={**os.environ, "PYTHONPATH": str(ROOT / "collections")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert '"a program that is not to be seen"' in done.stdout


def test_listening_rows_only() -> None:
    assert _host.listening(CLOSED_PORT_TABLE) == {"11": 8000}
    assert _host.listening("") == {}


def make_proc(folder: Path, table: str, groups: dict[str, str]) -> Path:
    """A /proc in which a process for each socket inode, pid 10 and on, has these control groups."""
    (folder / "net").mkdir(parents=True)
    (folder / "net/tcp").write_text(table)
    for pid, (inode, text) in enumerate(groups.items(), start=10):
        (folder / f"{pid}/fd").mkdir(parents=True)
        (folder / f"{pid}/fd/0").symlink_to("/dev/null")
        (folder / f"{pid}/fd/3").symlink_to(f"socket:[{inode}]")
        (folder / f"{pid}/comm").write_text("python3\n")
        (folder / f"{pid}/cgroup").write_text(text)
    return folder


@pytest.mark.parametrize("swapped", [False, True])
def test_two_programs_on_one_port_of_two_addresses(tmp_path: Path, swapped: bool) -> None:
    """An instance of ours on one address does not hide another program on another one, whichever comes first."""
    row = CLOSED_PORT_TABLE.splitlines()[1]
    rows = [row, row.replace("0100007F", "0B014D0A").replace(" 11 ", " 13 ")]
    table = "\n".join(["header", *(reversed(rows) if swapped else rows)])
    proc = make_proc(tmp_path, table, {"11": "0::/system.slice/vllm@tiny.service", "13": "0::/system.slice/x.service"})
    assert _host.taken_ports([8000], vllm_host_info.is_instance, proc) == {"8000": "python3 (pid 11)"}


@pytest.mark.parametrize(
    ("groups", "ours"),
    [
        ("0::/system.slice/system-vllm.slice/vllm@tiny.service\n", True),
        ("0::/system.slice/system-vllm.slice/vllm@my-model.v1.service\n", True),
        ("1:name=systemd:/system.slice/system-vllm.slice/vllm@a.service\n0::/\n", True),
        ("0::/system.slice/vllm.service\n", False),
        ("0::/user.slice/user-0.slice\n", False),
        ("", False),
    ],
)
def test_instances_of_ours_do_not_take_their_ports(tmp_path: Path, groups: str, ours: bool) -> None:
    proc = make_proc(tmp_path, CLOSED_PORT_TABLE, {"11": groups})
    found = _host.taken_ports([8000, 8001], vllm_host_info.is_instance, proc)
    assert found == ({} if ours else {"8000": "python3 (pid 10)"})


def test_socket_that_a_second_process_of_ours_holds_is_ours(tmp_path: Path) -> None:
    proc = make_proc(tmp_path, CLOSED_PORT_TABLE, {"11": "0::/init.scope", "12": "0::/system.slice/vllm@a.service"})
    (proc / "11/fd/4").symlink_to("socket:[11]")
    assert _host.taken_ports([8000], vllm_host_info.is_instance, proc) == {}


def test_processes_that_end_meanwhile(tmp_path: Path) -> None:
    proc = make_proc(tmp_path, CLOSED_PORT_TABLE, {"11": ""})
    (proc / "10/comm").unlink()
    (proc / "12").mkdir()
    assert _host.taken_ports([8000], vllm_host_info.is_instance, proc) == {"8000": _host.UNSEEN}


def test_holder_is_found_by_the_socket(listener: socket.socket) -> None:
    inode = os.readlink(f"/proc/self/fd/{listener.fileno()}").removeprefix("socket:[").removesuffix("]")
    name, groups = (Path(f"/proc/self/{file}").read_text() for file in ("comm", "cgroup"))
    assert _host.holders([inode, "0"]) == {inode: [_host.Program(os.getpid(), name.strip(), groups)], "0": []}


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (root@host)  Thu\n"
            "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n",
            "580.159.04",
        ),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n", "535.104.05"),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module 390.48 Thu Mar 22 00:42:57 PDT 2018\n", "390.48"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build  (x)\n", "540.4.0"),
        ("GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n", None),
        ("", None),
        (None, None),
    ],
)
def test_driver_version(run_module: Any, tmp_path: Path, text: str | None, version: str | None) -> None:
    path = tmp_path / "version"
    if text is not None:
        path.write_text(text)
    found = run_module("vllm_host_info", {}, patch={"NVIDIA": path})
    assert found["nvidia_driver_version"] == version


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nVERSION_ID="12"\nID=debian\nDEBUG_ID=7\n', "debian 12"),
        ('VERSION="22.04.5 LTS (Jammy)"\nID=ubuntu\nID_LIKE=debian\nVERSION_ID="22.04"\n', "ubuntu 22.04"),
        ("ID=arch\n", "arch"),
        ('ID="rocky"\nVERSION_ID="9.4"\n', "rocky 9.4"),
        ("", "unknown"),
        (None, "unknown"),
    ],
)
def test_system(tmp_path: Path, text: str | None, name: str) -> None:
    if text is not None:
        (tmp_path / "os-release").write_text(text)
    assert _host.system(tmp_path / "os-release") == name
