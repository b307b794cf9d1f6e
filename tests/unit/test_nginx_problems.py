# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""The checks of the role nginx's variables, and how its public name is taken apart."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from ansible_collections.llmfleet.serving.plugins.module_utils import _nginx_problems
from ansible_collections.llmfleet.serving.plugins.module_utils._names import nginx_name

SECRET = "0123456789-0123456789"
HASH = hashlib.sha256(SECRET.encode()).hexdigest()


def settings(**changes: Any) -> dict[str, Any]:
    found = {
        "nginx_server_name": "gw.example.test",
        "nginx_server_aliases": ["api.example.test"],
        "nginx_backends": [{"model": "org/tiny-1.5:chat", "servers": ["10.0.0.1:8000", "[fd77::1]:8000", "gpu-1:1"]}],
        "nginx_keys": [{"name": "default", "key": SECRET}],
        "nginx_api_keys": [],
        "nginx_forward_key": False,
        "nginx_backend_key": SECRET,
        "nginx_http_port": 80,
        "nginx_https_port": 443,
        "nginx_allowed_paths": ["/v1/models", "/v1/chat/completions"],
        "nginx_admin_paths": [],
        "nginx_admin_networks": [],
        "nginx_drained": [],
        "nginx_max_body_size": "4m",
        "nginx_read_timeout": 3600,
        "nginx_worker_connections": 8192,
        "nginx_header_timeout": 10,
        "nginx_body_timeout": 30,
        "nginx_drain_timeout": 3600,
        "nginx_requests_per_second": 50,
        "nginx_requests_burst": 0,
        "nginx_concurrent_requests": 128,
        "nginx_anonymous_requests_per_second": 5,
        "nginx_max_connections_per_address": 256,
        "nginx_max_choices": 128,
        "nginx_hsts_seconds": 0,
        **changes,
    }
    return {"name": nginx_name(found["nginx_server_name"]), **found}


def problems(**changes: Any) -> list[str]:
    return _nginx_problems.problems(settings(**changes))


def test_where_tenants_have_no_keys_nobody_is_let_in() -> None:
    assert problems(nginx_keys=[], nginx_forward_key=True) == []


@pytest.mark.parametrize(
    ("name", "host", "san"),
    [
        ("GW.example.test", "gw.example.test", "DNS:gw.example.test"),
        ("gateway", "gateway", "DNS:gateway"),
        ("10.0.0.1", "10.0.0.1", "IP:10.0.0.1"),
        ("FD77:0::1", "[fd77::1]", "IP:fd77::1"),
    ],
)
def test_good_names(name: str, host: str, san: str) -> None:
    assert nginx_name(name) == {"ip": san.startswith("IP"), "host": host, "san": san}


@pytest.mark.parametrize(
    "name",
    ["", "https://a", "a:443", "[fd77::1]", "10.0.0.256", "-a.b", "a..b", "a.", "*.a", "fe80::1%eth0", "a" * 64],
)
def test_bad_names(name: str) -> None:
    assert nginx_name(name) == {}
    assert len(problems(nginx_server_name=name)) == 1


def test_nothing_is_wrong() -> None:
    assert problems() == []
    assert problems(nginx_admin_paths=["/metrics"], nginx_admin_networks=["10.0.0.0/8", "fd77::1"]) == []
    assert problems(nginx_drained=["[fd77::1]:8000"]) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"nginx_server_aliases": ["*.example.test"]}, "nginx_server_aliases has '*.example.test'"),
        ({"nginx_server_aliases": ["10.0.0.1"]}, "nginx_server_aliases has '10.0.0.1'"),
        ({"nginx_server_aliases": ["GW.example.test"]}, "a name twice"),
        ({"nginx_backends": []}, "nginx_backends is empty"),
        ({"nginx_backends": [{"model": "a", "servers": []}]}, "no servers for the model 'a'"),
        ({"nginx_backends": [{"model": 'a"$', "servers": ["h:1"]}]}, "model 'a\"$'"),
        ({"nginx_backends": [{"model": "a", "servers": ["h:1"]}] * 2}, "twice"),
        ({"nginx_backends": [{"model": "a", "servers": ["h"]}]}, "'h'"),
        ({"nginx_backends": [{"model": "a", "servers": ["h:65536"]}]}, "'h:65536'"),
        ({"nginx_backends": [{"model": "a", "servers": ["fd77::1:8000;"]}]}, "[address]:port"),
        ({"nginx_keys": []}, "nginx_keys is empty"),
        ({"nginx_keys": [{"name": "a b", "key": SECRET}]}, "nginx_keys[0].name is 'a b'"),
        ({"nginx_keys": [{"name": "a"}]}, "either key or sha256"),
        ({"nginx_keys": [{"name": "a", "key": SECRET, "sha256": HASH}]}, "either key or sha256"),
        ({"nginx_keys": [{"name": "a", "sha256": HASH[1:]}]}, "nginx_keys[0].sha256 must have 64"),
        (
            {"nginx_keys": [{"name": "a", "key": SECRET}, {"name": "b", "sha256": HASH.upper()}]},
            "nginx_keys[1] has the same key as nginx_keys[0]",
        ),
        ({"nginx_drained": ["gpu-1:2"]}, "nginx_drained has 'gpu-1:2'"),
        ({"nginx_admin_paths": ["/metrics"]}, "nginx_admin_networks is empty"),
        (
            {"nginx_admin_paths": ["/key"], "nginx_admin_networks": ["10.0.0.1"], "nginx_forward_key": True},
            "nginx_admin_paths is ['/key'], which with tenants",
        ),
        ({"nginx_admin_paths": ["/v1/models"], "nginx_admin_networks": ["10.0.0.1"]}, "decide for one"),
        ({"nginx_admin_networks": ["10.0.0.1/8"]}, "'10.0.0.1/8'"),
        ({"nginx_allowed_paths": ["/.llmfleet/1"]}, "uses itself"),
        ({"nginx_requests_per_second": 0}, "nginx_requests_per_second is 0: use at least 1 request"),
        ({"nginx_hsts_seconds": -1}, "nginx_hsts_seconds is -1"),
        ({"nginx_http_port": 0}, "nginx_http_port is 0"),
        ({"nginx_https_port": 80}, "both 80"),
        ({"nginx_allowed_paths": []}, "nginx_allowed_paths is empty"),
        ({"nginx_allowed_paths": ["/v1/../x"]}, "'/v1/../x'"),
        ({"nginx_allowed_paths": ["/v1/"]}, "'/v1/'"),
        ({"nginx_allowed_paths": ["/v1", "/v1"]}, "twice"),
        ({"nginx_api_keys": [SECRET]}, "nginx_api_keys is now nginx_keys"),
        ({"nginx_keys": [{"name": "a", "key": 12345678901234567890}]}, "nginx_keys[0].key is no text"),
        ({"nginx_keys": [{"name": 7, "key": SECRET}]}, "nginx_keys[0].name is no text"),
        ({"nginx_keys": [{"name": "a", "sha256": 7}]}, "nginx_keys[0].sha256 is no text"),
        ({"nginx_keys": [{"name": None, "key": SECRET}]}, "nginx_keys[0].name is None"),
        ({"nginx_backend_key": 12345678901234567890}, "nginx_backend_key is no text"),
        ({"nginx_max_body_size": "1g"}, "'1g'"),
        ({"nginx_read_timeout": 0}, "at least 1 second"),
    ],
)
def test_each_problem_is_named(changes: dict[str, Any], says: str) -> None:
    found = problems(**changes)
    assert len(found) == 1
    assert says in found[0]


@pytest.mark.parametrize("key", ["", "short", SECRET + '"', SECRET + "\n", SECRET + " ", SECRET + "$x"])
def test_a_bad_key_is_named_and_not_shown(key: str) -> None:
    (found,) = problems(nginx_keys=[{"name": "a", "key": SECRET}, {"name": "b", "key": key}])
    assert found.startswith("nginx_keys[1].key ")
    assert SECRET not in found
    assert "short" not in found
    (found,) = problems(nginx_backend_key=key)
    assert found.startswith("nginx_backend_key ")
    assert SECRET not in found
