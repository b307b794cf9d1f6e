# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""What the role asks of model_info and engine_plan for an engine host."""

from __future__ import annotations

import json
from typing import Any

import pytest
from ansible_collections.llmfleet.serving.plugins.module_utils import _plans

MODELS_DIR = "/var/lib/vllm/models"
HUB = {"name": "hub", "source": "org/big", "users": 8, "context": 4096, "flags": {"seed": 1}}
COPIED = {"name": "copied", "source": "/home/me/tiny", "copy": True}
LOCAL = {"name": "local", "source": "/srv/tiny"}


def keys(*models: dict[str, Any], endpoint: str = "", asker: str = "gpu1") -> list[str]:
    return [each["key"] for each in _plans.lookups(models, endpoint, asker)]


def test_each_source_is_looked_up_where_it_lies() -> None:
    found = _plans.lookups([HUB, COPIED, LOCAL], "", "gpu1")
    assert [(each["where"], each["source"], each["revision"], each["path"]) for each in found] == [
        ("hub", "org/big", "main", ""),
        ("controller", "", "", "/home/me/tiny"),
        ("host", "", "", "/srv/tiny"),
    ]


def test_what_two_hosts_ask_for_alike_has_one_key() -> None:
    assert keys(HUB, COPIED) == keys(HUB, COPIED, asker="gpu2")
    assert keys(LOCAL) != keys(LOCAL, asker="gpu2"), "each host has folders of its own"
    assert keys(HUB) != keys(HUB, endpoint="http://mirror")
    assert keys(HUB) != keys({**HUB, "revision": "v1"})
    assert keys(HUB) == keys({**HUB, "revision": "main"})
    assert keys({**LOCAL, "source": "/home/me/tiny"}) != keys(COPIED)


def test_models_and_variants_are_looked_up_once() -> None:
    variants = [{"source": "org/big-AWQ"}, {"source": "org/big-FP8", "revision": "v1"}]
    both = [{**HUB, "variants": variants}, {"name": "again", "source": "org/big", "variants": variants[:1]}]
    assert keys(*both) == ["org/big at main", "org/big-AWQ at main", "org/big-FP8 at v1"]
    assert keys({**COPIED, "variants": [{"source": "/home/me/awq"}]}) == [
        "/home/me/tiny on the controller",
        "/home/me/awq on the controller",
    ]


def host(**changes: Any) -> dict[str, Any]:
    disks = {"/opt/vllm": {"free_bytes": 100, "device": 1}, MODELS_DIR: {"free_bytes": 100, "device": 1}}
    return {"disks": disks, "files": {}, "memory_bytes": 7, "shm_bytes": 6, **changes}


def request(*models: dict[str, Any], install_bytes: int = 0, **changes: Any) -> dict[str, Any]:
    environment = changes.pop("environment", {})
    looked_up = [
        {
            "item": item,
            "model": {"source": item["source"] or item["path"], "revision": "c0ffee", "files": [{"bytes": 30}]},
        }
        for item in _plans.lookups(models, "http://mirror", "gpu1")
    ]
    return _plans.plan_request(models, looked_up, host(**changes), environment, install_bytes)


def test_wishes_are_what_the_inventory_says_with_what_was_looked_up() -> None:
    asked = request({**HUB, "variants": [{"source": "org/big-AWQ"}]}, LOCAL)["models"]
    assert asked == [
        {
            "name": "hub",
            "model": {"source": "org/big", "revision": "main", "files": [{"bytes": 30}]},
            "variants": [{"source": "org/big-AWQ", "revision": "main", "files": [{"bytes": 30}]}],
            "users": 8,
            "context": 4096,
            "flags": {"seed": 1},
            "environment": {},
        },
        {
            "name": "local",
            "model": {"source": "/srv/tiny", "revision": None, "files": [{"bytes": 30}]},
            "variants": [],
            "flags": {},
            "environment": {},
        },
    ]


def test_commit_that_a_branch_stands_for_is_not_in_a_wish() -> None:
    """The fingerprint of a plan has the revision in it, and somebody edits a README on the hub every day."""
    assert "c0ffee" not in json.dumps(request(HUB, COPIED, LOCAL))


def test_nothing_of_the_environment_but_the_gpus_is_handed_on() -> None:
    """Module arguments are logged; the environment can hold secrets."""
    environment = {"CUDA_VISIBLE_DEVICES": "0,1", "TOKEN": "hidden"}
    own = {**LOCAL, "environment": {"CUDA_VISIBLE_DEVICES": 1, "OTHER": "hidden"}}
    asked = request(HUB, own, environment=environment)
    assert [each["environment"] for each in asked["models"]] == [
        {"CUDA_VISIBLE_DEVICES": "0,1"},
        {"CUDA_VISIBLE_DEVICES": "1"},
    ]
    assert "hidden" not in json.dumps(asked)


HUB_FOLDER = f"{MODELS_DIR}/org--big@main"


@pytest.mark.parametrize(
    ("model", "files", "disk_bytes"),
    [
        (HUB, {}, 100),
        (HUB, {f"{HUB_FOLDER}/config.json": "{}"}, 100),  # a download that was cut short
        (HUB, {f"{HUB_FOLDER}/config.json": "{}", f"{HUB_FOLDER}/.complete": "x"}, 130),
        (COPIED, {}, 100),
        (COPIED, {f"{MODELS_DIR}/copied/config.json": "{}"}, 130),
        (LOCAL, {"/srv/tiny/config.json": "{}"}, 130),
    ],
)
def test_files_in_place_count_as_room(model: dict[str, Any], files: dict[str, str], disk_bytes: int) -> None:
    """A plan asks for room for all files of its model, there or not."""
    assert request(model, files=files)["host"] == {"ram_bytes": 7, "shm_bytes": 6, "disk_bytes": disk_bytes}


def test_vllm_itself_takes_room_where_it_shares_the_disk() -> None:
    apart = host()["disks"]
    apart["/opt/vllm"]["device"] = 2
    assert request(HUB, install_bytes=40)["host"]["disk_bytes"] == 60
    assert request(HUB, install_bytes=400)["host"]["disk_bytes"] == 0
    assert request(HUB, install_bytes=40, disks=apart)["host"]["disk_bytes"] == 100


@pytest.mark.parametrize("text", [None, "", "{", "[]", "null", "7"])
def test_stored_plan_that_is_none(text: str | None) -> None:
    assert request(HUB, files={"/etc/vllm/hub.plan.json": text})["previous"] == {}


def test_stored_plans_are_handed_back() -> None:
    files = {"/etc/vllm/hub.plan.json": '{"fingerprint": "1"}', "/etc/vllm/gone.plan.json": '{"fingerprint": "2"}'}
    assert request(HUB, LOCAL, files=files)["previous"] == {"hub": {"fingerprint": "1"}}
