# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: from the inventory's ``vllm_models`` to instances, and what is wrong with them.

Pure: no Ansible import; the one look at files goes through a function that the caller gives. Runs on the controller.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from ansible_collections.llmfleet.serving.plugins.module_utils._names import MAX_PORT
from ansible_collections.llmfleet.serving.plugins.module_utils._values import switch
from packaging.version import InvalidVersion, Version

MODELS_DIR = "/var/lib/vllm/models"
# What a systemd instance name, a file name and an nginx upstream can all hold unescaped.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
# As the hub has them; it allows no "--", which stands for "/" in the names of our folders.
HUB_ID = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
REVISION = re.compile(r"(?!.*(--|\.\.|/\.|//|/$))[A-Za-z0-9_][A-Za-z0-9._/-]{0,127}")
ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# The unit's ProtectHome= and PrivateTmp= hide these from the engine.
HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108 - named, not written to
# Flags that the role sets, and what to use in their place.
OWNED = {
    "model": "source",
    "revision": "revision",
    "served-model-name": "name",
    "host": "vllm_host",
    "port": "port",
    "api-key": "vllm_api_key",
    "shutdown-timeout": "vllm_shutdown_timeout",
    "config": "flags",
    "hf-token": "vllm_hf_token",
}
FLOOR = Version("0.22.0")  # below it the API key can be bypassed: CVE-2026-48746
ADVISED = Version("0.32.0")  # the last of the known denial-of-service fixes: PYSEC-2026-4344


def flag(name: str) -> str:
    """vLLM takes max_model_len and max-model-len; its config file wants the latter."""
    return str(name).replace("_", "-")


def is_folder(source: str) -> bool:
    return source.startswith("/")


def is_copied(model: Mapping[str, Any]) -> bool:
    return bool(switch(model.get("copy")))


def model_path(model: Mapping[str, Any]) -> str:
    """Where the model's files lie on the engine host.

    A hub model has a folder per revision, so that another revision never overwrites files that are in use.
    """
    source = model["source"]
    if is_copied(model):
        return f"{MODELS_DIR}/{model['name']}"
    if is_folder(source):
        return source
    return f"{MODELS_DIR}/" + f"{source}@{model.get('revision') or 'main'}".replace("/", "--")


def instances(
    models: Sequence[Mapping[str, Any]],
    host: str,
    port: int,
    shutdown_timeout: int,
    plans: Sequence[Mapping[str, Any]] = (),
) -> list[dict[str, Any]]:
    """One instance for each model: where it listens, what it runs from, and vLLM's own config for it.

    ``plans`` are what engine_plan returned. A plan has been made from ``context`` and ``users``, so its flags count
    more than these; the model's own flags, which it has been made from as well, come last as they are written.
    """
    planned = {answer["name"]: answer.get("plan") or {} for answer in plans}
    found = []
    for model, number in zip(models, _ports(models, int(port)), strict=True):
        config: dict[str, Any] = {
            "model": model_path(model),
            "served-model-name": model["name"],
            "host": host,
            "port": number,
            "shutdown-timeout": int(shutdown_timeout),
        }
        if model.get("context"):
            config["max-model-len"] = int(model["context"])
        if model.get("users"):
            config["max-num-seqs"] = int(model["users"])
        plan = planned.get(model["name"]) or {}
        # In an order of their own, so that a plan that has been stored gives the same file.
        config.update({flag(name): value for name, value in sorted((plan.get("flags") or {}).items())})
        own = {flag(name): value for name, value in (model.get("flags") or {}).items()}
        if plan and str(own.get("max-model-len")) in ("auto", "-1"):
            del own["max-model-len"]  # the plan has found out how long it can be
        config.update(own)
        found.append(
            {
                "name": model["name"],
                "host": host,
                "port": number,
                "path": config["model"],
                "hub": "" if is_folder(model["source"]) else model["source"],
                "revision": model.get("revision") or "main",
                "copy_from": model["source"] if is_copied(model) else "",
                "kind": "embedding" if config.get("runner") == "pooling" else "completion",
                "config": config,
                "plan": plan,
            }
        )
    return found


def backends(engines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What nginx_backends takes, from the ``vllm_instances`` of all engines: an entry a model, with its replicas."""
    engines = list(engines)
    if unknown := [str(engine.get("inventory_hostname")) for engine in engines if "vllm_instances" not in engine]:
        raise ValueError(
            f"A gateway has to know what runs on {', '.join(unknown)}: a run with --limit must include all engines."
        )
    found: dict[str, dict[str, Any]] = {}
    for instance in (each for engine in engines for each in engine["vllm_instances"]):
        host = f"[{instance['host']}]" if ":" in instance["host"] else instance["host"]
        entry = found.setdefault(
            instance["model"], {"model": instance["model"], "servers": [], "kind": instance["kind"]}
        )
        entry["servers"].append(f"{host}:{instance['port']}")
    return list(found.values())


def endpoints(found: Sequence[Mapping[str, Any]], clients: Sequence[str]) -> list[dict[str, Any]]:
    """What others may know of instances: no config and no environment, which can hold secrets."""
    return [
        {"model": each["name"], **{key: each[key] for key in ("host", "port", "kind")}, "clients": list(clients)}
        for each in found
    ]


def probes(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What vllm_ready takes."""
    return [{key: each[key] for key in ("name", "host", "port", "kind")} for each in found]


def watched(found: Sequence[Mapping[str, Any]], config_dir: str, common: Sequence[str]) -> list[dict[str, Any]]:
    """What vllm_instances takes: the files of each instance and those that all of them run from."""
    return [
        {
            "name": each["name"],
            "paths": [
                f"{config_dir}/{each['name']}.yaml",
                f"{config_dir}/{each['name']}.env",
                each["path"],
                *common,
            ],
        }
        for each in found
    ]


def model_problems(
    models: Sequence[Mapping[str, Any]], port: int, environment: Mapping[str, Any], is_file: Callable[[str], bool]
) -> list[str]:
    """What is wrong with ``vllm_models`` and ``vllm_environment``: each with the variable, the value and the remedy.

    ``is_file`` tells whether the controller has a file.
    """
    if not models:
        return ["vllm_models is empty: declare a model with a name and a source, or take the host out of engines."]
    return [
        *(f"vllm_{problem}" for problem in _environment_problems(environment)),
        *_shared("name", [str(model.get("name", "")) for model in models], "give each model a name of its own."),
        *_shared("port", _ports(models, port), "give each model a port of its own, or none of them one."),
        *(
            f"vllm_models[{index}].{problem}"
            for index, (model, number) in enumerate(zip(models, _ports(models, port), strict=True))
            for problem in _problems(model, number, is_file)
        ),
    ]


def _ports(models: Sequence[Mapping[str, Any]], port: int) -> list[int]:
    given = (model.get("port") for model in models)
    return [port + index if number is None else int(number) for index, number in enumerate(given)]


def _shared(what: str, values: Sequence[object], remedy: str) -> Iterator[str]:
    for index, value in enumerate(values):
        first = values.index(value)
        if first < index:
            yield f"vllm_models[{index}].{what} is {value!r}, as is vllm_models[{first}].{what}: {remedy}"


def _problems(model: Mapping[str, Any], port: int, is_file: Callable[[str], bool]) -> Iterator[str]:
    name = str(model.get("name", ""))
    if not NAME.fullmatch(name):
        yield f"name is {name!r}: use at most 63 letters, digits, '.', '_' and '-', a letter or digit first."
    if not 1024 <= port <= MAX_PORT:
        yield f"port is {port}: choose one from 1024 to {MAX_PORT}, for vLLM runs without privileges."
    for key in ("users", "context"):
        if model.get(key) is not None and int(model[key]) < 1:
            yield f"{key} is {model[key]}: give a number of at least 1."
    yield from _environment_problems(model.get("environment") or {})
    if is_folder(str(model.get("source", ""))):
        yield from _folder_problems(model, is_file)
    else:
        yield from _hub_problems(model)
    yield from _variant_problems(model)
    yield from _flag_problems(model)


def _environment_problems(environment: Mapping[str, Any]) -> Iterator[str]:
    for key in environment:
        if not ENVIRONMENT_NAME.fullmatch(str(key)):
            yield f"environment has {key!r}: that is no name of an environment variable."
        if key == "VLLM_API_KEY":
            yield "environment has 'VLLM_API_KEY', which the role sets: use vllm_api_key in its place."


def _folder_problems(model: Mapping[str, Any], is_file: Callable[[str], bool]) -> Iterator[str]:
    source = model["source"]
    if ".." in PurePosixPath(source).parts and not is_copied(model):
        yield f"source is {source!r}: give the folder's path without '..'."
    if model.get("revision"):
        yield f"revision is {model['revision']!r}, but source {source} is a folder: only a hub has revisions."
    if is_copied(model):
        if not is_file(f"{source}/config.json"):
            yield f"source is {source}, but the controller has no {source}/config.json: name the model's folder."
    elif any(PurePosixPath(source).is_relative_to(hidden) for hidden in HIDDEN):
        yield (
            f"source is {source}: the service does not see {', '.join(HIDDEN)}. "
            "Move the folder, to /srv/models for one, or set copy: true if it lies on the controller."
        )


def _hub_problems(model: Mapping[str, Any]) -> Iterator[str]:
    source, revision = str(model.get("source", "")), str(model.get("revision") or "main")
    if is_copied(model):
        yield f"copy is set, but source {source!r} is no absolute path: give that of a folder on the controller."
    elif not HUB_ID.fullmatch(source):
        yield f"source is {source!r}: give a hub id such as Qwen/Qwen3-8B, or the absolute path of a folder."
    if not REVISION.fullmatch(revision):
        yield f"revision is {revision!r}: give a commit, a tag or a branch."


def _variant_problems(model: Mapping[str, Any]) -> Iterator[str]:
    for index, variant in enumerate(model.get("variants") or ()):
        source = str(variant.get("source", ""))
        at = f"variants[{index}]"
        if is_folder(source):
            if variant.get("revision"):
                yield (
                    f"{at}.revision is {variant['revision']!r}, but source {source} is a folder: "
                    "only a hub has revisions."
                )
        else:
            yield from (f"{at}.{problem}" for problem in _hub_problems({**variant, "copy": False}))


def _flag_problems(model: Mapping[str, Any]) -> Iterator[str]:
    flags = model.get("flags") or {}
    spelled = [flag(name) for name in flags]
    for name, value in flags.items():
        if flag(name) in OWNED:
            yield f"flags.{name} is set by the role: use {OWNED[flag(name)]} in its place."
        if value is None:
            yield f"flags.{name} has no value: give it one, or leave it out."
        for ours, theirs in (("context", "max-model-len"), ("users", "max-num-seqs")):
            if flag(name) == theirs and model.get(ours):
                yield f"flags.{name} is {value}, and {ours} is {model[ours]}: both mean {theirs}; keep one of them."
    for name in sorted({name for name in spelled if spelled.count(name) > 1}):
        yield f"flags has {name} twice, with '-' and with '_': keep one of them."


def version_findings(
    version: str, vulnerabilities: Sequence[Mapping[str, str]], accepted: Sequence[str]
) -> dict[str, list[str]]:
    """``problems`` that stop a version from being installed, and ``warnings`` about one that may be."""
    try:
        wanted = Version(version)
    except InvalidVersion:
        return {
            "problems": [f"vllm_version is {version!r}: give a release such as {ADVISED}."],
            "warnings": [],
        }
    known = [entry for entry in vulnerabilities if wanted < Version(entry["fixed"])]
    open_ones = [entry for entry in known if entry["id"] not in accepted]
    listed = "; ".join(f"{entry['id']} ({entry['what']}, fixed in {entry['fixed']})" for entry in open_ones)
    if wanted < FLOOR and (open_ones or not known):
        ids = ", ".join(entry["id"] for entry in known)
        return {
            "problems": [
                f"vllm_version is {version}, below {FLOOR}, and has {listed or 'known holes'}. Use {ADVISED} or newer. "
                f"Who must run it all the same sets vllm_accept_known_vulnerabilities: [{ids}]."
            ],
            "warnings": [],
        }
    if open_ones:
        return {
            "problems": [],
            "warnings": [f"vllm_version is {version}, which has {listed}. Use {ADVISED} or newer."],
        }
    return {"problems": [], "warnings": []}


def host_problems(
    found: Sequence[Mapping[str, Any]],
    host: Mapping[str, Any],
    needs: Mapping[str, int],
    platform: str,
    driver_branch: int = 0,
) -> list[str]:
    """What one engine host lacks. ``found`` are its instances, ``host`` is what vllm_host_info returned.

    ``needs`` maps a folder to the bytes that are to be written below it; folders of one file system add up.
    ``driver_branch`` is the oldest NVIDIA driver that the engine's CUDA runs with, such as 580.
    """
    return [
        *_missing(found, host),
        *_disk_problems(host["disks"], needs),
        *(_driver_problems(host["nvidia_driver_version"], driver_branch) if platform == "cuda" else ()),
    ]


def _missing(found: Sequence[Mapping[str, Any]], host: Mapping[str, Any]) -> Iterator[str]:
    for index, each in enumerate(found):
        at, port, path = f"vllm_models[{index}]", each["port"], each["path"]
        if str(port) in host["taken_ports"]:
            taker = host["taken_ports"][str(port)]
            yield f"{at}.port is {port}, but {taker} listens there: choose another port, or stop that program."
        if not each["hub"] and not each["copy_from"] and host["files"].get(f"{path}/config.json") is None:
            yield (
                f"{at}.source is {path}, but this host has no {path}/config.json: "
                "name the model's folder, or set copy: true to copy it from the controller."
            )


def _disk_problems(disks: Mapping[str, Mapping[str, int]], needs: Mapping[str, int]) -> Iterator[str]:
    for device in {disks[path]["device"] for path in needs}:
        paths = [path for path in needs if needs[path] and disks[path]["device"] == device]
        needed = sum(needs[path] for path in paths)
        free = min((disks[path]["free_bytes"] for path in paths), default=0)
        if needed > free:
            yield (
                f"{' and '.join(paths)} need {gib(needed)} and have {gib(free)} free: make room, or mount a larger "
                "disk there. vllm_required_free_bytes is what the installation of vLLM counts for."
            )


def _driver_problems(version: str | None, branch: int) -> Iterator[str]:
    if not version:
        yield (
            "vllm_platform is cuda, but no NVIDIA driver is loaded on this host: install one and reboot, "
            "so that nvidia-smi lists the GPUs, or set vllm_platform: cpu."
        )
    elif int(version.partition(".")[0]) < branch:
        yield (
            f"The NVIDIA driver is {version}, but the torch that vLLM brings needs {branch} or newer: "
            "install such a driver, or set vllm_torch_backend to a CUDA version that it runs, such as cu129."
        )


def client_problems(host: str, clients: Sequence[str], gateways_elsewhere: Sequence[str]) -> list[str]:
    """Whether the gateways can reach this engine, and nobody else can."""
    return [*_host_problems(host, gateways_elsewhere), *_allowed_problems(clients, gateways_elsewhere)]


def _host_problems(host: str, gateways_elsewhere: Sequence[str]) -> Iterator[str]:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        yield f"vllm_host is {host!r}: give the IP address that vLLM is to listen on."
        return
    if address.is_unspecified:
        yield f"vllm_host is {host}, which is every address: give the one that the gateways reach this host at."
    if address.is_loopback and gateways_elsewhere:
        yield (
            f"vllm_host is {host}, but {', '.join(gateways_elsewhere)} must reach it from another host: "
            "set vllm_host to this host's private address."
        )


def _allowed_problems(clients: Sequence[str], gateways_elsewhere: Sequence[str]) -> Iterator[str]:
    if gateways_elsewhere and not clients:
        yield (
            f"vllm_allowed_clients is empty, but {', '.join(gateways_elsewhere)} must reach this host: "
            "set it to the gateways' addresses."
        )
    for client in clients:
        try:
            ipaddress.ip_network(client, strict=False)
        except ValueError:
            yield (
                f"vllm_allowed_clients has {client!r}: systemd's IPAddressAllow= takes addresses and networks, "
                "not names. Set vllm_allowed_clients to the gateways' addresses."
            )


def gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
