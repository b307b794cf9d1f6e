# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""The pure functions of tests/hosts/hosts.py: no root, no network, no host."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def load() -> ModuleType:
    path = Path(__file__).parents[1] / "hosts" / "hosts.py"
    spec = importlib.util.spec_from_file_location("hosts", path)
    assert spec
    assert spec.loader
    module = sys.modules["hosts"] = importlib.util.module_from_spec(spec)  # dataclasses look it up there
    spec.loader.exec_module(module)
    return module


hosts = load()

DEB822 = """\
# Debian's own
Types: deb deb-src
# URIs: http://snapshot.example/debian
URIs: http://mirror.example/debian/
Suites: bookworm
 bookworm-updates
Components: main

Types: deb
URIs: https://mirror.example/debian-security
Suites: bookworm-security
Components: main

Types: deb
URIs: https://other.example/node
Suites: bookworm
Enabled: no

Types: deb-src
URIs: http://source.example/debian
Suites: bookworm
"""

ONE_LINE = """\
# deb http://commented.example/debian bookworm main
deb-src http://source.example/debian bookworm main
deb [arch=amd64 signed-by=/usr/share/keyrings/x.gpg] http://mirror.example/debian/ bookworm main contrib
deb http://mirror.example/debian bookworm-updates main
deb https://mirror.example/debian-security bookworm-security main # a remark
"""

ENTRIES = [
    ("http://mirror.example/debian", "bookworm"),
    ("http://mirror.example/debian", "bookworm-updates"),
    ("https://mirror.example/debian-security", "bookworm-security"),
]


@pytest.mark.parametrize(("text", "deb822"), [(DEB822, True), (ONE_LINE, False)])
def test_apt_sources_are_read_in_both_formats(text: str, deb822: bool) -> None:
    assert hosts.apt_entries(text, deb822=deb822) == ENTRIES


def test_mirrors_are_those_of_this_release_and_debootstrap_can_read_them() -> None:
    unusable = [("mirror+file:/etc/apt/mirrors.txt", "bookworm"), ("http://other.example", "nodistro")]
    assert hosts.mirrors(unusable + ENTRIES, "bookworm") == (
        "http://mirror.example/debian",
        "https://mirror.example/debian-security",
    )
    assert hosts.mirrors(ENTRIES, "trixie") == (None, None)


def test_a_host_is_read() -> None:
    assert hosts.parse_host("gw1=bookworm:10.77.1.11") == hosts.Host("gw1", "bookworm", "10.77.1.11")


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("gw1", "HOST=RELEASE:ADDRESS"),
        ("gw1=bookworm", "HOST=RELEASE:ADDRESS"),
        ("=bookworm:10.77.1.11", "HOST=RELEASE:ADDRESS"),
        ("../up=bookworm:10.77.1.11", "HOST=RELEASE:ADDRESS"),
        ("gw1-=bookworm:10.77.1.11", "HOST=RELEASE:ADDRESS"),
        ("gw1=sid:10.77.1.11", "one of bookworm, trixie, jammy, noble"),
        ("gw1=bookworm:10.77.1.256", "not an IPv4 address"),
        ("gw1=bookworm:fd77:1::11", "not an IPv4 address"),
    ],
)
def test_a_bad_host_is_refused_with_a_reason(spec: str, complaint: str) -> None:
    with pytest.raises(hosts.HostsError, match=complaint):
        hosts.parse_host(spec)


@pytest.mark.parametrize("name", ["", "A", "a/b", "..", "-a", "a b", "a" * 32])
def test_a_bad_set_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(hosts.HostsError, match="31 characters"):
        hosts.HostSet(name, tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("address", "expected"),
    [("10.77.1.9", "fd77:1::9"), ("10.77.1.11", "fd77:1::11"), ("10.77.1.254", "fd77:1::254")],
)
def test_the_ipv6_address_ends_in_the_digits_of_the_ipv4_address(address: str, expected: str) -> None:
    assert hosts.address6("fd77:1::/64", address) == expected


def test_short_names_stay_readable_and_long_ones_stay_apart() -> None:
    assert hosts.short_name("lf-", "default", 15) == "lf-default"
    long = [hosts.short_name("lf-", f"a-very-long-name-{n}", 15) for n in (1, 2)]
    assert len(set(long)) == 2
    assert all(len(name) <= 15 and name.startswith("lf-") for name in long)


def test_interface_names_of_two_sets_never_meet(tmp_path: Path) -> None:
    machines = [
        hosts.HostSet(of, tmp_path, tmp_path).machine(host)
        for of, host in [("a", "b-c"), ("a-b", "c"), ("molecule-gateway", "gw1"), ("molecule-gateway", "gw2")]
    ]
    assert len(set(machines)) == 4
    assert all(len(f"vb-{machine}") <= 15 for machine in machines)


def test_only_a_systemd_nspawn_of_ours_is_a_booted_tree() -> None:
    tree = "/state/default/gw1/root"
    assert hosts.booted_tree(["systemd-nspawn", "-D", tree, "--machine=x"]) == Path(tree)
    assert hosts.booted_tree(["/usr/bin/systemd-nspawn", "-D", tree]) == Path(tree)
    assert hosts.booted_tree(["tail", "-D", tree]) is None
    assert hosts.booted_tree(["grep", "systemd-nspawn", "-D", tree]) is None
    assert hosts.booted_tree(["systemd-nspawn", "--quiet", "-D", tree]) is None
    assert hosts.booted_tree([""]) is None


def test_only_the_rules_of_the_set_are_deleted() -> None:
    saved = """\
*filter
:FORWARD DROP [0:0]
-A FORWARD -i lf-a -m comment --comment "llmfleet-hosts:a" -j ACCEPT
-A FORWARD -i lf-ab -m comment --comment "llmfleet-hosts:ab" -j ACCEPT
-A FORWARD -i docker0 -j ACCEPT
COMMIT
*nat
-A POSTROUTING -s 10.77.1.0/24 ! -o lf-a -m comment --comment llmfleet-hosts:a -j MASQUERADE
COMMIT
"""
    commands = [" ".join(command) for command in hosts.rules_to_delete(saved, "llmfleet-hosts:a")]
    comment = "-m comment --comment llmfleet-hosts:a"
    assert commands == [
        f"iptables -w -t filter -D FORWARD -i lf-a {comment} -j ACCEPT",
        f"iptables -w -t nat -D POSTROUTING -s 10.77.1.0/24 ! -o lf-a {comment} -j MASQUERADE",
    ]


def test_only_certificates_that_the_other_bundle_lacks_are_missing() -> None:
    one, two = (f"-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----" for body in "AB")
    assert hosts.missing_certificates(f"# a proxy\n{two}\n{one}\n{two}\n", f"{one}\n") == [two]
    assert hosts.missing_certificates("", one) == []


def new_set(tmp_path: Path, name: str, subnet: str, *specs: str) -> None:
    """Ask for a set as "up" does, without creating anything but its set.json."""
    one = hosts.HostSet(name, tmp_path, tmp_path / "cache")
    one.ask([hosts.parse_host(spec) for spec in specs], subnet, "", [])
    one.save()


def test_a_set_is_remembered_and_can_grow(tmp_path: Path) -> None:
    new_set(tmp_path, "a", "10.77.1.0/24", "gw1=bookworm:10.77.1.11")
    new_set(tmp_path, "a", "", "gw2=trixie:10.77.1.12")
    again = hosts.HostSet("a", tmp_path, tmp_path / "cache")
    assert [host.name for host in again.hosts.values()] == ["gw1", "gw2"]
    assert again.subnet == "10.77.1.0/24"


@pytest.mark.parametrize(
    ("name", "subnet", "spec", "complaint"),
    [
        ("a", "", "gw1=trixie:10.77.1.11", "exists as bookworm:10.77.1.11"),
        ("a", "10.77.2.0/24", "gw2=trixie:10.77.2.12", "is on 10.77.1.0/24"),
        ("a", "", "gw2=trixie:10.77.1.11", "same address"),
        ("a", "", "gw2=trixie:10.77.1.1", "its gateway"),
        ("a", "", "gw2=trixie:10.77.1.255", "not in"),
        ("a", "", "gw2=trixie:10.77.2.12", "not in"),
        ("b", "", "gw2=trixie:10.77.2.12", "say its --subnet"),
        ("b", "10.77.0.0/16", "gw2=trixie:10.77.2.12", "overlaps with 10.77.1.0/24 of the set a"),
    ],
)
def test_a_misfit_is_refused(tmp_path: Path, name: str, subnet: str, spec: str, complaint: str) -> None:
    new_set(tmp_path, "a", "10.77.1.0/24", "gw1=bookworm:10.77.1.11")
    with pytest.raises(hosts.HostsError, match=complaint):
        new_set(tmp_path, name, subnet, spec)


def test_a_bind_keeps_its_place_or_gets_another(tmp_path: Path) -> None:
    assert hosts.parse_bind(str(tmp_path)) == f"{tmp_path}:{tmp_path}"
    assert hosts.parse_bind(f"{tmp_path}:/wheels") == f"{tmp_path}:/wheels"
    with pytest.raises(hosts.HostsError, match=r"--bind .*nowhere does not exist"):
        hosts.parse_bind(f"{tmp_path}/nowhere:/wheels")


def test_pip_folders_of_wheels_are_local_ones_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", f"https://wheels.example/ {tmp_path} {tmp_path}/nowhere")
    assert hosts.find_links() == [f"{tmp_path}:{tmp_path}"]


def test_a_set_is_of_the_checkout_whose_folders_it_has(tmp_path: Path) -> None:
    def made(*binds: str) -> bool:
        return hosts.HostSet("m-tls", tmp_path, tmp_path, binds=list(binds)).is_of(Path("/srv/mine"))

    assert made("/srv/mine/tests/cpu:/opt/demo", "/opt/wheels:/opt/wheels")
    assert not made("/srv/mine2/tests/cpu:/opt/demo", "/opt/wheels:/opt/wheels")
    assert made()  # nothing is known of what is left of it
