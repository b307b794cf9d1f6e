# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""What vLLM runs on which GPU, by version, and what it takes where nothing is said."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ansible_collections.llmfleet.serving.plugins.module_utils._planner import support
from ansible_collections.llmfleet.serving.plugins.module_utils._planner.architecture import (
    Architecture,
    Attention,
    State,
)
from ansible_collections.llmfleet.serving.plugins.module_utils._planner.errors import PlanError
from hypothesis import given
from hypothesis import strategies as st
from planned import INDEXER, MLA, model

GIB = 1 << 30
T4, V100, A100, RTX3090, L40S, H100, B200 = (7, 5), (7, 0), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0)
RTX5090, SPARK = (12, 0), (12, 1)
NOW = (0, 32, 0)


LLAMA = model()
GPT_OSS = model(head_dim=64, name="GptOssForCausalLM", experts=32, sinks=True)
GEMMA3 = model(head_dim=256, name="Gemma3ForConditionalGeneration", mm_prefix=True, multimodal=True)
GEMMA4 = model(
    Attention("sliding", 16, 256, 256, 1024), Attention("full", 4, 512, 512), name="Gemma4ForConditionalGeneration"
)
DEEPSEEK_V3 = model(MLA, name="DeepseekV3ForCausalLM", heads=128, experts=256)
DEEPSEEK_V32 = model((INDEXER, MLA), name="DeepseekV32ForCausalLM", heads=128, experts=256)
GLM5 = model((INDEXER, MLA), name="GlmMoeDsaForCausalLM", heads=64, experts=256)
HYBRID = model(Attention("full", 8, 128, 128), State("mamba2", (), ()), name="FalconH1ForCausalLM")


def quantised(method: str, **changes: Any) -> Any:
    return SimpleNamespace(**{"method": method, "kv_cache_dtype": "auto", **changes})


def problem(architecture: Architecture = LLAMA, quantization: Any = None, **changes: Any) -> str | None:
    capability, release = changes.pop("capability", H100), changes.pop("release", NOW)
    return support.problem(architecture, quantization, changes, capability, release)


# --- versions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "release"),
    [
        ("0.22.0", (0, 22, 0)),
        ("v0.25.1", (0, 25, 1)),
        ("0.32", (0, 32, 0)),
        ("0.33.1rc2.dev3+g1234567.cu130", (0, 33, 1)),
    ],
)
def test_versions(text: str, release: tuple[int, int, int]) -> None:
    assert support.version(text) == support.Version(text, release)


@pytest.mark.parametrize("text", ["0.34.0", "0.40.2", "1.0"])
def test_newer_versions_are_planned_as_the_newest_that_is_known(text: str) -> None:
    found = support.version(text)
    assert found.release == support.NEWEST
    assert found.text == text
    assert found.warning == f"vLLM {text} is newer than the planner knows: it is planned as 0.33.0."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "0.21.9",
            r"engine_version is 0\.21\.9, and the planner knows vLLM from 0\.22\.0 on: take 0\.22",
        ),
        ("latest", r"engine_version is 'latest': give a version of vLLM, such as 0\.33\.0\."),
        ("", "engine_version is ''"),
    ],
)
def test_versions_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        support.version(text)


# --- the GPU and its driver ----------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", [T4, A100, RTX3090, L40S, H100, B200, RTX5090, SPARK])
def test_gpus_that_run_a_model_in_its_own_dtype(capability: tuple[int, int]) -> None:
    assert problem(capability=capability) is None


def test_gpus_that_the_wheels_are_not_built_for() -> None:
    assert problem(capability=V100) == (
        "the GPU has compute capability 7.0, and vLLM's wheels are built for CUDA 13, which needs 7.5: "
        "take a newer GPU, or build vLLM for CUDA 12 yourself"
    )


# --- dtype ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "asked", "capability", "resolved"),
    [
        (LLAMA, "auto", A100, "bfloat16"),
        (LLAMA, "auto", T4, "float16"),
        (LLAMA, "float16", A100, "float16"),
        (model(dtype="float16"), "auto", A100, "float16"),
        (model(dtype="float32"), "auto", A100, "bfloat16"),
        (model(dtype="float32", pooling=True), "auto", A100, "float16"),
        (GEMMA3, "auto", T4, "float32"),
    ],
)
def test_resolved_dtype(architecture: Architecture, asked: str, capability: tuple[int, int], resolved: str) -> None:
    assert support.resolve_dtype(architecture, None, asked, capability) == resolved


def test_dtypes_that_do_not_work() -> None:
    assert problem(dtype="bfloat16", capability=T4) == (
        "flags.dtype is bfloat16, which needs compute capability 8.0, and the GPU has 7.5: "
        "set flags.dtype to float16, or leave it out"
    )
    assert "vLLM refuses for Gemma3ForConditionalGeneration" in (problem(GEMMA3, dtype="float16") or "")


# --- quantisation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "capability", "release", "right"),
    [
        ("awq", T4, NOW, True),
        ("gptq", T4, NOW, True),
        ("fp8", T4, NOW, True),
        ("compressed-tensors", T4, NOW, True),
        ("modelopt", A100, (0, 26, 0), False),
        ("modelopt", A100, (0, 27, 0), True),
        ("modelopt", L40S, (0, 26, 0), True),
        ("modelopt_fp4", T4, NOW, True),
        ("mxfp4", T4, NOW, False),
        ("mxfp4", A100, NOW, True),
        ("bitsandbytes", A100, (0, 27, 1), True),
        ("bitsandbytes", A100, (0, 28, 0), False),
        ("gguf", A100, (0, 23, 0), True),
        ("gguf", A100, (0, 24, 0), False),
        ("aqlm", A100, NOW, False),
    ],
)
def test_quantisation(method: str, capability: tuple[int, int], release: tuple[int, int, int], right: bool) -> None:
    found = problem(quantization=quantised(method), capability=capability, release=release)
    assert (found is None) is right
    assert right or method in str(found)


def test_quantisation_messages() -> None:
    assert problem(quantization=quantised("bitsandbytes")) == (
        "the model is quantised by bitsandbytes, which vLLM 0.32.0 does not have any more: "
        "take a version before 0.28.0, or a variant in fp8, awq, gptq or compressed-tensors"
    )
    assert problem(quantization=quantised("mxfp4"), capability=T4) == (
        "the model is quantised by mxfp4, which needs compute capability 8.0 in vLLM 0.32.0, and the GPU has 7.5: "
        "take another variant of the model"
    )


# --- KV cache dtype and attention backend --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "cache_dtype", "capability", "release", "backend"),
    [
        (LLAMA, "auto", T4, NOW, "TRITON_ATTN"),
        (LLAMA, "auto", A100, NOW, "FLASH_ATTN"),
        (LLAMA, "auto", H100, NOW, "FLASH_ATTN"),
        (LLAMA, "auto", B200, NOW, "FLASHINFER"),
        (LLAMA, "auto", RTX5090, NOW, "FLASH_ATTN"),
        (LLAMA, "fp8", T4, NOW, None),
        (LLAMA, "bfloat16", T4, NOW, None),
        (LLAMA, "fp8", A100, NOW, "FLASHINFER"),
        (LLAMA, "fp8", RTX3090, (0, 22, 0), "FLASHINFER"),
        (LLAMA, "fp8", H100, NOW, "FLASH_ATTN"),
        (LLAMA, "fp8", B200, NOW, "FLASHINFER"),
        (LLAMA, "fp8_e5m2", H100, NOW, "FLASHINFER"),
        (model(head_dim=80), "auto", A100, NOW, "FLASH_ATTN"),
        (model(head_dim=80), "fp8", A100, NOW, None),
        (model(head_dim=80), "fp8", L40S, NOW, "TRITON_ATTN"),
        (model(head_dim=80), "auto", B200, NOW, "FLASH_ATTN"),
        (LLAMA, "int8_per_token_head", A100, NOW, "TRITON_ATTN"),
        (LLAMA, "nvfp4", B200, (0, 22, 0), "FLASHINFER"),
        (LLAMA, "nvfp4", H100, (0, 31, 0), None),
        (LLAMA, "nvfp4", H100, NOW, "FLASHINFER"),
        (LLAMA, "nvfp4", RTX5090, NOW, "FLASHINFER"),
        (GPT_OSS, "auto", A100, NOW, "TRITON_ATTN"),
        (GPT_OSS, "auto", H100, NOW, "FLASH_ATTN"),
        (GPT_OSS, "auto", B200, NOW, "FLASHINFER"),
        (GPT_OSS, "auto", RTX5090, (0, 27, 0), "TRITON_ATTN"),
        (GPT_OSS, "auto", RTX5090, (0, 28, 0), "FLASHINFER"),
        (GPT_OSS, "fp8", A100, NOW, None),
        (GPT_OSS, "nvfp4", H100, NOW, None),
        (GEMMA3, "auto", H100, NOW, "TRITON_ATTN"),
        (GEMMA3, "fp8", A100, NOW, None),
        (GEMMA4, "auto", RTX3090, NOW, "TRITON_ATTN"),
        (GEMMA4, "fp8", RTX3090, NOW, None),
        (GEMMA4, "auto", H100, NOW, "FLASH_ATTN"),
        (DEEPSEEK_V3, "auto", A100, NOW, "TRITON_MLA"),
        (DEEPSEEK_V3, "fp8", A100, NOW, None),
        (DEEPSEEK_V3, "auto", H100, NOW, "FLASH_ATTN_MLA"),
        (DEEPSEEK_V3, "fp8", H100, NOW, "FLASHMLA"),
        (DEEPSEEK_V3, "auto", B200, NOW, "FLASHINFER_MLA"),
        (DEEPSEEK_V3, "auto", RTX5090, NOW, "TRITON_MLA"),
        (DEEPSEEK_V32, "auto", A100, NOW, None),
        (DEEPSEEK_V32, "auto", H100, (0, 24, 0), "FLASHMLA_SPARSE"),
        (DEEPSEEK_V32, "auto", H100, NOW, "FLASH_ATTN_MLA_SPARSE"),
        (DEEPSEEK_V32, "fp8", H100, NOW, "FLASHMLA_SPARSE"),
        (DEEPSEEK_V32, "auto", B200, NOW, "FLASHMLA_SPARSE"),
        (DEEPSEEK_V32, "fp8", B200, NOW, "FLASHINFER_MLA_SPARSE"),
        (DEEPSEEK_V32, "fp8_ds_mla", B200, NOW, "FLASHMLA_SPARSE"),
        (DEEPSEEK_V32, "auto", RTX5090, (0, 23, 0), None),
        (DEEPSEEK_V32, "auto", RTX5090, NOW, "FLASHINFER_MLA_SPARSE_SM120"),
    ],
)
def test_attention_backend(
    architecture: Architecture,
    cache_dtype: str,
    capability: tuple[int, int],
    release: tuple[int, int, int],
    backend: str | None,
) -> None:
    assert support.attention_backend(architecture, cache_dtype, "bfloat16", capability, release) == backend
    found = problem(architecture, kv_cache_dtype=cache_dtype, capability=capability, release=release)
    assert (found is None) is (backend is not None)


def test_few_heads_on_a_gpu_change_the_sparse_backend() -> None:
    found = support.attention_backend(DEEPSEEK_V32, "auto", "bfloat16", B200, NOW, tensor_parallel_size=8)
    assert found == "FLASHINFER_MLA_SPARSE"


def test_float32_is_left_to_triton() -> None:
    assert support.attention_backend(LLAMA, "auto", "float32", H100, NOW) == "TRITON_ATTN"


@pytest.mark.parametrize(
    ("architecture", "asked", "capability", "release", "resolved"),
    [
        (LLAMA, "auto", H100, NOW, "auto"),
        (DEEPSEEK_V32, "bfloat16", H100, NOW, "auto"),
        (DEEPSEEK_V32, "fp8", H100, NOW, "fp8_ds_mla"),
        (DEEPSEEK_V32, "fp8", B200, NOW, "fp8"),
        (DEEPSEEK_V32, "auto", SPARK, NOW, "fp8_ds_mla"),
        (GLM5, "auto", B200, NOW, "fp8_e4m3"),
        (GLM5, "auto", B200, (0, 31, 0), "auto"),
        (GLM5, "auto", H100, NOW, "auto"),
    ],
)
def test_resolved_cache_dtype(
    architecture: Architecture,
    asked: str,
    capability: tuple[int, int],
    release: tuple[int, int, int],
    resolved: str,
) -> None:
    assert support.resolve_cache_dtype(architecture, None, asked, capability, release) == resolved


def test_a_checkpoint_may_ask_for_a_cache_dtype() -> None:
    found = {
        asked: support.resolve_cache_dtype(LLAMA, quantised("modelopt", kv_cache_dtype="fp8"), asked, H100, NOW)
        for asked in ("auto", "bfloat16")
    }
    assert found == {"auto": "fp8", "bfloat16": "bfloat16"}


def test_cache_dtype_messages() -> None:
    assert problem(GPT_OSS, kv_cache_dtype="fp8", capability=RTX3090) == (
        "the KV cache dtype is fp8, for which vLLM 0.32.0 has no attention backend on compute capability 8.6 for "
        "GptOssForCausalLM: set flags.kv_cache_dtype to bfloat16"
    )
    assert problem(kv_cache_dtype="nvfp4", release=(0, 31, 0)) == (
        "the KV cache dtype is nvfp4, for which vLLM 0.31.0 has no attention backend on compute capability 9.0 for "
        "LlamaForCausalLM: set flags.kv_cache_dtype to fp8 or bfloat16"
    )
    assert problem(DEEPSEEK_V32, capability=A100) == (
        "vLLM 0.32.0 has no attention backend for DeepseekV32ForCausalLM in bfloat16 on compute capability 8.0: "
        "take another GPU or another model"
    )
    assert (problem(kv_cache_dtype="fp8", capability=T4) or "").endswith("set flags.kv_cache_dtype to float16")
    assert "which the planner cannot size: give one of auto," in (problem(kv_cache_dtype="turboquant_k8v4") or "")
    assert "which vLLM has from 0.25.0 on" in (problem(kv_cache_dtype="int4_per_token_head", release=(0, 24, 0)) or "")


def test_a_cache_dtype_that_the_checkpoint_asks_for_is_checked() -> None:
    assert "the KV cache dtype is fp8" in (
        problem(GPT_OSS, quantised("mxfp4", kv_cache_dtype="fp8"), capability=A100) or ""
    )


@pytest.mark.parametrize(
    ("architecture", "capability", "block_size", "right"),
    [(LLAMA, H100, 32, True), (LLAMA, H100, 24, False), (DEEPSEEK_V3, B200, 16, True), (DEEPSEEK_V32, H100, 16, False)],
)
def test_block_sizes(architecture: Architecture, capability: tuple[int, int], block_size: int, right: bool) -> None:
    found = problem(architecture, capability=capability, block_size=block_size)
    assert (found is None) is right
    assert right or f"flags.block_size is {block_size}" in str(found)


def test_encoders_need_no_backend_for_a_cache() -> None:
    assert problem(model(Attention("encoder", 12, 64, 64), pooling=True)) is None


def test_prefixes_of_mamba_models() -> None:
    assert problem(HYBRID, enable_prefix_caching=True) is None
    assert problem(HYBRID, release=(0, 27, 0)) is None
    assert "flags.enable_prefix_caching is true" in (
        problem(HYBRID, enable_prefix_caching=True, release=(0, 27, 0)) or ""
    )
    assert [support.hybrid_prefix_caching((0, minor, 0)) for minor in (26, 27, 28, 32)] == [False, False, True, True]


# --- defaults ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("release", "gib", "name", "capability", "batch"),
    [
        ((0, 22, 0), 24, "NVIDIA GeForce RTX 4090", L40S, (2048, 256)),
        ((0, 32, 0), 44, "NVIDIA L40S", L40S, (2048, 256)),
        ((0, 32, 0), 79, "NVIDIA A100-SXM4-80GB", A100, (2048, 256)),
        ((0, 32, 0), 79, "NVIDIA H100 80GB HBM3", H100, (8192, 1024)),
        ((0, 25, 1), 139, "NVIDIA H200", H100, (8192, 1024)),
        ((0, 27, 1), 178, "NVIDIA B200", B200, (8192, 1024)),
        ((0, 28, 0), 178, "NVIDIA B200", B200, (16384, 1024)),
        ((0, 32, 0), 119, "NVIDIA GB10", SPARK, (8192, 1024)),
        ((0, 33, 0), 119, "NVIDIA GB10", SPARK, (2048, 256)),
    ],
)
def test_default_batch(
    release: tuple[int, int, int], gib: int, name: str, capability: tuple[int, int], batch: tuple[int, int]
) -> None:
    assert support.default_batch(release, gib * GIB, name, capability) == batch


@pytest.mark.parametrize(
    ("architecture", "quantization", "since"),
    [
        (model(name="Qwen3ForCausalLM"), None, 22),
        (LLAMA, None, 23),
        (LLAMA, quantised("awq"), 24),
        (model(name="Qwen2ForCausalLM"), None, 25),
        (model(name="DeepseekV2ForCausalLM", experts=64), None, 24),
        (model(name="MixtralForCausalLM", experts=8), None, 29),
        (model(name="KimiK3ForConditionalGeneration", experts=8), None, 27),
        (HYBRID, None, 29),
        (model(name="Qwen3ForCausalLM", pooling=True), None, 29),
    ],
)
def test_runner(architecture: Architecture, quantization: Any, since: int) -> None:
    found = {minor: support.runner(architecture, quantization, (0, minor, 0)) for minor in range(22, 34)}
    assert found == {minor: "v2" if minor >= since else "v1" for minor in range(22, 34)}


def test_capture_sizes() -> None:
    def sizes(seqs: int, *, release: tuple[int, int, int] = (0, 25, 1), capability: tuple[int, int] = H100) -> Any:
        return support.capture_sizes(LLAMA, seqs, 8192, release, capability)

    assert sizes(1) == (1, 2)
    assert sizes(8) == (1, 2, 4, 8, 16)
    assert len(sizes(256)) == len(sizes(1024)) == 51
    assert sizes(256)[-3:] == (480, 496, 512)
    assert len(sizes(1024, release=NOW, capability=B200)) == 83
    assert sizes(100)[-1] == sizes(100, release=NOW)[-1] == 200
    assert 100 not in sizes(100)
    assert 100 in sizes(100, release=(0, 31, 0))
    assert support.capture_sizes(LLAMA, 256, 100, NOW, H100)[-2:] == (96, 100)
    assert support.capture_sizes(GPT_OSS, 8, 8192, NOW, H100)[-1] == 1024


@given(
    st.integers(1, 2048),
    st.integers(1, 32768),
    st.integers(22, 33),
    st.sampled_from([A100, H100, B200]),
    st.sampled_from([LLAMA, GPT_OSS]),
)
def test_capture_sizes_ascend_within_the_batch(
    seqs: int, tokens: int, minor: int, capability: tuple[int, int], architecture: Architecture
) -> None:
    found = support.capture_sizes(architecture, seqs, tokens, (0, minor, 0), capability)
    assert list(found) == sorted(set(found))
    assert found[0] == 1
    assert found[-1] <= min(tokens, 1024)
