# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""From a model's caches to blocks, tokens and concurrency, as vLLM logs them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
from ansible_collections.llmfleet.serving.plugins.module_utils._planner import kv_cache
from ansible_collections.llmfleet.serving.plugins.module_utils._planner.architecture import (
    Architecture,
    Attention,
    State,
)
from ansible_collections.llmfleet.serving.plugins.module_utils._planner.errors import PlanError
from hypothesis import assume, given
from hypothesis import strategies as st
from planned import INDEXER, MLA, model

GIB = 1 << 30


@dataclass(frozen=True)
class Fixed(State):
    """A state whose ``sizes`` are its shapes, on any number of GPUs."""

    def shapes(self, tp: int) -> tuple[tuple[tuple[int, ...], str], ...]:
        return tuple(zip(self.sizes, self.dtypes, strict=True))


def full(kv_heads: int, head_dim: int = 128) -> Attention:
    return Attention("full", kv_heads, head_dim, head_dim)


def sliding(kv_heads: int, window: int, head_dim: int = 128) -> Attention:
    return Attention("sliding", kv_heads, head_dim, head_dim, window)


def state(kind: str, *shapes: tuple[int, ...], dtype: str = "auto") -> State:
    return Fixed(kind, shapes, ("auto", *[dtype] * (len(shapes) - 1)))


def start(architecture: Architecture, **changes: Any) -> Any:
    """A start on one H100 by vLLM 0.32.0, unless told otherwise."""
    setting = {
        "architecture": architecture,
        "quantization": None,
        "version": (0, 32, 0),
        "compute_capability": (9, 0),
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "dtype": "bfloat16",
        "kv_cache_dtype": "auto",
        "max_model_len": 16384,
        "max_num_batched_tokens": 8192,
        "block_size": None,
        "enable_prefix_caching": None,
        "async_scheduling": True,
    }
    return SimpleNamespace(**{**setting, **changes})


def laid(architecture: Architecture, **changes: Any) -> tuple[kv_cache.Layout, ...]:
    return kv_cache.layout(start(architecture, **changes))


def one(architecture: Architecture, **changes: Any) -> kv_cache.Layout:
    layouts = laid(architecture, **changes)
    assert len(layouts) == 1
    return layouts[0]


QWEN25_7B = model(*[full(4)] * 28, name="Qwen2ForCausalLM", heads=28)
QWEN25_3B = model(*[full(2)] * 36, name="Qwen2ForCausalLM", heads=16)
QWEN3_06B = model(*[full(8)] * 28, name="Qwen3ForCausalLM", heads=16)
LLAMA_8B = model(*[full(8)] * 32)
MIXTRAL = model(*[full(8)] * 32, name="MixtralForCausalLM", experts=8)
DEEPSEEK_V2_LITE = model(*[MLA] * 27, name="DeepseekV2ForCausalLM", experts=64, heads=16)
GEMMA3_1B = model(
    *[full(1, 256) if layer % 6 == 5 else sliding(1, 512, 256) for layer in range(26)],
    name="Gemma3ForCausalLM",
    heads=4,
)
GPT_OSS_20B = model(
    *[full(8, 64) if layer % 2 else sliding(8, 128, 64) for layer in range(24)],
    name="GptOssForCausalLM",
    experts=32,
    sinks=True,
)
FALCON_H1_7B = model(
    *[(full(2), state("mamba2", (3, 3584), (24, 128, 256)))] * 44, name="FalconH1ForCausalLM", heads=12
)


def gdn(*, keys: int, values: int, dtype: str) -> State:
    """Heads of 128, convolution 4, as in Qwen3-Next and Qwen3.5."""
    return state("gdn", (3, 2 * 128 * keys + 128 * values), (values, 128, 128), dtype=dtype)


QWEN35_27B = model(
    *[full(4, 256) if layer % 4 == 3 else gdn(keys=16, values=48, dtype="float32") for layer in range(64)],
    name="Qwen3_5ForConditionalGeneration",
)


# --- starts that were measured -------------------------------------------------------------------------------

# vLLM 0.25.1 on an H200 with dummy weights: what it had for the KV cache, and what it made of it. The project's own
# measurements (docs/measurements.md). Groups are (layers, block_size, page bytes), in vLLM's order.
MEASURED = {
    "Qwen2.5-7B, 32 sequences": (
        (QWEN25_7B, {"max_num_batched_tokens": 2048}),
        (59831760159, 65211, 1043376, 63.68),
        [(28, 16, 32768)],
    ),
    "Qwen2.5-7B, 256 sequences": ((QWEN25_7B, {}), (59743652639, 65115, 1041840, 63.59), [(28, 16, 32768)]),
    "Qwen2.5-7B, 1024 sequences": ((QWEN25_7B, {}), (59743640351, 65115, 1041840, 63.59), [(28, 16, 32768)]),
    "Qwen2.5-7B, larger batch": (
        (QWEN25_7B, {"max_num_batched_tokens": 16384}),
        (58639542047, 63912, 1022592, 62.41),
        [(28, 16, 32768)],
    ),
    "Qwen2.5-7B, eager": ((QWEN25_7B, {}), (59751032607, 65123, 1041968, 63.60), [(28, 16, 32768)]),
    "Qwen2.5-7B, fp8": (
        (QWEN25_7B, {"kv_cache_dtype": "fp8"}),
        (59710098207, 130157, 2082512, 127.11),
        [(28, 16, 16384)],
    ),
    "Qwen2.5-7B, 24 GiB, cold": (
        (QWEN25_7B, {"max_num_batched_tokens": 2048}),
        (6478602154, 7061, 112976, 6.90),
        [(28, 16, 32768)],
    ),
    "Qwen2.5-7B, 24 GiB, warm": (
        (QWEN25_7B, {"max_num_batched_tokens": 2048}),
        (7287069610, 7942, 127072, 7.76),
        [(28, 16, 32768)],
    ),
    "Qwen2.5-3B GPTQ": (
        (QWEN25_3B, {"max_model_len": 8192, "dtype": "float16"}),
        (3304179679, 5601, 89616, 10.94),
        [(36, 16, 16384)],
    ),
    "Qwen3-0.6B": ((QWEN3_06B, {"max_model_len": 8192}), (9822041719, 5352, 85632, 10.45), [(28, 16, 65536)]),
    "Llama-3.1-8B": ((LLAMA_8B, {"max_model_len": 8192}), (5746821546, 2740, 43840, 5.35), [(32, 16, 65536)]),
    "Llama-3.1-8B AWQ": ((LLAMA_8B, {"max_model_len": 8192}), (4367734391, 2082, 33312, 4.07), [(32, 16, 65536)]),
    "Mixtral-8x7B": ((MIXTRAL, {}), (40267177984, 19200, 307200, 18.75), [(32, 16, 65536)]),
    "DeepSeek-V2-Lite": (
        (DEEPSEEK_V2_LITE, {"max_num_batched_tokens": 2048}),
        (13434569728, 26995, 431920, 26.36),
        [(27, 16, 18432)],
    ),
    "gemma-3-1b": (
        (GEMMA3_1B, {"max_model_len": 32768, "max_num_batched_tokens": 2048}),
        (20228041130, 308655, 3355675, 102.41),
        [*[(4, 16, 16384)] * 4, *[(3, 16, 16384)] * 2, (4, 16, 16384)],
    ),
    "gpt-oss-20b": (
        (GPT_OSS_20B, {"max_model_len": 32768, "max_num_batched_tokens": 2048}),
        (7253180842, 18445, 276615, 8.44),
        [(12, 16, 32768)] * 2,
    ),
    "Falcon-H1-7B": (
        (FALCON_H1_7B, {"max_num_batched_tokens": 4096}),
        (29155889152, 412, 562517, 34.33),
        [(44, 1568, 1605632), (44, 16384, 1605632)],
    ),
}


@pytest.mark.parametrize("case", MEASURED)
def test_measured_starts(case: str) -> None:
    (architecture, changes), (available, blocks, tokens, concurrency), groups = MEASURED[case]
    length = changes.get("max_model_len", 16384)
    layouts = laid(architecture, version=(0, 25, 1), **changes)
    assert [(group.layers, group.block_size, group.page_bytes) for group in layouts[0].groups] == groups
    assert kv_cache.num_blocks(layouts, available) == blocks
    assert kv_cache.tokens(layouts, available, length) == tokens
    assert round(kv_cache.concurrency(layouts, available, length), 2) == concurrency


@pytest.mark.parametrize(
    ("architecture", "gib", "blocks", "tokens", "concurrency"),
    [(QWEN25_7B, 13.31, 31162, 498592, 30.43), (DEEPSEEK_V2_LITE, 5.79, 12494, 199904, 12.20)],
)
def test_measured_starts_on_two_gpus(
    architecture: Architecture, gib: float, blocks: int, tokens: int, concurrency: float
) -> None:
    """Of these the log gives the available memory to two places only."""
    layouts = laid(architecture, version=(0, 25, 1), tensor_parallel_size=2)
    available = blocks * layouts[0].bytes_per_block
    least, most = (kv_cache.num_blocks(layouts, int((gib + edge) * GIB)) for edge in (-0.005, 0.005))
    assert least <= blocks <= most
    assert kv_cache.tokens(layouts, available, 16384) == tokens
    assert round(kv_cache.concurrency(layouts, available, 16384), 2) == concurrency


# --- pages ---------------------------------------------------------------------------------------------------


def test_kv_heads_are_replicated_where_there_are_more_gpus() -> None:
    pages = [one(LLAMA_8B, tensor_parallel_size=tp).groups[0].page_bytes for tp in (1, 2, 4, 8, 16)]
    assert pages == [65536, 32768, 16384, 8192, 8192]


@pytest.mark.parametrize(
    ("dtype", "of_token"),
    [
        ("auto", 2 * 128 * 2),
        ("bfloat16", 2 * 128 * 2),
        ("fp8", 2 * 128),
        ("fp8_e5m2", 2 * 128),
        ("nvfp4", 2 * (64 + 8)),
        ("fp8_per_token_head", 2 * (128 + 4)),
        ("int4_per_token_head", 2 * (64 + 4)),
    ],
)
def test_cache_dtypes(dtype: str, of_token: int) -> None:
    layout = one(LLAMA_8B, kv_cache_dtype=dtype, compute_capability=(10, 0))
    assert layout.groups[0].page_bytes == 16 * 8 * of_token


def test_the_models_own_dtype_counts() -> None:
    assert one(LLAMA_8B, dtype="float32").bytes_per_block == 2 * one(LLAMA_8B).bytes_per_block
    assert one(LLAMA_8B, dtype="float32", kv_cache_dtype="fp8").bytes_per_block * 2 == one(LLAMA_8B).bytes_per_block


def test_a_checkpoint_may_ask_for_an_fp8_cache() -> None:
    quantization = SimpleNamespace(method="compressed-tensors", kv_cache_dtype="fp8")
    assert kv_cache.cache_dtype(start(LLAMA_8B, quantization=quantization)) == "fp8"
    assert kv_cache.cache_dtype(start(LLAMA_8B, quantization=quantization, kv_cache_dtype="bfloat16")) == "bfloat16"


def test_a_cache_dtype_that_cannot_be_sized() -> None:
    with pytest.raises(PlanError, match=r"flags\.kv_cache_dtype is turboquant_k8v4.*set it to"):
        laid(LLAMA_8B, kv_cache_dtype="turboquant_k8v4")


@pytest.mark.parametrize(
    ("capability", "dtype", "block_size"),
    [
        ((8, 0), "auto", 16),
        ((9, 0), "auto", 16),
        ((9, 0), "fp8", 64),
        ((10, 0), "auto", 32),
        ((10, 0), "fp8", 32),
        ((12, 0), "auto", 16),
    ],
)
def test_block_size_of_mla(capability: tuple[int, int], dtype: str, block_size: int) -> None:
    layout = one(DEEPSEEK_V2_LITE, compute_capability=capability, kv_cache_dtype=dtype)
    assert layout.groups[0].block_size == block_size


def test_mla_is_the_same_on_every_gpu() -> None:
    assert one(DEEPSEEK_V2_LITE, tensor_parallel_size=8) == one(DEEPSEEK_V2_LITE)


@pytest.mark.parametrize(
    ("capability", "dtype", "of_token"),
    [
        ((9, 0), "auto", 1152 + 132),
        ((9, 0), "bfloat16", 1152 + 132),
        ((9, 0), "fp8", 656 + 132),
        ((10, 0), "fp8", 576 + 132),
        ((10, 0), "fp8_ds_mla", 656 + 132),
        ((12, 0), "auto", 656 + 132),
    ],
)
def test_sparse_attention_keeps_an_index(capability: tuple[int, int], dtype: str, of_token: int) -> None:
    sparse = model(*[(INDEXER, MLA)] * 61, name="DeepseekV32ForCausalLM", heads=128, experts=256)
    layout = one(sparse, compute_capability=capability, kv_cache_dtype=dtype)
    (group,) = layout.groups
    assert (group.kind, group.layers, group.block_size) == ("mla", 122, 64)
    assert layout.bytes_per_block == 61 * 64 * of_token


def test_a_block_size_that_was_asked_for() -> None:
    layout = one(LLAMA_8B, block_size=64)
    assert (layout.groups[0].block_size, layout.groups[0].page_bytes) == (64, 262144)


# --- groups --------------------------------------------------------------------------------------------------


def groups(architecture: Architecture, **changes: Any) -> list[tuple[str, int, int]]:
    return [(group.kind, group.layers, group.block_size) for group in one(architecture, **changes).groups]


def test_no_cache_at_all() -> None:
    layouts = laid(model(*[Attention("encoder", 12, 64, 64)] * 12, pooling=True))
    assert not kv_cache.needed(layouts)
    assert kv_cache.tokens(layouts, 0, 512) == 0
    assert kv_cache.concurrency(layouts, 0, 512) == math.inf
    assert kv_cache.bytes_for(layouts, 512, 1000) == (0,)
    assert kv_cache.longest(layouts, 0, 1000, 512) == 512


def test_layers_that_share_another_layers_cache_take_nothing() -> None:
    assert one(model(*[full(8)] * 20, *[()] * 10)).bytes_per_block == one(model(*[full(8)] * 20)).bytes_per_block


def test_layers_of_different_width_are_one_group() -> None:
    layout = one(model(full(8), full(4), full(8, 64)))
    assert [(group.kind, group.layers) for group in layout.groups] == [("full", 3)]
    assert layout.bytes_per_block == 16 * 512 * (8 + 4 + 4)


def test_a_model_of_windows_alone_is_one_group() -> None:
    layout = one(model(*[sliding(8, 4096)] * 32, name="MistralForCausalLM"), version=(0, 25, 1))
    assert [group.kind for group in layout.groups] == ["sliding"]
    assert layout.blocks_per_request(16384) == (4095 + 8192 + 15) // 16 + 1


@pytest.mark.parametrize(
    ("windows", "fulls", "sizes"),
    [
        (12, 12, [12, 12]),
        (13, 12, [13, 12]),  # padded to 13, for 12 would need another group
        (17, 12, [17, 12]),
        (18, 12, [9, 9, 12]),
        (52, 10, [9, 9, 9, 9, 8, 8, 10]),
    ],
)
def test_how_layers_are_shared_out(windows: int, fulls: int, sizes: list[int]) -> None:
    mixed = model(*[sliding(8, 1024)] * windows, *[full(8)] * fulls)
    assert [group.layers for group in one(mixed).groups] == sizes
    assert one(mixed).bytes_per_block == max(sizes) * 65536


def test_smaller_pages_get_larger_blocks() -> None:
    gemma4 = model(*[full(4, 512) if layer % 6 == 5 else sliding(16, 1024, 256) for layer in range(60)])
    assert groups(gemma4) == [*[("sliding", 10, 16)] * 5, ("full", 10, 32)]
    assert groups(gemma4, tensor_parallel_size=16) == [*[("sliding", 10, 32)] * 5, ("full", 10, 16)]


def test_pages_that_do_not_divide_are_padded() -> None:
    odd = model(sliding(8, 1024), full(12))
    assert {group.page_bytes for group in one(odd, version=(0, 24, 0)).groups} == {12 * 512 * 16}
    with pytest.raises(PlanError, match=r"layer 0 takes 65536 bytes .* 98304, which vLLM 0\.23\.0 cannot lay out"):
        laid(odd, version=(0, 23, 0))


def test_without_the_hybrid_manager_windows_are_stored_whole() -> None:
    layouts = kv_cache.layout(start(GEMMA3_1B), hybrid=False)
    assert [(group.kind, group.layers) for group in layouts[0].groups] == [("full", 26)]
    with pytest.raises(PlanError, match="disable_hybrid_kv_cache_manager is true"):
        kv_cache.layout(start(FALCON_H1_7B), hybrid=False)


def test_pipelines_take_the_blocks_of_the_poorest_rank() -> None:
    layouts = laid(model(*[full(8)] * 31), pipeline_parallel_size=2)
    assert [layout.groups[0].layers for layout in layouts] == [16, 15]
    available = [2000 * layouts[0].bytes_per_block, 1500 * layouts[1].bytes_per_block]
    assert kv_cache.num_blocks(layouts, available) == 1500
    assert kv_cache.bytes_for(layouts, 16, 99) == (100 * 16 * 65536, 100 * 15 * 65536)


def test_a_rank_without_a_cache_sets_no_bound() -> None:
    layouts = laid(model(full(8), ()), pipeline_parallel_size=2)
    assert kv_cache.num_blocks(layouts, [65536 * 10, 0]) == 10
    assert kv_cache.bytes_for(layouts, 16, 1) == (2 * 65536, 0)


# --- what a request takes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "in_flight"),
    [
        ({"version": (0, 25, 1)}, 8192),
        ({"version": (0, 26, 0)}, 2 * 8192),
        ({"version": (0, 26, 0), "async_scheduling": False}, 8192),
        ({"version": (0, 32, 0), "pipeline_parallel_size": 2}, 3 * 8192),
        # Experts and pipelines: the first model runner until 0.28, which does not overlap them.
        ({"version": (0, 26, 0), "pipeline_parallel_size": 2, "architecture": GPT_OSS_20B}, 2 * 8192),
        ({"version": (0, 26, 0), "architecture": GPT_OSS_20B}, 2 * 8192),
    ],
)
def test_windows_hold_what_is_in_flight(changes: dict[str, Any], in_flight: int) -> None:
    layouts = kv_cache.layout(start(**{"architecture": GEMMA3_1B, **changes}))
    assert {layout.in_flight_tokens for layout in layouts} == {in_flight}


def test_chunks_hold_what_is_in_flight() -> None:
    scout = model(*[full(8) if layer % 4 == 3 else Attention("chunked", 8, 128, 128, 8192) for layer in range(48)])
    layout = one(scout, version=(0, 25, 1), max_model_len=32768)
    assert layout.blocks_per_request(32768) * layout.bytes_per_block == int(3.75 * GIB)


@pytest.mark.parametrize("version", [(0, 25, 1), (0, 32, 0)])
def test_one_block_is_held_back(version: tuple[int, int, int]) -> None:
    layouts = laid(LLAMA_8B, version=version)
    (least,) = kv_cache.bytes_for(layouts, 16384, 1)
    assert least == (1024 + 1) * 32 * 65536
    assert kv_cache.concurrency(layouts, least - 32 * 65536, 16384) == 1.0
    assert kv_cache.users(layouts, least - 32 * 65536, 16384) == 0
    assert kv_cache.longest(layouts, least - 32 * 65536, 1, 131072) == 16384 - 16


# --- Mamba hybrids -------------------------------------------------------------------------------------------


OF_QWEN35 = gdn(keys=16, values=48, dtype="float32")
OF_KIMI = state("kda", (3, 4096), (32, 128, 128), dtype="float32")


@pytest.mark.parametrize(
    ("attention", "cell", "changes", "block_size"),
    [
        # As vLLM 0.25.1 says for Qwen3.5-27B, Qwen3.5-35B-A3B and Qwen3-Next-80B-A3B
        (full(4, 256), OF_QWEN35, {}, 784),
        (full(4, 256), OF_QWEN35, {"kv_cache_dtype": "fp8"}, 1568),
        (full(2, 256), gdn(keys=16, values=32, dtype="float32"), {}, 1056),
        (full(2, 256), gdn(keys=16, values=32, dtype="auto"), {}, 544),
        (full(4, 256), OF_QWEN35, {"block_size": 1024}, 1024),
        # FlashInfer's kernel keeps checkpoints at multiples of 64
        (full(4, 256), OF_QWEN35, {"version": (0, 33, 0)}, 832),
        (full(4, 256), OF_QWEN35, {"version": (0, 33, 0), "compute_capability": (8, 0)}, 784),
        (full(4, 256), OF_QWEN35, {"version": (0, 33, 0), "enable_prefix_caching": False}, 784),
        # MLA takes multiples of 128 from 0.27 on
        (MLA, OF_KIMI, {"version": (0, 26, 0)}, 1856),
        (MLA, OF_KIMI, {"version": (0, 27, 0)}, 1920),
    ],
)
def test_attention_blocks_grow_to_a_state(
    attention: Attention, cell: State, changes: dict[str, Any], block_size: int
) -> None:
    mixed = model(*[attention, cell, cell, cell] * 8)
    layout = one(mixed, **{"version": (0, 25, 1), **changes})
    assert {group.page_bytes for group in layout.groups} == {layout.groups[0].page_bytes}
    assert next(group.block_size for group in layout.groups if group.kind != "state") == block_size


@pytest.mark.parametrize(
    ("architecture", "changes", "held"),
    [
        (FALCON_H1_7B, {"version": (0, 27, 1)}, 1),
        (FALCON_H1_7B, {"version": (0, 28, 0)}, 2),
        (FALCON_H1_7B, {"version": (0, 31, 0)}, 2),
        (FALCON_H1_7B, {"version": (0, 32, 0)}, 3),
        (FALCON_H1_7B, {"enable_prefix_caching": False}, 1),
        (QWEN35_27B, {"version": (0, 27, 1)}, 1),
        (QWEN35_27B, {"version": (0, 27, 1), "enable_prefix_caching": True}, 2),
        (QWEN35_27B, {"version": (0, 32, 0)}, 2),
        (QWEN35_27B, {"version": (0, 33, 0)}, 3),
        (QWEN35_27B, {"version": (0, 33, 0), "compute_capability": (8, 9)}, 2),
        (replace(FALCON_H1_7B, pooling=True), {}, 1),
        (model(*[state("mamba1", (3, 8192), (8192, 16))] * 64, name="FalconMambaForCausalLM"), {}, 1),
    ],
)
def test_states_of_a_request(architecture: Architecture, changes: dict[str, Any], held: int) -> None:
    assert {group.held for group in one(architecture, **changes).groups if group.kind == "state"} == {held}


def test_states_for_every_block_are_not_sized() -> None:
    with pytest.raises(PlanError, match=r"flags\.enable_prefix_caching is true, and vLLM 0\.27\.1 .* leave it out"):
        laid(FALCON_H1_7B, version=(0, 27, 1), enable_prefix_caching=True)


def test_a_model_of_states_alone() -> None:
    layout = one(model(*[state("mamba1", (3, 8192), (8192, 16))] * 64, name="FalconMambaForCausalLM"))
    assert layout.bytes_per_block == 64 * 2 * (3 * 8192 + 16 * 8192)
    assert layout.blocks_per_request(1) == layout.blocks_per_request(1 << 20) == 1


# --- what must hold for any model ----------------------------------------------------------------------------

ATTENTION = st.one_of(
    st.builds(full, st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([64, 128, 256])),
    st.builds(sliding, st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 5000), st.sampled_from([64, 128, 256])),
)
DENSE = st.lists(ATTENTION, min_size=1, max_size=3).flatmap(
    lambda kinds: st.lists(st.sampled_from(kinds), min_size=4, max_size=40).map(lambda layers: model(*layers))
)
MODELS = st.one_of(DENSE, st.sampled_from([FALCON_H1_7B, QWEN35_27B, DEEPSEEK_V2_LITE, GPT_OSS_20B]))
VERSIONS = st.sampled_from([(0, minor, 0) for minor in range(24, 34)])
LENGTHS = st.integers(1, 200_000)
USERS = st.integers(1, 2000)


@st.composite
def layouts_of_any(draw: st.DrawFn) -> tuple[kv_cache.Layout, ...]:
    return laid(
        draw(MODELS),
        version=draw(VERSIONS),
        tensor_parallel_size=draw(st.sampled_from([1, 2, 4])),
        pipeline_parallel_size=draw(st.sampled_from([1, 2])),
        compute_capability=draw(st.sampled_from([(8, 9), (9, 0), (10, 0), (12, 0)])),
        max_num_batched_tokens=draw(st.integers(1, 16384)),
    )


@given(layouts_of_any(), LENGTHS, USERS)
def test_bytes_for_carries_so_many_users_and_no_less_does(
    layouts: tuple[kv_cache.Layout, ...], length: int, number: int
) -> None:
    least = kv_cache.bytes_for(layouts, length, number)
    assert kv_cache.users(layouts, least, length) == number
    assert kv_cache.concurrency(layouts, least, length) >= number
    for rank, layout in enumerate(layouts):
        less = [given_bytes - layout.bytes_per_block * (place == rank) for place, given_bytes in enumerate(least)]
        assert layout.bytes_per_block == 0 or kv_cache.users(layouts, less, length) == number - 1


@given(layouts_of_any(), st.integers(0, 200 * GIB), USERS, LENGTHS)
def test_longest_fits_and_more_does_not(
    layouts: tuple[kv_cache.Layout, ...], available: int, number: int, limit: int
) -> None:
    found = kv_cache.longest(layouts, available, number, limit)
    assert 0 <= found <= limit
    if found:
        assert max(kv_cache.bytes_for(layouts, found, number)) <= available
        assert kv_cache.users(layouts, available, found) >= number
    if found < limit:
        assert max(kv_cache.bytes_for(layouts, found + 1, number)) > available


@given(layouts_of_any(), st.integers(0, 200 * GIB), st.integers(0, 10 * GIB), LENGTHS)
def test_more_memory_never_means_less(
    layouts: tuple[kv_cache.Layout, ...], available: int, more: int, length: int
) -> None:
    assert kv_cache.tokens(layouts, available + more, length) >= kv_cache.tokens(layouts, available, length)
    assert kv_cache.users(layouts, available + more, length) >= kv_cache.users(layouts, available, length)
    assert kv_cache.longest(layouts, available + more, 1, length) >= kv_cache.longest(layouts, available, 1, length)


@given(layouts_of_any(), LENGTHS, LENGTHS, USERS)
def test_longer_requests_never_take_less(
    layouts: tuple[kv_cache.Layout, ...], one_length: int, other: int, number: int
) -> None:
    short, long = sorted((one_length, other))
    assert kv_cache.bytes_for(layouts, short, number) <= kv_cache.bytes_for(layouts, long, number)


@given(DENSE, VERSIONS, LENGTHS, USERS)
def test_fp8_never_takes_more(
    architecture: Architecture, version: tuple[int, int, int], length: int, number: int
) -> None:
    bf16 = kv_cache.bytes_for(laid(architecture, version=version), length, number)
    fp8 = kv_cache.bytes_for(laid(architecture, version=version, kv_cache_dtype="fp8"), length, number)
    assert fp8[0] * 2 == bf16[0]


@given(DENSE, VERSIONS, LENGTHS, USERS, st.sampled_from([1, 2, 4]))
def test_more_gpus_never_take_more_of_each(
    architecture: Architecture, version: tuple[int, int, int], length: int, number: int, tp: int
) -> None:
    heads = {cache.kv_heads for layer in architecture.layers for cache in layer.caches}
    assume(all(count % (2 * tp) == 0 or 2 * tp % count == 0 for count in heads))
    few = kv_cache.bytes_for(laid(architecture, version=version, tensor_parallel_size=tp), length, number)
    many = kv_cache.bytes_for(laid(architecture, version=version, tensor_parallel_size=2 * tp), length, number)
    assert many[0] <= few[0]
