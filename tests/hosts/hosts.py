#!/usr/bin/env python3
# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""Booted Debian and Ubuntu hosts for the tests and the demo: systemd-nspawn, a bridge with NAT, and SSH.

A set of hosts is a folder. Everything else (processes, cgroups, bridge, firewall rules) bears the set's
name and is found by it, so whatever a killed run left behind is mended by "up" or removed by "destroy".
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import ipaddress
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

RELEASES = {"bookworm": "debian", "trixie": "debian", "jammy": "ubuntu", "noble": "ubuntu"}
COMPONENTS = {"debian": "main", "ubuntu": "main universe"}
KEYRINGS = {"debian": "debian-archive-keyring", "ubuntu": "ubuntu-keyring"}  # their apt packages
PACKAGES = "systemd,systemd-sysv,dbus,python3,python3-apt,ca-certificates,iproute2,procps,sudo,openssh-server"
TOOLS = {  # what is run here, and the apt package that brings it
    "debootstrap": "debootstrap",
    "systemd-nspawn": "systemd-container",
    "ip": "iproute2",
    "iptables": "iptables",
    "ssh-keygen": "openssh-client",
}
IP_FORWARD = Path("/proc/sys/net/ipv4/ip_forward")
BUNDLE = "etc/ssl/certs/ca-certificates.crt"
ARCHIVES = "var/cache/apt/archives"
SET_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,30}")
BOOT_SECONDS = 120
STOP_SECONDS = 30


class HostsError(Exception):
    """One line for the user: what failed, on which host, what to do."""


@dataclass(frozen=True)
class Host:
    """One host as asked for: NAME=RELEASE:ADDRESS."""

    name: str
    release: str
    address: str


# --- pure functions ---------------------------------------------------------------------------------------


def parse_host(spec: str) -> Host:
    """Read NAME=RELEASE:ADDRESS."""
    match = re.fullmatch(r"([a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)=([a-z]+):(\S+)", spec)
    if not match:
        raise HostsError(f"{spec!r} is not HOST=RELEASE:ADDRESS, such as gw1=bookworm:10.77.1.11")
    name, release, address = match.groups()
    if release not in RELEASES:
        raise HostsError(f"{spec!r}: the release must be one of {', '.join(RELEASES)}")
    try:
        return Host(name, release, str(ipaddress.IPv4Address(address)))
    except ValueError:
        raise HostsError(f"{spec!r}: {address!r} is not an IPv4 address") from None


def address6(subnet6: str, address: str) -> str:
    """The IPv6 twin of an address: 10.77.1.11 in fd77:1::/64 is fd77:1::11."""
    return str(ipaddress.IPv6Network(subnet6)[int(address.rsplit(".", 1)[1], 16)])


def short_name(prefix: str, name: str, limit: int) -> str:
    """Prefix and name, or prefix and a hash of the name where that would be too long."""
    if len(prefix + name) <= limit:
        return prefix + name
    return prefix + hashlib.sha256(name.encode()).hexdigest()[: min(8, limit - len(prefix))]


def booted_tree(argv: list[str]) -> Path | None:
    """The tree that a command line boots, where it is a systemd-nspawn started by this tool."""
    if len(argv) > 2 and Path(argv[0]).name == "systemd-nspawn" and argv[1] == "-D":
        return Path(argv[2])
    return None


def apt_entries(text: str, deb822: bool) -> list[tuple[str, str]]:
    """The (URI, suite) pairs of an apt sources file in either format."""
    text = re.sub(r"(?m)^\s*#.*\n?", "", text)
    if not deb822:
        found = re.findall(r"(?m)^\s*deb\s+(?:\[[^]]*\]\s*)?(\S+)\s+(\S+)", text)
        return [(uri.rstrip("/"), suite) for uri, suite in found]
    entries: list[tuple[str, str]] = []
    for paragraph in re.split(r"\n\s*\n", text):
        found = re.findall(r"(?m)^([A-Za-z-]+):((?:.*\n?)(?:[ \t]+.*\n?)*)", paragraph)
        fields = {key.lower(): value.split() for key, value in found}
        if "deb" in fields.get("types", []) and fields.get("enabled") != ["no"]:
            entries += [(u.rstrip("/"), s) for u in fields.get("uris", []) for s in fields.get("suites", [])]
    return entries


def mirrors(entries: list[tuple[str, str]], codename: str) -> tuple[str | None, str | None]:
    """The URIs that a machine of this codename reads its archive and its security updates from."""
    http = [(uri, suite) for uri, suite in entries if uri.startswith(("http://", "https://"))]
    archive = next((uri for uri, suite in http if suite == codename), None)
    return archive, next((uri for uri, suite in http if suite == f"{codename}-security"), None)


def rules_to_delete(saved: str, comment: str) -> list[list[str]]:
    """The iptables commands that delete each rule of `iptables-save` that has exactly this comment."""
    commands, table = [], ""
    for line in saved.splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith("-A ") and comment in (words := shlex.split(line)):
            commands.append(["iptables", "-w", "-t", table, "-D", *words[1:]])
    return commands


def missing_certificates(ours: str, theirs: str) -> list[str]:
    """The certificates of one PEM bundle that another lacks."""
    blocks = re.compile(r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
    known = set(blocks.findall(theirs))
    return [block for block in dict.fromkeys(blocks.findall(ours)) if block not in known]


# --- the machine ------------------------------------------------------------------------------------------


def say(line: str) -> None:
    print(line, flush=True)


def run(*argv: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command quietly; its last lines become the message when it fails.

    The command is killed when this program is, and inherits its locks: they are free when it has ended.
    """
    words = ["setpriv", "--pdeathsig=KILL", *map(str, argv)]
    done = subprocess.run(
        words, env=os.environ | {"LC_ALL": "C.UTF-8"}, text=True, errors="replace", close_fds=False,
        check=False, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if check and done.returncode:
        why = " / ".join(done.stdout.strip().splitlines()[-3:]) or f"exit status {done.returncode}"
        raise HostsError(f"`{shlex.join(words[2:])}` failed: {why}")
    return done


@contextlib.contextmanager
def lock(path: Path) -> Iterator[Path]:
    """Hold a lock file (which its holder may remove)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for the holder of {path}")
            fcntl.flock(fd, fcntl.LOCK_EX)
        if path.exists() and os.fstat(fd).st_ino == path.stat().st_ino:
            break
        os.close(fd)
    os.set_inheritable(fd, True)
    try:
        yield path
    finally:
        os.close(fd)


def write(path: Path, text: str) -> None:
    """Write a whole file at once: readers and crashes see the old text or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.rename(path)


def remove(path: Path) -> None:
    """Remove a folder, never anything that is mounted in it."""
    for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
        if (mount := Path(line.split()[4])).is_relative_to(path):
            run("umount", "--lazy", mount)
    run("rm", "-rf", "--one-file-system", path)


def send(number: signal.Signals, pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def new_key(path: Path, comment: str) -> None:
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", path)


def link_debs(source: Path, target: Path) -> None:
    """Share the packages of one folder with another: hard links where possible, copies otherwise."""
    target.mkdir(parents=True, exist_ok=True)
    debs = [deb for deb in source.glob("*.deb") if not (target / deb.name).exists()]
    if debs and run("cp", "--link", "-t", target, *debs, check=False).returncode:
        run("cp", "--no-clobber", "-t", target, *debs, check=False)  # best effort: it only saves downloads


def machine_mirrors(family: str) -> tuple[str | None, str | None]:
    """Where this machine, or the user, says that this family's packages are."""
    chosen = os.environ.get(f"LLMFLEET_{family.upper()}_MIRROR")
    release = platform.freedesktop_os_release()
    if chosen or release["ID"] != family:
        return chosen, None
    files = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    entries: list[tuple[str, str]] = []
    for file in files:
        if file.suffix in (".list", ".sources") and file.is_file():
            entries += apt_entries(file.read_text(), deb822=file.suffix == ".sources")
    return mirrors(entries, release.get("VERSION_CODENAME", ""))


def resolv_conf() -> str:
    """The name servers of this machine, as seen from outside its loopback."""
    text, upstream = Path("/etc/resolv.conf").read_text(), Path("/run/systemd/resolve/resolv.conf")
    return upstream.read_text() if "127.0.0.53" in text and upstream.exists() else text


def mtu() -> int:
    """The MTU of the way out: large transfers hang where a host believes in a larger one."""
    for route in json.loads(run("ip", "-json", "route", "show", "default").stdout or "[]"):
        return int(Path("/sys/class/net", route["dev"], "mtu").read_text())
    return 1500


# --- base trees -------------------------------------------------------------------------------------------


def base_tree(cache: Path, release: str) -> Path:
    """The tarball of a bare, customised release; built once, then cached."""
    tarball = cache / f"{release}.tar"
    with lock(cache / f"{release}.lock"):
        if tarball.exists():
            return tarball
        start = time.monotonic()
        tree = cache / f"{release}.building"
        remove(tree)
        build_base(tree, release)
        run("tar", "-C", tree, "--numeric-owner", "--xattrs", "-cf", f"{tarball}.new", ".")
        write(cache / f"{release}.packages", run("chroot", tree, "dpkg-query", "-W").stdout)
        Path(f"{tarball}.new").rename(tarball)
        remove(tree)
        say(f"{release} base tree: built in {time.monotonic() - start:.0f} s (cached)")
    return tarball


def build_base(tree: Path, release: str) -> None:
    """Bootstrap a release and make it a bare image: no apt lists, no identity, static networking."""
    family = RELEASES[release]
    keyring = Path(f"/usr/share/keyrings/{family}-archive-keyring.gpg")
    if not keyring.exists():
        raise HostsError(f"{release}: {keyring} is missing: apt-get install {KEYRINGS[family]}")
    if not Path("/usr/share/debootstrap/scripts", release).exists():
        raise HostsError(f"{release}: this machine's debootstrap does not know it: install a newer one")
    archive, security = machine_mirrors(family)
    # In namespaces of its own, so that nothing of it, and no mount, outlives a kill of this program.
    apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
    options = ["--variant=minbase", f"--keyring={keyring}", f"--include={PACKAGES}"]
    run(*apart, "debootstrap", *options, release, tree, *filter(None, [archive]))

    sources = tree / "etc/apt/sources.list"
    archive = archive or apt_entries(sources.read_text(), deb822=False)[0][0]  # debootstrap's own default
    lines = [f"deb {archive} {release}", f"deb {archive} {release}-updates"]
    if family == "ubuntu" or security:
        lines.append(f"deb {security or archive} {release}-security")
    write(sources, "".join(f"{line} {COMPONENTS[family]}\n" for line in lines))
    write(tree / "etc/apt/apt.conf.d/90keep-downloads", 'APT::Keep-Downloaded-Packages "true";\n')

    # Behind a proxy that intercepts TLS, the hosts must trust what this machine trusts.
    ours = Path("/", BUNDLE)
    extra = missing_certificates(ours.read_text() if ours.exists() else "", (tree / BUNDLE).read_text())
    for number, certificate in enumerate(extra):
        write(tree / f"usr/local/share/ca-certificates/machine-{number}.crt", certificate + "\n")
    run("chroot", tree, "update-ca-certificates")
    run("chroot", tree, "systemctl", "enable", "systemd-networkd.service")

    identity = [tree / "etc/machine-id", tree / "var/lib/dbus/machine-id", *tree.glob("etc/ssh/ssh_host_*")]
    for path in [*identity, *tree.glob(f"{ARCHIVES}/*.deb")]:
        path.unlink(missing_ok=True)
    remove(tree / "var/lib/apt/lists")
    (tree / "var/lib/apt/lists").mkdir()


# --- a set of hosts ---------------------------------------------------------------------------------------


@dataclass
class HostSet:
    """A folder with one tree for each host, a bridge, and what is asked for in set.json."""

    name: str
    state: Path
    cache: Path
    subnet: str = ""
    subnet6: str = ""
    binds: list[str] = field(default_factory=list)
    hosts: dict[str, Host] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not SET_NAME.fullmatch(self.name):
            raise HostsError(f"set {self.name!r}: use a-z, 0-9 and '-', at most 31 characters")
        self.folder = self.state / self.name
        self.bridge = short_name("lf-", self.name, 15)
        self.comment = f"llmfleet-hosts:{self.name}"
        with contextlib.suppress(FileNotFoundError):
            saved = json.loads((self.folder / "set.json").read_text())
            self.subnet, self.subnet6, self.binds = saved["subnet"], saved["subnet6"], saved["binds"]
            self.hosts = {host["name"]: Host(**host) for host in saved["hosts"]}

    # names that everything is found by

    def root(self, host: str) -> Path:
        return self.folder / host / "root"

    def machine(self, host: str) -> str:
        """The machine name. nspawn puts "vb-" before it for the interface, 15 characters at most."""
        return short_name("", f"{self.name}.{host}", 12)

    def cgroups(self, host: str) -> list[Path]:
        """Where a host's processes are: in cgroup v2, and in the "systemd" tree of the hybrid layout."""
        mounts = [line.split()[1:4] for line in Path("/proc/self/mounts").read_text().splitlines()]
        tops = [Path(at) for at, kind, options in mounts if kind == "cgroup2" or "name=systemd" in options]
        return [top / "llmfleet.slice" / f"llmfleet-{self.name}.{host}.service" for top in tops]

    def processes(self, host: str = "") -> list[int]:
        """The systemd-nspawn processes of one host, or of all."""
        found = []
        for proc in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                tree = booted_tree((proc / "cmdline").read_bytes().decode(errors="replace").split("\0"))
                if tree and (tree == self.root(host) if host else tree.is_relative_to(self.folder)):
                    found.append(int(proc.name))
        return sorted(found)

    # creating

    def save(self) -> None:
        saved = {"subnet": self.subnet, "subnet6": self.subnet6, "binds": self.binds}
        hosts = [asdict(host) for host in self.hosts.values()]
        write(self.folder / "set.json", json.dumps(saved | {"hosts": hosts}, indent=2) + "\n")

    def ask(self, hosts: list[Host], subnet: str, subnet6: str, binds: list[str]) -> None:
        """Take over what the user asks for, as far as it fits what exists."""
        self.binds = binds or self.binds
        subnet, subnet6 = subnet or self.subnet, subnet6 or self.subnet6
        if not subnet:
            raise HostsError(f"the set {self.name} is new: say its --subnet, such as 10.77.1.0/24")
        if self.hosts and (subnet, subnet6) != (self.subnet, self.subnet6):
            raise HostsError(f"set {self.name} is on {self.subnet} {self.subnet6}: destroy it first")
        net = ipaddress.IPv4Network(subnet)
        for other in all_sets(self.state, self.cache):
            if other.name != self.name and other.subnet and net.overlaps(ipaddress.IPv4Network(other.subnet)):
                raise HostsError(f"{subnet} overlaps with {other.subnet} of the set {other.name}")
        self.subnet, self.subnet6 = subnet, subnet6
        for host in hosts:
            if self.hosts.get(host.name, host) != host:
                old = self.hosts[host.name]
                raise HostsError(f"{host.name} exists as {old.release}:{old.address}: destroy the set first")
            if ipaddress.IPv4Address(host.address) not in list(net.hosts())[1:]:
                raise HostsError(f"{host.name}: {host.address} is not in {subnet}, or is its gateway")
            self.hosts[host.name] = host
        if len({host.address for host in self.hosts.values()}) < len(self.hosts):
            raise HostsError("two hosts of the set have the same address")

    def create(self, host: Host) -> None:
        """Unpack a tree and give it its identity. Only a complete tree is ever called "root"."""
        root = self.root(host.name)
        if root.exists():
            return
        tarball, start = base_tree(self.cache, host.release), time.monotonic()
        new = root.with_name("root.new")
        remove(new)
        new.mkdir(parents=True)
        run("tar", "-C", new, "--numeric-owner", "--xattrs", "-xpf", tarball)
        write(new / "etc/hostname", f"{host.name}\n")
        write(new / "etc/hosts", "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n")
        write(new / "etc/machine-id", f"{uuid.uuid4().hex}\n")
        write(new / "root/.ssh/authorized_keys", (self.folder / "id_ed25519.pub").read_text())
        new_key(new / "etc/ssh/ssh_host_ed25519_key", host.name)
        link_debs(self.cache / "apt" / host.release, new / ARCHIVES)
        new.rename(root)
        say(f"{host.name} {host.address}: created in {time.monotonic() - start:.0f} s")

    def networks(self) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
        return [ipaddress.ip_network(subnet) for subnet in (self.subnet, self.subnet6) if subnet]

    def addresses(self, host: Host) -> list[str]:
        return [host.address, *([address6(self.subnet6, host.address)] if self.subnet6 else [])]

    def configure(self, host: Host) -> None:
        """Write what may differ from start to start: addresses, MTU, name servers."""
        root, nets = self.root(host.name), self.networks()
        lines = ["[Match]", "Name=host0", "[Link]", f"MTUBytes={mtu()}"]
        lines += ["[Network]", f"Gateway={nets[0][1]}", "IPv6AcceptRA=no"]  # IPv6 has no way out
        for address, net in zip(self.addresses(host), nets, strict=True):
            lines += ["[Address]", f"Address={address}/{net.prefixlen}", "DuplicateAddressDetection=none"]
        write(root / "etc/systemd/network/10-host0.network", "\n".join(lines) + "\n")
        (root / "etc/resolv.conf").unlink(missing_ok=True)
        write(root / "etc/resolv.conf", resolv_conf())

    def introduce(self) -> None:
        """Make the hosts known by name: to each other, and to ssh on this machine."""
        made = [host for host in self.hosts.values() if self.root(host.name).exists()]
        for one in made:
            file = self.root(one.name) / "etc/hosts"
            lines = file.read_text().splitlines()
            names = [f"{address} {host.name}" for host in made for address in self.addresses(host)]
            if new := [line for line in names if line not in lines]:
                write(file, "\n".join(lines + new) + "\n")
        known_hosts, config = "", ""
        for host in made:
            key = (self.root(host.name) / "etc/ssh/ssh_host_ed25519_key.pub").read_text().split()[:2]
            known_hosts += f"{','.join([host.name, *self.addresses(host)])} {' '.join(key)}\n"
            config += f"Host {host.name}\n  HostName {host.address}\n"
        config += f"Host *\n  User root\n  IdentityFile {self.folder}/id_ed25519\n  IdentitiesOnly yes\n"
        config += f"  UserKnownHostsFile {self.folder}/known_hosts\n  StrictHostKeyChecking yes\n"
        write(self.folder / "known_hosts", known_hosts)
        write(self.folder / "ssh_config", config + "  LogLevel ERROR\n")
        user, group = (int(os.environ.get(variable, "0")) for variable in ("SUDO_UID", "SUDO_GID"))
        for name in ("id_ed25519", "id_ed25519.pub", "known_hosts", "ssh_config"):
            os.chown(self.folder / name, user, group)

    def up(self) -> None:
        """Create what is missing and start what does not run."""
        self.save()
        self.start(list(self.hosts))

    # running

    def network(self) -> None:
        """The bridge, its addresses, NAT and forwarding; all of it may exist already."""
        if not Path("/sys/class/net", self.bridge).exists():
            # A fixed address: otherwise the bridge takes over that of a host, and changes it when that goes.
            mac = hashlib.sha256(self.bridge.encode()).digest()[:5].hex(":")
            run("ip", "link", "add", self.bridge, "address", f"02:{mac}", "type", "bridge")
        for net in self.networks():
            flags = ["nodad"] if net.version == 6 else []
            run("ip", "address", "replace", f"{net[1]}/{net.prefixlen}", "dev", self.bridge, *flags)
        run("ip", "link", "set", self.bridge, "mtu", str(mtu()), "up")
        for table, chain, match in (
            ("nat", "POSTROUTING", ["-s", self.subnet, "!", "-o", self.bridge, "-j", "MASQUERADE"]),
            ("filter", "FORWARD", ["-i", self.bridge, "-j", "ACCEPT"]),
            ("filter", "FORWARD", ["-o", self.bridge, "-j", "ACCEPT"]),
        ):
            rule = [chain, *match, "-m", "comment", "--comment", self.comment]
            if run("iptables", "-w", "-t", table, "-C", *rule, check=False).returncode:
                run("iptables", "-w", "-t", table, "-I", *rule)
        with lock(self.state / "ip_forward") as saved:
            if not saved.read_text():
                saved.write_text(IP_FORWARD.read_text())
            IP_FORWARD.write_text("1\n")

    def boot(self, host: str) -> None:
        """Start systemd-nspawn in a session and a cgroup of its own, to outlive this program."""
        log, interface = self.folder / host / "console.log", f"vb-{self.machine(host)}"
        argv = ["systemd-nspawn", "-D", str(self.root(host)), f"--machine={self.machine(host)}"]
        argv += ["--register=no", "--keep-unit", "--settings=no", "--link-journal=no", "--timezone=off"]
        argv += ["--resolv-conf=off", f"--network-bridge={self.bridge}", "--boot"]
        argv += [f"--bind={self.cache}/uv:/root/.cache/uv", *(f"--bind-ro={bind}" for bind in self.binds)]
        (self.cache / "uv").mkdir(parents=True, exist_ok=True)
        self.end(host)
        if Path("/sys/class/net", interface).exists():
            run("ip", "link", "delete", interface, check=False)
        unified = {"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"}  # cgroup v2 inside, whatever this machine has
        if Path("/run/systemd/system").is_dir():
            unit = ["--quiet", "--collect", "--slice=llmfleet.slice", f"--unit=llmfleet-{self.name}.{host}"]
            for setting in ("Delegate=yes", "KillMode=mixed", f"StandardOutput=truncate:{log}"):
                unit.append(f"--property={setting}")
            run("systemd-run", *unit, *(f"--setenv={key}={value}" for key, value in unified.items()), *argv)
            return

        def enter_cgroups() -> None:
            for cgroup in self.cgroups(host):
                cgroup.mkdir(parents=True, exist_ok=True)
                (cgroup / "cgroup.procs").write_text("0")

        with log.open("wb") as out:
            subprocess.Popen(
                argv, env=os.environ | unified, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True, preexec_fn=enter_cgroups,  # noqa: PLW1509 (there are no threads here)
            )  # fmt: skip

    def wait(self, host: str) -> None:
        """Return when SSH answers and systemd says that everything is up."""
        start, state = time.monotonic(), ""
        options = ["-oConnectTimeout=2", "-oServerAliveInterval=5"]
        ssh = ["ssh", "-F", str(self.folder / "ssh_config"), *options, host]
        question = f"timeout {BOOT_SECONDS} systemctl is-system-running --wait"
        while state not in ("running", "degraded"):
            answer = run(*ssh, question, check=False).stdout.strip()
            state, seconds = answer.rpartition("\n")[2], time.monotonic() - start
            if seconds > BOOT_SECONDS or (seconds > 2 and not self.processes(host)):
                what = f"did not boot in {BOOT_SECONDS} s" if self.processes(host) else "ended while booting"
                log = self.folder / host / "console.log"
                text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", log.read_text(errors="replace"))
                say("\n".join([f"--- the end of {log}", *text.splitlines()[-15:], "---"]))
                raise HostsError(f"{host} {what} (SSH: {state or 'no answer'}): see its console above")
            time.sleep(0.2)
        if state == "degraded":
            failed = run(*ssh, "systemctl --failed --plain --no-legend", check=False).stdout
            units = ", ".join(line.split()[0] for line in failed.splitlines())
            raise HostsError(f"{host}: failed units: {units}: see `hosts.py ssh --set {self.name} {host}`")
        say(f"{host} {self.hosts[host].address}: up in {seconds:.0f} s")

    def start(self, names: list[str]) -> None:
        """Create and start those of the named hosts that do not run, all at once, and wait for all."""
        key = self.folder / "id_ed25519"
        if not key.with_suffix(".pub").exists():
            key.unlink(missing_ok=True)
            new_key(key, self.comment)
        for name in names:
            self.create(self.hosts[name])
        self.network()
        self.introduce()
        for name in names:
            if not self.processes(name):
                self.configure(self.hosts[name])
                self.boot(name)
        for name in names:
            self.wait(name)

    def stop(self, names: list[str]) -> None:
        """Shut hosts down cleanly, all at once; kill what has not ended in time."""
        start = time.monotonic()
        for name in names:
            send(signal.SIGTERM, self.processes(name))
        for name in names:
            while self.processes(name) and time.monotonic() < start + STOP_SECONDS:
                time.sleep(0.1)
            how = "killed after" if self.processes(name) else "stopped in"
            self.end(name)
            self.keep_debs(name)
            say(f"{name}: {how} {time.monotonic() - start:.0f} s")

    def keep_debs(self, name: str) -> None:
        if name in self.hosts:
            link_debs(self.root(name) / ARCHIVES, self.cache / "apt" / self.hosts[name].release)

    def end(self, host: str) -> None:
        """Kill all that is left of a host ("*": of all hosts), and remove its cgroups."""
        deadline = time.monotonic() + 10
        send(signal.SIGKILL, self.processes("" if host == "*" else host))
        while cgroups := [path for group in self.cgroups(host) for path in group.parent.glob(group.name)]:
            if time.monotonic() > deadline:
                raise HostsError(f"{host}: {cgroups[0]} is still in use: see its cgroup.procs")
            for cgroup in cgroups:
                with contextlib.suppress(OSError):
                    (cgroup / "cgroup.kill").write_text("1")
                for folder in [*sorted(cgroup.rglob("*/"), reverse=True), cgroup, cgroup.parent]:
                    with contextlib.suppress(OSError):  # not empty yet, or shared with other hosts
                        folder.rmdir()
            time.sleep(0.05)

    def discard(self, name: str) -> None:
        """Kill a host and remove its tree."""
        self.end(name)
        self.keep_debs(name)
        remove(Path("/run/systemd/nspawn/propagate", self.machine(name)))
        tree = self.root(name)
        new = tree.with_name("root.new")
        remove(new)
        if tree.exists():
            inode = tree.stat()
            Path(f"/run/systemd/nspawn/locks/inode-{inode.st_dev}:{inode.st_ino}").unlink(missing_ok=True)
            tree.rename(new)  # half a tree must not be called "root"
            remove(new)

    def is_of(self, checkout: Path) -> bool:
        """Whether it is not known to be of another: a set has folders of the checkout that has made it."""
        return not self.binds or any(Path(bind.partition(":")[0]).is_relative_to(checkout) for bind in self.binds)

    def destroy(self) -> None:
        """Remove every trace of the set, however little or much of it there is."""
        self.end("*")
        for rule in rules_to_delete(run("iptables-save").stdout, self.comment):
            run(*rule)
        if Path("/sys/class/net", self.bridge).exists():
            run("ip", "link", "delete", self.bridge)
        for tree in self.folder.glob("*/root"):
            self.discard(tree.parent.name)
        remove(self.folder)
        with lock(self.state / "ip_forward") as saved:
            if not all_sets(self.state, self.cache):
                IP_FORWARD.write_text(saved.read_text() or IP_FORWARD.read_text())
                saved.unlink()
        say(f"set {self.name}: destroyed")


def all_sets(state: Path, cache: Path) -> list[HostSet]:
    """The sets that have a folder."""
    folders = [path for path in sorted(state.glob("*")) if path.is_dir() and SET_NAME.fullmatch(path.name)]
    return [HostSet(path.name, state, cache) for path in folders]


# --- the command line -------------------------------------------------------------------------------------


def parse_bind(spec: str) -> str:
    """Read SRC[:DST] into the form that nspawn takes."""
    source, _, target = spec.partition(":")
    if not Path(source).exists():
        raise HostsError(f"--bind {spec}: {source} does not exist")
    return f"{Path(source).resolve()}:{target or Path(source).absolute()}"


def find_links() -> list[str]:
    """pip's local folders of wheels on this machine, to be had at the same place in the hosts."""
    folders = [Path(word) for word in os.environ.get("PIP_FIND_LINKS", "").split()]
    return [f"{path}:{path}" for path in folders if path.is_absolute() and path.is_dir()]


def check_machine() -> None:
    """Refuse early, and say what is missing."""
    if os.geteuid() != 0:
        raise HostsError("this needs root: run it with sudo")
    path = os.environ["PATH"] = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    if missing := sorted({package for tool, package in TOOLS.items() if not shutil.which(tool, path=path)}):
        raise HostsError(f"missing programs: apt-get install --no-install-recommends {' '.join(missing)}")


def parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    for option, variable, default in (
        ("--state-dir", "LLMFLEET_HOSTS_DIR", "/var/lib/llmfleet-hosts"),
        ("--cache-dir", "LLMFLEET_CACHE_DIR", "/var/cache/llmfleet-hosts"),
    ):
        value = Path(os.environ.get(variable, default))
        common.add_argument(option, type=Path, default=value, help=f"default: ${variable}, or {default}")
    common.add_argument("--set", default="default", help="the set of hosts (default: %(default)s)")
    main_parser = argparse.ArgumentParser(description="Booted hosts for the tests and the demo.")
    commands = main_parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, parents=[common])

    up = command("up", "Create the hosts that are missing and start those that do not run.")
    up.add_argument("hosts", nargs="+", metavar="HOST=RELEASE:ADDRESS")
    up.add_argument("--subnet", type=ipaddress.IPv4Network, help="such as 10.77.1.0/24; needed for a new set")
    up.add_argument("--subnet6", type=ipaddress.IPv6Network, help="such as fd77:1::/64: .11 gets fd77:1::11")
    up.add_argument("--bind", action="append", default=[], metavar="SRC[:DST]", help="a read-only folder")
    command("start", "Start hosts (default: all); bare ones where there are none.").add_argument(
        "hosts", nargs="*", metavar="HOST"
    )
    command("stop", "Shut hosts down (default: all).").add_argument("hosts", nargs="*", metavar="HOST")
    destroy = command("destroy", "Remove the set with everything that belongs to it, or the trees of some hosts.")
    destroy.add_argument("hosts", nargs="*", metavar="HOST")
    destroy.add_argument("--of", type=Path, metavar="CHECKOUT", help="leave it where another checkout has made it")
    command("list", "Show every set.")
    ssh = command("ssh", "Run a command, or a shell, on a host.")
    ssh.add_argument("host", metavar="HOST")
    ssh.add_argument("remote", nargs=argparse.REMAINDER, metavar="COMMAND")
    command("ssh-config", "Print the set's ssh_config.")
    command("clean-cache", "Remove the base trees and all downloads.")
    return main_parser


def show(sets: list[HostSet]) -> None:
    for one in sets:
        for host in one.hosts.values():
            status = "running" if one.processes(host.name) else "stopped"
            say(f"{one.name:15} {host.name:15} {host.release:9} {' '.join(one.addresses(host)):32} {status}")


def ssh_config(hosts: HostSet) -> Path:
    config = hosts.folder / "ssh_config"
    if not config.exists():
        raise HostsError(f"there is no set {hosts.name}: see `hosts.py list`")
    return config


def change(args: argparse.Namespace, hosts: HostSet) -> None:
    """The commands that change a set; its lock is held."""
    if args.command == "destroy" and args.of and not hosts.is_of(args.of.resolve()):
        say(f"set {hosts.name}: left, for another checkout has made it")
    elif args.command == "destroy" and not args.hosts:
        hosts.destroy()
    elif args.command == "up":
        binds = [parse_bind(spec) for spec in args.bind] + find_links()
        subnet, subnet6 = (str(net or "") for net in (args.subnet, args.subnet6))
        hosts.ask([parse_host(spec) for spec in args.hosts], subnet, subnet6, binds)
        hosts.up()
    else:
        names = args.hosts or list(hosts.hosts)
        if unknown := [name for name in names if name not in hosts.hosts]:
            raise HostsError(f"set {hosts.name} has no host {', '.join(unknown)}: see `hosts.py list`")
        if args.command == "start":
            hosts.start(names)
        elif args.command == "stop":
            hosts.stop(names)
        else:
            for name in names:
                hosts.discard(name)
                say(f"{name}: destroyed")


def main() -> None:
    os.umask(0o022)
    args = parser().parse_args()
    place = args.state_dir.resolve(), args.cache_dir.resolve()
    hosts = HostSet(args.set, *place)
    if args.command == "list":
        show(all_sets(*place))
    elif args.command == "ssh-config":
        print(ssh_config(hosts).read_text(), end="")
    elif args.command == "ssh":
        command = ["ssh", "-F", str(ssh_config(hosts)), args.host, *args.remote]
        os.execvp("ssh", command)  # noqa: S606 (no shell is wanted)
    else:
        check_machine()
        if args.command == "clean-cache":
            if running := [one.name for one in all_sets(*place) if one.processes()]:
                raise HostsError(f"hosts are running in {', '.join(running)}: stop them first")
            remove(hosts.cache)
            return
        with lock(hosts.state / f"{args.set}.lock") as held:
            try:
                change(args, HostSet(args.set, *place))  # read again, as the last holder of the lock left it
            finally:
                if not hosts.folder.exists():
                    held.unlink()
        with contextlib.suppress(OSError):  # there are other sets
            hosts.state.rmdir()


if __name__ == "__main__":
    try:
        main()
    except HostsError as error:
        sys.exit(f"hosts.py: {error}")
    except KeyboardInterrupt:
        sys.exit("hosts.py: interrupted; run `up` again, or `destroy`")
