"""What can be reached, from another host of the network: the role firewall, and that it locks nobody out."""

from __future__ import annotations

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import support
from testinfra.host import Host

FILES = Path(__file__).parents[1] / "files"
TRAP = 9999  # where nothing is meant to be reached, and something listens
OPEN = {"gw": [22, 80, 443], "eng": [22]}
ENGINE_PORT = 8000
STREAM = 9100  # and the IP version
HELD = 9200
TABLE = "inet llmfleet"
LEFT = "/etc/nftables.d /etc/systemd/system/nftables.service.d /etc/systemd/system/llmfleet-firewall.service"
WITHOUT_SSH = {"__firewall_found_ports": [2222], "firewall_rollback_seconds": 20}


@pytest.fixture(scope="module")
def out() -> Host:
    return support.host("out")


@pytest.fixture(scope="module", autouse=True)
def traps() -> None:
    for name in OPEN:
        listen(support.host(name), TRAP)


def script(host: Host, file: str, *arguments: object, prefix: str = "") -> str:
    """Run one of our programs on the host. It is sent along, for a bare host has no place for it."""
    text = (FILES / file).read_text(encoding="utf-8")
    return host.check_output(f"{prefix}python3 -c %s {' '.join(map(str, arguments))}", text)


def listen(host: Host, port: int, *how: str) -> None:
    if host.run(f"systemctl is-active listener-{port}").rc:
        script(host, "listener.py", port, *how, prefix=f"systemd-run --quiet --collect --unit listener-{port} ")
        support.wait_until(lambda: f":{port} " in host.check_output("ss -Hltn"), 10)


def scan(source: Host, target: str, version: int, *ports: int) -> list[int]:
    return json.loads(script(source, "scan.py", target, version, *ports))


def udp(source: Host, target: str, version: int) -> bool:
    """Whether the trap answers by UDP."""
    family = {4: "AF_INET", 6: "AF_INET6"}[version]
    program = (
        "import socket as s\n"
        f"u = s.socket(s.{family}, s.SOCK_DGRAM)\n"
        "u.settimeout(1)\n"
        f"u.connect(s.getaddrinfo({target!r}, {TRAP}, s.{family}, s.SOCK_DGRAM)[0][4])\n"
        "u.send(b'question')\n"
        "print(u.recv(16))\n"
    )
    return source.run("python3 -c %s", program).rc == 0


def rules(host: Host) -> str:
    return host.run(f"nft --stateless --terse list table {TABLE}").stdout


def firewall(**variables: Any) -> support.Run:
    """On all hosts of the fleet."""
    return support.apply("firewall", variables=variables)


def ping(source: Host, target: str, version: int) -> bool:
    """By a raw socket, for a bare host has no ping. The kernel fills in the checksum of ICMPv6."""
    family, kind, answer = {4: ("AF_INET", 8, 0), 6: ("AF_INET6", 128, 129)}[version]
    protocol, skip = {4: ("IPPROTO_ICMP", 20), 6: ("IPPROTO_ICMPV6", 0)}[version]
    program = (
        "import socket as s\n"
        f"p = s.socket(s.{family}, s.SOCK_RAW, s.{protocol})\n"
        "p.settimeout(2)\n"
        f"p.connect(s.getaddrinfo({target!r}, None, s.{family})[0][4])\n"
        f"p.send(bytes([{kind}, 0, {0xFFFF - kind * 256 - 2 >> 8}, {0xFFFF - kind * 256 - 2 & 255}, 0, 1, 0, 1]))\n"
        f"while p.recv(2048)[{skip}] != {answer}: pass\n"
    )
    return source.run("python3 -c %s", program).rc == 0


# --- what is open ---------------------------------------------------------------------------------------------


def test_nothing_but_the_intended_ports_answers(out: Host) -> None:
    cases = [(name, version) for name in OPEN for version in (4, 6)]
    with ThreadPoolExecutor(len(cases)) as pool:
        found = dict(zip(cases, pool.map(lambda case: scan(out, *case), cases), strict=True))
    assert found == {(name, version): OPEN[name] for name, version in cases}


def test_engine_answers_the_gateway_alone(out: Host) -> None:
    assert scan(support.host("gw"), "eng", 4, ENGINE_PORT, TRAP) == [ENGINE_PORT]
    assert scan(out, "eng", 4, ENGINE_PORT, TRAP) == []


def test_udp_is_closed_and_ping_is_not(out: Host) -> None:
    """One port of UDP, where something answers, stands for all: a port that is silent looks like a closed one."""
    for name in OPEN:
        assert udp(support.host(name), "localhost", 4), "the trap does not listen"
        for version in (4, 6):
            assert not udp(out, name, version), (name, version)
            assert ping(out, name, version), (name, version)


def test_removal_leaves_the_host_as_it_was(out: Host) -> None:
    """Which shows, too, that it is the firewall that keeps the traps shut."""
    hosts = {name: support.host(name) for name in OPEN}
    for host in hosts.values():
        host.check_output("nft add table inet operators")
        host.check_output("nft add chain inet operators input '{ type filter hook input priority 5; }'")
    firewall(firewall_enabled=False)
    try:
        for name, host in hosts.items():
            assert host.check_output("nft list tables") == "table inet operators"
            assert host.run(f"ls -d {LEFT}").stdout == ""
            for version in (4, 6):
                assert scan(out, name, version, 22, TRAP) == [22, TRAP]
                assert udp(out, name, version)
        assert firewall(firewall_enabled=False).total("changed") == 0
    finally:
        firewall()
    for name, host in hosts.items():
        assert "table inet operators" in host.check_output("nft list tables")
        assert scan(out, name, 6, 22, TRAP) == [22]
        host.check_output("nft delete table inet operators")


@pytest.mark.long
def test_running_streams_outlive_the_first_rules(out: Host) -> None:
    """Of connections that the host has opened and says nothing on, as the gateway while an engine streams to it.

    The kernel does not know them, for it tracks connections only where there are rules that ask for it.
    """
    host = support.host("gw")
    support.apply("firewall", "--limit", "gw", variables={"firewall_enabled": False})
    assert host.check_output("nft list tables") == ""
    for version in (4, 6):
        script(
            out, "ticker.py", "serve", STREAM + version, prefix=f"systemd-run --quiet --collect --unit tick-{version} "
        )
        support.wait_until(lambda port=STREAM + version: f":{port} " in out.check_output("ss -Hltn"), 10)
        script(
            host,
            "ticker.py",
            *("read", STREAM + version, "out", version, f"/run/ticks-{version}"),
            prefix=f"systemd-run --quiet --collect --unit tick-{version} ",
        )
    try:
        support.wait_until(lambda: min(ticks(host)) > 0, 10)
        support.apply("firewall", "--limit", "gw")
        assert scan(out, "gw", 4, 22, TRAP) == [22]
        before = ticks(host)
        support.wait_until(lambda: all(now > then + 3 for now, then in zip(ticks(host), before, strict=True)), 15)
    finally:
        for each in (host, out):
            each.run("systemctl stop 'tick-*'")


def ticks(host: Host) -> list[int]:
    """How much has come over IPv4 and IPv6."""
    return [int(host.run(f"wc -c < /run/ticks-{version}").stdout or 0) for version in (4, 6)]


def test_one_source_has_only_so_many_connections(out: Host) -> None:
    """Held by a port that all may reach; SSH is not counted."""
    program = (
        "import socket as s, sys\n"
        "held, kind = [], s.AF_INET6 if sys.argv[1] == '6' else s.AF_INET\n"
        "where = s.getaddrinfo('gw', int(sys.argv[2]), kind, s.SOCK_STREAM)[0][4]\n"
        "try:\n"
        "    for _ in range(80):\n"
        "        held.append(s.socket(kind)); held[-1].settimeout(1); held[-1].connect(where)\n"
        "    print(80)\n"
        "except TimeoutError: print(len(held) - 1)\n"
    )
    listen(support.host("gw"), HELD, "hold")
    more = [{"ports": [HELD]}]
    support.apply(
        "firewall", "--limit", "gw", variables={"firewall_allow_more": more, "firewall_connections_per_source": 64}
    )
    try:
        found = [int(out.check_output(f"python3 -c %s {version} {HELD}", program)) for version in (4, 6)]
        assert found == [64, 64]
        assert scan(out, "gw", 4, 22) == [22]
        assert "ct count over 64" in rules(support.host("gw"))
    finally:
        support.apply("firewall", "--limit", "gw")


# --- running it -----------------------------------------------------------------------------------------------


def test_second_run_changes_nothing() -> None:
    again = firewall()
    assert again.total("changed") == 0, again.output
    print(f"no-change run of the firewall on two hosts: {again.tasks} tasks, {again.seconds:.1f} s")


def test_rules_that_lock_out_are_taken_back() -> None:
    """The rules let SSH in at a port where nothing listens, as if the right one had not been found."""
    host = support.host("gw")
    before = rules(host)
    run = support.play("firewall", "--limit", "gw", variables=WITHOUT_SSH)
    assert run.code != 0
    assert "lets in no new SSH connection (port 2222). It has brought back its previous rules by itself." in (
        " ".join(run.output.split())
    )
    assert rules(host) == before
    assert support.apply("firewall", "--limit", "gw").total("changed") == 0


def test_run_that_is_cut_short_is_taken_back_and_mended() -> None:
    host = support.host("gw")
    before = rules(host)
    host.check_output("systemd-run --quiet --collect --unit llmfleet-firewall-rollback --on-active 500s /bin/true")
    host.check_output(f"nft add rule {TABLE} input tcp dport {TRAP} accept")
    assert support.apply("firewall", "--limit", "gw").total("changed") > 0
    assert rules(host) == before
    assert "llmfleet-firewall" not in host.check_output("systemctl list-timers --all --no-legend")


def test_who_would_be_locked_out_is_told_before() -> None:
    run = support.play("firewall", "--limit", "gw", variables={"firewall_ssh_sources": ["192.0.2.0/24"]})
    assert run.code != 0
    assert run.total("changed") == 0
    assert "which would be locked out: add that address or its network" in " ".join(run.output.split())


def test_flush_by_the_operator_is_survived() -> None:
    """Debian's /etc/nftables.conf begins with `flush ruleset`."""
    host = support.host("gw")
    before = rules(host)
    assert "flush ruleset" in host.file("/etc/nftables.conf").content_string
    for verb in ("start", "reload", "restart"):
        host.check_output(f"systemctl {verb} nftables.service")
        assert rules(host) == before
    host.check_output("systemctl stop nftables.service")
    assert rules(host) == ""
    assert support.apply("firewall", "--limit", "gw").total("changed") > 0
    assert rules(host) == before


def test_rules_are_there_before_the_services_after_a_reboot(out: Host) -> None:
    tool = [str(support.PROJECT / "tests/hosts/hosts.py")]
    name = support.HOSTS.name
    before = rules(support.host("gw"))
    for verb in ("stop", "start"):
        subprocess.run([*tool, verb, "--set", name, "gw"], check=True)
    host = support.host("gw")
    assert rules(host) == before
    units = ("llmfleet-firewall", "network-pre.target", "systemd-networkd", "ssh")
    shown = [host.check_output(f"systemctl show -P ActiveEnterTimestampMonotonic {unit}") for unit in units]
    assert sorted(map(int, shown)) == list(map(int, shown))
    listen(host, TRAP)
    assert scan(out, "gw", 4, 22, TRAP) == scan(out, "gw", 6, 22, TRAP) == [22]


# --- hosts that have a firewall already -----------------------------------------------------------------------

ALREADY = {
    "ufw": {
        "packages": "ufw",
        # Of the two it is not SSH that is limited: six connections in 30 s are less than these tests make.
        "begin": "ufw allow 22/tcp; ufw limit 7000/tcp; ufw --force enable",
        "end": "ufw --force reset; ufw disable",
        "theirs": "ufw status | grep -E '^(22/tcp|7000/tcp)'",
    },
    "firewalld": {
        "packages": "firewalld netbase",
        "begin": "systemctl start firewalld; firewall-cmd --permanent --add-port 7000/tcp; firewall-cmd --reload",
        "end": "systemctl disable --now firewalld",
        "theirs": "firewall-cmd --list-all",
    },
}


@pytest.mark.parametrize("name", ALREADY)
def test_host_with_a_firewall_of_its_own(out: Host, name: str, tmp_path: Path) -> None:
    """Run on the stranger, which is no part of the fleet: our rules come and go, those of the operator stay."""
    seen, allowed = support.host("gw"), [{"ports": ["443"]}, {"ports": ["8001-8002"], "sources": ["fd77::/16"]}]
    play = {"hosts": "out", "gather_facts": False, "roles": [{"role": "llmfleet.serving.firewall"}]}
    (tmp_path / "play.yml").write_text(json.dumps([play]))

    def run(code: int = 0, **variables: Any) -> support.Run:
        done = support.play(str(tmp_path / "play.yml"), variables={"firewall_allow": allowed, **variables})
        assert done.code == code, done.output
        return done

    def reached(version: int) -> list[int]:
        return scan(seen, "out", version, 22, 443, 7000, 8001, TRAP)

    how = ALREADY[name]
    out.check_output(f"apt-get update -qq && apt-get install -qq -y --no-install-recommends {how['packages']}")
    for port in (443, 7000, 8001, TRAP):
        listen(out, port)
    out.check_output(how["begin"])
    try:
        theirs = out.check_output(how["theirs"])
        assert f"but {name} is active on this host" in " ".join(run(2, firewall_backend="nftables").output.split())
        run()
        assert run().total("changed") == 0
        assert (reached(4), reached(6)) == ([22, 443, 7000], [22, 443, 7000, 8001])
        assert out.check_output(how["theirs"]) == theirs
        run(firewall_enabled=False)
        assert (reached(4), reached(6)) == ([22, 7000], [22, 7000])
        assert out.check_output(how["theirs"]) == theirs
    finally:
        out.run(how["end"])
