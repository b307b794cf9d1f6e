# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
from __future__ import annotations

DOCUMENTATION = r"""
name: nginx_name
author: llmfleet developers
version_added: 1.0.0
short_description: Take apart the public name of a gateway
description: Tells whether a name is a DNS name or an IP literal, and how nginx and a certificate write it.
options:
  _input:
    description: A DNS name, or an IPv4 or IPv6 literal without brackets.
    type: str
    required: true
"""

EXAMPLES = r"""
- name: Show how nginx writes an IPv6 literal
  ansible.builtin.debug:
    msg: "{{ ('fd77::1' | llmfleet.serving.nginx_name).host }}" # [fd77::1]
"""

RETURN = r"""
_value:
  description: Empty when the input is neither a DNS name nor an IP literal.
  type: dict
  contains:
    ip:
      description: Whether it is an IP literal.
      type: bool
    host:
      description: The name as it stands in a URL and in C(server_name), in lower case, an IPv6 literal in brackets.
      type: str
    san:
      description: The name as a certificate's subject alternative name, as V(DNS:...) or V(IP:...).
      type: str
"""

import ipaddress

from ansible_collections.llmfleet.serving.plugins.module_utils._names import is_dns_name


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


class FilterModule:
    def filters(self):
        return {"nginx_name": nginx_name}
