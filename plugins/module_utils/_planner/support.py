# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: what vLLM can do on a GPU, by its version and the GPU's compute capability.

Each ``*_problem`` returns None, or why vLLM would not start as one sentence with the value and the remedy. Versions in
comments are those in whose wheel a rule was seen first; every minor release from 0.22 to 0.33 was looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .architecture import Architecture, Attention, State
from .errors import PlanError
from .quantization import Quantization
from .units import GIB

Release = tuple[int, int, int]
Capability = tuple[int, int]

OLDEST: Release = (0, 22, 0)
NEWEST: Release = (0, 33, 0)

# The wheels on PyPI are built for CUDA 13 (METADATA of 0.22.0 to 0.33.0: torch 2.11 to 2.13, nvidia-cutlass-dsl[cu13]).
OLDEST_CAPABILITY: Capability = (7, 5)  # CUDA 13 has no code generation for anything older

# platforms/cuda.py supported_dtypes, config/model.py _FLOAT16_NOT_SUPPORTED_MODELS, 0.22 to 0.33.
BFLOAT16_CAPABILITY: Capability = (8, 0)
NOT_IN_FLOAT16 = (
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration",
    "Glm4ForCausalLM",
)

# get_min_capability() of model_executor/layers/quantization/*.py. Later entries replace earlier ones.
METHODS: Mapping[str, tuple[tuple[Release, Capability], ...]] = {
    "awq": ((OLDEST, (7, 5)),),
    "awq_marlin": ((OLDEST, (7, 5)),),
    "compressed-tensors": ((OLDEST, (7, 0)),),
    "experts_int8": ((OLDEST, (8, 0)),),
    "bitsandbytes": ((OLDEST, (7, 0)),),
    "fbgemm_fp8": ((OLDEST, (8, 0)),),
    "fp8": ((OLDEST, (7, 5)),),  # below 8.9 as weight-only Marlin
    "fp_quant": ((OLDEST, (10, 0)),),
    "gguf": ((OLDEST, (6, 0)),),
    "gptq": ((OLDEST, (6, 0)),),
    "gptq_marlin": ((OLDEST, (7, 5)),),
    "gpt_oss_mxfp4": ((OLDEST, (8, 0)),),
    "humming": ((OLDEST, (7, 5)),),
    "inc": ((OLDEST, (6, 0)),),
    "modelopt": ((OLDEST, (8, 9)), ((0, 27, 0), (8, 0))),
    "modelopt_fp4": ((OLDEST, (7, 5)),),
    "modelopt_mixed": ((OLDEST, (8, 9)), ((0, 24, 0), (7, 5))),
    "modelopt_mxfp8": ((OLDEST, (8, 0)),),
    "moe_wna16": ((OLDEST, (7, 0)),),
    "mxfp4": ((OLDEST, (8, 0)),),
    "quark": ((OLDEST, (7, 0)),),
    "torchao": ((OLDEST, (7, 5)),),
}
# model_executor/layers/quantization/__init__.py QuantizationMethods: the first release without them.
REMOVED: Mapping[str, Release] = {"gguf": (0, 24, 0), "bitsandbytes": (0, 28, 0)}

# KV cache dtypes (config/cache.py CacheDType) that the planner can size, and the release that brought them.
CACHE_DTYPES: Mapping[str, Release] = {
    "auto": OLDEST,
    "float16": OLDEST,
    "bfloat16": OLDEST,
    "fp8": OLDEST,
    "fp8_e4m3": OLDEST,
    "fp8_e5m2": OLDEST,
    "fp8_ds_mla": OLDEST,
    "fp8_per_token_head": OLDEST,
    "int8_per_token_head": OLDEST,
    "int4_per_token_head": (0, 25, 0),
    "nvfp4": OLDEST,
}
# triton_attn.py from 0.25, mla/triton_mla.py from 0.26; before, their kernels did not compile for less either.
TRITON_FP8_CAPABILITY: Capability = (8, 9)
PLAIN = ("auto", "float16", "bfloat16")
FP8 = ("fp8", "fp8_e4m3")

# get_supported_kernel_block_sizes() of v1/attention/backends: 16, vLLM's default, is not among theirs.
BLOCK_SIZES: Mapping[str, int] = {
    "CUTLASS_MLA": 128,
    "FLASHINFER_MLA": 32,
    "FLASHINFER_MLA_SPARSE": 64,  # 32, but its indexer takes 64 alone (mla/indexer.py)
    "FLASHINFER_MLA_SPARSE_SM120": 64,
    "FLASHMLA": 64,
    "FLASHMLA_SPARSE": 64,
    "FLASH_ATTN_MLA_SPARSE": 64,
}
DEFAULT_BLOCK_SIZE = 16  # config/cache.py, 0.22 to 0.33

# config/vllm.py DEFAULT_V2_MODEL_RUNNER_ARCHITECTURES.
RUNNER_V2_FIRST = {
    (0, 22): ("Qwen3ForCausalLM",),
    (0, 23): ("LlamaForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM"),
}
RUNNER_V2_MOE = ("DeepseekV2ForCausalLM", "GraniteMoeForCausalLM", "Qwen2MoeForCausalLM")
RUNNER_V2_LATER: Mapping[str, Release] = {
    "InklingForCausalLM": (0, 26, 0),
    "InklingForConditionalGeneration": (0, 26, 0),
    "LongcatFlashNgramForCausalLM": (0, 26, 0),
    "KimiK3ForConditionalGeneration": (0, 27, 0),
    "DeepseekV4ForCausalLM": (0, 28, 0),
}


@dataclass(frozen=True)
class Version:
    """A version of vLLM as the user wrote it, and the release that it is planned as."""

    text: str
    release: Release
    warning: str | None = None


def version(text: str) -> Version:
    """The release of a version's text; refuses what is older than the planner knows."""
    match = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", str(text).strip())
    if not match:
        raise PlanError(f"engine_version is {text!r}: give a version of vLLM, such as {_dotted(NEWEST)}.")
    release = (int(match[1]), int(match[2]), int(match[3] or 0))
    if release < OLDEST:
        raise PlanError(
            f"engine_version is {text}, and the planner knows vLLM from {_dotted(OLDEST)} on: "
            f"take {_dotted(OLDEST)} or newer."
        )
    if release[:2] > NEWEST[:2]:
        known = _dotted(NEWEST)
        return Version(str(text), NEWEST, f"vLLM {text} is newer than the planner knows: it is planned as {known}.")
    return Version(str(text), release)


def problem(
    architecture: Architecture,
    quantization: Quantization | None,
    flags: Mapping[str, Any],
    compute_capability: Capability,
    release: Release,
) -> str | None:
    """The first thing that keeps vLLM from running this model on this GPU with these flags."""
    dtype = flags.get("dtype", "auto")
    resolved = resolve_dtype(architecture, quantization, dtype, compute_capability)
    cached = resolve_cache_dtype(
        architecture, quantization, flags.get("kv_cache_dtype", "auto"), compute_capability, release
    )
    return (
        capability_problem(compute_capability)
        or dtype_problem(architecture, dtype, compute_capability)
        or quantization_problem(quantization, compute_capability, release)
        or prefix_caching_problem(architecture, flags.get("enable_prefix_caching"), release)
        or cache_dtype_problem(
            architecture,
            cached,
            resolved,
            compute_capability,
            release,
            tensor_parallel_size=flags.get("tensor_parallel_size") or 1,
            block_size=flags.get("block_size"),
        )
    )


def capability_problem(compute_capability: Capability) -> str | None:
    if compute_capability < OLDEST_CAPABILITY:
        return (
            f"the GPU has compute capability {_dotted(compute_capability)}, and vLLM's wheels are built for CUDA 13, "
            f"which needs {_dotted(OLDEST_CAPABILITY)}: take a newer GPU, or build vLLM for CUDA 12 yourself"
        )
    return None


# -- dtype ------------------------------------------------------------------------------------------------------------


def resolve_dtype(
    architecture: Architecture, quantization: Quantization | None, dtype: str, compute_capability: Capability
) -> str:
    """The dtype that vLLM computes in (config/model.py _resolve_auto_dtype). A GPU without bfloat16 gets float16."""
    if dtype != "auto":
        return dtype
    supported = ["bfloat16", "float16", "float32"]
    if compute_capability < BFLOAT16_CAPABILITY:
        supported.remove("bfloat16")
    if architecture.name in NOT_IN_FLOAT16:
        supported.remove("float16")
    preferred = "float16" if architecture.pooling and "float16" in supported else supported[0]
    own = architecture.dtype if architecture.dtype != "float32" else preferred
    return own if own in supported else preferred


def dtype_problem(architecture: Architecture, dtype: str, compute_capability: Capability) -> str | None:
    if dtype == "bfloat16" and compute_capability < BFLOAT16_CAPABILITY:
        return (
            f"flags.dtype is bfloat16, which needs compute capability {_dotted(BFLOAT16_CAPABILITY)}, and the GPU has "
            f"{_dotted(compute_capability)}: set flags.dtype to float16, or leave it out"
        )
    if dtype == "float16" and architecture.name in NOT_IN_FLOAT16:
        return (
            f"flags.dtype is float16, which vLLM refuses for {architecture.name}: set it to bfloat16, or leave it out"
        )
    return None


# -- quantisation -----------------------------------------------------------------------------------------------------


def quantization_problem(
    quantization: Quantization | None, compute_capability: Capability, release: Release
) -> str | None:
    if quantization is None:
        return None
    method = quantization.method
    if method in REMOVED and release >= REMOVED[method]:
        return (
            f"the model is quantised by {method}, which vLLM {_dotted(release)} does not have any more: take a version "
            f"before {_dotted(REMOVED[method])}, or a variant in fp8, awq, gptq or compressed-tensors"
        )
    if method not in METHODS:
        return (
            f"the model is quantised by {method}, which the planner does not know: take a variant in fp8, awq or gptq"
        )
    needed = next(least for since, least in reversed(METHODS[method]) if release >= since)
    if compute_capability < needed:
        return (
            f"the model is quantised by {method}, which needs compute capability {_dotted(needed)} in vLLM "
            f"{_dotted(release)}, and the GPU has {_dotted(compute_capability)}: take another variant of the model"
        )
    return None


# -- KV cache dtype and attention backend -----------------------------------------------------------------------------


def resolve_cache_dtype(
    architecture: Architecture,
    quantization: Quantization | None,
    cache_dtype: str,
    compute_capability: Capability,
    release: Release,
) -> str:
    """The KV cache dtype as vLLM resolves it: the flag, else the checkpoint's, else "auto" for the model's dtype."""
    if cache_dtype == "auto" and quantization is not None:
        cache_dtype = quantization.kv_cache_dtype or "auto"
    sparse = _has(architecture, "indexer")
    if sparse and cache_dtype == "bfloat16":  # models/config.py DeepseekV32ForCausalLM
        cache_dtype = "auto"
    if architecture.name == "GlmMoeDsaForCausalLM" and cache_dtype == "auto":  # models/config.py, 0.32
        cache_dtype = "fp8_e4m3" if compute_capability[0] == 10 and release >= (0, 32, 0) else "auto"
    # layers/attention/mla_attention.py _canonicalize_sparse_mla_kv_cache_dtype
    if sparse and compute_capability[0] == 12 and cache_dtype in ("auto", *FP8):
        cache_dtype = "fp8_ds_mla"
    if sparse and compute_capability[0] == 9 and cache_dtype in FP8:
        cache_dtype = "fp8_ds_mla"
    return cache_dtype


def cache_dtype_problem(
    architecture: Architecture,
    cache_dtype: str,
    dtype: str,
    compute_capability: Capability,
    release: Release,
    *,
    tensor_parallel_size: int = 1,
    block_size: int | None = None,
) -> str | None:
    """Why there is no attention backend for this KV cache dtype and block size, or None."""
    has = f"compute capability {_dotted(compute_capability)}"
    if cache_dtype not in CACHE_DTYPES:
        return (
            f"flags.kv_cache_dtype is {cache_dtype}, which the planner cannot size: give one of "
            f"{', '.join(sorted(CACHE_DTYPES))}"
        )
    if release < CACHE_DTYPES[cache_dtype]:
        since = _dotted(CACHE_DTYPES[cache_dtype])
        return f"flags.kv_cache_dtype is {cache_dtype}, which vLLM has from {since} on: take {since}, or set it to auto"

    def found(cached: str, size: int | None) -> str | None:
        return attention_backend(
            architecture,
            cached,
            dtype,
            compute_capability,
            release,
            tensor_parallel_size=tensor_parallel_size,
            block_size=size,
        )

    if not any(isinstance(cache, Attention) for cache in _caches(architecture)) or found(cache_dtype, block_size):
        return None
    if block_size is not None and found(cache_dtype, None):
        right = BLOCK_SIZES.get(found(cache_dtype, None) or "", DEFAULT_BLOCK_SIZE)
        return f"flags.block_size is {block_size}, and no attention backend takes it: give a multiple of {right}"
    if found("auto", block_size):
        works = [name for name in ("fp8", dtype) if name != cache_dtype and found(name, block_size)]
        return (
            f"the KV cache dtype is {cache_dtype}, for which vLLM {_dotted(release)} has no attention backend on {has} "
            f"for {architecture.name}: set flags.kv_cache_dtype to {' or '.join(works) or 'auto'}"
        )
    return (
        f"vLLM {_dotted(release)} has no attention backend for {architecture.name} in {dtype} on {has}: "
        "take another GPU or another model"
    )


def prefix_caching_problem(architecture: Architecture, asked: bool | None, release: Release) -> str | None:
    """models/config.py MambaModelConfig: mamba_cache_mode is "all" there, for Mamba 1 and 2."""
    kinds = {cache.kind for cache in _caches(architecture) if isinstance(cache, State)}
    if asked and release < (0, 28, 0) and kinds & {"mamba1", "mamba2"}:
        return (
            f"flags.enable_prefix_caching is true, and vLLM {_dotted(release)} then keeps a Mamba state for every "
            "block, which the planner cannot size: leave it out, or take vLLM 0.28.0 or newer"
        )
    return None


def attention_backend(
    architecture: Architecture,
    cache_dtype: str,
    dtype: str,
    compute_capability: Capability,
    release: Release,
    *,
    tensor_parallel_size: int = 1,
    block_size: int | None = None,
) -> str | None:
    """The backend that vLLM chooses by itself (platforms/cuda.py _get_backend_priorities), or None where none does.

    FlashInfer counts as installed: every release requires it on CUDA.
    """
    if _has(architecture, "indexer"):
        backends = _sparse_mla(architecture.heads // tensor_parallel_size, cache_dtype, compute_capability, release)
    elif _has(architecture, "mla"):
        backends = _mla(cache_dtype, compute_capability)
    else:
        backends = _dense(architecture, cache_dtype, compute_capability, release)
    if dtype == "float32":
        backends = iter([name for name in backends if name in ("TRITON_ATTN", "FLEX_ATTENTION")])
    for name in backends:
        if block_size is None or block_size % BLOCK_SIZES.get(name, DEFAULT_BLOCK_SIZE) == 0:
            return name
    return None


def _sparse_mla(heads: int, cache_dtype: str, capability: Capability, release: Release) -> Iterator[str]:
    plain = cache_dtype in PLAIN
    if capability[0] == 10:
        order = ["FLASHMLA_SPARSE", "FLASHINFER_MLA_SPARSE"]
        if heads <= 16 or not plain:
            order.reverse()
        if cache_dtype == "fp8_ds_mla":
            order.remove("FLASHINFER_MLA_SPARSE")
        yield from order if plain or cache_dtype in (*FP8, "fp8_ds_mla") else ()
    elif capability[0] == 12:
        if release >= (0, 24, 0) and (cache_dtype in ("auto", "fp8_ds_mla", *FP8)):
            yield "FLASHINFER_MLA_SPARSE_SM120"
    elif capability[0] == 9:
        if plain and release >= (0, 25, 0):
            yield "FLASH_ATTN_MLA_SPARSE"
        if plain or cache_dtype in (*FP8, "fp8_ds_mla"):
            yield "FLASHMLA_SPARSE"


def _mla(cache_dtype: str, capability: Capability) -> Iterator[str]:
    plain = cache_dtype in PLAIN
    if not plain and cache_dtype not in FP8:
        return
    if capability[0] == 10:
        yield from ("FLASHINFER_MLA", "CUTLASS_MLA")
    if capability[0] == 9 and plain:
        yield "FLASH_ATTN_MLA"
    if capability[0] in (9, 10):
        yield "FLASHMLA"
    if plain or capability >= TRITON_FP8_CAPABILITY:
        yield "TRITON_MLA"


def _dense(architecture: Architecture, cache_dtype: str, capability: Capability, release: Release) -> Iterator[str]:
    sizes = {cache.head_dim for cache in _caches(architecture) if isinstance(cache, Attention)} or {
        architecture.head_dim
    }
    if cache_dtype == "bfloat16" and capability < BFLOAT16_CAPABILITY:
        return
    order = ["FLASH_ATTN", "FLASHINFER"]
    if capability[0] == 10:
        order.reverse()
    checks = {"FLASH_ATTN": _flash_attn, "FLASHINFER": _flashinfer}
    if architecture.name.startswith("Gemma4") and len(sizes) > 1 and capability[0] not in (9, 10):
        order = []  # models/config.py Gemma4Config: Triton alone where there is no FlashAttention 4
    for name in order:
        if all(checks[name](size, architecture, cache_dtype, capability, release) for size in sizes):
            yield name
    if cache_dtype in PLAIN or cache_dtype.endswith("_per_token_head"):
        yield "TRITON_ATTN"
    if cache_dtype in (*FP8, "fp8_e5m2") and capability >= TRITON_FP8_CAPABILITY:
        yield "TRITON_ATTN"
    if cache_dtype in PLAIN and not architecture.sinks:
        yield "FLEX_ATTENTION"


def _flash_attn(
    head_size: int, architecture: Architecture, cache_dtype: str, capability: Capability, release: Release
) -> bool:
    """flash_attn.py and fa_utils.py: FlashAttention 3 or 4 on 9.x, 4 on 10.x, else 2."""
    if capability < (8, 0) or head_size % 8 or head_size > (512 if capability[0] in (9, 10) else 256):
        return False
    if architecture.mm_prefix or (architecture.sinks and capability[0] not in (9, 10)):
        return False
    if cache_dtype in PLAIN:
        return True
    if cache_dtype not in FP8:
        return False
    if capability[0] == 9:
        return head_size <= 256 or (head_size == 512 and release >= (0, 31, 0))
    return (
        capability[0] == 10
        and release >= (0, 27, 0)
        and (head_size <= 128 or (head_size == 256 and release >= (0, 29, 0)))
    )


def _flashinfer(
    head_size: int, architecture: Architecture, cache_dtype: str, capability: Capability, release: Release
) -> bool:
    """flashinfer.py FlashInferBackend."""
    if not (8, 0) <= capability <= (12, 1) or head_size not in (64, 128, 256, 512):
        return False
    sinks = architecture.sinks
    since = {10: OLDEST, 12: (0, 28, 0), 9: (0, 30, 0)}.get(capability[0])
    if architecture.mm_prefix or (sinks and (since is None or release < since)):
        return False
    if cache_dtype == "nvfp4":
        return capability[0] == 10 or (
            release >= (0, 32, 0) and capability[0] in (8, 9, 12) and head_size != 64 and not sinks
        )
    return cache_dtype in (*PLAIN, *FP8, "fp8_e5m2")


@lru_cache(maxsize=64)
def _caches(architecture: Architecture) -> tuple[Any, ...]:
    """The kinds of cache that the layers have, each once."""
    found = (cache for layer in architecture.layers for cache in layer.caches if cache.kind != "encoder")
    return tuple(dict.fromkeys(found))


def _has(architecture: Architecture, kind: str) -> bool:
    return any(isinstance(cache, Attention) and cache.kind == kind for cache in _caches(architecture))


# -- defaults ---------------------------------------------------------------------------------------------------------


def default_batch(release: Release, total_bytes: int, gpu_name: str, compute_capability: Capability) -> tuple[int, int]:
    """``max_num_batched_tokens`` and ``max_num_seqs`` of a server: engine/arg_utils.py get_batch_defaults."""
    if release >= (0, 28, 0) and total_bytes >= 160 * GIB:
        return 16384, 1024
    spark = release >= (0, 33, 0) and compute_capability == (12, 1)
    if total_bytes >= 70 * GIB and "a100" not in gpu_name.lower() and not spark:
        return 8192, 1024
    return 2048, 256


def runner(architecture: Architecture, quantization: Quantization | None, release: Release) -> str:
    """The model runner, "v1" or "v2", that vLLM takes by default: config/vllm.py use_v2_model_runner."""
    if release >= (0, 29, 0):
        return "v2"
    name, states = architecture.name, [cache for cache in _caches(architecture) if isinstance(cache, State)]
    if architecture.pooling:
        return "v1"
    if release < (0, 24, 0):
        chosen = name in RUNNER_V2_FIRST[release[:2]] and quantization is None
    elif release < (0, 25, 0):
        chosen = name in (*RUNNER_V2_FIRST[(0, 23)], *RUNNER_V2_MOE)
    else:
        listed = name in RUNNER_V2_MOE or release >= RUNNER_V2_LATER.get(name, (1, 0, 0))
        chosen = listed or (not states and not architecture.experts)
        if states and release < (0, 27, 0):
            chosen = False
    return "v2" if chosen else "v1"


def hybrid_prefix_caching(release: Release) -> bool:
    """Whether models with Mamba layers cache prefixes by default: engine/arg_utils.py and config/model.py, 0.28."""
    return release >= (0, 28, 0)


def capture_sizes(
    architecture: Architecture,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    release: Release,
    compute_capability: Capability,
) -> tuple[int, ...]:
    """Batch sizes that CUDA graphs are captured for, ascending: config/vllm.py _set_cudagraph_sizes."""
    most = 1024 if release >= (0, 28, 0) and compute_capability[0] == 10 else 512
    largest = min(2 * max_num_seqs, most)
    extra = {max_num_seqs} if release >= (0, 31, 0) and max_num_seqs <= largest else set()
    if architecture.name == "GptOssForCausalLM":  # models/config.py GptOssForCausalLMConfig
        largest, extra = 1024, set()
    largest = min(largest, max_num_batched_tokens)
    sizes = {size for size in (1, 2, 4) if size <= largest}
    sizes |= set(range(8, min(largest + 1, 256), 8)) | set(range(256, largest + 1, 16))
    sizes |= {size for size in extra if size <= max_num_batched_tokens}
    if max_num_batched_tokens <= largest:
        sizes.add(max_num_batched_tokens)
    return tuple(sorted(sizes))


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(str(number) for number in numbers)
