# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: what a host answers to, from the inventory and from what is found on the host.

Pure: no Ansible import and no I/O.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ansible_collections.llmfleet.serving.plugins.module_utils._names import MAX_PORT
from ansible_collections.llmfleet.serving.plugins.module_utils._values import listed

PORTS = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")
COMMENT = re.compile(r"[A-Za-z0-9 ._:/,@+-]{0,64}")
MARK = "llmfleet"  # the comment of our rules in ufw
ROLLBACK_SECONDS = range(20, 601)
LEAST_CONNECTIONS = 64  # what clients behind one address want to share at least
TUNNELS = {"wireguard", "tun", "xfrm", "vti", "vti6"}

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


# --- what is to be allowed ------------------------------------------------------------------------------------


def allow(groups: Collection[str], instances: Iterable[Mapping[str, Any]], gateway_ports: Iterable[Any]) -> list[Any]:
    """``firewall_allow`` for a host of these groups that runs these ``vllm_instances``."""
    found: list[dict[str, Any]] = []
    if "gateways" in groups:
        found.append({"comment": "clients", "ports": [str(port) for port in gateway_ports]})
    by_clients: dict[tuple[str, ...], list[str]] = {}
    for instance in instances:
        if not _is_loopback(instance["host"]) and instance["clients"]:
            by_clients.setdefault(tuple(map(_network, instance["clients"])), []).append(str(instance["port"]))
    for clients, ports in by_clients.items():
        found.append({"comment": "gateways to vLLM", "ports": ports, "sources": list(clients)})
    return found


def _network(client: str) -> str:
    """``vllm_allowed_clients`` may have a network with an address in it. What is neither is left to ``problems``."""
    try:
        return _written(ipaddress.ip_network(client, strict=False))
    except ValueError:
        return client


def port_ranges(ports: Iterable[Any]) -> list[str]:
    """Each port once, neighbours and overlaps joined: nft refuses a set with overlaps."""
    spans = sorted((int(first), int(last or first)) for first, last in (_port(port) for port in ports))
    joined: list[tuple[int, int]] = []
    for first, last in spans:
        if joined and first <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
        else:
            joined.append((first, last))
    return [str(first) if first == last else f"{first}-{last}" for first, last in joined]


def _port(port: Any) -> tuple[str, str | None]:
    match = PORTS.fullmatch(str(port))
    assert match, port  # noqa: S101 - what `problems` has let pass
    return match[1], match[2]


def _entries(value: Any) -> list[dict[str, Any]]:
    return [
        {**entry, "ports": listed(entry.get("ports")), "sources": listed(entry.get("sources"))}
        for entry in listed(value)
    ]


def rules(entries: Iterable[Mapping[str, Any]], connections: int = 0) -> list[dict[str, Any]]:
    """Each entry as a rule for each address family; ``family`` is empty where any address may come.

    Where anybody may come, ``connections`` says how many one may have by TCP; 0 is any number.
    """
    found = []
    for entry in entries:
        rule = {
            "comment": entry.get("comment") or "",
            "protocol": entry.get("protocol") or "tcp",
            "ports": port_ranges(entry["ports"]),
            "connections": 0,
        }
        networks = [ipaddress.ip_network(source) for source in entry.get("sources") or ()]
        if not networks:
            limit = connections if rule["protocol"] == "tcp" else 0
            found.append({**rule, "family": "", "sources": [], "connections": limit})
        for family, version in (("ip", 4), ("ip6", 6)):
            joined = ipaddress.collapse_addresses(net for net in networks if net.version == version)
            if sources := [_written(net) for net in joined]:
                found.append({**rule, "family": family, "sources": sources})
    return found


def _written(net: Network) -> str:
    """As nft and ufw list it: a single address without its prefix."""
    return str(net.network_address) if net.prefixlen == net.max_prefixlen else str(net)


# --- variables --------------------------------------------------------------------------------------------------


def problems(settings: Mapping[str, Any]) -> list[str]:
    """What is wrong with the role's variables: each with the variable, the value and the remedy."""
    seconds = int(settings["firewall_rollback_seconds"])
    connections = int(settings["firewall_connections_per_source"])
    found = []
    if not settings["instances_known"]:
        found.append(
            "What this engine runs is not known: run the playbook llmfleet.serving.firewall, or include the role vllm "
            "with tasks_from: instances before this one."
        )
    if seconds not in ROLLBACK_SECONDS:
        found.append(
            f"firewall_rollback_seconds is {seconds}: give {ROLLBACK_SECONDS[0]} to {ROLLBACK_SECONDS[-1]} seconds."
        )
    if connections and connections < LEAST_CONNECTIONS:
        found.append(
            f"firewall_connections_per_source is {connections}: give at least {LEAST_CONNECTIONS}, "
            "for many clients may share an address, or 0 for no limit."
        )
    found += _port_problems("firewall_ssh_ports", settings["firewall_ssh_ports"])
    found += _source_problems("firewall_ssh_sources", settings["firewall_ssh_sources"])
    for name in ("firewall_allow", "firewall_allow_more"):
        for index, entry in enumerate(settings[name]):
            at = f"{name}[{index}]"
            if not entry["ports"]:
                found.append(f"{at}.ports is empty: name at least one port, or take the entry out.")
            found += _port_problems(f"{at}.ports", entry["ports"])
            found += _source_problems(f"{at}.sources", entry["sources"])
            if not COMMENT.fullmatch(str(entry.get("comment") or "")):
                found.append(
                    f"{at}.comment is {entry['comment']!r}: use at most 64 letters, digits, spaces and ._:/,@+-"
                )
    return found


def _port_problems(name: str, ports: Iterable[Any]) -> Iterator[str]:
    for port in ports:
        match = PORTS.fullmatch(str(port))
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 0 < first <= last <= MAX_PORT:
            yield f"{name} has {port!r}: write a port from 1 to {MAX_PORT}, or a range as 9000-9010."


def _source_problems(name: str, sources: Iterable[Any]) -> Iterator[str]:
    for source in sources:
        try:
            net = ipaddress.ip_network(str(source), strict=False)
        except ValueError:
            yield f"{name} has {source!r}: write an address or a network, as 192.0.2.7, 192.0.2.0/24 or 2001:db8::/32."
            continue
        if "/" in str(source) and str(net.network_address) != str(ipaddress.ip_interface(str(source)).ip):
            yield f"{name} has {source!r}: write {net} for the network, or the address without a prefix."
        if not net.prefixlen:
            yield f"{name} has {source!r}, which is every address of its kind: leave sources empty to let all in."


# --- the host ---------------------------------------------------------------------------------------------------


def backend(asked: str, host: Mapping[str, Any]) -> str:
    """What filters on this host."""
    active = [name for name in ("ufw", "firewalld") if host[name]["active"]]
    return asked if asked != "auto" else (active or ["nftables"])[0]


def host_problems(settings: Mapping[str, Any], host: Mapping[str, Any]) -> list[str]:
    """Why the host's own state does not allow what the variables ask for."""
    asked = settings["firewall_backend"]
    active = [name for name in ("ufw", "firewalld") if host[name]["active"]]
    found = []
    for name in active:
        if asked not in ("auto", name):
            remedy = "`ufw disable`" if name == "ufw" else "`systemctl disable --now firewalld`"
            found.append(
                f"firewall_backend is {asked}, but {name} is active on this host: set firewall_backend to auto "
                f"or {name}, or turn it off there with {remedy}."
            )
    if asked == "auto" and len(active) > 1:
        found.append("ufw and firewalld are both active on this host, and each undoes the other: turn one of them off.")
    if asked in ("ufw", "firewalld") and not host[asked]["active"]:
        what, remedy = (
            ("not active", "activate it there, with a rule for SSH")
            if host[asked]["installed"]
            else ("not installed", "install and activate it there, with a rule for SSH")
        )
        found.append(
            f"firewall_backend is {asked}, but {asked} is {what} on this host: {remedy}, "
            "or set firewall_backend to auto."
        )
    if backend(asked, host) == "ufw" and host["ufw"]["active"]:
        found += _ufw_problems(settings, host)
    if backend(asked, host) == "firewalld":
        found += [
            f"firewalld's zone {zone} has the target ACCEPT, so that every port is open: put the host's interfaces "
            "into another zone, as with `firewall-cmd --set-default-zone public`, or turn firewalld off to have "
            "nftables used."
            for zone in host["firewalld"]["open_zones"]
        ]
    return found + list(_ssh_problems(settings, host))


def _ssh_problems(settings: Mapping[str, Any], host: Mapping[str, Any]) -> Iterator[str]:
    if settings["connection"] == "local":
        return
    if not settings["ssh_ports"]:
        yield (
            "No SSH port was found on this host, by which the operator would be locked out: "
            "set firewall_ssh_ports to the ports that its SSH server listens on."
        )
    tunnel = host["ssh_interface"]
    if (
        tunnel.get("kind") in TUNNELS
        and backend(settings["firewall_backend"], host) == "nftables"
        and not any(rule["protocol"] == "udp" for rule in settings["rules"])
    ):
        yield (
            f"This run comes in by the tunnel {tunnel['name']} ({tunnel['kind']}), which ends on this host, and no UDP "
            "port is let in: the tunnel would work until it is idle for a while, and lock you out. Add its port to "
            "firewall_allow_more, as {ports: [51820], protocol: udp}, or reach the host by another address."
        )
    networks = [ipaddress.ip_network(source, strict=False) for source in settings["firewall_ssh_sources"]]
    if not networks:
        return
    if not host["ssh_client"]:
        yield (
            "firewall_ssh_sources is set, but the host does not tell from which address you reach it: "
            "leave firewall_ssh_sources empty."
        )
    elif not any(ipaddress.ip_address(host["ssh_client"]) in net for net in networks):
        yield (
            f"firewall_ssh_sources is {', '.join(map(str, networks))}, but this run reaches the host from "
            f"{host['ssh_client']}, which would be locked out: add that address or its network."
        )


def _ufw_problems(settings: Mapping[str, Any], host: Mapping[str, Any]) -> Iterator[str]:
    if host["ufw"]["default_incoming"] not in ("DROP", "REJECT"):
        yield (
            f"ufw's default for what comes in is {host['ufw']['default_incoming'].lower()}, so that every port is "
            "open: run `ufw default deny incoming` there, or `ufw disable` to have nftables used."
        )
    if not host["ufw"]["ipv6"]:
        yield (
            "ufw filters no IPv6 on this host (IPV6=no in /etc/default/ufw), so that every port is open there: "
            "set IPV6=yes and run `ufw reload`, or `ufw disable` to have nftables used."
        )
    denied = [rule for rule in host["ufw"]["rules"] if rule["action"] in ("deny", "reject")]
    wanted = _of_families(ufw_rules(settings["rules"]))
    for rule in denied:
        if _tuple(rule) in wanted:
            yield (
                f"ufw has the rule `{rule['action']} {rule['port']}/{rule['protocol']} from {rule['source']}`, but "
                f"that is to be let in (firewall_allow): delete the rule there, or change firewall_allow."
            )


def plan(settings: Mapping[str, Any], host: Mapping[str, Any]) -> dict[str, Any]:
    """What the role does by: ``backend``, ``problems``, ``rules``, and for ufw what is to add and to delete."""
    lists = {name: listed(settings[name]) for name in ("firewall_ssh_ports", "firewall_ssh_sources")}
    allowed = {name: _entries(settings[name]) for name in ("firewall_allow", "firewall_allow_more")}
    settings = {**settings, **lists, **allowed}
    found = problems(settings)
    if found:
        return {"backend": "", "problems": found, "rules": [], "ssh_ports": [], "ufw": {"add": [], "delete": []}}
    settings["ssh_ports"] = port_ranges([*settings["found_ssh_ports"], *settings["firewall_ssh_ports"]])
    ssh = {"comment": "SSH", "ports": settings["ssh_ports"], "sources": settings["firewall_ssh_sources"]}
    wanted = rules([ssh] if settings["ssh_ports"] else [])
    wanted += rules(
        settings["firewall_allow"] + settings["firewall_allow_more"], int(settings["firewall_connections_per_source"])
    )
    name = backend(settings["firewall_backend"], host)
    changes: dict[str, Any] = {"add": [], "delete": []}
    if name == "ufw":
        changes = ufw_changes(ufw_rules(wanted), host["ufw"]["rules"])
    return {
        "backend": name,
        "problems": host_problems({**settings, "rules": wanted}, host),
        "rules": wanted,
        "ssh_ports": settings["ssh_ports"],
        "ufw": changes,
    }


# --- SSH --------------------------------------------------------------------------------------------------------


def sshd_ports(effective: str) -> set[int]:
    """The ports of the listenaddress lines that ``sshd -T`` prints."""
    found = re.findall(r"^listenaddress (\S+):([0-9]+)(?: .*)?$", effective, re.MULTILINE)
    return {int(port) for address, port in found if not _is_loopback(address)}


def socket_ports(listen: str) -> set[int]:
    """The TCP ports of a socket unit, as ``systemctl show --property Listen`` prints them."""
    found = re.findall(r"(\S*?):?([0-9]+) \(Stream\)", listen)
    return {int(port) for address, port in found if not _is_loopback(address)}


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.strip("[]")).is_loopback
    except ValueError:  # a name, or every address
        return False


def ssh_connection(environment: str) -> tuple[str, str, int] | None:
    """Of the text of /proc/<pid>/environ, where somebody came in by SSH from, and at which address and port."""
    match = re.search(r"(?:^|\0)SSH_CONNECTION=(\S+) [0-9]+ (\S+) ([0-9]+)(?:\0|$)", environment)
    return (_plain(match[1]), _plain(match[2]), int(match[3])) if match else None


def _plain(written: str) -> str:
    address = ipaddress.ip_address(written.partition("%")[0])
    mapped = address.ipv4_mapped if address.version == 6 else None
    return str(mapped or address)


def interface(links: Iterable[Mapping[str, Any]], address: str) -> dict[str, str]:
    """Name and kind of the link that has the address, of what ``ip -json -details address`` prints."""
    for link in links:
        if any(address == each.get("local") for each in link.get("addr_info") or ()):
            return {"name": link["ifname"], "kind": _kind(link)}
    return {}


def _kind(link: Mapping[str, Any]) -> str:
    """Empty for a network card."""
    return (link.get("linkinfo") or {}).get("info_kind") or ""


# --- firewalld --------------------------------------------------------------------------------------------------


def open_zones(zones: str, default: str, links: Iterable[Mapping[str, Any]]) -> list[str]:
    """Zones that let all in, of what ``firewall-cmd --list-all-zones`` prints: the default, or with an interface.

    Not those of bridges alone, such as Docker's, nor those that are there for some sources.
    """
    bridges = {link["ifname"] for link in links if _kind(link) == "bridge"} | {"lo"}
    found = []
    for block in re.split(r"\n\s*\n", zones.strip()):
        head, _, body = block.strip().partition("\n")
        name = head.partition(" ")[0]
        values = dict(re.findall(r"^\s+([\w-]+): ?(.*)$", body, re.MULTILINE))
        used = name == default or set(values.get("interfaces", "").split()) - bridges
        if values.get("target") == "ACCEPT" and used:
            found.append(name)
    return found


# --- ufw --------------------------------------------------------------------------------------------------------

TUPLE = re.compile(
    r"^### tuple ### (?P<action>\w+) (?P<protocol>\w+) (?P<port>\S+) (?P<to>\S+) any (?P<source>\S+) in"
    r"(?: comment=(?P<comment>\w+))?$",
    re.MULTILINE,
)
ANY = {"0.0.0.0/0": "any", "::/0": "any"}


@dataclass(frozen=True)
class Tuple:
    """What ufw tells rules apart by, as far as ours differ. ``family`` is 4 or 6."""

    family: int
    protocol: str
    port: str
    source: str


def parse_ufw(text: str) -> list[dict[str, Any]]:
    """The plain rules for what comes in, of user.rules or user6.rules: no interfaces, applications or destinations."""
    found = []
    for match in TUPLE.finditer(text):
        if match["to"] in ANY:
            comment = bytes.fromhex(match["comment"] or "").decode(errors="replace")
            found.append(
                {
                    "family": 6 if ":" in match["to"] else 4,
                    "action": match["action"].partition("_")[0],
                    "protocol": match["protocol"],
                    "port": match["port"],
                    "source": ANY.get(match["source"], match["source"]),
                    "ours": comment == MARK,
                }
            )
    return found


def ufw_rules(wanted: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """What the module ufw takes: a rule for each port and source, so that each can be compared with those of others."""
    return [
        {"protocol": rule["protocol"], "port": port.replace("-", ":"), "source": source}
        for rule in wanted
        for port in rule["ports"]
        for source in rule["sources"] or ["any"]
    ]


def _of_families(wanted: Iterable[Mapping[str, str]]) -> dict[Tuple, Mapping[str, str]]:
    return {
        Tuple(family, rule["protocol"], rule["port"], rule["source"]): rule
        for rule in wanted
        for family in ((4, 6) if rule["source"] == "any" else (6 if ":" in rule["source"] else 4,))
    }


def _tuple(rule: Mapping[str, Any]) -> Tuple:
    return Tuple(rule["family"], rule["protocol"], rule["port"], rule["source"])


def ufw_changes(wanted: Sequence[Mapping[str, str]], present: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is to add and to delete. Another's rule that says the same is left alone: ufw would make it ours."""
    tuples = _of_families(wanted)
    there = {_tuple(rule) for rule in present}
    missing = [rule for rule in wanted if any(tuples[one] is rule and one not in there for one in tuples)]
    stale = [rule for rule in present if rule["ours"] and _tuple(rule) not in tuples]
    delete = {
        (rule["protocol"], rule["port"], rule["source"]): {key: rule[key] for key in ("protocol", "port", "source")}
        for rule in stale
    }
    return {"add": missing, "delete": list(delete.values())}
