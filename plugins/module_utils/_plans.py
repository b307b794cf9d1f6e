# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: what the role vllm asks of model_info and engine_plan.

Pure: no Ansible import, no file or network access. Runs on the controller.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ansible_collections.llmfleet.serving.plugins.module_utils import _models

MODELS_DIR = _models.MODELS_DIR
CONFIG_DIR = "/etc/vllm"


def lookups(models: Sequence[Mapping[str, Any]], endpoint: str, asker: str) -> list[dict[str, str]]:
    """What has to be looked up of a host's models and their variants, each once.

    ``where`` says who can see it: the hub and the controller's folders once for all hosts that ask for the same,
    which have the same ``key`` then; a host's folders only the host itself.
    """
    found = [
        _lookup(each, endpoint, asker, _models.is_copied(model))
        for model in models
        for each in (model, *(model.get("variants") or ()))
    ]
    return list({each["key"]: each for each in found}.values())


def _lookup(model: Mapping[str, Any], endpoint: str, asker: str, copied: bool) -> dict[str, str]:
    source = str(model["source"])
    if not _models.is_folder(source):
        revision = str(model.get("revision") or "main")
        where = f" from {endpoint}" if endpoint else ""
        return {
            "key": f"{source} at {revision}{where}",
            "where": "hub",
            "source": source,
            "revision": revision,
            "path": "",
            "endpoint": endpoint,
            "asker": asker,
        }
    place = "the controller" if copied else asker
    return {
        "key": f"{source} on {place}",
        "where": "controller" if copied else "host",
        "source": "",
        "revision": "",
        "path": source,
        "endpoint": "",
        "asker": asker,
    }


def _place(lookup: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(lookup[key] for key in ("where", "source", "revision", "path"))


def plan_request(
    models: Sequence[Mapping[str, Any]],
    looked_up: Sequence[Mapping[str, Any]],
    host: Mapping[str, Any],
    environment: Mapping[str, Any],
    install_bytes: int,
) -> dict[str, Any]:
    """``models``, ``host`` and ``previous`` as engine_plan takes them.

    ``looked_up`` are model_info's results for the lookups of this host, each with its ``item``.
    ``host`` is what vllm_host_info returned.
    """
    documents = {_place(each["item"]): each["model"] for each in looked_up}

    def document(model: Mapping[str, Any], copied: bool) -> dict[str, Any]:
        """With the revision that the inventory names: a branch that moves on is no reason to restart an engine."""
        asked = _lookup(model, "", "", copied)
        return {**documents[_place(asked)], "revision": asked["revision"] or None}

    wishes = []
    for model in models:
        copied = _models.is_copied(model)
        seen = {**environment, **(model.get("environment") or {})}.get("CUDA_VISIBLE_DEVICES")
        wish = {
            "name": model["name"],
            "model": document(model, copied),
            "variants": [document(variant, copied) for variant in model.get("variants") or ()],
            "flags": dict(model.get("flags") or {}),
            # Nothing else of it, for it may hold secrets.
            "environment": {} if seen is None else {"CUDA_VISIBLE_DEVICES": str(seen)},
        }
        wish.update({key: int(model[key]) for key in ("users", "context") if model.get(key)})
        wishes.append(wish)
    return {
        "models": wishes,
        "host": _room(models, [wish["model"] for wish in wishes], host, int(install_bytes)),
        "previous": {model["name"]: plan for model in models if (plan := _stored(host, model["name"]))},
    }


def _room(
    models: Sequence[Mapping[str, Any]],
    documents: Sequence[Mapping[str, Any]],
    host: Mapping[str, Any],
    install_bytes: int,
) -> dict[str, int]:
    """What the host has for these models besides GPUs, in bytes.

    Memory and /dev/shm are told whole, for the engines that run hold some of them. What of the models is already
    there counts as room on the disk, for a plan asks for room for all of its files.
    """
    disk = host["disks"][MODELS_DIR]
    free = disk["free_bytes"] + sum(
        file_bytes(document) for model, document in zip(models, documents, strict=True) if _in_place(model, host)
    )
    together = any(path != MODELS_DIR and other["device"] == disk["device"] for path, other in host["disks"].items())
    return {
        "ram_bytes": host["memory_bytes"],
        "shm_bytes": host["shm_bytes"],
        "disk_bytes": max(0, free - (install_bytes if together else 0)),
    }


def file_bytes(document: Mapping[str, Any]) -> int:
    return sum(int(file["bytes"]) for file in document.get("files") or ())


def _in_place(model: Mapping[str, Any], host: Mapping[str, Any]) -> bool:
    """Whether the host has the model's files: a hub model once it is whole, a folder once it has a config."""
    path = _models.model_path(model)
    marker = "config.json" if _models.is_folder(str(model["source"])) else ".complete"
    return host["files"].get(f"{path}/{marker}") is not None


def _stored(host: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The plan that the host runs; empty where there is none, or a file that somebody has spoilt."""
    try:
        plan = json.loads(host["files"].get(f"{CONFIG_DIR}/{name}.plan.json") or "{}")
    except ValueError:
        return {}
    return plan if isinstance(plan, dict) else {}
