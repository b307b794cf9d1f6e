# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""How a checkpoint is quantized, and what a matrix takes after loading."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.llmfleet.serving.plugins.module_utils._planner.architecture import Tensor
from ansible_collections.llmfleet.serving.plugins.module_utils._planner.errors import PlanError
from ansible_collections.llmfleet.serving.plugins.module_utils._planner.quantization import matrices, parse

DOWN = Tensor("model.layers.0.mlp.down_proj.weight", (4096, 14336), "row", True)
QKV = Tensor("model.layers.7.self_attn.qkv_proj.weight", (6144, 4096), "qkv", True, (4096, 1024, 1024), 8)
WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}


def quantized(method: str, **more: Any) -> Any:
    return parse({"quantization_config": {"quant_method": method, **more}})


def compressed(weights: dict[str, Any], inputs: dict[str, Any] | None = None, **more: Any) -> Any:
    groups = {"group_0": {"weights": weights, "input_activations": inputs, "targets": ["Linear"]}}
    return quantized("compressed-tensors", config_groups=groups, **more)


def size(how: Any, capability: tuple[int, int] | None = (9, 0), tensor: Tensor = DOWN) -> tuple[int, ...]:
    return matrices(tensor, tensor.shape, tensor.parts, how, capability, 2)


def test_none_is_none() -> None:
    assert parse({"hidden_size": 8}) is None
    assert size(None) == (4096 * 14336 * 2,)


def test_awq_on_hopper_keeps_its_zeros_as_wide_as_the_scales() -> None:
    how = quantized("awq", bits=4, group_size=128, zero_point=True)
    groups = 4096 * 14336 // 128
    assert size(how) == (4096 * 14336 // 2, groups * 2, groups * 2)  # Machete
    assert size(how, (8, 6)) == (4096 * 14336 // 2, groups * 2, groups // 2)  # Marlin


def test_gptq_keeps_its_order_only_with_desc_act() -> None:
    groups = 4096 * 14336 // 128
    assert size(quantized("gptq", bits=4, group_size=128, sym=True), (8, 0)) == (4096 * 14336 // 2, groups * 2)
    ordered = quantized("gptq", bits=4, group_size=128, sym=True, desc_act=True)
    assert size(ordered, (8, 0)) == (4096 * 14336 // 2, groups * 2, 14336 * 4, 14336 * 4)


def test_fp8_blocks() -> None:
    how = quantized("fp8", weight_block_size=[128, 128], activation_scheme="dynamic")
    assert size(how) == (4096 * 14336, 32 * 112 * 4)
    assert size(how, (10, 0)) == (4096 * 14336, 4096 * 28 * 4)  # packed for DeepGEMM
    assert size(how, (8, 6)) == (4096 * 14336, 4096 * 112 * 2)  # Marlin


def test_fp8_has_one_scale_for_a_matrix() -> None:
    assert size(quantized("fp8", activation_scheme="static")) == (4096 * 14336, 4, 4, 4)


def test_compressed_tensors() -> None:
    channel = {"num_bits": 8, "type": "float", "strategy": "channel"}
    assert size(compressed(channel, {"num_bits": 8, "dynamic": True})) == (4096 * 14336, 4096 * 4)
    assert size(compressed(WEIGHTS), (8, 0)) == (4096 * 14336 // 2, 4096 * 112 * 2)
    assert size(compressed({"num_bits": 4, "type": "float", "group_size": 16}))[:2] == (4096 * 14336 // 2, 4096 * 896)


def test_mxfp4_is_of_experts_alone_and_padded_for_the_gpu() -> None:
    how = quantized("mxfp4")
    experts = Tensor("model.layers.0.mlp.experts.w13_weight", (32, 5760, 2880), "expert_column", True, (2880, 2880))
    assert how.of(QKV.name) is None
    assert how.of(experts.name) is how
    assert size(how, None, experts)[0] == 32 * 5760 * 2880 // 2
    assert size(how, (9, 0), experts)[0] == 32 * 5760 * 2880 // 2  # Triton
    assert size(how, (8, 0), experts)[0] == 32 * 5888 * 3072 // 2  # Marlin: 2944 and 3072
    assert size(how, (10, 0), experts)[0] == 32 * 6144 * 3072 // 2  # TRTLLM: 3072 and 3072


def test_modelopt_is_read_from_either_form_of_its_file() -> None:
    one = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}}
    two = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
    found = [parse({"quantization_config": each}) for each in (one, two)]
    assert found[0] == found[1]
    assert (found[0].scheme, found[0].group_size, found[0].ignore) == ("nvfp4", 16, ("lm_head",))


def test_mixed_precision_has_a_format_for_each_module() -> None:
    layers = {
        "model.layers.0.mlp.down_proj": {"quant_algo": "FP8"},
        "model.layers.7.self_attn.q_proj": {"quant_algo": "NVFP4"},
    }
    how = quantized("modelopt", quant_algo="MIXED_PRECISION", quantized_layers=layers)
    assert how.of(DOWN.name).scheme == "fp8"
    assert how.of(QKV.name).scheme == "nvfp4"
    assert how.of("model.layers.3.mlp.down_proj.weight") is None


@pytest.mark.parametrize(
    "pattern",
    [
        "model.layers.7.self_attn.q_proj",
        "model.layers.7.self_attn",
        "model.language_model.layers.7.self_attn.k_proj",
        "language_model.model.layers.7.self_attn.v_proj",
        "re:.*self_attn.*",
        "*self_attn*",
        "model.layers.7*",
    ],
)
def test_modules_are_ignored_by_the_names_of_the_checkpoint(pattern: str) -> None:
    how = quantized("fp8", ignored_layers=[pattern])
    assert how.of(QKV.name) is None
    assert how.of(DOWN.name) is how


def test_awq_ignores_by_a_part_of_the_name() -> None:
    how = quantized("awq", bits=4, group_size=128, modules_to_not_convert=["gate"])
    assert how.of("model.layers.0.block_sparse_moe.experts.w13_weight") is how
    assert how.of("model.layers.0.block_sparse_moe.gate.weight") is None


def test_a_cache_in_fp8_is_seen() -> None:
    assert quantized("modelopt", quant_algo="FP8", kv_cache_quant_algo="FP8").kv_cache_dtype == "fp8"
    assert quantized("fp8").kv_cache_dtype == "auto"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"quant_method": "sparkle"}, "'sparkle'"),
        ({}, None),
        ({"bits": 4}, "None"),
        ({"quant_method": "awq", "bits": 5, "group_size": 128}, "bits: 5"),
        ({"quant_method": "awq", "bits": 4, "group_size": -7}, "group_size: -7"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"x": 1}}, "dynamic"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "lm_head": True}, "lm_head"),
        ({"quant_method": "fp8", "weight_block_size": "128x128"}, "weight_block_size"),
        ({"quant_method": "compressed-tensors"}, "config_groups"),
        ({"quant_method": "modelopt", "quant_algo": "W3A3"}, "W3A3"),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "quantized_layers"),
    ],
)
def test_what_is_not_known_is_refused_by_name(config: dict[str, Any], says: str | None) -> None:
    if says is None:
        assert parse({"quantization_config": config}) is None
        return
    with pytest.raises(PlanError, match=says):
        parse({"quantization_config": config})


def test_a_broken_expression_is_refused() -> None:
    with pytest.raises(PlanError, match="regular expression"):
        quantized("fp8", ignored_layers=["re:("]).of(DOWN.name)
