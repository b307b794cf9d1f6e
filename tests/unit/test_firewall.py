# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""What a host lets in, by the inventory and by what is found there; the look at the host; and the files made of it."""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from ansible_collections.llmfleet.serving.plugins.module_utils import _firewall
from hypothesis import given
from hypothesis import strategies as st

ROLE = Path(__file__).parents[2] / "roles/firewall"


def instance(port: int = 8000, host: str = "10.0.0.11", clients: tuple[str, ...] = ("10.0.0.1",)) -> dict[str, Any]:
    return {"model": "tiny", "host": host, "port": port, "kind": "completion", "clients": list(clients)}


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "connection": "ssh",
        "instances_known": True,
        "firewall_allow": [{"ports": [80, 443]}],
        "firewall_allow_more": [],
        "firewall_backend": "auto",
        "firewall_connections_per_source": 4096,
        "firewall_rollback_seconds": 60,
        "firewall_ssh_ports": [],
        "firewall_ssh_sources": [],
        "found_ssh_ports": [22],
        **changes,
    }


def host(**changes: Any) -> dict[str, Any]:
    ufw = {"installed": False, "active": False, "ipv6": False, "default_incoming": "", "rules": [], "present": False}
    firewalld = {"installed": False, "active": False, "in_force": False, "present": False, "open_zones": []}
    found = {"ufw": ufw, "firewalld": firewalld, "ssh_client": "192.0.2.7", "ssh_interface": {}}
    return {
        name: {**value, **changes.pop(name, {})} if isinstance(value, dict) else value for name, value in found.items()
    } | changes


# --- what is to be allowed ------------------------------------------------------------------------------------


def test_gateway_lets_all_in_to_its_ports() -> None:
    assert _firewall.allow(["gateways"], [], [80, 443]) == [{"comment": "clients", "ports": ["80", "443"]}]


def test_engine_lets_the_gateways_in_to_its_instances() -> None:
    found = _firewall.allow(["engines"], [instance(8000), instance(8001)], [80, 443])
    assert found == [{"comment": "gateways to vLLM", "ports": ["8000", "8001"], "sources": ["10.0.0.1"]}]


@pytest.mark.parametrize("one", [instance(host="127.0.0.1"), instance(host="::1"), instance(clients=())])
def test_engine_that_nobody_else_speaks_to_opens_nothing(one: dict[str, Any]) -> None:
    assert _firewall.allow(["engines"], [one], [80, 443]) == []


def test_one_box_opens_the_gateways_ports_only() -> None:
    box = _firewall.allow(["engines", "gateways"], [instance(host="127.0.0.1", clients=())], [80, 443])
    assert [entry["ports"] for entry in box] == [["80", "443"]]


def test_clients_are_networks_as_systemd_takes_them() -> None:
    (entry,) = _firewall.allow([], [instance(clients=("10.0.0.5/24", "fd00::5", "gw1"))], [])
    assert entry["sources"] == ["10.0.0.0/24", "fd00::5", "gw1"]
    assert any("'gw1'" in problem for problem in _firewall.problems(settings(firewall_allow=[entry])))


def test_rules_have_a_family_where_they_have_sources() -> None:
    entry = {"ports": [8000], "sources": ["10.0.0.1", "10.0.0.0/31", "fd00::/64"], "protocol": "udp", "comment": "x"}
    same = {"comment": "x", "protocol": "udp", "ports": ["8000"], "connections": 0}
    assert _firewall.rules([entry]) == [
        {**same, "family": "ip", "sources": ["10.0.0.0/31"]},
        {**same, "family": "ip6", "sources": ["fd00::/64"]},
    ]
    assert _firewall.rules([{"ports": ["1-2"]}]) == [
        {"comment": "", "protocol": "tcp", "ports": ["1-2"], "family": "", "sources": [], "connections": 0}
    ]


def test_connections_are_limited_where_anybody_may_come_by_tcp() -> None:
    allowed = [{"ports": [443]}, {"ports": [443], "protocol": "udp"}, {"ports": [8000], "sources": ["10.0.0.1"]}]
    plan = _firewall.plan(settings(firewall_allow=allowed), host())
    found = [(rule["comment"], rule["protocol"], rule["connections"]) for rule in plan["rules"]]
    assert found == [("SSH", "tcp", 0), ("", "tcp", 4096), ("", "udp", 0), ("", "tcp", 0)]


@pytest.mark.parametrize("ports", ["443", 443, [443], ["443"], "443,", (443,)])
def test_one_item_is_a_list_of_one(ports: Any) -> None:
    entry = {"ports": ports, "sources": "10.0.0.1"}
    changes = {"firewall_ssh_ports": ports, "firewall_ssh_sources": "192.0.2.0/24", "firewall_allow": entry}
    plan = _firewall.plan(settings(**changes), host())
    assert (plan["problems"], plan["ssh_ports"]) == ([], ["22", "443"])
    found = [(rule["ports"], rule["sources"]) for rule in plan["rules"]]
    assert found == [(["22", "443"], ["192.0.2.0/24"]), (["443"], ["10.0.0.1"])]


def test_text_with_commas_is_a_list() -> None:
    """As on the command line."""
    plan = _firewall.plan(settings(firewall_ssh_ports="2222, 2223"), host())
    assert plan["ssh_ports"] == ["22", "2222", "2223"]


PORT = st.integers(1, 65535)
RANGE = st.tuples(PORT, PORT).map(sorted).map(lambda pair: f"{pair[0]}-{pair[1]}")


@given(st.lists(PORT | RANGE, min_size=1, max_size=8))
def test_port_ranges_are_the_same_ports_without_overlaps(ports: list[int | str]) -> None:
    def spans(written: list[Any]) -> list[tuple[int, int]]:
        pairs = [[int(part) for part in str(port).split("-")] for port in written]
        return [(pair[0], pair[-1]) for pair in pairs]

    joined = spans(_firewall.port_ranges(ports))
    assert all(earlier[1] < later[0] for earlier, later in itertools.pairwise(joined))
    for first, last in spans(ports):
        assert any(start <= first and last <= end for start, end in joined)
    edges = {edge for span in spans(ports) for edge in span}
    assert all(set(span) <= edges for span in joined)


# --- variables ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"instances_known": False}, "What this engine runs is not known"),
        ({"firewall_rollback_seconds": 5}, "firewall_rollback_seconds is 5: give 20 to 600"),
        ({"firewall_connections_per_source": 63}, "firewall_connections_per_source is 63: give at least 64"),
        ({"firewall_connections_per_source": -1}, "firewall_connections_per_source is -1: give at least 64"),
        ({"firewall_ssh_ports": "ssh"}, "firewall_ssh_ports has 'ssh'"),
        ({"firewall_ssh_ports": [0]}, "firewall_ssh_ports has 0: write a port from 1 to 65535"),
        ({"firewall_ssh_ports": ["9010-9000"]}, "firewall_ssh_ports has '9010-9000'"),
        ({"firewall_ssh_ports": ["22; drop"]}, "firewall_ssh_ports has '22; drop'"),
        ({"firewall_ssh_ports": ["22\n"]}, "firewall_ssh_ports has '22\\n'"),
        ({"firewall_ssh_sources": ["office"]}, "firewall_ssh_sources has 'office': write an address or a network"),
        ({"firewall_ssh_sources": ["10.0.0.5/24"]}, "firewall_ssh_sources has '10.0.0.5/24': write 10.0.0.0/24"),
        ({"firewall_ssh_sources": ["fd00::5/64"]}, "firewall_ssh_sources has 'fd00::5/64': write fd00::/64"),
        ({"firewall_ssh_sources": ["::/0"]}, "firewall_ssh_sources has '::/0', which is every address"),
        ({"firewall_allow": [{"ports": []}]}, "firewall_allow[0].ports is empty"),
        ({"firewall_allow": [{"ports": ""}]}, "firewall_allow[0].ports is empty"),
        ({"firewall_allow": [{"ports": [65536]}]}, "firewall_allow[0].ports has 65536"),
        ({"firewall_allow_more": [{"ports": [1], "sources": ["x"]}]}, "firewall_allow_more[0].sources has 'x'"),
        ({"firewall_allow_more": [{"ports": [1], "comment": "a\nb"}]}, "firewall_allow_more[0].comment is 'a\\nb'"),
    ],
)
def test_wrong_variables_are_named_with_their_value(changes: dict[str, Any], expected: str) -> None:
    found = _firewall.plan(settings(**changes), host())
    assert len(found["problems"]) == 1
    assert found["problems"][0].startswith(expected)
    assert found["rules"] == []


def test_good_variables() -> None:
    allowed = [
        {"ports": [9100, "9000-9010"], "sources": ["10.0.0.0/8", "fd00::7"], "protocol": "udp", "comment": "a b"}
    ]
    found = _firewall.plan(settings(firewall_allow_more=allowed), host())
    assert (found["problems"], found["backend"]) == ([], "nftables")
    assert [rule["ports"] for rule in found["rules"]] == [["22"], ["80", "443"], *[["9000-9010", "9100"]] * 2]


# --- the host -------------------------------------------------------------------------------------------------

WIREGUARD = {"name": "wg0", "kind": "wireguard"}
ACTIVE = {"installed": True, "active": True, "ipv6": True, "default_incoming": "DROP"}


@pytest.mark.parametrize(
    ("asked", "found", "expected"),
    [
        ("auto", {}, "nftables"),
        ("nftables", {}, "nftables"),
        ("auto", {"ufw": {"installed": True}}, "nftables"),
        ("auto", {"ufw": ACTIVE}, "ufw"),
        ("auto", {"firewalld": ACTIVE}, "firewalld"),
        ("firewalld", {"firewalld": ACTIVE}, "firewalld"),
    ],
)
def test_backend(asked: str, found: dict[str, Any], expected: str) -> None:
    plan = _firewall.plan(settings(firewall_backend=asked), host(**found))
    assert (plan["backend"], plan["problems"]) == (expected, [])


@pytest.mark.parametrize(
    ("changes", "found", "expected"),
    [
        ({"firewall_backend": "nftables"}, {"ufw": ACTIVE}, "firewall_backend is nftables, but ufw is active"),
        ({"firewall_backend": "nftables"}, {"firewalld": ACTIVE}, "firewall_backend is nftables, but firewalld"),
        ({"firewall_backend": "ufw"}, {}, "firewall_backend is ufw, but ufw is not installed"),
        (
            {"firewall_backend": "firewalld"},
            {"firewalld": {"installed": True}},
            "firewall_backend is firewalld, but firewalld is not active",
        ),
        ({}, {"ufw": ACTIVE, "firewalld": ACTIVE}, "ufw and firewalld are both active"),
        ({}, {"ufw": {**ACTIVE, "default_incoming": "ACCEPT"}}, "ufw's default for what comes in is accept"),
        ({}, {"ufw": {**ACTIVE, "ipv6": False}}, "ufw filters no IPv6"),
        ({}, {"firewalld": {**ACTIVE, "open_zones": ["trusted"]}}, "firewalld's zone trusted has the target ACCEPT"),
        ({}, {"ssh_interface": WIREGUARD}, "This run comes in by the tunnel wg0 (wireguard), which ends on this host"),
        ({"found_ssh_ports": []}, {}, "No SSH port was found"),
        (
            {"firewall_ssh_sources": ["198.51.100.0/24"]},
            {},
            "firewall_ssh_sources is 198.51.100.0/24, but this run reaches the host from 192.0.2.7",
        ),
        (
            {"firewall_ssh_sources": ["192.0.2.0/24"]},
            {"ssh_client": ""},
            "firewall_ssh_sources is set, but the host does not tell",
        ),
    ],
)
def test_hosts_that_do_not_allow_it(changes: dict[str, Any], found: dict[str, Any], expected: str) -> None:
    (problem,) = _firewall.plan(settings(**changes), host(**found))["problems"]
    assert problem.startswith(expected)


@pytest.mark.parametrize(
    ("sources", "client"), [(["192.0.2.0/24"], "192.0.2.7"), (["10.0.0.0/8", "fd00::/64"], "fd00::9")]
)
def test_operator_within_the_sources_is_let_in(sources: list[str], client: str) -> None:
    plan = _firewall.plan(settings(firewall_ssh_sources=sources), host(ssh_client=client))
    assert plan["problems"] == []
    assert sources == [source for rule in plan["rules"] if rule["comment"] == "SSH" for source in rule["sources"]]


@pytest.mark.parametrize(
    ("allowed", "found"),
    [
        ([{"ports": [51820], "protocol": "udp"}], {"ssh_interface": WIREGUARD}),
        ([], {"ssh_interface": {"name": "eth0", "kind": ""}}),
        ([], {"ssh_interface": {"name": "eth0", "kind": "veth"}}),
        ([], {"ssh_interface": WIREGUARD, "ufw": ACTIVE}),  # which has let it in so far
    ],
)
def test_tunnel_that_stays_open(allowed: list[Any], found: dict[str, Any]) -> None:
    assert _firewall.plan(settings(firewall_allow_more=allowed), host(**found))["problems"] == []


def test_nobody_is_locked_out_of_the_machine_that_runs_it() -> None:
    local = settings(connection="local", found_ssh_ports=[], firewall_ssh_sources=["198.51.100.0/24"])
    assert _firewall.plan(local, host(ssh_client=""))["problems"] == []


# --- SSH ------------------------------------------------------------------------------------------------------


def test_ports_of_sshd() -> None:
    text = "port 22\n" + "".join(
        f"listenaddress {address}\n" for address in ("[::]:22", "0.0.0.0:2222", "127.0.0.1:2200", "[::1]:2201")
    )
    assert _firewall.sshd_ports(text) == {22, 2222}
    assert _firewall.sshd_ports("") == set()


@pytest.mark.parametrize(
    ("text", "ports"),
    [
        ("[::]:22 (Stream)", {22}),
        ("0.0.0.0:22 (Stream) [::]:2222 (Stream)", {22, 2222}),
        ("127.0.0.1:22 (Stream)", set()),
        ("/run/ssh.sock (Stream)", set()),
        ("", set()),
    ],
)
def test_ports_of_a_socket_unit(text: str, ports: set[int]) -> None:
    assert _firewall.socket_ports(text) == ports


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A=1\0SSH_CONNECTION=192.0.2.7 50000 10.0.0.1 2222\0B=2\0", ("192.0.2.7", "10.0.0.1", 2222)),
        ("SSH_CONNECTION=fe80::1%eth0 50000 fe80::2%eth0 22\0", ("fe80::1", "fe80::2", 22)),
        ("SSH_CONNECTION=::ffff:192.0.2.7 50000 ::ffff:10.0.0.1 22\0", ("192.0.2.7", "10.0.0.1", 22)),
        ("NOT_SSH_CONNECTION=192.0.2.7 50000 10.0.0.1 22\0", None),
        ("", None),
    ],
)
def test_the_connection_in_use(text: str, found: tuple[str, int] | None) -> None:
    assert _firewall.ssh_connection(text) == found


LINKS = [
    {"ifname": "lo", "addr_info": [{"local": "127.0.0.1"}]},
    {"ifname": "eth0", "addr_info": [{"local": "10.0.0.1"}, {"local": "fe80::2"}]},
    {"ifname": "wg0", "linkinfo": {"info_kind": "wireguard"}, "addr_info": [{"local": "10.9.0.1"}]},
    {"ifname": "docker0", "linkinfo": {"info_kind": "bridge"}, "addr_info": []},
]


@pytest.mark.parametrize(
    ("address", "found"), [("10.9.0.1", WIREGUARD), ("fe80::2", {"name": "eth0", "kind": ""}), ("192.0.2.1", {})]
)
def test_the_interface_in_use(address: str, found: dict[str, str]) -> None:
    assert _firewall.interface(LINKS, address) == found


# --- firewalld ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "target", "interfaces", "is_open"),
    [
        ("public (default, active)", "default", "eth0", False),
        ("trusted", "ACCEPT", "", True),
        ("trusted (active)", "ACCEPT", "eth0", True),
        ("trusted (active)", "ACCEPT", "", False),  # of sources
        ("docker (active)", "ACCEPT", "docker0", False),
        ("mine (active)", "ACCEPT", "docker0 eth0", True),
        ("other", "ACCEPT", "", False),
    ],
)
def test_zones_that_let_all_in(head: str, target: str, interfaces: str, is_open: bool) -> None:
    zone = f"{head}\n  target: {target}\n  icmp-block-inversion: no\n  interfaces: {interfaces}\n  rich rules: \n"
    text = f"block\n  target: %%REJECT%%\n  interfaces: \n\n{zone}\nwork\n  target: default\n  interfaces: \n\n"
    assert _firewall.open_zones(text, "trusted" if head == "trusted" else "public", LINKS) == (
        [head.split(maxsplit=1)[0]] if is_open else []
    )


# --- ufw ------------------------------------------------------------------------------------------------------

OURS = b"llmfleet".hex()


def test_ufw_rules_are_read() -> None:
    text = f"""
### tuple ### allow tcp 22 0.0.0.0/0 any 0.0.0.0/0 in
### tuple ### allow tcp 8000 0.0.0.0/0 any 10.0.0.1 in comment={OURS}
### tuple ### limit_log any 2222 ::/0 any ::/0 in
### tuple ### allow tcp 22 0.0.0.0/0 any 0.0.0.0/0 OpenSSH - in
### tuple ### allow any any 0.0.0.0/0 any 1.2.3.4 in_eth0
### tuple ### allow tcp 80 10.0.0.2 any 0.0.0.0/0 in
### tuple ### allow tcp 443 0.0.0.0/0 any 0.0.0.0/0 out
"""
    found = _firewall.parse_ufw(text)
    assert [(rule["family"], rule["action"], rule["port"], rule["source"], rule["ours"]) for rule in found] == [
        (4, "allow", "22", "any", False),
        (4, "allow", "8000", "10.0.0.1", True),
        (6, "limit", "2222", "any", False),
    ]


def lines(*rules: str, comment: str = "") -> list[dict[str, Any]]:
    suffix = f" comment={comment}" if comment else ""
    return _firewall.parse_ufw("\n".join(f"### tuple ### {rule} in{suffix}" for rule in rules))


BOTH = ("allow tcp 443 0.0.0.0/0 any 0.0.0.0/0", "allow tcp 443 ::/0 any ::/0")
HTTPS = {"protocol": "tcp", "port": "443", "source": "any"}


@pytest.mark.parametrize(
    ("present", "add", "delete"),
    [
        ([], [HTTPS], []),
        (lines(*BOTH, comment=OURS), [], []),
        (lines(*BOTH), [], []),  # somebody else's, which ufw would make ours
        (lines(*(rule.replace("allow", "limit") for rule in BOTH)), [], []),
        (lines(BOTH[0], comment=OURS), [HTTPS], []),
        (lines(*BOTH, "allow tcp 80 ::/0 any ::/0"), [], []),
        (
            lines(*BOTH, "allow tcp 80 0.0.0.0/0 any 0.0.0.0/0", "allow tcp 80 ::/0 any ::/0", comment=OURS),
            [],
            [{"protocol": "tcp", "port": "80", "source": "any"}],
        ),
    ],
)
def test_ufw_changes(present: list[dict[str, Any]], add: list[Any], delete: list[Any]) -> None:
    wanted = _firewall.ufw_rules(_firewall.rules([{"ports": [443]}]))
    assert wanted == [HTTPS]
    assert _firewall.ufw_changes(wanted, present) == {"add": add, "delete": delete}


def test_ufw_rules_of_ranges_and_networks() -> None:
    entry = {"ports": ["9000-9010"], "sources": ["10.0.0.0/8", "fd00::1"]}
    wanted = _firewall.ufw_rules(_firewall.rules([entry, entry]))
    assert [rule["source"] for rule in wanted] == ["10.0.0.0/8", "fd00::1"] * 2
    assert {rule["port"] for rule in wanted} == {"9000:9010"}
    assert len(_firewall.ufw_changes(wanted, [])["add"]) == 2
    there = lines("allow tcp 9000:9010 0.0.0.0/0 any 10.0.0.0/8", "allow tcp 9000:9010 ::/0 any fd00::1")
    assert _firewall.ufw_changes(wanted, there) == {"add": [], "delete": []}


def test_what_ufw_denies_is_not_opened_behind_its_back() -> None:
    found = host(
        ufw={**ACTIVE, "rules": lines("deny tcp 443 0.0.0.0/0 any 0.0.0.0/0", "deny tcp 25 0.0.0.0/0 any 0.0.0.0/0")}
    )
    (problem,) = _firewall.plan(settings(), found)["problems"]
    assert problem.startswith("ufw has the rule `deny 443/tcp from any`")


# --- the look at the host -------------------------------------------------------------------------------------


@pytest.fixture
def look(tmp_path: Path, run_module: Any) -> Callable[..., dict[str, Any]]:
    """On a host with stand-ins for its programs; what a stand-in prints is given by its name."""
    units = {
        "llmfleet-firewall.service": "LoadState=loaded\nActiveState=active\nUnitFileState=enabled",
        "llmfleet-firewall-rollback.timer": "LoadState=not-found\nActiveState=inactive\nUnitFileState=",
        "ssh.socket": "LoadState=loaded\nActiveState=inactive\nUnitFileState=disabled\nListen=[::]:2022 (Stream)",
        "firewalld.service": "LoadState=not-found\nActiveState=inactive\nUnitFileState=",
    }
    proc = tmp_path / "proc"
    (proc / "net").mkdir(parents=True)
    (proc / str(os.getpid())).mkdir()
    (proc / f"{os.getpid()}/environ").write_text("")
    (proc / f"{os.getpid()}/stat").write_text(f"{os.getpid()} (python3 (x)) S 77 {'0 ' * 40}")
    (proc / "77").mkdir()
    (proc / "77/environ").write_text("A=b\0SSH_CONNECTION=192.0.2.7 50000 10.0.0.1 2222\0")

    def run(*, rules: str | None = "tcp dport 22 accept", file: str = "as loaded", **programs: Any) -> dict[str, Any]:
        shown = {**units, **programs.pop("units", {})}
        (tmp_path / "show").write_text("\n\n".join(f"Id={name}\n{text}" for name, text in shown.items()))
        (tmp_path / "loaded").write_text(rules or "")
        (tmp_path / "rules.nft").write_text(file)
        scripts = {
            "systemctl": f"cat {tmp_path}/show",
            "nft": "exit 1" if rules is None else f"cat {tmp_path}/loaded",
            "unshare": f'grep -q "as loaded" {tmp_path}/rules.nft && cat {tmp_path}/loaded || echo other',
            "sshd": "echo 'listenaddress [::]:22'",
            "ip": f"echo '{json.dumps(LINKS)}'",
            **programs,
        }
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        for name, script in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(0o755)
        asked = {
            "rules_file": str(tmp_path / "rules.nft"),
            "table": "inet llmfleet",
            "unit": "llmfleet-firewall.service",
            "rollback": "llmfleet-firewall-rollback",
            "policy_file": str(tmp_path / "llmfleet.xml"),
            "files": [str(tmp_path / "rules.nft"), "/no/such/file"],
        }
        patch = {
            "PROC": proc,
            "UFW_DEFAULTS": tmp_path / "ufw.default",
            "UFW_CONF": tmp_path / "ufw.conf",
            "UFW_RULES": (tmp_path / "user.rules",),
        }
        environment = {"PATH": f"{folder}:/usr/bin:/bin"}
        return run_module("firewall_host_info", asked, patch=patch, environment=environment)

    return run


def test_rules_in_force(look: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    found = look()
    assert found["nftables"] == {"installed": True, "loaded": True, "in_force": True, "unit": True, "present": True}
    assert found["files"] == {str(tmp_path / "rules.nft"): "as loaded", "/no/such/file": None}
    assert (found["ssh_ports"], found["ssh_client"], found["ssh_port"]) == ([22], "192.0.2.7", 2222)
    assert found["ssh_interface"] == {"name": "eth0", "kind": ""}
    assert found["rollback_pending"] is False


@pytest.mark.parametrize(
    "changes",
    [
        {"rules": None},
        {"file": "changed since"},
        {"units": {"llmfleet-firewall.service": "LoadState=loaded\nActiveState=active\nUnitFileState=disabled"}},
        {"units": {"llmfleet-firewall.service": "LoadState=loaded\nActiveState=failed\nUnitFileState=enabled"}},
    ],
)
def test_rules_not_in_force(look: Callable[..., dict[str, Any]], changes: dict[str, Any]) -> None:
    found = look(**changes)["nftables"]
    assert (found["in_force"], found["present"]) == (False, True)


def test_ssh_by_a_socket_and_by_a_server_of_another_kind(look: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        inode = os.fstat(server.fileno()).st_ino
    proc = tmp_path / "proc"
    row = f"  sl\n   0: 00000000:{2200:04X} 00000000:0000 0A 0:0 0:0 0 0 0 {inode} 1 0\n"
    (proc / "net/tcp").write_text(row)
    (proc / "88/fd").mkdir(parents=True)
    (proc / "88/fd/3").symlink_to(f"socket:[{inode}]")
    (proc / "88/comm").write_text("dropbear\n")
    (proc / "88/cgroup").write_text("0::/\n")
    listening = {"ssh.socket": "LoadState=loaded\nActiveState=active\nUnitFileState=enabled\nListen=[::]:2022 (Stream)"}
    assert look(units=listening, sshd="exit 1")["ssh_ports"] == [2022, 2200]


def test_ufw_that_is_active(look: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "ufw.default").write_text('IPV6=yes\nDEFAULT_INPUT_POLICY="DROP"\n')
    (tmp_path / "ufw.conf").write_text("ENABLED=yes\n")
    (tmp_path / "user.rules").write_text(f"### tuple ### {BOTH[0]} in comment={OURS}\n")
    found = look(ufw="exit 0")["ufw"]
    assert [rule["port"] for rule in found.pop("rules")] == ["443"]
    assert found == {"installed": True, "active": True, "ipv6": True, "default_incoming": "DROP", "present": True}
    (tmp_path / "ufw.conf").write_text("ENABLED=no\n")
    assert look(ufw="exit 0")["ufw"]["active"] is False


def test_firewalld_and_a_pending_rollback(look: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "llmfleet.xml").write_text("<policy/>")
    units = {
        "firewalld.service": "LoadState=loaded\nActiveState=active\nUnitFileState=enabled",
        "llmfleet-firewall-rollback.timer": "LoadState=loaded\nActiveState=active\nUnitFileState=transient",
    }
    zones = 'case $1 in --get-default-zone) echo trusted ;; *) printf "trusted\\n  target: ACCEPT\\n" ;; esac'
    found = look(units=units, **{"firewall-cmd": zones})
    firewalld = {"installed": True, "active": True, "in_force": True, "present": True, "open_zones": ["trusted"]}
    assert found["firewalld"] == firewalld
    assert found["rollback_pending"] is True
    assert look(units=units, **{"firewall-cmd": "exit 1"})["firewalld"]["in_force"] is False


# --- files ----------------------------------------------------------------------------------------------------


def render(template: str, entries: list[dict[str, Any]], connections: int = 0) -> str:
    environment = jinja2.Environment(  # noqa: S701 - not HTML, and addresses and ports alone
        loader=jinja2.FileSystemLoader(ROLE / "templates"), undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    plan = {"rules": _firewall.rules(entries, connections)}
    return environment.get_template(template).render(ansible_managed="x", __firewall_plan=plan)


ENTRIES = [
    {"ports": [22], "comment": "SSH"},
    {"ports": [8000, 8001], "sources": ["10.0.0.1", "fd00::/64"], "comment": "gateways"},
    {"ports": ["53"], "protocol": "udp"},
]


def test_nftables_file() -> None:
    text = render("llmfleet.nft.j2", ENTRIES)
    assert re.findall(r"^\t\t(.*dport \{.*)$", text, re.MULTILINE) == [
        "tcp dport { 22 } accept",
        "ip saddr { 10.0.0.1 } tcp dport { 8000, 8001 } accept",
        "ip6 saddr { fd00::/64 } tcp dport { 8000, 8001 } accept",
        "udp dport { 53 } accept",
    ]
    assert "policy drop" in text
    assert "ct count" not in text
    limited = render("llmfleet.nft.j2", ENTRIES, 4096)
    assert re.findall(r"tcp dport \{ (.*?) \} .* (ip6? saddr) .*ct count over 4096", limited) == [
        ("22", "ip saddr"),
        ("22", "ip6 saddr"),
    ]
    assert "flush" not in text
    table = yaml.safe_load((ROLE / "vars/main.yml").read_text())["__firewall_table"]
    assert re.findall(r"^(?:delete )?table (.*?)(?: \{)?$", text, re.MULTILINE) == [table] * 3


def test_firewalld_policy() -> None:
    policy = ET.fromstring(render("llmfleet.xml.j2", ENTRIES).partition("\n")[2])  # noqa: S314 - ours
    assert [(port.get("port"), port.get("protocol")) for port in policy.findall("port")] == [
        ("22", "tcp"),
        ("53", "udp"),
    ]
    found = [
        (rule.get("family"), rule.find("source").get("address"), rule.find("port").get("port"))
        for rule in policy.findall("rule")
        if rule.find("accept") is not None
    ]
    sources = [("ipv4", "10.0.0.1"), ("ipv6", "fd00::/64")]
    assert sorted(found) == sorted((*source, port) for source in sources for port in ("8000", "8001"))


def test_commands_of_the_way_back_hold_nothing_that_systemd_expands() -> None:
    for guard in yaml.safe_load((ROLE / "vars/main.yml").read_text())["__firewall_guards"].values():
        assert not re.search(r"[$%]", re.sub(r"\{\{.*?\}\}", "", guard["restore"]))


def test_units_name_the_files_that_the_role_writes() -> None:
    variables = yaml.safe_load((ROLE / "vars/main.yml").read_text())
    for path in (ROLE / "files/systemd").rglob("*.*"):
        if path.is_file():
            assert variables["__firewall_rules_file"] in path.read_text(), path
    unit = (ROLE / "files/systemd" / variables["__firewall_unit"]).read_text()
    assert f'"add table {variables["__firewall_table"]}; delete table {variables["__firewall_table"]}"' in unit
