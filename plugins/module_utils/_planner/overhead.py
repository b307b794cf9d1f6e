# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: what vLLM takes of a GPU besides the KV cache, and which of it it counts itself.

vLLM sizes the KV cache as ``ceil(total * gpu_memory_utilization)`` minus what it counts: weights, the peak of a profile
run with the largest batch, what is not torch's, and from 0.29 on an estimate of its CUDA graphs (gpu_worker.py
determine_available_memory). Its CUDA context lies outside that sum, and so does what it allocates afterwards.
Formulae come from the sources and from traces of the allocator; docs/measurements.md says which is which.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from . import support, weights
from .architecture import Architecture, State, Tensor
from .quantization import ITEM_BYTES, Quantization
from .units import GIB, MIB

# --- measured on NVIDIA H200 with driver 580; docs/measurements.md has the starts that each comes from ---
CONTEXT = 527 * MIB  # CUDA context and the driver's own, before vLLM's first look at the card
NCCL_CONTEXT = 1566 * MIB  # communicators of two ranks, made before that look as well
NON_TORCH = 230 * MIB  # kernels' code and cuBLAS handles
NON_TORCH_EXPERTS = 10 * MIB
NON_TORCH_STATES = 28 * MIB
NON_TORCH_SEVERAL_RANKS = 330 * MIB  # before 0.27; later releases make all of it before their first look
MARLIN_EXPERTS = 220 * MIB  # mxfp4 experts on 9.0: Marlin's kernels, compiled by the driver when they are loaded
SLACK = 20 * MIB  # rests of the allocator's segments, which count from 0.27 on
LOADING_REST = 16 * MIB  # the same of blocks that loading has freed and used again
LOADING_REST_QUANTIZED = 48 * MIB  # where kernels repack weights
GRAPH = 0.37 * MIB  # of one layer in the graphs of one batch size
GRAPH_SINKS = 0.28 * MIB  # the same of gpt-oss
# The second largest graph for decoding stands for all of them, with what is loaded while it is captured
# (v1/worker/gpu/cudagraph_utils.py _extrapolate_full_graph_memory). Seen for 9 of 15 models and max_num_seqs above 64.
GRAPH_SECOND = 6.8 * MIB
GRAPH_SECOND_FROM = 64
GRAPH_MLA = 200 * MIB  # what MLA's decode kernels allocate when the first graph is captured
RUNTIME = (
    448 * MIB
)  # kernels first used under load, and what the allocator cannot use again: 0.35 GiB over 64 MiB at most
SAMPLER = 12  # bytes of one logit at run time, with top-k, top-p, penalties and logprobs
PROCESS_RAM = 3 * GIB  # of a worker's process; 1.8 to 2.3 GiB were measured

# --- from the sources ---
CUBLAS = 32 * MIB  # torch's cuBLAS workspace on 9.0 (aten/src/ATen/cuda/CUDABlas.cpp, 2.13)
L2_FLUSH = 60 * MIB  # torch/_inductor/runtime/benchmarking.py: what is overwritten between two timings, on 9.0
LOGIT = 6  # bytes: bfloat16, and float32 for the sampler (v1/worker/gpu/sample/sampler.py)
PENALTY = 4.125  # bytes of a logit: int32 counts and one bit (v1/worker/gpu/sample/penalties.py)
MLA_WORKSPACE_TOKENS = 64 * 1024  # layers/attention/mla_attention.py determine_chunked_prefill_workspace_size
DEEP_GEMM_ALIGNMENT = 128  # rows of an expert: layers/fused_moe/deep_gemm_utils.py compute_aligned_M
SHM_CHANNEL = 160 * MIB  # 10 chunks of 16 MiB: distributed/device_communicators/shm_broadcast.py, envs.py
COUNTS_EVERYTHING = (
    0,
    27,
    0,
)  # utils/mem_utils.py memory_profiling: all that the card lost, not only what torch counted
COUNTS_GRAPHS = (0, 29, 0)  # v1/worker/gpu/cudagraph_utils.py profile_cudagraph_memory; runner v1 does in all releases


@dataclass(frozen=True)
class Setting:
    """One way to start an engine, with everything that its memory hangs on. The names are vLLM's flags."""

    architecture: Architecture
    quantization: Quantization | None
    tensors: Sequence[Mapping[str, Any]] | None
    version: support.Release
    compute_capability: support.Capability
    total_bytes: int
    tensor_parallel_size: int
    pipeline_parallel_size: int
    enable_expert_parallel: bool
    dtype: str
    kv_cache_dtype: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    enforce_eager: bool
    language_model_only: bool
    block_size: int | None
    enable_prefix_caching: bool | None
    async_scheduling: bool | None

    @property
    def ranks(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size


@dataclass(frozen=True)
class Rank:
    """One GPU's memory besides the KV cache, in bytes. ``context`` and ``unaccounted`` are not counted by vLLM."""

    context_bytes: int
    weights_bytes: int
    activation_bytes: int
    non_torch_bytes: int
    cudagraph_bytes: int
    unaccounted_bytes: int

    @property
    def counted_bytes(self) -> int:
        return self.weights_bytes + self.activation_bytes + self.non_torch_bytes + self.cudagraph_bytes

    @property
    def footprint_bytes(self) -> int:
        return self.counted_bytes + self.context_bytes + self.unaccounted_bytes


def ranks(setting: Setting) -> tuple[Rank, ...]:
    """One for each pipeline rank; its tensor parallel ranks are alike."""
    architecture = setting.architecture
    loaded = weights.loaded(
        architecture,
        setting.quantization,
        tp=setting.tensor_parallel_size,
        pp=setting.pipeline_parallel_size,
        expert_parallel=setting.enable_expert_parallel,
        version=setting.version,
        compute_capability=setting.compute_capability,
        dtype=setting.dtype,
        tensors=setting.tensors,
        language_model_only=setting.language_model_only,
    )
    runner = support.runner(architecture, setting.quantization, setting.version)
    stages = weights.pp_layers(len(architecture.layers), setting.pipeline_parallel_size)
    return tuple(
        _rank(setting, runner, number, loaded.per_rank[stage], first=stage == 0, last=stage == len(stages) - 1)
        for stage, number in enumerate(stages)
    )


def _rank(setting: Setting, runner: str, layers: int, loaded: int, *, first: bool, last: bool) -> Rank:
    samples = last and not setting.architecture.pooling
    peak = max(_forward(setting), _compiling(setting, first), _logits(setting) if samples else 0)
    penalties = (
        int(PENALTY * setting.max_num_seqs * setting.architecture.vocab_size) if samples and runner == "v2" else 0
    )
    graphs = 0 if setting.enforce_eager else _graphs(setting, layers)
    everything = setting.version >= COUNTS_EVERYTHING
    counts_graphs = runner == "v1" or setting.version >= COUNTS_GRAPHS
    activation = peak + (penalties + SLACK if everything else 0)
    activation += LOADING_REST_QUANTIZED if setting.quantization else LOADING_REST
    unaccounted = RUNTIME + _block_tables(setting) + (_sampling(setting, peak) if samples else 0)
    unaccounted += (0 if everything else penalties) + (0 if counts_graphs else graphs)
    return Rank(
        context_bytes=CONTEXT + (NCCL_CONTEXT if setting.ranks > 1 else 0),
        weights_bytes=loaded,
        activation_bytes=activation,
        non_torch_bytes=_non_torch(setting),
        cudagraph_bytes=graphs if counts_graphs else 0,
        unaccounted_bytes=unaccounted,
    )


def _non_torch(setting: Setting) -> int:
    architecture, how = setting.architecture, setting.quantization
    marlin = bool(how and how.scheme == "mxfp4" and setting.compute_capability[0] == 9)
    marlin = marlin and setting.version >= COUNTS_EVERYTHING
    return (
        NON_TORCH
        + (NON_TORCH_EXPERTS if architecture.experts else 0)
        + (NON_TORCH_STATES if _has_states(architecture) else 0)
        + (NON_TORCH_SEVERAL_RANKS if setting.ranks > 1 and setting.version < COUNTS_EVERYTHING else 0)
        + (MARLIN_EXPERTS if marlin else 0)
    )


def _has_states(architecture: Architecture) -> bool:
    return any(isinstance(cache, State) for layer in architecture.layers for cache in layer.caches)


# -- the profile run --------------------------------------------------------------------------------------------------


def _forward(setting: Setting) -> int:
    """The largest layer's activations with the largest batch, the MoE and cuBLAS workspaces included."""
    architecture, item = setting.architecture, ITEM_BYTES[setting.dtype]
    tokens, hidden = setting.max_num_batched_tokens, architecture.hidden_size
    most, widest = _widths(architecture, setting.tensor_parallel_size)
    dense = tokens * item * most
    if architecture.experts:
        dense = max(dense, _expert_workspace(setting) + tokens * item * (widest + 6 * hidden) + _mla_prefill(setting))
    else:
        dense = max(dense, tokens * item * (widest + 4 * hidden) + _mla_prefill(setting))
    return dense + CUBLAS + MIB


@lru_cache(maxsize=256)
def _widths(architecture: Architecture, tensor_parallel_size: int) -> tuple[int, int]:
    """Values of one token in the widest MLP, its input and output included, and in the widest attention or state."""
    widest = most = 0
    for layer in {id(layer.tensors): layer for layer in architecture.layers}.values():
        wanted = [each for each in layer.tensors if _is(each.name, *MLP, "qkv_proj") or ".in_proj" in each.name]
        rows = {tensor.name: weights.cut(tensor, tensor_parallel_size)[0] for tensor in wanted}
        up = max((shape[0] for name, shape in rows.items() if _is(name, *MLP[:3])), default=0)
        down = max((shape[-1] for name, shape in rows.items() if _is(name, *MLP[3:])), default=0)
        states = max((shape[0] for name, shape in rows.items() if ".in_proj" in name and len(shape) == 2), default=0)
        heads = max((shape[0] for name, shape in rows.items() if _is(name, "qkv_proj")), default=0)
        most = max(most, up + down + 4 * architecture.hidden_size)
        widest = max(widest, heads, 2 * states)
    return most, widest


MLP = ("gate_up_proj", "up_proj", "fc1", "down_proj", "fc2")


def _is(name: str, *modules: str) -> bool:
    if "expert" in name:
        return False
    return any(f".{module}.weight" in name or f".{module}.qweight" in name for module in modules)


def _expert_workspace(setting: Setting) -> int:
    """workspace13 and workspace2 of the fused experts: layers/fused_moe/experts (0.32.0), workspace_shapes."""
    architecture, item = setting.architecture, ITEM_BYTES[setting.dtype]
    tensor = 1 if setting.enable_expert_parallel else setting.tensor_parallel_size
    experts = architecture.experts // (setting.tensor_parallel_size if setting.enable_expert_parallel else 1)
    hidden, size = architecture.hidden_size, architecture.moe_intermediate_size // tensor
    rows = setting.max_num_batched_tokens * architecture.experts_per_token
    how = setting.quantization
    if how and how.scheme == "fp8" and how.block and setting.compute_capability[0] in (9, 10):
        rows += experts * (DEEP_GEMM_ALIGNMENT - 1)
    return rows * (max(size, hidden) + max(2 * size, hidden)) * item


def _mla_prefill(setting: Setting) -> int:
    """What MLA allocates in place of its longest prefill: layers/attention/mla_attention.py forward_impl."""
    if not any(cache.kind == "mla" for layer in setting.architecture.layers for cache in layer.caches):
        return 0
    sizes = [_kv_b_rows(layer.tensors) for layer in setting.architecture.layers]
    tokens = min(max(8 * setting.max_model_len, 4 * setting.max_num_seqs * 16), MLA_WORKSPACE_TOKENS)
    return tokens * max(sizes) // setting.tensor_parallel_size * ITEM_BYTES[setting.dtype]


def _kv_b_rows(tensors: Sequence[Tensor]) -> int:
    return max((tensor.shape[0] for tensor in tensors if ".kv_b_proj." in tensor.name), default=0)


def _compiling(setting: Setting, first: bool) -> int:
    """What Inductor allocates on a first start: it tries kernels on copies of what they read, large tables included.

    For the embedding that is the whole vocabulary matrix, for the rotary embedding its cache of all positions
    (torch/_inductor/codegen/wrapper.py generate_and_run_autotune_block; triton.py benchmark_combo_kernel).
    """
    if setting.enforce_eager:
        return 0
    architecture, item = setting.architecture, ITEM_BYTES[setting.dtype]
    step = setting.max_num_batched_tokens * item
    hidden, tensor = architecture.hidden_size, setting.tensor_parallel_size
    # One hidden state in, one out; what is scaled or summed over ranks is there once or thrice more.
    states = 2 + (1 if architecture.name.startswith(SCALES_EMBEDDING) else 0) + (3 if tensor > 1 else 0)
    tables = [
        math.prod(each.shape) * ITEM_BYTES[each.dtype or setting.dtype]
        for each in architecture.outer
        if "rotary" in each.name
    ]
    rows = _qkv_rows(architecture, tensor)
    vocabulary = -(-architecture.vocab_size // weights.VOCAB_PADDING) * weights.VOCAB_PADDING // tensor
    # With several ranks the lookup of 0.32 is not tried on a copy (measured: 404 MiB in all where the copy has 520).
    copied = first and (tensor == 1 or setting.version < COUNTS_EVERYTHING)
    return max(
        vocabulary * hidden * item + states * step * hidden if copied else 0,
        max(tables, default=0) + 2 * step * rows + L2_FLUSH,
        0
        if architecture.experts
        else _forward(setting) + L2_FLUSH - (0 if setting.version >= COUNTS_EVERYTHING else step * hidden),
    )


SCALES_EMBEDDING = ("FalconH1",)  # models/falcon_h1.py multiplies its embedding outside the lookup's kernel


@lru_cache(maxsize=256)
def _qkv_rows(architecture: Architecture, tensor_parallel_size: int) -> int:
    tensors = (tensor for layer in architecture.layers for tensor in layer.tensors if tensor.parallel == "qkv")
    return max((weights.cut(tensor, tensor_parallel_size)[0][0] for tensor in tensors), default=0)


def _logits(setting: Setting) -> int:
    step = setting.max_num_batched_tokens * setting.architecture.hidden_size * ITEM_BYTES[setting.dtype]
    return LOGIT * setting.max_num_seqs * setting.architecture.vocab_size + step + CUBLAS + 3 * MIB


# -- beside it --------------------------------------------------------------------------------------------------------


def _graphs(setting: Setting, layers: int) -> int:
    architecture = setting.architecture
    sizes = support.capture_sizes(
        architecture,
        setting.max_num_seqs,
        setting.max_num_batched_tokens,
        setting.version,
        setting.compute_capability,
    )
    mla = any(cache.kind == "mla" for layer in architecture.layers for cache in layer.caches)
    each = GRAPH_SINKS if architecture.sinks else GRAPH
    decoding = sum(size <= setting.max_num_seqs for size in sizes)
    estimated = setting.version >= COUNTS_GRAPHS and setting.max_num_seqs > GRAPH_SECOND_FROM
    second = GRAPH_SECOND * (decoding - 1) if estimated else 0
    return int(each * layers * len(sizes) + second) + (GRAPH_MLA if mla else 0)


def _sampling(setting: Setting, peak: int) -> int:
    """Logits under load beyond what the profile run has set aside for its own peak."""
    step = setting.max_num_batched_tokens * setting.architecture.hidden_size * ITEM_BYTES[setting.dtype]
    return max(0, SAMPLER * setting.max_num_seqs * setting.architecture.vocab_size + step - peak)


def _block_tables(setting: Setting) -> int:
    """v1/worker/gpu/block_table.py: two int32 tables for each group of layers, allocated after the KV cache."""
    kinds = {
        (cache.kind, getattr(cache, "window", None)) for layer in setting.architecture.layers for cache in layer.caches
    }
    blocks = math.ceil(setting.max_model_len / 128) * 8  # of 16 tokens, by eights
    return 2 * 4 * max(1, len(kinds)) * setting.max_num_seqs * blocks


def host_needs(setting: Setting, document: Mapping[str, Any]) -> dict[str, int]:
    """RAM of all processes with what they pin, /dev/shm of the channels between them, and disk for the files."""
    pinned = 4 * setting.max_num_seqs * setting.max_model_len  # v1/worker/gpu/states.py all_token_ids
    return {
        "ram_bytes": PROCESS_RAM * (setting.ranks + 1) + pinned * setting.ranks,
        "shm_bytes": SHM_CHANNEL * (setting.ranks + 1) if setting.ranks > 1 else 0,
        "disk_bytes": sum(int(file["bytes"]) for file in document.get("files") or ()),
    }
