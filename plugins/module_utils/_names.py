# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: which names and ports there are. Pure: no Ansible import and no I/O."""

from __future__ import annotations

import ipaddress
import re

MAX_PORT = 65535
LABEL = r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)"
DNS_NAME = re.compile(rf"(?=.{{1,253}}\Z){LABEL}(\.{LABEL})*")


def is_dns_name(name: str) -> bool:
    """Whether it is one in full, without a wildcard. 10.0.0.256 is a mistyped address, not a name."""
    return bool(DNS_NAME.fullmatch(name)) and not name.rpartition(".")[2].isdigit()


def nginx_name(name: str) -> dict[str, object]:
    name = str(name).lower()
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return {"ip": False, "host": name, "san": f"DNS:{name}"} if is_dns_name(name) else {}
    if "%" in name:
        return {}
    return {
        "ip": True,
        "host": f"[{address}]" if address.version == 6 else str(address),
        "san": f"IP:{address}",
    }
