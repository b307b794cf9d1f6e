# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: what vLLM logs as "Model loading took X GiB", for each pipeline rank.

vLLM takes the difference in bytes that torch has allocated (utils/mem_utils.py DeviceMemoryProfiler), so what its
caching allocator rounds up counts, and so do buffers: rotary caches, and four scales for each attention layer.
"""

# ruff: noqa: PLR0911, PLR0917 (a table in the form of a function, and what the search asks by)
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .architecture import Architecture, Attention, Layer, Tensor
from .errors import PlanError
from .quantization import ITEM_BYTES, Quantization, matrices, module_names
from .units import MIB

# torch's c10/cuda/CUDACachingAllocator (2.11): sizes are rounded up, and a large one has segments of its own, which
# vLLM does not let it split (gpu_worker.py _scoped_allocator_max_split, 20 MiB, 0.22.0 to 0.33.0).
ROUND, LARGE, SEGMENT = 512, 10 * MIB, 2 * MIB
UNSPLIT, LEAST_REST = 20 * MIB, MIB
VOCAB_PADDING = 64  # layers/vocab_parallel_embedding.py DEFAULT_VOCAB_PADDING_SIZE
SCALES = 4  # layers/attention/attention.py set_default_quant_scales: q, k, v, prob
# The first release whose Qwen-VL rotary cache is not four times as long (rotary_embedding/mrope.py).
SHORT_MROPE = (0, 32, 0)
MROPE_FACTOR = 4


@dataclass(frozen=True)
class Loaded:
    """Bytes on (tensor rank 0 of) each pipeline rank, and the parameters of the whole model."""

    per_rank: tuple[int, ...]
    parameters: int


def loaded(
    architecture: Architecture,
    quantization: Quantization | None,
    *,
    tp: int = 1,
    pp: int = 1,
    expert_parallel: bool = False,
    version: tuple[int, int, int] = (0, 32, 0),
    compute_capability: tuple[int, int] = (9, 0),
    dtype: str = "bfloat16",
    tensors: Sequence[Mapping[str, Any]] | None = None,
    language_model_only: bool = False,
) -> Loaded:
    """What each rank holds after loading. ``tensors``: the summary of the safetensors headers, where there is one."""
    plain = _stored_plain(tensors) if tensors and quantization else frozenset()
    split = (tp, pp, expert_parallel)
    ranks = _ranks(architecture, quantization, split, version, compute_capability, dtype, plain, language_model_only)
    return Loaded(ranks, parameters(architecture, language_model_only))


def parameters(architecture: Architecture, language_model_only: bool = False) -> int:
    vision = () if language_model_only else architecture.vision
    layers = (tensor for layer in architecture.layers for tensor in layer.tensors)
    return sum(math.prod(each.shape) for each in (*architecture.outer, *vision, *layers) if each.parameter)


def stored(architecture: Architecture, quantization: Quantization | None) -> int:
    """Bytes of the checkpoint's tensors by arithmetic, for models whose headers are not at hand."""
    total = 0
    for tensor in (
        *architecture.outer,
        *architecture.vision,
        *(each for layer in architecture.layers for each in layer.tensors),
    ):
        if tensor.parameter:
            how = quantization.of(tensor.name) if quantization and tensor.quantizable else None
            item = ITEM_BYTES[tensor.dtype or architecture.dtype]
            total += sum(matrices(tensor, tensor.shape, tensor.parts, how, None, item))
    return total


def pp_layers(layers: int, pp: int) -> tuple[int, ...]:
    """Layers of each pipeline rank (distributed/utils.py get_pp_indices): the last but one and up get what is left."""
    found, left = [layers // pp] * pp, layers % pp
    for place in range(2, left + 2):
        found[-place] += 1
    return tuple(found)


@lru_cache(maxsize=512)
def _ranks(
    architecture: Architecture,
    quantization: Quantization | None,
    split: tuple[int, int, bool],
    version: tuple[int, int, int],
    capability: tuple[int, int],
    dtype: str,
    plain: frozenset[str],
    language_model_only: bool,
) -> tuple[int, ...]:
    tp, pp, expert_parallel = split
    if dtype not in ITEM_BYTES:
        raise PlanError(f"dtype is {dtype!r}, which is none of {', '.join(ITEM_BYTES)}")
    found, first = [], 0
    for place, number in enumerate(pp_layers(len(architecture.layers), pp)):
        layers = architecture.layers[first : first + number]
        first += number
        stages = (
            {"every"} | ({"first", "ends"} if place == 0 else set()) | ({"last", "ends"} if place == pp - 1 else set())
        )
        tensors = [each for each in architecture.outer if each.stage in stages]
        tensors += () if language_model_only else architecture.vision
        tensors += (each for layer in layers for each in layer.tensors)
        total = sum(_scale_bytes(layer) for layer in layers)
        for tensor in tensors:
            how = quantization.of(tensor.name) if quantization and tensor.quantizable else None
            if how and plain and not plain.isdisjoint(_starred(tensor.name)):
                how = None
            shape, parts = cut(tensor, tp, expert_parallel)
            if tensor.name.startswith("mrotary") and version < SHORT_MROPE:
                shape = (MROPE_FACTOR * shape[0], *shape[1:])
            sizes = matrices(tensor, shape, parts, how, capability, ITEM_BYTES[tensor.dtype or dtype])
            if how and ".kv_b_proj." in tensor.name:
                sizes += (math.prod(shape) * ITEM_BYTES[dtype],)  # mla_attention.py: W_UV and W_UK_T, not quantized
            total += sum(map(allocated, sizes))
        found.append(total)
    return tuple(found)


def _scale_bytes(layer: Layer) -> int:
    attends = sum(isinstance(cache, Attention) and cache.kind != "indexer" for cache in layer.caches)
    return attends * SCALES * ROUND


def allocated(size: int) -> int:
    """Bytes that torch's caching allocator counts for a tensor of this size."""
    whole = -(-size // SEGMENT) * SEGMENT
    if size >= LARGE and (size >= UNSPLIT or whole - size <= LEAST_REST):
        return whole
    return -(-size // ROUND) * ROUND


def cut(tensor: Tensor, tp: int, expert_parallel: bool = False) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and merged parts of what one of ``tp`` ranks holds of a tensor."""
    shape, parts, kind = tensor.shape, tensor.parts, tensor.parallel
    if kind == "vocab":
        return (-(-shape[0] // VOCAB_PADDING) * VOCAB_PADDING // tp, *shape[1:]), parts
    if kind == "qkv":
        heads = max(1, tensor.kv_heads // tp)
        parts = (*(part // tp for part in parts[:-2]), *(part // tensor.kv_heads * heads for part in parts[-2:]))
        return (sum(parts), *shape[1:]), parts
    if kind.startswith("expert_") and expert_parallel:
        return (-(-shape[0] // tp), *shape[1:]), parts
    if kind == "expert_column":
        return (shape[0], shape[1] // tp, *shape[2:]), tuple(part // tp for part in parts)
    if kind == "column":
        return (shape[0] // tp, *shape[1:]), tuple(part // tp for part in parts)
    if kind in ("row", "expert_row"):
        return (*shape[:-1], shape[-1] // tp), parts
    return shape, parts


# --- safetensors headers ------------------------------------------------------------------------------------------


def _starred(name: str) -> Iterable[str]:
    """A tensor's modules as the summary of the headers names them, beginning at ``layers.`` where there is one."""
    for module in module_names(name):
        yield _summary(module)


def _summary(module: str) -> str:
    parts = ["*" if part.isdigit() else part for part in module.split(".")]
    return ".".join(parts[parts.index("layers") :] if "layers" in parts else parts)


def _stored_plain(tensors: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """Modules all of whose weights the headers have as plain floats: not quantized, whatever the config says."""
    plain, other = set(), set()
    for each in tensors:
        module, _, kind = str(each.get("name")).rpartition(".")
        if kind in ("weight", "weight_packed", "qweight"):
            (plain if each.get("dtype") in ("BF16", "F16", "F32") else other).add(_summary(module))
    return frozenset(plain - other)


# --- splits that vLLM refuses -------------------------------------------------------------------------------------


def indivisible(
    architecture: Architecture,
    quantization: Quantization | None,
    tp: int,
    pp: int,
    expert_parallel: bool,
    version: tuple[int, int, int],
) -> str | None:
    """Why vLLM cannot split the model so, in its own terms; None where it can."""
    if pp > len(architecture.layers):
        return f"pipeline_parallel_size={pp} is more than the {len(architecture.layers)} layers"
    if tp == 1:
        return None
    if architecture.heads % tp:
        return f"{architecture.heads} attention heads are not divisible by tensor_parallel_size={tp}"
    for tensor in (*architecture.outer, *architecture.vision, *_kinds_of(architecture)):
        why = _uncut(tensor, quantization, tp, expert_parallel)
        if why:
            return why
    return None


@lru_cache(maxsize=64)
def _kinds_of(architecture: Architecture) -> tuple[Tensor, ...]:
    """The tensors of the layers, one of each name, shape and cut."""
    kinds = {}
    for tensor in (each for layer in architecture.layers for each in layer.tensors):
        kinds.setdefault((_summary(tensor.name), tensor.shape, tensor.parallel), tensor)
    return tuple(kinds.values())


def _uncut(tensor: Tensor, quantization: Quantization | None, tp: int, expert_parallel: bool) -> str | None:
    kind, name = tensor.parallel, _summary(tensor.name)
    if kind in ("replicated", "expert_replicated") or (kind.startswith("expert_") and expert_parallel):
        return None
    if kind == "qkv" and tensor.kv_heads % tp and tp % tensor.kv_heads:
        return f"{name} has {tensor.kv_heads} key/value heads, which tensor_parallel_size={tp} does not divide"
    whole = {"row": tensor.shape[-1:], "expert_row": tensor.shape[-1:], "vocab": (-(-tensor.shape[0] // 64) * 64,)}
    cuts = whole.get(kind) or (tensor.parts[:-2] if kind == "qkv" else tensor.parts or tensor.shape[:1])
    odd = [size for size in cuts if size % tp]
    if odd:
        what = "columns" if kind.endswith("row") else "rows"
        return f"{name} has {odd[0]} {what}, which tensor_parallel_size={tp} does not divide"
    how = quantization.of(tensor.name) if quantization and tensor.quantizable else None
    return _ungrouped(tensor, name, how, tp) if how else None


def _ungrouped(tensor: Tensor, name: str, how: Quantization, tp: int) -> str | None:
    """Cuts that go through a scale (utils/fp8_utils.py validate_fp8_block_shape, auto_gptq.py, auto_awq.py)."""
    shape, parts = cut(tensor, tp)
    across = tensor.parallel.endswith("row")
    if how.block:
        sizes, unit, what = (
            (shape[-1:], how.block[1], "columns") if across else (parts or shape[-2:-1], how.block[0], "rows")
        )
    elif across and how.group_size and how.group_size > 0 and how.scheme not in ("mxfp4", "nvfp4"):
        sizes, unit, what = shape[-1:], how.group_size, "columns"
    else:
        return None
    odd = [size for size in sizes if size % unit]
    if odd:
        return (
            f"{name} has {odd[0]} {what} on each of {tp} GPUs, which is not a multiple of the {unit} that share a scale"
        )
    return None
