# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: what is wrong with the role nginx's variables. No Ansible import and no I/O."""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Iterator
from typing import Any

from ansible_collections.llmfleet.serving.plugins.module_utils._names import MAX_PORT, is_dns_name

KEY = re.compile(r"[A-Za-z0-9._~+/=-]+")  # RFC 6750's b64token, which needs no quoting in nginx
KEY_MIN_LENGTH = 20
KEY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/@-]{0,159}")  # a tenant's is team/name
SHA256 = re.compile(r"[0-9A-Fa-f]{64}")
MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
SERVER = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?):([0-9]{1,5})")
PATH = re.compile(r"(/[A-Za-z0-9_.~-]+)+")
SIZE = re.compile(r"[1-9][0-9]*[kKmM]?")
AT_LEAST = {  # and what each counts
    "nginx_read_timeout": (1, "second"),
    "nginx_worker_connections": (512, "connections"),
    "nginx_header_timeout": (1, "second"),
    "nginx_body_timeout": (1, "second"),
    "nginx_drain_timeout": (1, "second"),
    "nginx_requests_per_second": (1, "request"),
    "nginx_requests_burst": (0, "requests"),
    "nginx_concurrent_requests": (1, "request"),
    "nginx_anonymous_requests_per_second": (1, "request"),
    "nginx_max_connections_per_address": (1, "connection"),
    "nginx_max_choices": (1, "answer"),
    "nginx_hsts_seconds": (0, "seconds"),
}


def problems(settings: dict[str, Any]) -> list[str]:
    return [
        *_name(settings),
        *_backends(settings["nginx_backends"]),
        *_drained(settings),
        *_keys(settings),
        *_key("nginx_backend_key", settings["nginx_backend_key"]),
        *_ports(settings),
        *_paths(settings),
        *_admin(settings),
        *_numbers(settings),
    ]


def _name(settings: dict[str, Any]) -> Iterator[str]:
    if not settings["nginx_server_name"]:
        yield "nginx_server_name is not set: set it to the public DNS name (or the IP address) that clients use."
    elif not settings["name"]:
        yield (
            f"nginx_server_name is {settings['nginx_server_name']!r}: "
            "use a DNS name or an IP literal, without scheme, port or brackets."
        )
    names = [settings["nginx_server_name"], *settings["nginx_server_aliases"]]
    for alias in names[1:]:
        if not is_dns_name(alias):
            yield f"nginx_server_aliases has {alias!r}: use DNS names, without scheme, port or wildcard."
    if len({name.lower() for name in names}) < len(names):
        yield "nginx_server_aliases has a name twice, or nginx_server_name as well: list each name once."


def _backends(backends: list[dict[str, Any]]) -> Iterator[str]:
    if not backends:
        yield "nginx_backends is empty: name at least one model with its servers."
    seen: set[str] = set()
    for backend in backends:
        model = backend["model"]
        if not MODEL.fullmatch(model):
            yield (
                f"nginx_backends has a model {model!r}: "
                "use at most 128 of A-Z a-z 0-9 . _ : / -, beginning with a letter or digit."
            )
        if model in seen:
            yield f"nginx_backends has the model {model!r} twice: put all its servers into one entry."
        seen.add(model)
        if not backend["servers"]:
            yield f"nginx_backends has no servers for the model {model!r}: name at least one, or remove the model."
        for server in backend["servers"]:
            match = SERVER.fullmatch(server)
            if not match or not 0 < int(match[3]) <= MAX_PORT:
                yield (
                    f"nginx_backends has a server {server!r} for the model {model!r}: "
                    "write host:port or [address]:port."
                )


def _drained(settings: dict[str, Any]) -> Iterator[str]:
    servers = [server for backend in settings["nginx_backends"] for server in backend["servers"]]
    for server in settings["nginx_drained"]:
        if server not in servers:
            yield f"nginx_drained has {server!r}: use servers of nginx_backends, which are {', '.join(servers)}."


def _keys(settings: dict[str, Any]) -> Iterator[str]:
    if settings["nginx_api_keys"]:
        yield "nginx_api_keys is now nginx_keys: list each key there with a name, and take nginx_api_keys out."
    keys = settings["nginx_keys"]
    # Tenants may have no key that is let in, at first or when all are blocked.
    if not keys and not settings["nginx_forward_key"]:
        yield "nginx_keys is empty: list at least one key, or remove the variable to have one generated."
    hashes: dict[str, int] = {}
    for index, entry in enumerate(keys):
        where = f"nginx_keys[{index}]"
        unquoted = [part for part, value in entry.items() if isinstance(value, (bool, int, float))]
        for part in unquoted:
            yield f"{where}.{part} is no text, but a number or a boolean: put it into quotes."
        if unquoted:
            continue
        name, key, sha256 = (
            None if entry.get(part) is None else str(entry[part]) for part in ("name", "key", "sha256")
        )
        if not KEY_NAME.fullmatch(name or ""):
            yield f"{where}.name is {name!r}: use up to 160 of A-Z a-z 0-9 . _ / @ -, the first a letter or digit."
        if (key is None) == (sha256 is None):
            yield f"{where} needs either key or sha256, and not both."
            continue
        if key is not None:
            problems = list(_key(f"{where}.key", key))
        else:
            problems = [] if SHA256.fullmatch(sha256) else [f"{where}.sha256 must have 64 hexadecimal digits."]
        yield from problems
        digest = sha256.lower() if sha256 is not None else hashlib.sha256(key.encode()).hexdigest()
        if digest in hashes:
            yield f"{where} has the same key as nginx_keys[{hashes[digest]}]: give each a key of its own."
        elif not problems:
            hashes[digest] = index


def _key(where: str, key: Any) -> Iterator[str]:
    if isinstance(key, (bool, int, float)):
        yield f"{where} is no text, but a number or a boolean: put it into quotes."
        return
    key = str(key)  # ansible-vault's is none yet
    if not KEY.fullmatch(key):
        yield f"{where} is empty or has a character that is not one of A-Z a-z 0-9 . _ ~ + / = -: make another key."
    elif len(key) < KEY_MIN_LENGTH:
        yield f"{where} has {len(key)} characters: make a key of at least {KEY_MIN_LENGTH}."


def _ports(settings: dict[str, Any]) -> Iterator[str]:
    names = ("nginx_http_port", "nginx_https_port")
    for name in names:
        if not 0 < settings[name] <= MAX_PORT:
            yield f"{name} is {settings[name]}: use a port from 1 to {MAX_PORT}."
    if settings[names[0]] == settings[names[1]]:
        yield f"{names[0]} and {names[1]} are both {settings[names[0]]}: use two ports."


def _paths(settings: dict[str, Any]) -> Iterator[str]:
    if not settings["nginx_allowed_paths"]:
        yield "nginx_allowed_paths is empty: list at least one path, or remove the variable."
    for variable in ("nginx_allowed_paths", "nginx_admin_paths"):
        paths = settings[variable]
        for path in paths:
            if not PATH.fullmatch(path) or {".", ".."} & set(path.split("/")):
                yield (
                    f"{variable} has {path!r}: "
                    "write it as /v1/models, of A-Z a-z 0-9 _ . ~ - and without a slash at its end."
                )
            if path.startswith("/.llmfleet"):
                yield f"{variable} has {path!r}, which the gateway uses itself: choose another."
        if len(set(paths)) < len(paths):
            yield f"{variable} has a path twice: list each once."
    for path in set(settings["nginx_allowed_paths"]) & set(settings["nginx_admin_paths"]):
        yield f"nginx_admin_paths has {path!r}, as has nginx_allowed_paths: decide for one."


def _admin(settings: dict[str, Any]) -> Iterator[str]:
    for network in settings["nginx_admin_networks"]:
        try:
            ipaddress.ip_network(network)
        except ValueError as error:
            yield f"nginx_admin_networks has {network!r} ({error}): write an address or a network as 10.0.0.0/24."
    if settings["nginx_admin_paths"] and not settings["nginx_admin_networks"]:
        yield "nginx_admin_paths is set, and nginx_admin_networks is empty: name the networks that may use them."
    if settings["nginx_admin_paths"] and settings["nginx_forward_key"]:
        yield (
            f"nginx_admin_paths is {settings['nginx_admin_paths']}, which with tenants (nginx_forward_key) would lead "
            "to LiteLLM's administration: take it out, and use LiteLLM on the gateway itself."
        )


def _numbers(settings: dict[str, Any]) -> Iterator[str]:
    if not SIZE.fullmatch(settings["nginx_max_body_size"]):
        yield (
            f"nginx_max_body_size is {settings['nginx_max_body_size']!r}: "
            "write a number of bytes, or one with k or m, as 4m."
        )
    for name, (least, what) in AT_LEAST.items():
        if settings[name] < least:
            yield f"{name} is {settings[name]}: use at least {least} {what}."
