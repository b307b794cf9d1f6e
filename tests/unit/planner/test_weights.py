# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""What vLLM logs as "Model loading took X GiB", against its own starts (docs/measurements.md) and against itself."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from ansible_collections.llmfleet.serving.plugins.module_utils._planner import quantization
from ansible_collections.llmfleet.serving.plugins.module_utils._planner.architecture import parse
from ansible_collections.llmfleet.serving.plugins.module_utils._planner.errors import PlanError
from ansible_collections.llmfleet.serving.plugins.module_utils._planner.weights import (
    allocated,
    indivisible,
    loaded,
    parameters,
    pp_layers,
    stored,
)
from hypothesis import given
from hypothesis import strategies as st
from test_architecture import (
    DEEPSEEK,
    FALCON_H1,
    GEMMA3,
    GEMMA3_MM,
    GPT_OSS,
    LLAMA,
    MIXTRAL,
    MODELS,
    QWEN2,
    QWEN3,
    QWEN3_NEXT,
)

MIB, GIB = 1 << 20, 1 << 30
OLD, NEW = (0, 25, 1), (0, 32, 0)
MXFP4 = {"quantization_config": {"quant_method": "mxfp4"}}
AWQ = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}}
FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def of(config: dict[str, Any], **more: Any) -> tuple[int, ...]:
    return loaded(parse(config), quantization.parse(config), **{"version": OLD, **more}).per_rank


# vLLM 0.25.1 on an H200, dummy weights: model_memory_usage in bytes.
@pytest.mark.parametrize(
    ("config", "measured", "permille"),
    [
        (QWEN2, 15343488000, 0),
        (QWEN3, 1203968000, 0),
        (MIXTRAL, 93414039552, 0),
        (FALCON_H1, 15278544896, 0),
        (GEMMA3, 2100253696, 0.2),
        (DEEPSEEK, 31505036288, 0.7),
        # A block freed by the rotary cache is taken again by a smaller matrix: 16 MiB more.
        (LLAMA, 16110919680, 1.1),
        ({**GPT_OSS, **MXFP4}, 13976352768, 2.3),
        ({**LLAMA, **AWQ}, 5893595136, 8.6),
    ],
)
def test_loaded_as_measured(config: dict[str, Any], measured: int, permille: float) -> None:
    (found,) = of(config)
    assert abs(found - measured) <= measured * permille / 1000


@pytest.mark.parametrize(("config", "logged"), [(QWEN2, 7.16), (DEEPSEEK, 14.75)])
def test_loaded_on_two_gpus_as_logged(config: dict[str, Any], logged: float) -> None:
    (found,) = of(config, tp=2)
    assert found / GIB == pytest.approx(logged, abs=0.025)


def test_files_by_arithmetic() -> None:
    assert stored(parse(LLAMA), None) == 16060522496
    awq = {**QWEN2, **AWQ}
    assert stored(parse(awq), quantization.parse(awq)) == 5570747392  # Qwen2.5-7B-Instruct-AWQ's files


@pytest.mark.parametrize(
    ("size", "counted"),
    [(1, 512), (512, 512), (9 * MIB + 1, 9 * MIB + 512), (31 * MIB + MIB // 2, 32 * MIB), (40 * MIB, 40 * MIB)],
)
def test_torch_rounds_up(size: int, counted: int) -> None:
    assert allocated(size) == counted


def test_large_tensors_below_20_mib_are_split_from_their_segment() -> None:
    assert allocated(12 * MIB + MIB // 4) == 12 * MIB + MIB // 4
    assert allocated(13 * MIB) == 14 * MIB


# --- splits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "pp", "expected"),
    [(32, 4, (8, 8, 8, 8)), (61, 4, (15, 15, 16, 15)), (7, 3, (2, 3, 2)), (5, 3, (2, 2, 1))],
)
def test_pipeline_ranks_have_layers_as_vllm_gives_them(layers: int, pp: int, expected: tuple[int, ...]) -> None:
    assert pp_layers(layers, pp) == expected


@pytest.mark.parametrize("name", MODELS)
@given(tp=st.sampled_from([1, 2, 4, 8]), pp=st.integers(1, 6), expert_parallel=st.booleans())
def test_ranks_together_hold_the_model(name: str, tp: int, pp: int, expert_parallel: bool) -> None:
    config, expected = MODELS[name]
    found = parse(config)
    if indivisible(found, None, tp, pp, expert_parallel, NEW):
        return
    result = loaded(found, None, tp=tp, pp=pp, expert_parallel=expert_parallel)
    assert result.parameters == expected
    assert len(result.per_rank) == pp
    assert sum(result.per_rank) * tp >= 2 * expected


@pytest.mark.parametrize("name", MODELS)
@given(pp=st.integers(1, 4), expert_parallel=st.booleans())
def test_more_ranks_never_make_one_larger(name: str, pp: int, expert_parallel: bool) -> None:
    found = parse(MODELS[name][0])
    possible = [tp for tp in (1, 2, 4, 8) if not indivisible(found, None, tp, pp, expert_parallel, NEW)]
    sizes = [loaded(found, None, tp=tp, pp=pp, expert_parallel=expert_parallel).per_rank for tp in possible]
    assert all(more <= less for pair in itertools.pairwise(sizes) for less, more in zip(*pair, strict=True))


def test_expert_parallelism_leaves_experts_whole() -> None:
    assert of(MIXTRAL, tp=2, expert_parallel=True) == of(MIXTRAL, tp=2)
    assert indivisible(parse(MIXTRAL), None, 16, 1, True, NEW) is None


@pytest.mark.parametrize(
    ("config", "tp", "pp", "why"),
    [
        (QWEN2, 8, 1, "28 attention heads are not divisible by tensor_parallel_size=8"),
        ({**LLAMA, "num_key_value_heads": 2, "num_attention_heads": 36, "head_dim": 128}, 3, 1, "2 key/value heads"),
        (LLAMA, 1, 33, "pipeline_parallel_size=33 is more than the 32 layers"),
        ({**QWEN2, **AWQ}, 4, 1, None),
        ({**LLAMA, **AWQ, "intermediate_size": 14336 + 128 * 4}, 8, 1, "1856 columns on each of 8 GPUs"),
        ({**LLAMA, **FP8, "intermediate_size": 1536}, 8, 1, "192 rows on each of 8 GPUs"),
        (LLAMA, 16, 1, None),
    ],
)
def test_splits_that_vllm_refuses(config: dict[str, Any], tp: int, pp: int, why: str | None) -> None:
    found = indivisible(parse(config), quantization.parse(config), tp, pp, False, NEW)
    assert found is None if why is None else why in str(found)


def test_key_value_heads_are_replicated_where_ranks_outnumber_them() -> None:
    qkv = [tensor for tensor in parse(GEMMA3).layers[0].tensors if "qkv" in tensor.name]
    assert qkv[0].kv_heads == 1
    assert 2 * of(GEMMA3, tp=4)[0] > of(GEMMA3, tp=2)[0]


# --- what changes it --------------------------------------------------------------------------------------------------


def test_the_vision_tower_is_loaded_unless_told_otherwise() -> None:
    whole, text = of(GEMMA3_MM)[0], of(GEMMA3_MM, language_model_only=True)[0]
    assert whole - text >= 2 * (parameters(parse(GEMMA3_MM)) - parameters(parse(GEMMA3_MM), True))


def test_float32_takes_twice_as_much() -> None:
    assert of(MIXTRAL, dtype="float32")[0] > 1.99 * of(MIXTRAL)[0]


def test_a_dtype_that_is_none_is_refused() -> None:
    with pytest.raises(PlanError, match="int3"):
        of(LLAMA, dtype="int3")


def test_mla_keeps_a_copy_of_quantized_projections() -> None:
    quantized, plain = of({**DEEPSEEK, **FP8})[0], parameters(parse(DEEPSEEK))
    copies = 27 * 16 * (128 + 128) * 512 * 2
    assert quantized > plain + 102400 * 2048 * 2 + copies


def test_headers_show_what_is_not_quantized() -> None:
    config = {**LLAMA, **AWQ}
    header = {"name": "model.layers.*.mlp.down_proj.weight", "dtype": "BF16", "shape": [4096, 14336], "count": 32}
    packed = {"name": "model.layers.*.self_attn.o_proj.qweight", "dtype": "I32", "shape": [512, 4096], "count": 32}
    found, how = parse(config), quantization.parse(config)
    without = loaded(found, how, version=OLD).per_rank[0]
    assert loaded(found, how, version=OLD, tensors=[packed]).per_rank[0] == without
    assert loaded(found, how, version=OLD, tensors=[header]).per_rank[0] > without + 32 * 4096 * 14336


def test_the_rotary_cache_of_qwen_vl_became_shorter() -> None:
    config = {**QWEN3, "rope_scaling": {"mrope_section": [24, 20, 20], "rope_type": "default"}}
    assert of(config, version=OLD)[0] - of(config, version=NEW)[0] == 3 * 40960 * 128 * 2


def test_gated_delta_net_is_loaded() -> None:
    assert of(QWEN3_NEXT)[0] >= 2 * parameters(parse(QWEN3_NEXT))
