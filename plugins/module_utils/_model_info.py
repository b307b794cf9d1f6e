# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: the document that stands for a model, made of its checkpoint by the planner's arithmetic.

No Ansible import. It runs on bare hosts too: what needs the hub is in ``_hub``, which only the controller imports.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from ansible_collections.llmfleet.serving.plugins.module_utils._checkpoint import (
    Checkpoint,
    ModelError,
    Store,
    checkpoint,
)
from ansible_collections.llmfleet.serving.plugins.module_utils._planner import (
    architecture,
    kv_cache,
    search,
    weights,
)
from ansible_collections.llmfleet.serving.plugins.module_utils._planner.errors import PlanError, UnknownArchitecture

DTYPE = "bfloat16"  # of the cache that is described
NOTHING = {"parameters": None, "max_position_embeddings": None, "kv": None}


def look(store: Store, source: str, revision: str | None) -> tuple[dict[str, Any], str | None]:
    """The model document, and why the planner cannot compute what it leaves out, if it does.

    An architecture that the planner does not know is no error here: engine_plan refuses it, with what to do about it.
    """
    found = checkpoint(store)
    problem = None
    try:
        numbers = describe(found)
    except UnknownArchitecture as error:
        numbers, problem = unknown(found), str(error)
    except PlanError as error:
        raise ModelError(f"{store.what}: {error}; or set vllm_plan: false, to start it by its flags alone") from None
    document = {
        **numbers,
        "source": source,
        "revision": revision,
        "config": found.config,
        "tensors": found.tensors,
        "files": found.files,
    }
    return document, problem


def describe(found: Checkpoint) -> dict[str, Any]:
    """What the planner computes: the only place that calls it."""
    parsed = search.parse_model({"config": found.config})
    model, packed = parsed.architecture, parsed.quantization
    return {
        "architecture": model.name,
        "parameters": weights.parameters(model),
        "weights_bytes": weights.stored(model, packed) if found.weights_bytes is None else found.weights_bytes,
        "dtype": model.dtype,
        "quantization": packed.method if packed else None,
        "max_position_embeddings": model.max_position_embeddings,
        "kv": _kv(model.layers),
    }


def unknown(found: Checkpoint) -> dict[str, Any]:
    """What the files say by themselves."""
    config = found.config
    names = config.get("architectures")
    packed = config.get("quantization_config")
    dtype = config.get("dtype") or config.get("torch_dtype")
    return {
        **NOTHING,
        "architecture": str(names[0]) if isinstance(names, list) and names else None,
        "weights_bytes": found.weights_bytes,
        "dtype": str(dtype) if dtype else None,
        "quantization": packed.get("quant_method") if isinstance(packed, dict) else None,
    }


def _kv(layers: Sequence[architecture.Layer]) -> dict[str, Any]:
    """The cache of one token and of one request on one GPU, without vLLM's padding."""
    caches = [cache for layer in layers for cache in layer.caches if cache.kind != "encoder"]
    attention = [cache for cache in caches if isinstance(cache, architecture.Attention)]
    states = [cache for cache in caches if isinstance(cache, architecture.State)]
    return {
        "layers": sum(any(cache.kind != "encoder" for cache in layer.caches) for layer in layers),
        "bytes_per_token": sum(_token_bytes(cache) for cache in attention),
        "state_bytes": sum(_state_bytes(cache) for cache in states),
        "groups": list(_groups(caches)),
    }


def _groups(caches: Iterable[architecture.Cache]) -> Iterable[dict[str, Any]]:
    for cache, layers in Counter(caches).items():
        group: dict[str, Any] = {"kind": cache.kind, "layers": layers}
        if isinstance(cache, architecture.Attention):
            group.update({"kv_heads": cache.kv_heads, "head_dim": cache.head_dim, "window": cache.window})
            yield {**group, "bytes_per_token": _token_bytes(cache)}
        else:
            yield {**group, "state_bytes": _state_bytes(cache)}


def _token_bytes(cache: architecture.Attention) -> int:
    if cache.kind == "indexer":
        return cache.head_dim + cache.head_dim // kv_cache.INDEXER_BLOCK * kv_cache.SCALE_BYTES
    size = kv_cache.ELEMENT_BYTES[DTYPE]
    if cache.kind == "mla":
        return cache.head_dim * size
    return cache.kv_heads * (cache.head_dim + cache.v_head_dim) * size


def _state_bytes(state: architecture.State) -> int:
    sizes = {**kv_cache.ELEMENT_BYTES, "auto": kv_cache.ELEMENT_BYTES[DTYPE]}
    return sum(math.prod(shape) * sizes[dtype] for shape, dtype in state.shapes(1))
