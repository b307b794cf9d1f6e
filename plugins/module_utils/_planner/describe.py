# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: a plan as a document, with the reason for each flag that was chosen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from . import kv_cache, overhead, support
from .search import Try, count, guard, spare_bytes
from .units import GIB, gib
from .wish import Wish


def document(found: Try) -> dict[str, Any]:
    """The plan as engine_plan returns it."""
    setting, split, wish = found.setting, found.split, found.task.wish
    flags: dict[str, Any] = {
        "max_model_len": found.max_model_len,
        "max_num_seqs": setting.max_num_seqs,
        "max_num_batched_tokens": setting.max_num_batched_tokens,
        "gpu_memory_utilization": found.utilization,
        "dtype": setting.dtype,
        "kv_cache_dtype": setting.kv_cache_dtype,
    }
    if split.tensor > 1:
        flags["tensor_parallel_size"] = split.tensor
    if split.pipeline > 1:
        flags["pipeline_parallel_size"] = split.pipeline
    if split.expert_parallel:
        flags["enable_expert_parallel"] = True
    if setting.enforce_eager:
        flags["enforce_eager"] = True
    if found.share:
        flags["kv_cache_memory_bytes"] = found.share
    flags.update(wish.flags)
    cached = kv_cache.needed(found.layouts)
    return {
        "name": wish.name,
        "gpus": [gpu.index for gpu in found.gpus],
        "flags": flags,
        "environment": {
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "CUDA_VISIBLE_DEVICES": ",".join(gpu.uuid if gpu.mig else str(gpu.index) for gpu in found.gpus),
        },
        "memory": [_memory(found, place) for place in range(split.gpus)],
        "kv_cache_tokens": found.tokens if cached else 0,
        "max_concurrency": round(found.concurrency, 2) if cached else None,
        "users": wish.users,
        "context": wish.context,
        "host": overhead.host_needs(setting, found.task.model.document),
        "engine_version": found.task.engine.text,
        "model": {
            "source": found.task.model.source,
            "revision": found.task.model.document.get("revision"),
            "architecture": found.task.model.architecture.name,
            "parameters": found.task.model.document.get("parameters"),
        },
        "reasons": list(_reasons(found)),
        "warnings": list(_warnings(found)),
    }


def _memory(found: Try, place: int) -> dict[str, int]:
    gpu, rank = found.gpus[place], found.rank_of(place)
    cache = found.available[place // found.split.tensor]
    row = {
        "gpu": gpu.index,
        "total_bytes": gpu.total_bytes,
        "context_bytes": rank.context_bytes,
        "weights_bytes": rank.weights_bytes,
        "activation_bytes": rank.activation_bytes,
        "non_torch_bytes": rank.non_torch_bytes,
        "cudagraph_bytes": rank.cudagraph_bytes,
        "unaccounted_bytes": rank.unaccounted_bytes,
        "kv_cache_bytes": cache,
    }
    row["other_bytes"] = gpu.total_bytes - gpu.free_bytes
    row["spare_bytes"] = spare_bytes(found, place)
    return row


def _reasons(found: Try) -> Iterator[str]:
    setting, wish, gpu = found.setting, found.task.wish, found.gpus[0]
    flags = wish.flags
    given = {"tensor_parallel_size", "pipeline_parallel_size"} & {*flags}
    what = "as its flags say; they" if given else "the fewest that"
    yield f"{count(found.split.gpus, 'GPU')}, {found.split}: {what} {_carried(wish)}."
    if found.share:
        yield (
            f"kv_cache_memory_bytes {found.share}: the GPU is shared, and with a fixed size it does not matter which "
            f"instance starts first; gpu_memory_utilization {found.utilization} is this instance's part."
        )
    elif "gpu_memory_utilization" not in flags and "kv_cache_memory_bytes" not in flags:
        rank = max(found.ranks, key=lambda each: each.context_bytes + each.unaccounted_bytes)
        yield (
            f"gpu_memory_utilization {found.utilization}: {gib(gpu.free_bytes)} of {gib(gpu.total_bytes)} are free; "
            f"vLLM counts neither its CUDA context ({gib(rank.context_bytes)}) nor {gib(rank.unaccounted_bytes)} that "
            f"it allocates afterwards; {gib(guard(gpu.total_bytes))} stay free."
        )
    default_tokens, default_seqs = support.default_batch(
        setting.version, gpu.total_bytes, gpu.name, gpu.compute_capability
    )
    if setting.max_num_batched_tokens < default_tokens and "max_num_batched_tokens" not in flags:
        yield (
            f"max_num_batched_tokens {setting.max_num_batched_tokens} and not vLLM's default of {default_tokens}: "
            "with it the KV cache would be too small."
        )
    if "max_num_seqs" not in flags:
        said = "as many as users" if wish.users else "no users are declared"
        yield f"max_num_seqs {setting.max_num_seqs}: {said}; vLLM's default is {default_seqs}, and each takes memory."
    if wish.context is None and "max_model_len" not in flags:
        longest = found.task.model.architecture.max_position_embeddings
        why = "the model's own" if found.max_model_len == longest else f"as long as fits; the model's own is {longest}"
        yield f"max_model_len {found.max_model_len}: no context is declared; {why}."
    if setting.enforce_eager and "enforce_eager" not in flags:
        yield "enforce_eager: only without CUDA graphs is there enough room; answers come more slowly."


def _carried(wish: Wish) -> str:
    users = count(wish.users, "user") if wish.users else "one request"
    return f"carry {users}" + (f" of {wish.context} tokens each" if wish.context else "")


def _warnings(found: Try) -> Iterator[str]:
    if found.task.engine.warning:
        yield found.task.engine.warning
    if found.setting.enforce_eager and "enforce_eager" not in found.task.wish.flags:
        yield "CUDA graphs are off, for they do not fit: fewer users, a shorter context or another GPU bring them back."
    for gpu in found.gpus:
        held = gpu.total_bytes - gpu.free_bytes
        if held > GIB:
            yield f"GPU {gpu.index} is shared: {gib(held)} of {gib(gpu.total_bytes)} are held by others."
