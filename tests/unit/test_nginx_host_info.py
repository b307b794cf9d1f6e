# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""nginx_host_info run as a module: real files and certificates, a real socket, and a /proc of its own for nginx."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.llmfleet.serving.plugins.module_utils import _host, _nginx
from ansible_collections.llmfleet.serving.plugins.modules import nginx_host_info
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

NOW = datetime.now(timezone.utc)
NAME = "DNS:llm.example.org"


@dataclass
class Host:
    """A host with stand-ins for dpkg-query and systemctl, its own /proc, and real folders."""

    folder: Path
    run_module: Any

    def __post_init__(self) -> None:
        for path in (self.bin, self.proc / "net", self.lists):
            path.mkdir(parents=True)
        self.command("dpkg-query", "exit 1")
        self.command("systemctl", "echo NeedDaemonReload=no")

    @property
    def bin(self) -> Path:
        return self.folder / "bin"

    @property
    def proc(self) -> Path:
        return self.folder / "proc"

    @property
    def lists(self) -> Path:
        return self.folder / "lists"

    def command(self, name: str, script: str) -> None:
        (self.bin / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.bin / name).chmod(0o755)

    def process(self, pid: int, name: str, *, parent: int = 1, title: str = "", age: float = 3600) -> Path:
        """A process that started that many seconds ago."""
        folder = self.proc / str(pid)
        (folder / "fd").mkdir(parents=True)
        start = int((time.clock_gettime(time.CLOCK_BOOTTIME) - age) * os.sysconf("SC_CLK_TCK"))
        fields = ["S", str(parent), *["0"] * 17, str(start), *["0"] * 30]
        (folder / "stat").write_text(f"{pid} ({name}) {' '.join(fields)}\n")
        (folder / "comm").write_text(f"{name}\n")
        (folder / "cgroup").write_text("0::/\n")
        (folder / "cmdline").write_text(f"{title or name}\0")
        return folder

    def nginx(self, age: float = 3600) -> None:
        self.process(100, "nginx", title="nginx: master process /usr/sbin/nginx", age=age)
        (self.folder / "nginx.pid").write_text("100\n")

    def worker(self, pid: int, age: float, title: str = "nginx: worker process") -> None:
        self.process(pid, "nginx", parent=100, title=title, age=age)

    def listen(self, port: int, inode: int, *pids: int, table: str = "tcp") -> None:
        path = self.proc / "net" / table
        rows = path.read_text() if path.exists() else "  sl  local_address\n"
        address = "00000000" if table == "tcp" else "0" * 32
        path.write_text(f"{rows}   0: {address}:{port:04X} {address}:0000 0A 0:0 0:0 0 0 0 {inode} 1 0\n")
        for pid in pids:
            (self.proc / f"{pid}/fd/{inode}").symlink_to(f"socket:[{inode}]")

    def look(self, *, check: bool = False, **asked: Any) -> dict[str, Any]:
        paths = {"PROC": self.proc, "PID_FILE": self.folder / "nginx.pid", "APT_LISTS": self.lists}
        environment = {"PATH": f"{self.bin}:/bin:/usr/bin"}
        return self.run_module("nginx_host_info", asked, patch=paths, environment=environment, check=check)


@pytest.fixture
def host(tmp_path: Path, run_module: Any) -> Host:
    return Host(tmp_path, run_module)


def test_drained_servers_are_read_from_the_site(host: Host) -> None:
    site = host.folder / "site.conf"
    up, down = (
        "    server 10.0.0.1:8000 max_fails=3;\n",
        "    server 10.0.0.2:8000 down;\n    server [fd77::1]:80 down;\n",
    )
    site.write_text(f"upstream a {{\n{up}{down}}}\nupstream b {{\n{down}}}\n# server 10.0.0.9:1 down;\nserver {{\n}}\n")
    found = host.look(site=str(site))
    assert (found["site"], found["drained"]) == (True, ["10.0.0.2:8000", "[fd77::1]:80"])


@pytest.mark.parametrize("check", [False, True])
def test_bare_host(host: Host, check: bool) -> None:
    found = host.look(
        check=check,
        packages=["nginx", "python3-cryptography"],
        directories=[str(host.folder), str(host.folder / "nginx"), str(host.bin / "systemctl")],
        ports=[80, 443],
        default_site=str(host.folder / "default"),
        site=str(host.folder / "site.conf"),
        loaded_files=[str(host.folder / "site.conf")],
        dropin=str(host.folder / "dropin.conf"),
    )
    del found["invocation"], found["system"]
    assert found == {
        "changed": False,
        "ipv6": False,
        "missing_packages": ["nginx", "python3-cryptography"],
        "package_lists": False,
        "missing_directories": [str(host.folder / "nginx"), str(host.bin / "systemctl")],
        "files_there": [],
        "taken_ports": {},
        "default_site": False,
        "site": False,
        "drained": [],
        "certificate_to_do": "",
        "running": False,
        "reload_pending": False,
        "daemon_reload_needed": False,
        "unconfined": False,
    }


def test_this_machine_with_nothing_asked(run_module: Any) -> None:
    """Nothing is moved here: whatever this machine is, the module tells it without an error."""
    found = run_module("nginx_host_info", {})
    assert found["changed"] is False
    assert found["system"] == run_module("vllm_host_info", {})["system"]
    assert (found["missing_packages"], found["missing_directories"], found["taken_ports"]) == ([], [], {})


def test_host_without_the_programs_is_for_the_preflight_to_refuse(host: Host) -> None:
    for name in ("dpkg-query", "systemctl"):
        (host.bin / name).unlink()
    paths = {"PROC": host.proc, "PID_FILE": host.folder / "nginx.pid"}
    found = host.run_module(
        "nginx_host_info", {"packages": ["nginx"]}, patch=paths, environment={"PATH": str(host.bin)}
    )
    assert (found["missing_packages"], found["daemon_reload_needed"]) == (["nginx"], False)


def test_packages(host: Host) -> None:
    host.command("dpkg-query", "printf 'nginx installed\\nlibnginx-mod-http-js config-files\\n'; exit 1")
    found = host.look(packages=["nginx", "nginx-core", "libnginx-mod-http-js"])
    assert found["missing_packages"] == ["nginx-core", "libnginx-mod-http-js"]


def test_dpkg_is_asked_in_its_own_words(host: Host) -> None:
    host.command("dpkg-query", f"printf '%s|' \"$@\" > {host.folder}/asked")
    host.look(packages=["nginx"])
    assert (host.folder / "asked").read_text() == "--show|--showformat|${Package} ${db:Status-Status}\n|nginx|"


def test_package_lists(host: Host) -> None:
    (host.lists / "partial").mkdir()
    assert host.look()["package_lists"] is False
    (host.lists / "deb.example.org_debian_dists_bookworm_main_binary-amd64_Packages.lz4").touch()
    assert host.look()["package_lists"] is True


def test_ipv6(host: Host) -> None:
    (host.proc / "net/if_inet6").touch()
    assert host.look()["ipv6"] is True


def test_default_site_is_a_link_even_if_it_leads_nowhere(host: Host) -> None:
    (host.folder / "default").symlink_to(host.folder / "missing")
    assert host.look(default_site=str(host.folder / "default"))["default_site"] is True


@pytest.mark.parametrize(("line", "needed"), [("NeedDaemonReload=yes", True), ("NeedDaemonReload=no", False)])
def test_daemon_reload(host: Host, line: str, needed: bool) -> None:
    host.command("systemctl", f'[ "$*" = "show nginx.service --property NeedDaemonReload" ] && echo {line}')
    assert host.look()["daemon_reload_needed"] is needed


# --- ports --------------------------------------------------------------------------------------------------


def test_port_of_this_very_program(run_module: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        found = run_module("nginx_host_info", {"ports": [port]})["taken_ports"]
    name = Path("/proc/self/comm").read_text().strip()
    assert found == {str(port): f"{name} (pid {os.getpid()})"}


def test_ports_of_nginx_are_not_taken(host: Host) -> None:
    host.nginx()
    host.worker(101, 10)
    host.listen(80, 11, 100, 101)
    host.listen(80, 12, 100, 101, table="tcp6")
    assert host.look(ports=[80, 443])["taken_ports"] == {}


def test_port_that_systemd_has_opened_for_nginx(host: Host) -> None:
    host.process(1, "systemd")
    host.nginx()
    host.listen(80, 11, 1, 100)
    assert host.look(ports=[80])["taken_ports"] == {}


def test_ports_of_others(host: Host) -> None:
    host.nginx()
    host.process(200, "apache2")
    host.listen(80, 11, 100)
    host.listen(443, 12, 200)
    host.listen(443, 13, 200, table="tcp6")
    host.listen(8080, 14, 200)
    assert host.look(ports=[80, 443])["taken_ports"] == {"443": "apache2 (pid 200)"}


def test_nginx_does_not_hide_another_program_on_the_port(host: Host) -> None:
    """Each on an address of its own: the role's site, which listens on all of them, could not be loaded."""
    host.nginx()
    host.process(200, "apache2")
    host.listen(80, 11, 100)
    host.listen(80, 12, 200)
    assert host.look(ports=[80])["taken_ports"] == {"80": "apache2 (pid 200)"}


# --- nginx as it runs ---------------------------------------------------------------------------------------


def test_pid_file_of_a_process_that_is_gone_or_another(host: Host) -> None:
    (host.folder / "nginx.pid").write_text("100\n")
    assert host.look()["running"] is False
    host.process(100, "bash")
    assert host.look()["running"] is False


@pytest.mark.parametrize("text", ["", "x\n"])
def test_pid_file_without_a_pid(host: Host, text: str) -> None:
    (host.folder / "nginx.pid").write_text(text)
    assert host.look()["running"] is False


@pytest.mark.parametrize(
    ("age", "pending"),
    [(10, True), (-10, False)],  # the file has just been written; the worker began before it, or after it
)
def test_reload_is_pending_while_a_worker_is_older_than_a_file(host: Host, age: float, pending: bool) -> None:
    host.nginx()
    host.worker(101, age)
    (host.folder / "site.conf").touch()
    files = [str(host.folder / name) for name in ("site.conf", "missing.js")]
    found = host.look(loaded_files=files)
    assert (found["running"], found["reload_pending"]) == (True, pending)


def test_workers_that_only_end_their_requests_have_been_reloaded(host: Host) -> None:
    host.nginx()
    host.worker(101, 10, title="nginx: worker process is shutting down")
    host.worker(102, -10)
    host.process(103, "nginx", parent=999, title="nginx: worker process", age=10)  # of another nginx
    (host.folder / "site.conf").touch()
    assert host.look(loaded_files=[str(host.folder / "site.conf")])["reload_pending"] is False


def test_link_counts_by_itself(host: Host) -> None:
    """A site that has just been enabled, though its file is older."""
    host.nginx()
    (host.folder / "site.conf").touch()
    time.sleep(0.2)
    host.worker(101, 0)
    time.sleep(0.2)
    (host.folder / "enabled").symlink_to(host.folder / "site.conf")
    assert host.look(loaded_files=[str(host.folder / "site.conf")])["reload_pending"] is False
    assert host.look(loaded_files=[str(host.folder / "enabled")])["reload_pending"] is True


def test_other_processes_do_not_matter(host: Host) -> None:
    host.nginx()
    host.worker(101, -10)
    stat = host.process(300, "x) S 100") / "stat"
    stat.write_bytes(stat.read_bytes().replace(b"x", b"\xff"))
    (host.proc / "301").mkdir()  # it has just ended
    (host.proc / "self").mkdir()
    assert host.look(loaded_files=[str(host.bin)])["reload_pending"] is False


@pytest.mark.parametrize(("age", "unconfined"), [(10, True), (-10, False)])
def test_nginx_older_than_its_dropin(host: Host, age: float, unconfined: bool) -> None:
    host.nginx(age)
    (host.folder / "dropin.conf").touch()
    assert host.look(dropin=str(host.folder / "dropin.conf"))["unconfined"] is unconfined


def test_nginx_without_the_dropin(host: Host) -> None:
    host.nginx(10)
    assert host.look(dropin=str(host.folder / "dropin.conf"))["unconfined"] is True
    assert host.look()["unconfined"] is False


def test_started_agrees_with_the_kernel() -> None:
    before = time.time()
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", "input()"], os.environ)
    try:
        assert nginx_host_info.started(Path(f"/proc/{pid}")) == pytest.approx(before, abs=1)
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def test_stat_of_a_process_with_any_name(tmp_path: Path) -> None:
    fields = " ".join(["S", "7", *["0"] * 17, "4242", "0"])
    (tmp_path / "stat").write_text(f"12 (a) S 1 (b) {fields}\n")
    assert _host.stat(tmp_path) == _host.Stat(parent=7, start=4242)


# --- the own CA ---------------------------------------------------------------------------------------------


def pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def key_pem(key: Any, password: bytes | None = None) -> bytes:
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def certificate(issuer_key: Any, key: Any, names: list[str], days: float = 397) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(x509.Name([]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - timedelta(days=400))
        .not_valid_after(NOW + timedelta(days=days))
    )
    if names:
        pairs = [name.split(":", 1) for name in names]
        general = [
            x509.IPAddress(ipaddress.ip_address(value)) if kind == "IP" else x509.DNSName(value)
            for kind, value in pairs
        ]
        builder = builder.add_extension(x509.SubjectAlternativeName(general), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


EC_CA, OTHER_CA, KEY = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
RSA_CA = rsa.generate_private_key(65537, 2048)


@dataclass
class OwnCa:
    """What the module is asked of a certificate, on disk; ``say`` is what it says."""

    host: Host
    ca: bytes = pem(certificate(EC_CA, EC_CA, []))
    name: str = NAME
    key: bytes | None = key_pem(KEY)
    certificate: bytes | None = pem(certificate(EC_CA, KEY, [NAME]))

    def say(self) -> str:
        for path, content in (("own.key", self.key), ("own.crt", self.certificate)):
            if content is not None:
                (self.host.folder / path).write_bytes(content)
        asked = {
            "ca_content": self.ca.decode(),
            "certificate_path": str(self.host.folder / "own.crt"),
            "privatekey_path": str(self.host.folder / "own.key"),
            "subject_alt_names": [self.name],
        }
        return self.host.look(own_ca=asked)["certificate_to_do"]


def test_certificate_that_will_do(host: Host) -> None:
    assert OwnCa(host).say() == ""


def test_certificate_of_a_ca_with_an_rsa_key(host: Host) -> None:
    ca, leaf = pem(certificate(RSA_CA, RSA_CA, [])), pem(certificate(RSA_CA, KEY, [NAME]))
    assert OwnCa(host, ca=ca, certificate=leaf).say() == ""
    assert OwnCa(host, ca=ca).say() == "another CA signed it"
    assert OwnCa(host, certificate=leaf).say() == "another CA signed it"


@pytest.mark.parametrize("name", ["IP:192.0.2.10", "IP:fd77::1"])
def test_certificate_for_an_address(host: Host, name: str) -> None:
    leaf = pem(certificate(EC_CA, KEY, [name]))
    assert OwnCa(host, name=name, certificate=leaf).say() == ""
    assert (
        OwnCa(host, name="IP:192.0.2.11", certificate=leaf).say()
        == "nginx_server_name or nginx_server_aliases has changed"
    )
    assert OwnCa(host, certificate=leaf).say() == "nginx_server_name or nginx_server_aliases has changed"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"ca": b""}, "there is no CA yet"),
        ({"key": None}, "it is missing"),
        ({"certificate": None}, "it is missing"),
        ({"name": "DNS:other.example.org"}, "nginx_server_name or nginx_server_aliases has changed"),
        ({"certificate": pem(certificate(EC_CA, KEY, []))}, "nginx_server_name or nginx_server_aliases has changed"),
        (
            {"certificate": pem(certificate(EC_CA, KEY, [NAME, "DNS:b.org"]))},
            "nginx_server_name or nginx_server_aliases has changed",
        ),
        ({"certificate": pem(certificate(OTHER_CA, KEY, [NAME]))}, "another CA signed it"),
        ({"key": key_pem(OTHER_CA)}, "it does not belong to the key"),
        ({"key": key_pem(ed25519.Ed25519PrivateKey.generate())}, "it does not belong to the key"),
    ],
)
def test_reasons_for_another_certificate(host: Host, changes: dict[str, Any], why: str) -> None:
    assert OwnCa(host, **changes).say() == why


@pytest.mark.parametrize(("days", "renewed"), [(29.9, True), (-1, True), (30.1, False)])
def test_certificate_is_renewed_in_time(host: Host, days: float, renewed: bool) -> None:
    end = NOW + timedelta(days=days)
    said = OwnCa(host, certificate=pem(certificate(EC_CA, KEY, [NAME], days))).say()
    assert said == (f"it expires on {end:%Y-%m-%d}" if renewed else "")


@pytest.mark.parametrize(
    "changes", [{"certificate": b"nonsense"}, {"key": b""}, {"key": key_pem(KEY, b"secret")}, {"ca": b"nonsense"}]
)
def test_what_cannot_be_read_is_made_anew(host: Host, changes: dict[str, bytes]) -> None:
    assert OwnCa(host, **changes).say().startswith("it cannot be read (")


def test_old_cryptography_has_no_times_in_utc() -> None:
    """Debian 12's."""
    leaf = certificate(EC_CA, KEY, [NAME], days=100)

    class Old:
        def __getattr__(self, name: str) -> Any:
            if name == "not_valid_after_utc":
                raise AttributeError(name)
            if name == "not_valid_after":
                return leaf.not_valid_after_utc.replace(tzinfo=None)
            return getattr(leaf, name)

    def say(now: datetime) -> str:
        with pytest.MonkeyPatch.context() as patched:
            real = x509.load_pem_x509_certificate
            patched.setattr(_nginx.x509, "load_pem_x509_certificate", lambda data: Old() if data == b"" else real(data))
            return _nginx.certificate_problem(OwnCa.ca, key_pem(KEY), b"", [NAME], now)

    assert say(NOW) == ""
    assert say(NOW + timedelta(days=71)).startswith("it expires on ")


def test_host_without_cryptography(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_nginx, "x509", None)
    assert OwnCa(host, key=None, certificate=None).say() == "it is missing"
    assert OwnCa(host).say() == "python3-cryptography, which reads it, is missing"
