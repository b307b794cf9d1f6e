# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""From a wish and GPUs to a plan or a refusal: the order of preference, and what holds for all of them."""

# ruff: noqa: PLR0917 (what Hypothesis draws)
from __future__ import annotations

import copy
import time
from typing import Any

import pytest
from ansible_collections.llmfleet.serving.plugins.module_utils._planner import pack, support, wish
from ansible_collections.llmfleet.serving.plugins.module_utils._planner.errors import PlanError
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from planned import (
    BERT,
    BIG,
    GIB,
    LLAMA,
    MIB,
    MODELS,
    PARTS,
    QWEN,
    TINY,
    cards,
    document,
    gpu,
    plan,
    planned,
    refusal,
    wished,
)

ANY_MODEL = st.sampled_from(sorted(MODELS))
VERSIONS = st.sampled_from(["0.22.0", "0.25.1", "0.29.0", "0.32.0", "0.33.0", "0.40"])
SIZES = st.sampled_from([8, 16, 24, 48, 80, 141])
FALCON, SCOUT = "tiiuae/Falcon-H1-7B-Instruct", "RedHatAI/Llama-4-Scout-17B-16E-Instruct-FP8-dynamic"


# -- what holds for any wish; planned() checks each plan against what vLLM checks at a start


@settings(max_examples=15)
@given(
    ANY_MODEL,
    VERSIONS,
    SIZES,
    st.sampled_from([1, 2, 4]),
    st.none() | st.integers(1, 300),
    st.none() | st.integers(1, 200_000),
    st.floats(0, 1),
)
def test_every_plan_satisfies_the_checks_of_a_start(
    model: str, version: str, size: int, number: int, users: int | None, context: int | None, free: float
) -> None:
    gpus = cards(number, size, free_bytes=int(size * GIB * free))
    planned([wished(model, users=users, context=context)], gpus, version)


@settings(max_examples=12)
@given(
    ANY_MODEL,
    st.fixed_dictionaries(
        {},
        optional={
            "max_num_seqs": st.integers(1, 600),
            "max_num_batched_tokens": st.integers(1, 20_000),
            "gpu_memory_utilization": st.floats(0.01, 1),
            "kv_cache_memory_bytes": st.integers(1, 40 * GIB),
            "max_model_len": st.integers(1, 40_000),
            "enforce_eager": st.booleans(),
            "kv_cache_dtype": st.sampled_from(["auto", "fp8", "bfloat16", "nonsense"]),
            "tensor_parallel_size": st.integers(1, 5),
            "enable_prefix_caching": st.booleans(),
            "enable_chunked_prefill": st.booleans(),
            "disable_hybrid_kv_cache_manager": st.booleans(),
            "block_size": st.sampled_from([1, 16, 64, 128]),
        },
    ),
)
def test_fixed_flags_are_kept_or_refused(model: str, flags: dict[str, Any]) -> None:
    planned([wished(model, flags=flags)], cards(2, 48))


@settings(max_examples=15)
@given(ANY_MODEL, st.integers(1, 200), st.integers(256, 16384), st.integers(0, 80 * 1024), st.integers(0, 4096))
def test_more_memory_never_plans_less(model: str, users: int, context: int, free: int, more: int) -> None:
    """With one batch; a larger one, which more memory may allow, takes of the KV cache what it needs."""
    flags = {"max_num_batched_tokens": 2048, "enforce_eager": False}
    asked = wished(model, users=users, context=min(context, 8192), flags=flags)
    less, much = (planned([asked], [gpu(80, free_bytes=min(80 << 10, size) * MIB)])[0] for size in (free, free + more))
    if "plan" in less:
        assert "plan" in much
        assert much["plan"]["kv_cache_tokens"] >= less["plan"]["kv_cache_tokens"]


@settings(max_examples=15)
@given(ANY_MODEL, st.integers(1, 256), st.integers(256, 8192), SIZES, st.sampled_from([1, 2, 4]), st.integers(1, 256))
def test_fewer_users_never_need_more(model: str, users: int, context: int, size: int, number: int, fewer: int) -> None:
    gpus = cards(number, size)
    answer = planned([wished(model, users=users, context=context)], gpus)[0]
    less = planned([wished(model, users=max(1, users - fewer), context=context)], gpus)[0]
    if "plan" in answer:
        assert "plan" in less
        assert len(less["plan"]["gpus"]) <= len(answer["plan"]["gpus"])
    elif "refusal" in less:
        needs, of_less = answer["refusal"]["needs"], less["refusal"]["needs"]
        assert needs["what"] != of_less["what"] or of_less["bytes"] <= needs["bytes"] + 16 * MIB


@settings(max_examples=12)
@given(
    ANY_MODEL, st.integers(1, 400), st.integers(1, 160_000), st.sampled_from([8, 16, 24, 80]), st.sampled_from([1, 2])
)
@example(QWEN, 128, 32768, 24, 1)
def test_what_is_offered_is_accepted(model: str, users: int, context: int, size: int, number: int) -> None:
    gpus = cards(number, size)
    answer = planned([wished(model, users=users, context=context, variants=[document(TINY)])], gpus)[0]
    assume("refusal" in answer)
    for fit in answer["refusal"]["fits"]:
        there = gpus if fit["gpus"] <= number and "GPUs like" not in fit["change"] else cards(8, size)
        again = plan(fit["source"], there, users=fit["users"], context=fit["context"], flags=fit["flags"])
        assert len(again["gpus"]) == fit["gpus"]


# -- nonsense --------------------------------------------------------------------------------------------------------

NONSENSE = st.sampled_from(
    [0, -1, 1, 3, 10**12, 10**30, 1.5, float("nan"), None, "", "16k", "x", True, [], [0], {}, {"type": "yarn"}]
)


@st.composite
def _broken(draw: st.DrawFn) -> dict[str, Any]:
    config = copy.deepcopy(MODELS[draw(ANY_MODEL)])
    if len(str(config.get("quantization_config", ""))) > 2000:
        config.pop("quantization_config")  # hundreds of names, each of which would be drawn
    for _ in range(draw(st.integers(1, 3))):
        inner = config
        key = draw(st.sampled_from(sorted(inner)))
        while isinstance(inner[key], dict) and inner[key] and draw(st.booleans()):
            inner = inner[key]
            key = draw(st.sampled_from(sorted(inner)))
        if draw(st.booleans()):
            inner[key] = copy.deepcopy(draw(NONSENSE))
        else:
            inner.pop(key)
        if not config:
            break
    return config


@settings(max_examples=50)
@given(_broken(), VERSIONS)
def test_broken_configs_are_planned_refused_or_an_error_that_speaks(config: dict[str, Any], version: str) -> None:
    asked = wish.wish({"name": "broken", "model": {"source": "broken", "config": config, "files": []}})
    try:
        pack.pack([asked], cards(2, 80), support.version(version))
    except PlanError as error:
        assert len(str(error)) > 20  # noqa: PT017


@settings(max_examples=20)
@given(
    st.sampled_from([0, 1, 1000, 10**6, GIB, 24 * GIB, 10**13]),
    st.sampled_from([0, 1, 10**6, 24 * GIB, 10**13]),
    st.sampled_from([1, 1000, 10**9, 10**15]),
    st.sampled_from([1, 17, 10**9, 10**15]),
    st.sampled_from([(0, 0), (7, 0), (7, 5), (8, 9), (10, 3), (12, 1), (99, 0)]),
)
def test_absurd_numbers(total: int, free: int, users: int, context: int, capability: tuple[int, int]) -> None:
    document_of = {
        "index": 0,
        "uuid": "GPU-00000000",
        "name": "x",
        "memory_total_bytes": total,
        "memory_free_bytes": free,
        "compute_capability": f"{capability[0]}.{capability[1]}",
    }
    planned([wished(TINY, users=users, context=context)], wish.gpus([document_of]))


@pytest.mark.parametrize("version", ["0.21", "0.21.9", "nightly", "", "latest"])
def test_versions_that_are_not_known(version: str) -> None:
    with pytest.raises(PlanError, match=r"^engine_version is .*(take|give a version)"):
        support.version(version)


# -- the order of preference ------------------------------------------------------------------------------------------


def test_the_fewest_gpus_then_tensor_then_pipeline() -> None:
    assert plan(QWEN, cards(4))["gpus"] == [0]
    two = plan("microsoft/phi-4", cards(4))
    assert two["gpus"] == [0, 1]
    assert two["flags"]["tensor_parallel_size"] == 2
    assert "pipeline_parallel_size" not in two["flags"]
    # its MLP cannot be cut along groups of 128 in two
    assert plan(BIG, cards(2, 80), users=16, context=8192)["flags"]["pipeline_parallel_size"] == 2


def test_smaller_batches_come_before_eager_and_eager_last() -> None:
    model, asked = "mistralai/Mixtral-8x7B-v0.1", {"users": 16, "context": 8192}
    assert plan(model, [gpu(141)], **asked)["flags"]["max_num_batched_tokens"] == 8192
    need = plan(model, [gpu(141)], **asked, flags={"max_num_batched_tokens": 2048})["memory"][0]
    small = plan(model, [gpu(141, free_bytes=sum(need[part] for part in PARTS[:6]) + int(17.8 * GIB))], **asked)
    assert small["flags"]["max_num_batched_tokens"] < 8192
    assert "enforce_eager" not in small["flags"]
    assert any("not vLLM's default of 8192" in reason for reason in small["reasons"])
    last = plan(QWEN, [gpu(24)], users=16, context=8192)
    assert last["flags"]["enforce_eager"] is True
    assert any("CUDA graphs are off" in warning for warning in last["warnings"])
    assert "enforce_eager" not in plan(QWEN, cards(2), users=16, context=8192)["flags"], "another GPU comes first"


def test_graphs_that_are_asked_for_are_kept() -> None:
    refused = refusal(QWEN, [gpu(24)], users=16, context=8192, flags={"enforce_eager": False})
    assert "without flags.enforce_eager" in [fit["change"] for fit in refused["fits"]]


def test_fixed_parallelism() -> None:
    four = plan(QWEN, cards(4), flags={"tensor_parallel_size": 4})
    assert four["gpus"] == [0, 1, 2, 3]
    assert four["reasons"][0] == "4 GPUs, tensor_parallel_size 4: as its flags say; they carry one request."
    assert plan(QWEN, cards(2), flags={"pipeline-parallel-size": "2"})["flags"]["pipeline_parallel_size"] == 2
    refused = refusal(QWEN, cards(3), flags={"tensor_parallel_size": 3})
    assert "28 attention heads are not divisible by tensor_parallel_size=3" in refused["reason"]
    assert refused["fits"][0]["change"] == "without flags.tensor_parallel_size"
    assert (
        "asks for 2 GPUs, and 1 GPU can be used" in refusal(QWEN, cards(1), flags={"tensor_parallel_size": 2})["reason"]
    )


def test_nvlink_pairs_are_preferred() -> None:
    four = [gpu(24, index, nvlink=frozenset({(3, 2, 1, 0)[index]})) for index in range(4)]
    assert plan("microsoft/phi-4", four)["gpus"] == [0, 3]


def test_cards_of_several_kinds_are_never_mixed() -> None:
    mixed = [gpu(24, 0), gpu(24, 1, name="NVIDIA Other"), gpu(16, 2)]
    refused = refusal("microsoft/phi-4", mixed)
    assert refused["fits"][-1]["change"] == "2 GPUs like NVIDIA Test instead of 1"
    assert (
        "3 kinds; cards that share a model must be alike"
        in refusal(QWEN, mixed, flags={"tensor_parallel_size": 2})["reason"]
    )


def test_a_mig_instance_goes_by_its_uuid_and_alone() -> None:
    parts = [gpu(20, 0, uuid=f"MIG-{n}", mig=True) for n in range(2)]
    assert plan(QWEN, parts)["environment"]["CUDA_VISIBLE_DEVICES"] == "MIG-0"
    assert refusal("microsoft/phi-4", parts)["fits"] == []


def test_a_desktop_on_the_card_lowers_the_utilization() -> None:
    bare, desktop = plan(TINY, [gpu(24)]), plan(TINY, [gpu(24, free_bytes=22 * GIB)])
    assert desktop["flags"]["gpu_memory_utilization"] < bare["flags"]["gpu_memory_utilization"] - 0.07
    assert desktop["memory"][0]["other_bytes"] == 2 * GIB
    assert desktop["warnings"] == ["GPU 0 is shared: 2.00 GiB of 24.00 GiB are held by others."]


def test_old_gpus() -> None:
    assert "compute capability 7.0" in refusal(TINY, [gpu(32, compute_capability=(7, 0))])["reason"]
    two = [gpu(32, 0, compute_capability=(7, 0), name="NVIDIA V100"), gpu(16, 1)]
    assert plan(TINY, two)["gpus"] == [1]


@pytest.mark.parametrize(
    ("model", "size", "seqs"),
    [(QWEN, 24, 256), (QWEN, 80, 1024), ("Qwen/Qwen3-30B-A3B-FP8", 79.2, 512), (SCOUT, 141, 256)],
)
def test_without_users_as_many_requests_as_the_cache_has_room_for(model: str, size: float, seqs: int) -> None:
    found = plan(model, [gpu(size, compute_capability=(9, 0))], context=8192)
    assert found["flags"]["max_num_seqs"] == seqs
    assert seqs == 256 or found["kv_cache_tokens"] >= seqs * 512


# -- refusals and messages --------------------------------------------------------------------------------------------


def test_more_than_the_model_can() -> None:
    refused = refusal(QWEN, [gpu(80)], context=40_000)
    assert refused["reason"] == (
        f"{QWEN} does not fit: context is 40000, and the model's own limit is 32768 tokens: give at most 32768."
    )
    assert [fit["context"] for fit in refused["fits"]] == [32768]
    assert "flags.max_model_len is 99999" in refusal(QWEN, [gpu(80)], flags={"max_model_len": 99999})["reason"]


def test_a_batch_smaller_than_the_requests_at_a_time() -> None:
    flags = {"max_num_batched_tokens": 100, "max_num_seqs": 200}
    refused = refusal(TINY, [gpu()], flags=flags)
    assert "flags.max_num_batched_tokens is 100, and requests at a time are 200: give at least 200" in refused["reason"]
    assert plan(TINY, [gpu(80)], users=3000, context=128)["flags"]["max_num_batched_tokens"] == 8192
    assert plan(TINY, [gpu(24)], users=2500, context=16)["flags"]["max_num_batched_tokens"] == 2500


def test_a_refusal_names_weights_and_what_is_there() -> None:
    refused = refusal(BIG, [gpu(24)])
    assert "39.5" in refused["reason"]
    assert "23.80 GiB are free" in refused["reason"]
    assert 40 * GIB < refused["needs"]["bytes"] < 45 * GIB, "with the least KV cache, not with the model's whole length"
    assert refused["has"]["bytes"] == gpu(24).free_bytes
    assert refused["fits"][-1]["change"] == "2 GPUs like NVIDIA Test instead of 1"


def test_what_would_fit() -> None:
    refused = refusal(
        LLAMA, [gpu(24)], users=16, context=8192, variants=[document(TINY), document({"architectures": ["New"]})]
    )
    assert "16 requests of 8192 tokens need 16.00 GiB of KV cache on the GPU, and" in refused["reason"]
    assert [fit["change"] for fit in refused["fits"]] == [
        "7 users instead of 16",
        "a context of 3584 instead of 8192",
        "flags.kv_cache_dtype: fp8, which changes answers a little and 14 users instead of 16",
        f"the variant {TINY}",
        "2 GPUs like NVIDIA Test instead of 1",
    ]


def test_other_processes_are_named() -> None:
    refused = refusal(QWEN, [gpu(24, free_bytes=10 * GIB)])
    assert refused["fits"][-1]["change"] == "the same GPUs without the other processes on them"


@pytest.mark.parametrize("utilization", [1.0, 0.99, 0.97])
def test_a_fixed_utilization_that_cannot_start_is_told_the_one_that_can(utilization: float) -> None:
    refused = refusal(TINY, [gpu(24)], users=8, context=4096, flags={"gpu_memory_utilization": utilization})
    least = float(refused["reason"].rstrip(".").rpartition(" ")[2])
    assert f"flags.gpu_memory_utilization is {utilization}" in refused["reason"]
    assert plan(TINY, [gpu(24)], users=8, context=4096, flags={"gpu_memory_utilization": least})
    assert refused["fits"][-1]["change"] == "without flags.gpu_memory_utilization"


def test_a_fixed_utilization_that_is_too_small() -> None:
    refused = refusal(QWEN, [gpu(24)], flags={"gpu_memory_utilization": 0.3})
    assert "flags.gpu_memory_utilization is 0.3, which gives vLLM 7.20 GiB" in refused["reason"]


def test_a_fixed_kv_cache_that_is_too_large() -> None:
    refused = refusal(TINY, [gpu(24)], flags={"kv_cache_memory_bytes": 30 * GIB})
    most = int(refused["reason"].rstrip(".").rpartition(" ")[2])
    assert plan(TINY, [gpu(24)], flags={"kv_cache_memory_bytes": most})["memory"][0]["spare_bytes"] == 0


def test_one_block_is_held_back() -> None:
    found = plan(LLAMA, [gpu(80)], users=4, context=4096)
    exact = 4 * 4096 * 131072
    flags = {"max_num_batched_tokens": 8192, "kv_cache_memory_bytes": exact}
    assert "4 requests" in refusal(LLAMA, [gpu(80)], users=4, context=4096, flags=flags)["reason"]
    flags["kv_cache_memory_bytes"] = exact + 16 * 131072
    assert plan(LLAMA, [gpu(80)], users=4, context=4096, flags=flags)["max_concurrency"] >= 4
    assert found["max_concurrency"] > 4


def test_mamba_states_for_every_sequence() -> None:
    refused = refusal(FALCON, [gpu(24)], flags={"max_num_seqs": 256, "enforce_eager": False})
    assert "max_num_seqs is 256, and there is room for" in refused["reason"]


def test_without_the_hybrid_manager_windows_are_stored_whole() -> None:
    whole = plan("google/gemma-3-1b-it", [gpu()], flags={"disable_hybrid_kv_cache_manager": True})
    assert whole["kv_cache_tokens"] < plan("google/gemma-3-1b-it", [gpu()])["kv_cache_tokens"] / 2
    refused = refusal(FALCON, [gpu(80)], flags={"disable_hybrid_kv_cache_manager": True})
    assert "Mamba layers need that manager" in refused["reason"]


def test_an_encoder_has_no_kv_cache() -> None:
    found = plan(BERT, [gpu(24)])
    assert found["max_concurrency"] is None
    assert found["memory"][0]["kv_cache_bytes"] == 0
    assert found["flags"]["gpu_memory_utilization"] < 0.2
    assert "kv_cache_memory_bytes" not in found["flags"]
    long = plan({**BERT, "max_position_embeddings": 8192}, [gpu(24)])
    assert long["flags"]["max_num_batched_tokens"] >= 8192, "vLLM does not cut an encoder's prompts"


def test_a_refusal_is_quick() -> None:
    began = time.process_time()
    refusal(SCOUT, [gpu(24)], users=64, context=65536)
    refusal(LLAMA, cards(2), users=512, context=16384)
    assert time.process_time() - began < 4, "1 s each where nothing else runs"
