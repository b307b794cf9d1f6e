# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""What vLLM builds from config.json: parameters, caches, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
from ansible_collections.llmfleet.serving.plugins.module_utils._planner.architecture import (
    KNOWN,
    Attention,
    State,
    parse,
)
from ansible_collections.llmfleet.serving.plugins.module_utils._planner.errors import PlanError, UnknownArchitecture
from ansible_collections.llmfleet.serving.plugins.module_utils._planner.weights import parameters
from hypothesis import given
from hypothesis import strategies as st

# Figures of published models; what is expected is what vLLM's own model has, on torch's meta device or in a start.
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "sliding_window": 131072,
    "use_sliding_window": False,
}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "sliding_window": 512,
    "vocab_size": 262144,
    "max_position_embeddings": 32768,
}
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
}
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "vocab_size": 201088,
    "max_position_embeddings": 131072,
    "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096},
}
DEEPSEEK = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "vocab_size": 102400,
    "max_position_embeddings": 163840,
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096},
}
FALCON_H1 = {
    "architectures": ["FalconH1ForCausalLM"],
    "hidden_size": 3072,
    "intermediate_size": 12288,
    "num_hidden_layers": 44,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "mamba_d_ssm": 3072,
    "mamba_n_heads": 24,
    "mamba_d_head": 128,
    "mamba_d_state": 256,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
    "vocab_size": 130048,
    "max_position_embeddings": 262144,
}
QWEN3_NEXT = {
    "architectures": ["Qwen3NextForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "vocab_size": 151936,
    "max_position_embeddings": 262144,
}
GEMMA3_MM = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "sliding_window": 1024,
        "vocab_size": 262144,
    },
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 896,
        "patch_size": 14,
    },
}
MODELS = {
    "Llama-3.1-8B": (LLAMA, 8030261248),
    "Qwen2.5-7B": (QWEN2, 7615616512),
    "Qwen3-0.6B": (QWEN3, 596049920),
    "gemma-3-1b": (GEMMA3, 999885952),
    "Mixtral-8x7B": (MIXTRAL, 46702792704),
    "gpt-oss-20b": (GPT_OSS, 20914757184),
    "DeepSeek-V2-Lite": (DEEPSEEK, 15706484224),
    "Falcon-H1-7B": (FALCON_H1, 7585513568),
    "Qwen3-Next-80B-A3B": (QWEN3_NEXT, 79674391296),
    "gemma-3-4b": (GEMMA3_MM, 4299915632),
}


def without(config: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != key}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_vllms_model(name: str) -> None:
    config, expected = MODELS[name]
    assert parameters(parse(config)) == expected


def test_language_model_alone_has_no_vision_tower() -> None:
    # vLLM's model with language_model_only, on the meta device.
    assert parameters(parse(GEMMA3_MM), language_model_only=True) == 3880099328


# --- caches ---------------------------------------------------------------------------------------------------------


def test_full_attention() -> None:
    assert {cache for layer in parse(LLAMA).layers for cache in layer.caches} == {Attention("full", 8, 128, 128, None)}


def test_a_window_that_is_not_in_use_is_none() -> None:
    assert {cache.kind for layer in parse(QWEN2).layers for cache in layer.caches} == {"full"}


def test_every_sixth_layer_of_gemma3_is_full() -> None:
    caches = [layer.caches[0] for layer in parse(GEMMA3).layers]
    assert [index for index, cache in enumerate(caches) if cache.kind == "full"] == [5, 11, 17, 23]
    assert caches[0] == Attention("sliding", 1, 256, 256, 512)


def test_gpt_oss_slides_in_even_layers_and_has_sinks() -> None:
    found = parse(GPT_OSS)
    assert [layer.caches[0].window for layer in found.layers[:3]] == [128, None, 128]
    assert found.sinks


def test_mistral_slides_unless_its_config_says_null() -> None:
    mistral = {**LLAMA, "architectures": ["MistralForCausalLM"]}
    assert parse(mistral).layers[0].caches[0].window == 4096
    assert parse({**mistral, "sliding_window": None}).layers[0].caches[0].window is None


def test_mla_keeps_one_vector_for_all_heads() -> None:
    assert parse(DEEPSEEK).layers[3].caches == (Attention("mla", 1, 576, 512, None),)


def test_falcon_h1_has_attention_and_state_in_each_layer() -> None:
    attention, state = parse(FALCON_H1).layers[0].caches
    assert attention == Attention("full", 2, 128, 128, None)
    assert isinstance(state, State)
    assert state.shapes(1) == (((3, 3584), "auto"), ((24, 128, 256), "auto"))


def test_groups_of_mamba_are_replicated_where_ranks_outnumber_them() -> None:
    state = parse(FALCON_H1).layers[0].caches[1]
    assert state.shapes(2) == (((3, 2048), "auto"), ((12, 128, 256), "auto"))


def test_gated_delta_net() -> None:
    layers = parse(QWEN3_NEXT).layers
    assert [len(layer.caches) for layer in layers] == [1] * 48
    assert layers[3].caches[0] == Attention("full", 2, 256, 256, None)
    assert layers[0].caches[0].shapes(1) == (((3, 8192), "auto"), ((32, 128, 128), "auto"))


# --- longest request ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        (None, 32768),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        ({"rope_type": "linear", "factor": 2.0}, 65536),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}, 32768),
    ],
)
def test_longest_request_follows_the_rope(rope: dict[str, Any] | None, longest: int) -> None:
    assert parse({**QWEN2, "rope_scaling": rope}).max_position_embeddings == longest


def test_long_rope_is_not_used_by_default() -> None:
    long = {"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 4096}
    assert parse({**LLAMA, "architectures": ["Phi3ForCausalLM"], **long}).max_position_embeddings == 4096


# --- what is refused ------------------------------------------------------------------------------------------------


@given(st.text().filter(lambda name: name not in KNOWN))
def test_an_unknown_architecture_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnknownArchitecture, match="does not know"):
        parse({**LLAMA, "architectures": [name]})


@pytest.mark.parametrize("names", [None, [], "LlamaForCausalLM", [None], 3])
def test_architectures_that_are_no_list_of_names_are_refused(names: Any) -> None:
    with pytest.raises(UnknownArchitecture):
        parse({**LLAMA, "architectures": names})


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
@pytest.mark.parametrize("value", [0, -1, 1 << 40, "many", True, 2.5, [1]])
def test_absurd_figures_are_refused_with_their_key(key: str, value: Any) -> None:
    with pytest.raises(PlanError, match=key):
        parse({**LLAMA, key: value})


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (LLAMA, "hidden_size"),
        (LLAMA, "vocab_size"),
        (MIXTRAL, "num_local_experts"),
        (DEEPSEEK, "kv_lora_rank"),
        (FALCON_H1, "mamba_d_state"),
        (QWEN3_NEXT, "linear_num_value_heads"),
        (GEMMA3_MM, "text_config"),
        (GEMMA3_MM, "vision_config"),
    ],
)
def test_a_missing_key_is_named(config: dict[str, Any], key: str) -> None:
    with pytest.raises(PlanError, match=f"no {key}"):
        parse(without(config, key))


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(PlanError, match="do not divide"):
        parse({**LLAMA, "num_key_value_heads": 5})


def test_layer_types_must_be_one_for_each_layer() -> None:
    with pytest.raises(PlanError, match="layer_types for 1 of 26"):
        parse({**GEMMA3, "layer_types": ["sliding_attention"]})


@given(
    st.dictionaries(
        st.sampled_from(sorted(LLAMA)), st.one_of(st.none(), st.integers(), st.text(), st.lists(st.integers()))
    )
)
def test_whatever_a_config_says_is_planned_or_refused(changes: dict[str, Any]) -> None:
    try:
        found = parse({**LLAMA, "num_hidden_layers": 2, **changes})
    except PlanError:
        return
    assert all(math.prod(tensor.shape) > 0 for layer in found.layers for tensor in layer.tensors)
