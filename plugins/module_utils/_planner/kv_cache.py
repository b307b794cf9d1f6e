# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: how vLLM cuts KV cache memory into blocks, and what requests take of them.

As v1/core/kv_cache_utils.py (0.22 to 0.32) and v1/core/kv_cache_planning.py (0.33) do: each layer has a spec, layers
with equal specs form groups, all groups draw blocks of one size from one pool, and a request takes of each group the
blocks that its tokens need. Sizes are bytes of one GPU, lengths are tokens. Not counted: drafters and KV connectors.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from . import support
from .architecture import Architecture, Attention, State
from .errors import PlanError
from .quantization import Quantization
from .weights import pp_layers

# BlockPool holds one block back for good (v1/core/block_pool.py null_block). vLLM itself checks for it from 0.29 on;
# before, a server that just fits one request never schedules it.
NULL_BLOCKS = 1

ELEMENT_BYTES: Mapping[str, int] = {
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "fp8": 1,
    "fp8_e4m3": 1,
    "fp8_e5m2": 1,
    "fp8_per_token_head": 1,
    "int8_per_token_head": 1,
}
SCALE_BYTES = 4  # float32, one for K and one for V of each token and head: v1/kv_cache_interface.py AttentionSpec
FP8_DS_MLA_BYTES = 656  # of a token: v1/kv_cache_interface.py MLAAttentionSpec, 0.22; mla_attention.py, 0.29
INDEXER_BLOCK = 128  # values with one float32 scale: models/deepseek_v2.py DeepseekV32IndexerCache
GDN_CHECKPOINT_ALIGNMENT = 64  # v1/attention/backends/gdn_attn.py FLASHINFER_GDN_CHECKPOINT_ALIGNMENT, 0.33
MLA_HYBRID_BLOCK = 128  # platforms/interface.py _align_hybrid_block_size, 0.27


class Setting(Protocol):
    """What is read of a planned start; the names are vLLM's flags."""

    architecture: Architecture
    quantization: Quantization | None
    version: support.Release
    compute_capability: support.Capability
    tensor_parallel_size: int
    pipeline_parallel_size: int
    dtype: str  # resolved, as "bfloat16"
    kv_cache_dtype: str
    max_model_len: int
    max_num_batched_tokens: int
    block_size: int | None
    enable_prefix_caching: bool | None  # None: vLLM's default
    async_scheduling: bool | None


@dataclass(frozen=True)
class Spec:
    """The KV cache of one layer on one GPU. Layers with equal specs can share a block table."""

    kind: str  # "full", "mla", "indexer", "sliding", "chunked" or "state"
    shape: tuple[Any, ...]
    block_size: int  # tokens
    token_bytes: int = 0
    state_bytes: int = 0
    window: int = 0  # tokens
    held: int = 0  # state blocks that a request holds, however long it is
    page_padded: int = 0

    @property
    def page_bytes(self) -> int:
        """Of one block in this layer."""
        return max(self.page_padded, self.state_bytes, self.block_size * self.token_bytes)

    @property
    def family(self) -> tuple[Any, ...]:
        """Layers of one family and block size always need the same number of blocks (is_uniform_with_collection)."""
        if self.kind == "state":
            return ("state", self.held)
        if self.kind in ("sliding", "chunked"):
            return (self.kind, self.window)
        return ("full",)


@dataclass(frozen=True)
class Group:
    """Layers of one rank that share a block table."""

    kind: str
    layers: int
    block_size: int  # tokens
    page_bytes: int  # of one block in the largest of these layers
    block_bytes: int  # of one block in all of them
    window: int = 0
    held: int = 0

    def blocks(self, tokens: int, in_flight: int) -> int:
        """Blocks that a request of so many tokens takes at most: max_memory_usage_bytes of the specs."""
        if self.kind == "state":
            return self.held
        if self.kind == "sliding":
            return _ceil(min(self.window - 1 + in_flight, tokens), self.block_size) + 1
        if self.kind == "chunked":
            return _ceil(min(self.window + in_flight, tokens), self.block_size)
        return _ceil(tokens, self.block_size)


@dataclass(frozen=True)
class Layout:
    """How one pipeline rank lays out its KV cache. ``groups`` is empty where the model has no KV cache."""

    groups: tuple[Group, ...]
    in_flight_tokens: int

    null_blocks = NULL_BLOCKS

    @property
    def bytes_per_block(self) -> int:
        return max((group.block_bytes for group in self.groups), default=0)

    def blocks(self, available: int) -> int:
        """What num_gpu_blocks would be for this rank alone; without bound where no layer of it has a KV cache."""
        return max(0, available // self.bytes_per_block) if self.bytes_per_block else sys.maxsize

    def blocks_per_request(self, tokens: int) -> int:
        return sum(group.blocks(tokens, self.in_flight_tokens) for group in self.groups)


# -- what fits --------------------------------------------------------------------------------------------------------
#
# ``available`` is bytes for the KV cache: the same on each rank, or one figure for each.


def needed(layouts: Sequence[Layout]) -> bool:
    """Whether the model has a KV cache at all; encoders have none."""
    return any(layout.groups for layout in layouts)


def num_blocks(layouts: Sequence[Layout], available: int | Sequence[int]) -> int:
    """vLLM's num_gpu_blocks: all ranks have as many as the poorest."""
    each = [available] * len(layouts) if isinstance(available, int) else available
    return min(layout.blocks(each[rank]) for rank, layout in enumerate(layouts))


def concurrency(layouts: Sequence[Layout], available: int | Sequence[int], tokens: int) -> float:
    """vLLM's "Maximum concurrency for N tokens per request": get_max_concurrency_for_kv_cache_config."""
    if not needed(layouts):
        return math.inf
    return num_blocks(layouts, available) / layouts[0].blocks_per_request(tokens)


def tokens(layouts: Sequence[Layout], available: int | Sequence[int], max_model_len: int) -> int:
    """vLLM's "GPU KV cache size: N tokens": get_kv_cache_capacity. Not blocks times block size."""
    return int(concurrency(layouts, available, max_model_len) * max_model_len) if needed(layouts) else 0


def users(layouts: Sequence[Layout], available: int | Sequence[int], tokens: int) -> int:
    """Requests of so many tokens that are in the KV cache together, none of them waiting."""
    if not needed(layouts):
        return sys.maxsize
    return max(0, num_blocks(layouts, available) - NULL_BLOCKS) // layouts[0].blocks_per_request(tokens)


def bytes_for(layouts: Sequence[Layout], tokens: int, users: int) -> tuple[int, ...]:
    """The least bytes of each rank that carry ``users`` requests of so many tokens."""
    if not needed(layouts):
        return (0,) * len(layouts)
    blocks = layouts[0].blocks_per_request(tokens) * users + NULL_BLOCKS
    return tuple(blocks * layout.bytes_per_block for layout in layouts)


def longest(layouts: Sequence[Layout], available: int | Sequence[int], users: int, limit: int) -> int:
    """The longest request, up to ``limit`` tokens, that so many users can have at the same time; 0 if none."""
    if not needed(layouts):
        return limit
    blocks = max(0, num_blocks(layouts, available) - NULL_BLOCKS)
    least, most = 0, limit
    while least < most:
        middle = (least + most + 1) // 2
        if layouts[0].blocks_per_request(middle) * users <= blocks:
            least = middle
        else:
            most = middle - 1
    return least


# -- layout -----------------------------------------------------------------------------------------------------------


def cache_dtype(setting: Setting) -> str:
    """The KV cache dtype that the start comes to, "auto" resolved."""
    resolved = _cache_dtype(setting)
    return setting.dtype if resolved == "auto" else resolved


def _cache_dtype(setting: Setting) -> str:
    return support.resolve_cache_dtype(
        setting.architecture,
        setting.quantization,
        setting.kv_cache_dtype,
        setting.compute_capability,
        setting.version,
    )


def layout(setting: Setting, *, hybrid: bool = True) -> tuple[Layout, ...]:
    """How each pipeline rank lays out its KV cache. ``hybrid``: False for --disable-hybrid-kv-cache-manager."""
    specs = list(_specs(setting))
    if not hybrid:
        specs = list(_promoted(specs))
    grouped = _groups(specs, setting.version) if specs else []
    in_flight = _in_flight(setting)
    layouts, first = [], 0
    for layers in pp_layers(len(setting.architecture.layers), setting.pipeline_parallel_size):
        own = range(first, first + layers)
        groups = tuple(_on_rank(group, own) for group in grouped)
        layouts.append(Layout(groups, in_flight))
        first += layers
    return tuple(layouts)


def _on_rank(group: Sequence[tuple[int, Spec]], own: range) -> Group:
    spec = max((each for _, each in group), key=lambda each: each.page_bytes)
    pages = [each.page_bytes for place, each in group if place in own]
    return Group(spec.kind, len(pages), spec.block_size, max(pages, default=0), sum(pages), spec.window, spec.held)


def _in_flight(setting: Setting) -> int:
    """Tokens that are scheduled and not yet settled: config/vllm.py max_in_flight_tokens, 0.26."""
    batches, ranks = 1, setting.pipeline_parallel_size
    if setting.version >= (0, 26, 0):
        batches = ranks
        if setting.async_scheduling is not False and not setting.architecture.pooling:
            second = support.runner(setting.architecture, setting.quantization, setting.version) == "v2"
            batches = ranks + 1 if second or ranks == 1 else ranks
    return batches * setting.max_num_batched_tokens


def _specs(setting: Setting) -> Iterator[tuple[int, Spec]]:
    """Each layer's place in the model with its spec; a layer may have several."""
    dtype = cache_dtype(setting)
    caches = [(place, cache) for place, layer in enumerate(setting.architecture.layers) for cache in layer.caches]
    caches = [(place, cache) for place, cache in caches if cache.kind != "encoder"]
    attention = [cache for _, cache in caches if isinstance(cache, Attention)]
    states = [cache for _, cache in caches if isinstance(cache, State)]
    block_size = setting.block_size or _kernel_block(setting)
    padded, mode = 0, _state_mode(setting, attention, states)
    if attention and states:
        block_size, padded = _aligned(setting, attention, states, block_size, mode)
    own_window_block = (0, 25, 0) <= setting.version < (0, 30, 0)
    for place, cache in caches:
        if isinstance(cache, State):
            held = 1 if mode == "none" else 2 + _checkpoints(setting, cache)
            length = setting.max_model_len if mode == "none" else block_size
            shapes = cache.shapes(setting.tensor_parallel_size)
            yield place, Spec("state", shapes, length, 0, _state_bytes(setting, cache), 0, held, padded)
            continue
        heads = max(1, cache.kv_heads // setting.tensor_parallel_size)
        # attention.py get_kv_cache_spec: the smallest block its kernel takes, whatever block_size says
        size = support.DEFAULT_BLOCK_SIZE if own_window_block and cache.kind == "sliding" else block_size
        shape = (heads, cache.head_dim, cache.v_head_dim)
        yield place, Spec(cache.kind, shape, size, _token_bytes(cache, heads, dtype), window=cache.window or 0)


def _token_bytes(cache: Attention, heads: int, dtype: str) -> int:
    """Of one token in one layer: real_page_size_bytes of the specs in v1/kv_cache_interface.py."""
    if cache.kind == "indexer":
        return cache.head_dim + cache.head_dim // INDEXER_BLOCK * SCALE_BYTES
    if cache.kind == "mla":
        return FP8_DS_MLA_BYTES if dtype == "fp8_ds_mla" else cache.head_dim * _element(dtype)
    sizes = (cache.head_dim, cache.v_head_dim or cache.head_dim)
    if dtype == "nvfp4":
        return heads * sum(size // 2 + size // 16 for size in sizes)
    if dtype == "int4_per_token_head":
        return heads * sum(size // 2 + SCALE_BYTES for size in sizes)
    scales = SCALE_BYTES if dtype.endswith("_per_token_head") else 0
    return heads * sum(size * _element(dtype) + scales for size in sizes)


def _element(dtype: str) -> int:
    if dtype not in ELEMENT_BYTES:
        raise PlanError(
            f"flags.kv_cache_dtype is {dtype}, which the planner cannot size here: set it to auto, bfloat16 or fp8."
        )
    return ELEMENT_BYTES[dtype]


def _state_bytes(setting: Setting, state: State) -> int:
    shapes = state.shapes(setting.tensor_parallel_size)
    return sum(math.prod(shape) * ELEMENT_BYTES[setting.dtype if dtype == "auto" else dtype] for shape, dtype in shapes)


def _kernel_block(setting: Setting) -> int:
    """The smallest block that the attention backend takes, which is also what vLLM prefers."""
    backend = support.attention_backend(
        setting.architecture,
        _cache_dtype(setting),
        setting.dtype,
        setting.compute_capability,
        setting.version,
        tensor_parallel_size=setting.tensor_parallel_size,
        block_size=setting.block_size,
    )
    return support.BLOCK_SIZES.get(backend or "", support.DEFAULT_BLOCK_SIZE)


# -- hybrids of attention and Mamba -----------------------------------------------------------------------------------


def _state_mode(setting: Setting, attention: Sequence[Attention], states: Sequence[State]) -> str:
    """The mamba_cache_mode: models/config.py MambaModelConfig."""
    architecture, caching = setting.architecture, setting.enable_prefix_caching
    if caching is None:
        caching = bool(attention) and not architecture.pooling and support.hybrid_prefix_caching(setting.version)
    if not caching or not states:
        return "none"
    problem = support.prefix_caching_problem(architecture, caching, setting.version)
    if problem:
        raise PlanError(f"{problem}.")
    return "align"


def _checkpoints(setting: Setting, state: State) -> int:
    """Blocks for states in the middle of a prefill, in mode "align": num_prefill_checkpoint_blocks."""
    if state.kind == "mamba2":
        return int(setting.version >= (0, 32, 0))
    if state.kind == "gdn":  # with FlashInfer's kernel: gdn/qwen_gdn_linear_attn.py _resolve_gdn_prefill_backend
        return int(setting.version >= (0, 33, 0) and setting.compute_capability[0] in (9, 10, 12))
    return 0


def _aligned(
    setting: Setting, attention: Sequence[Attention], states: Sequence[State], block_size: int, mode: str
) -> tuple[int, int]:
    """Block size and state page of a hybrid: platforms/interface.py _align_hybrid_block_size.

    An attention page is made as large as a Mamba state, and the state is padded to it.
    """
    cache = next((each for each in attention if each.kind in ("full", "mla")), attention[0])
    heads = max(1, cache.kv_heads // setting.tensor_parallel_size)
    of_token = _token_bytes(replace(cache, v_head_dim=cache.head_dim), heads, cache_dtype(setting))
    state = max(_state_bytes(setting, each) for each in states)
    step = max(block_size, _kernel_block(setting))
    if cache.kind == "mla" and setting.version >= (0, 27, 0):
        step = max(step, MLA_HYBRID_BLOCK)
    if mode == "align" and all(each.kind == "gdn" and _checkpoints(setting, each) for each in states):
        step = math.lcm(step, GDN_CHECKPOINT_ALIGNMENT)
    block_size = max(block_size, step * _ceil(state, step * of_token))
    return block_size, block_size * of_token


# -- groups -----------------------------------------------------------------------------------------------------------


def _promoted(specs: Sequence[tuple[int, Spec]]) -> Iterator[tuple[int, Spec]]:
    """Without the hybrid manager, windows are stored whole: unify_hybrid_kv_cache_specs."""
    full = any(spec.family == ("full",) for _, spec in specs)
    if any(spec.kind == "state" for _, spec in specs) and len({spec.family for _, spec in specs}) > 1:
        raise PlanError(
            "flags.disable_hybrid_kv_cache_manager is true, and Mamba layers need that manager: leave it out."
        )
    for place, spec in specs:
        yield place, replace(spec, kind="full", window=0) if full and spec.window else spec


def _groups(specs: Sequence[tuple[int, Spec]], version: support.Release) -> list[list[tuple[int, Spec]]]:
    """get_kv_cache_groups: the layers of the whole model, by the block table that they share."""
    alike = {(spec.family, spec.block_size) for _, spec in specs}
    pages = {spec.page_bytes for _, spec in specs}
    if len(alike) == 1 and (len(pages) == 1 or specs[0][1].kind != "state" or version < (0, 29, 0)):
        return [list(specs)]
    buckets: dict[Spec, list[tuple[int, Spec]]] = {}
    for place, spec in _one_page_size(specs, version):
        buckets.setdefault(spec, []).append((place, spec))
    counts = [len(layers) for layers in buckets.values()]
    size = max(counts) if max(counts) < min(counts) * 1.5 else min(counts)
    groups = []
    for layers in buckets.values():
        number = _ceil(len(layers), size)
        groups += [layers[first::number] for first in range(number)]
    return groups


def _one_page_size(specs: Sequence[tuple[int, Spec]], version: support.Release) -> Iterator[tuple[int, Spec]]:
    """unify_kv_cache_spec_page_size: larger blocks where that comes out even, else padding."""
    never = (sys.maxsize, 0, 0)
    padded_since = {"state": (0, 26, 0), "mla": never, "indexer": never}
    largest = max(spec.page_bytes for _, spec in specs)
    for place, spec in specs:
        page = spec.page_bytes
        if page == largest:
            yield place, spec
        elif spec.kind != "state" and largest % page == 0:
            yield place, replace(spec, block_size=spec.block_size * (largest // page))
        elif version >= padded_since.get(spec.kind, (0, 24, 0)):
            yield place, replace(spec, page_padded=largest)
        else:
            raise PlanError(
                f"the KV cache of layer {place} takes {page} bytes a block and that of others {largest}, which vLLM "
                f"{'.'.join(map(str, version))} cannot lay out: take another model, or a newer engine_version."
            )


def _ceil(number: int, step: int) -> int:
    return -(-number // step)
