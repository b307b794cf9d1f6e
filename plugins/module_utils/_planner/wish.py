# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: what the planner is asked: GPUs, a model for users at a context, fixed flags.

From the documents that Ansible hands on to checked dataclasses. Each problem names variable, value and remedy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from .errors import PlanError

# As vLLM's command line takes numbers: vllm/engine/arg_utils.py human_readable_int, 0.32.0.
HUMAN = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)([kKmMgG]?)")
SUFFIX = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
MOST = 1 << 50  # a petabyte, or as many tokens: more is a slip of the pen
MOST_SAID = 60  # characters of a wrong value in a message
# Flags that take memory which no formula here counts. Going on would be a guess.
UNCOUNTED = (
    "speculative_config",
    "enable_lora",
    "data_parallel_size",
    "cpu_offload_gb",
    "kv_transfer_config",
    "enable_sleep_mode",
    "num_gpu_blocks_override",
    "compilation_config",
    "cudagraph_capture_sizes",
    "decode_context_parallel_size",
    "enable_dbo",
    "enable_eplb",
    "hf_overrides",
    "hf_config_path",
    "prefill_context_parallel_size",
    "mamba_block_size",
    "mamba_cache_dtype",
    "mamba_cache_mode",
    "mamba_ssm_cache_dtype",
    "max_cudagraph_capture_size",
    "performance_mode",
)
OFF = ("", "0", "auto", "balanced", "false", "none", "{}", "[]")  # such a flag as if it were not there
# What vLLM writes in two ways.
SAME_FLAG = {"kv_cache_memory": "kv_cache_memory_bytes"}
DTYPES = {"auto": "auto", "half": "float16", "float16": "float16", "bfloat16": "bfloat16", "float": "float32"}
DTYPES["float32"] = "float32"


@dataclass(frozen=True)
class Gpu:
    """One device that vLLM can use: a card, or a MIG instance of one. Bytes are those that CUDA reports."""

    index: int
    uuid: str
    name: str
    total_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int]
    nvlink: frozenset[int] = frozenset()
    mig: bool = False


@dataclass(frozen=True)
class Host:
    """What an engine takes of a host besides GPUs, in bytes; None where it is not known, and then not checked."""

    ram_bytes: int | None = None
    shm_bytes: int | None = None
    disk_bytes: int | None = None


@dataclass(frozen=True)
class Wish:
    """A model for so many users at so long a context, and flags that are not to change."""

    name: str
    model: Mapping[str, Any]
    users: int | None = None
    context: int | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    variants: Sequence[Mapping[str, Any]] = ()
    visible: frozenset[str] | None = None


def gpus(documents: Sequence[Mapping[str, Any]], own_unit: str = "") -> tuple[Gpu, ...]:
    """The devices of ``gpu_info`` that an engine can use. What processes of ``own_unit``\\ * hold counts as free.

    A card that is cut into MIG instances is left out, its instances are taken in its place.
    """
    found: list[Gpu] = []
    for place, document in enumerate(documents):
        try:
            if not _unusable(document):
                found += _devices(document, own_unit)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise PlanError(
                f"gpus[{place}] is not as gpu_info returns it ({type(error).__name__}: {error}): "
                "hand its answer on unchanged."
            ) from None
    return tuple(gpu for gpu in found if gpu.total_bytes > 0)


def _devices(document: Mapping[str, Any], own_unit: str) -> Iterator[Gpu]:
    major, _, minor = str(document["compute_capability"]).partition(".")
    common = {
        "index": int(document["index"]),
        "name": str(document["name"]),
        "compute_capability": (int(major), int(minor or 0)),
    }
    mig = document.get("mig") or {}
    if mig.get("enabled"):
        for part in mig.get("instances") or ():
            if part.get("memory_total_bytes") and part.get("memory_free_bytes") is not None:
                yield Gpu(uuid=str(part["uuid"]), mig=True, **_sizes(part, 0), **common)
        return
    ours = sum(
        int(process.get("memory_bytes") or 0)
        for process in document.get("processes") or ()
        if own_unit and str(process.get("unit") or "").startswith(own_unit)
    )
    nvlink = frozenset(int(peer) for peer in document.get("nvlink") or ())
    yield Gpu(uuid=str(document["uuid"]), nvlink=nvlink, **_sizes(document, ours), **common)


def _sizes(document: Mapping[str, Any], ours: int) -> dict[str, int]:
    total = int(document["memory_total_bytes"])
    return {"total_bytes": total, "free_bytes": max(0, min(total, int(document["memory_free_bytes"]) + ours))}


def _unusable(document: Mapping[str, Any]) -> str:
    """Why the planner cannot use a GPU, with the remedy; nothing if it can."""
    vendor = document.get("vendor") or "nvidia"
    if vendor != "nvidia":
        return f"is from {vendor}, and the planner knows NVIDIA's alone: set vllm_plan: false for this host"
    if document.get("problem"):
        return f"cannot be used: {str(document['problem']).rstrip('.')}"
    sizes = (document, *((document.get("mig") or {}).get("instances") or ()))
    sized = any(each.get("memory_total_bytes") and each.get("memory_free_bytes") is not None for each in sizes)
    if document.get("index") is None or not document.get("compute_capability") or not sized:
        return "is not seen by a driver: install NVIDIA's, or set vllm_plan: false for this host"
    return ""


def without_gpus(documents: Sequence[Mapping[str, Any]]) -> str:
    """Why a host has no GPU to plan for, each with the remedy."""
    said = [f"{each.get('name') or 'a GPU'} {why}" for each in documents if (why := _unusable(each))]
    return "; ".join(dict.fromkeys(said)) or (
        "this host has no GPU that the planner can use: install NVIDIA's driver if it has one, "
        "or set vllm_platform: cpu or vllm_plan: false for it"
    )


def visible(devices: Sequence[Gpu], wanted: frozenset[str] | None) -> tuple[Gpu, ...]:
    """Those that CUDA_VISIBLE_DEVICES names, by index or by (the beginning of) the uuid."""
    if wanted is None:
        return tuple(devices)
    if not wanted:
        raise PlanError("environment.CUDA_VISIBLE_DEVICES is empty, which hides all GPUs: name some, or leave it out.")
    chosen: list[Gpu] = []
    for name in sorted(wanted):
        matching = [gpu for gpu in devices if _named(gpu, name)]
        if not matching:
            there = ", ".join(gpu.uuid if gpu.mig else str(gpu.index) for gpu in devices) or "none"
            raise PlanError(
                f"environment.CUDA_VISIBLE_DEVICES has {name!r}, but this host has {there}: name one of these."
            )
        chosen += (gpu for gpu in matching if gpu not in chosen)
    return tuple(sorted(chosen, key=lambda gpu: gpu.index))


def _named(gpu: Gpu, name: str) -> bool:
    return (name == str(gpu.index) and not gpu.mig) or (len(name) > 4 and gpu.uuid.startswith(name))


def number(name: str, value: Any, least: int = 1) -> int:
    """A whole number as vLLM's command line takes it: 16384, "16384", "16k" (16000) or "16K" (16384)."""
    match = HUMAN.fullmatch(str(value).strip()) if not isinstance(value, bool) else None
    result = Fraction(match[1]) * SUFFIX[match[2]] if match else Fraction(-1)
    if not least <= result <= MOST or result.denominator != 1:
        raise PlanError(f"{name} is {_short(value)}: give a whole number of at least {least}.")
    return int(result)


def _short(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= MOST_SAID else f"{said[:MOST_SAID]}..."


def fraction(name: str, value: Any) -> float:
    try:
        result = -1.0 if isinstance(value, bool) else float(value)
    except (OverflowError, TypeError, ValueError):
        result = -1.0
    if not 0 < result <= 1:
        raise PlanError(f"{name} is {_short(value)}: give a number above 0 and at most 1.")
    return result


def truth(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    raise PlanError(f"{name} is {_short(value)}: give true or false.")


def dtype(name: str, value: Any) -> str:
    if str(value) not in DTYPES:
        raise PlanError(f"{name} is {_short(value)}: give one of {', '.join(sorted(DTYPES))}.")
    return DTYPES[str(value)]


CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "tensor_parallel_size": number,
    "pipeline_parallel_size": number,
    "max_num_seqs": number,
    "max_num_batched_tokens": number,
    "kv_cache_memory_bytes": number,
    "block_size": number,
    "gpu_memory_utilization": fraction,
    "enforce_eager": truth,
    "enable_expert_parallel": truth,
    "enable_prefix_caching": truth,
    "async_scheduling": truth,
    "disable_hybrid_kv_cache_manager": truth,
    "enable_chunked_prefill": truth,
    "language_model_only": truth,
    "dtype": dtype,
    "kv_cache_dtype": lambda name, value: str(value),
    "quantization": lambda name, value: str(value),
}


def flags(given: Mapping[str, Any]) -> dict[str, Any]:
    """The flags under vLLM's names with ``_``, those that the plan depends on checked and as numbers."""
    found: dict[str, Any] = {}
    for spelled, value in given.items():
        name = str(spelled).replace("-", "_")
        name = SAME_FLAG.get(name, name)
        off = (*OFF, "1") if name.endswith("_size") else OFF
        if name in UNCOUNTED and str(value).lower() not in off:
            raise PlanError(
                f"flags.{name} is {_short(value)}, and the planner does not count the memory that it takes: "
                "take it out, or set vllm_plan: false to run this host's models by hand-made flags alone."
            )
        if name == "max_model_len" and str(value) in ("auto", "-1"):
            continue
        check = number if name == "max_model_len" else CHECKS.get(name)
        found[name] = check(f"flags.{name}", value) if check else value
    return found


def wish(document: Mapping[str, Any], variable: str = "vllm_models[]") -> Wish:
    """A wish from ``{name, model, users, context, flags, variants, environment}``; None stands for not said."""
    try:
        model = document.get("model")
        if not isinstance(model, Mapping) or not isinstance(model.get("config"), Mapping):
            raise PlanError("model has no config: hand on what model_info returned as model.")
        fixed = flags(document.get("flags") or {})
        context, users = document.get("context"), document.get("users")
        devices = (document.get("environment") or {}).get("CUDA_VISIBLE_DEVICES")
        context = None if context is None else number("context", context)
        users = None if users is None else number("users", users)
        for ours, asked, flag in (("context", context, "max_model_len"), ("users", users, "max_num_seqs")):
            if asked and asked > fixed.get(flag, asked):
                raise PlanError(f"{ours} is {asked}, and flags.{flag} is {fixed[flag]}: both mean one thing, keep one.")
        return Wish(
            name=str(document.get("name") or model.get("source") or "model"),
            model=model,
            users=users,
            context=context,
            flags=fixed,
            variants=tuple(document.get("variants") or ()),
            visible=None if devices is None else frozenset(filter(None, re.split(r"[,\s]+", str(devices)))),
        )
    except PlanError as error:
        raise type(error)(f"{variable}.{error}") from None
