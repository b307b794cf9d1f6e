# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""What the planner is asked, from documents of any kind."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.llmfleet.serving.plugins.module_utils._planner import wish
from ansible_collections.llmfleet.serving.plugins.module_utils._planner.errors import PlanError
from hypothesis import given
from hypothesis import strategies as st
from planned import GIB, TINY, cards, document, gpu

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def card(**changes: Any) -> dict[str, Any]:
    return {
        "index": 0,
        "uuid": "GPU-0a",
        "name": "NVIDIA L4",
        "vendor": "nvidia",
        "memory_total_bytes": 24 * GIB,
        "memory_free_bytes": 20 * GIB,
        "compute_capability": "8.9",
        "mig": None,
        "processes": [],
        "nvlink": [],
        "problem": None,
        **changes,
    }


def test_a_gpu() -> None:
    assert wish.gpus([card(nvlink=[1])]) == (
        wish.Gpu(0, "GPU-0a", "NVIDIA L4", 24 * GIB, 20 * GIB, (8, 9), frozenset({1})),
    )


def test_what_our_own_units_hold_counts_as_free() -> None:
    processes = [
        {"pid": 1, "memory_bytes": 2 * GIB, "unit": "vllm@qwen.service"},
        {"pid": 2, "memory_bytes": GIB, "unit": "ollama.service"},
        {"pid": 3, "memory_bytes": None, "unit": "vllm@other.service"},
        {"pid": 4, "memory_bytes": GIB, "unit": None},
    ]
    assert wish.gpus([card(processes=processes)], "vllm@")[0].free_bytes == 22 * GIB
    assert wish.gpus([card(processes=processes)])[0].free_bytes == 20 * GIB
    processes[0]["memory_bytes"] = 9 * GIB
    assert wish.gpus([card(processes=processes)], "vllm@")[0].free_bytes == 24 * GIB


def test_mig_instances_stand_for_their_card() -> None:
    parts = [{"uuid": f"MIG-{n}", "memory_total_bytes": 10 * GIB, "memory_free_bytes": 9 * GIB} for n in range(2)]
    found = wish.gpus([card(mig={"enabled": True, "instances": parts}, memory_free_bytes=None)])
    assert [(each.uuid, each.mig, each.index, each.total_bytes) for each in found] == [
        ("MIG-0", True, 0, 10 * GIB),
        ("MIG-1", True, 0, 10 * GIB),
    ]
    assert wish.gpus([card(mig={"enabled": True, "instances": []})]) == ()


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"vendor": "amd", "name": "MI300X"}, "MI300X is from amd, and .* vllm_plan: false"),
        ({"problem": "it fell off the bus: reset it."}, "cannot be used: it fell off the bus: reset it$"),
        ({"compute_capability": None}, "not seen by a driver: install NVIDIA's"),
        ({"memory_total_bytes": 0}, "not seen by a driver"),
        ({"memory_free_bytes": None}, "not seen by a driver"),
        ({"index": None}, "not seen by a driver"),
    ],
)
def test_gpus_that_cannot_be_used(changes: dict[str, Any], remedy: str) -> None:
    assert wish.gpus([card(**changes)]) == ()
    with pytest.raises(PlanError, match=remedy):
        raise PlanError(wish.without_gpus([card(**changes)]))


def test_a_host_without_gpus() -> None:
    assert "install NVIDIA's driver" in wish.without_gpus([])
    assert "vllm_plan: false" in wish.without_gpus([])


@given(st.dictionaries(st.sampled_from(sorted(card())), ANYTHING))
def test_any_gpu_document_ends_in_gpus_or_a_plan_error(changes: dict[str, Any]) -> None:
    try:
        found = wish.gpus([card(**changes)])
    except PlanError as error:
        assert "gpus[0] is not as gpu_info returns it" in str(error)  # noqa: PT017
    else:
        assert all(0 <= each.free_bytes <= each.total_bytes for each in found)


def test_visible_gpus() -> None:
    three = cards(3)
    assert wish.visible(three, None) == tuple(three)
    assert wish.visible(three, frozenset({"2", "0"})) == (three[0], three[2])
    assert wish.visible(three, frozenset({"GPU-00000001"})) == (three[1],)
    assert wish.visible(three, frozenset({"1", "GPU-00000001"})) == (three[1],), "one card by two names"
    part = gpu(10, mig=True, uuid="MIG-1")
    assert wish.visible([part], frozenset({"MIG-1"})) == (part,)
    with pytest.raises(PlanError, match=r"has '0', but this host has MIG-1: name one"):
        wish.visible([part], frozenset({"0"}))


@pytest.mark.parametrize("devices", ["3", "-1", "all", "GPU-", "GPU-9", "0;1", "NoDevFiles", "[0]", "0.0", ""])
def test_nonsense_in_cuda_visible_devices(devices: str) -> None:
    asked = wish.wish({"model": document(TINY), "environment": {"CUDA_VISIBLE_DEVICES": devices}})
    with pytest.raises(PlanError, match=r"environment\.CUDA_VISIBLE_DEVICES (has .* name one|is empty)"):
        wish.visible(cards(2), asked.visible)


@pytest.mark.parametrize(
    ("value", "number"),
    [(1, 1), ("16384", 16384), ("16k", 16000), ("16K", 16384), ("1.5k", 1500), (16384.0, 16384), (" 8 ", 8)],
)
def test_numbers_as_vllm_takes_them(value: Any, number: int) -> None:
    assert wish.number("users", value) == number


@pytest.mark.parametrize(
    "value", [0, -1, 1.5, "1.0001k", True, None, "", "many", "1e5", "9" * 5000, 10**30, [], {}, float("inf"), "\u0661"]
)
def test_what_is_not_a_number(value: Any) -> None:
    with pytest.raises(PlanError, match=r"^users is .{1,70}: give a whole number of at least 1\.$"):
        wish.number("users", value)


@pytest.mark.parametrize("value", [0, -0.1, 1.01, "90%", None, [], True, float("nan"), 10**400])
def test_what_is_not_a_fraction(value: Any) -> None:
    with pytest.raises(PlanError, match=r"^flags.gpu_memory_utilization is .*: give a number above 0 and at most 1\.$"):
        wish.flags({"gpu-memory-utilization": value})


def test_flags_are_checked_and_named_as_vllm_names_them() -> None:
    given_flags = {"max-model-len": "16k", "kv_cache_memory": "4G", "dtype": "half", "enforce-eager": "True", "seed": 1}
    assert wish.flags(given_flags) == {
        "max_model_len": 16000,
        "kv_cache_memory_bytes": 4 * GIB,
        "dtype": "float16",
        "enforce_eager": True,
        "seed": 1,
    }


@pytest.mark.parametrize("value", ["auto", "-1", -1])
def test_a_max_model_len_that_vllm_is_to_find_is_found_here(value: Any) -> None:
    assert wish.flags({"max_model_len": value}) == {}


@pytest.mark.parametrize(
    "flags",
    [
        {"speculative_config": {"method": "ngram"}},
        {"enable-lora": True},
        {"enable_lora": "true"},
        {"data-parallel-size": 2},
        {"cpu_offload_gb": 4},
        {"max_cudagraph_capture_size": 8},
        {"hf_overrides": {"rope_scaling": None}},
    ],
)
def test_flags_that_are_not_counted_are_refused_by_name(flags: dict[str, Any]) -> None:
    name = next(iter(flags)).replace("-", "_")
    with pytest.raises(PlanError, match=rf"flags\.{name} is .* does not count .* take it out, or set vllm_plan: false"):
        wish.flags(flags)


@pytest.mark.parametrize(
    "flags", [{"enable_lora": False}, {"data_parallel_size": 1}, {"data_parallel_size": "1"}, {"cpu_offload_gb": 0}]
)
def test_the_same_flags_switched_off_are_kept(flags: dict[str, Any]) -> None:
    assert wish.flags(flags) == flags


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"users": 0}, "users is 0"),
        ({"context": -5}, "context is -5"),
        ({"flags": {"dtype": "int3"}}, "flags.dtype is 'int3': give one of"),
        ({"flags": {"enforce_eager": 1}}, "flags.enforce_eager is 1: give true or false"),
        ({"users": 9, "flags": {"max_num_seqs": 8}}, "users is 9, and flags.max_num_seqs is 8"),
        ({"context": 9000, "flags": {"max_model_len": 8000}}, "context is 9000, and flags.max_model_len is 8000"),
        ({"model": {}}, "model has no config"),
        ({"model": None}, "model has no config"),
        ({"model": {"config": "{"}}, "model has no config"),
    ],
)
def test_a_wish_that_makes_no_sense_says_where(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError) as raised:
        wish.wish({"model": document(TINY), **asked}, "vllm_models[2]")
    assert str(raised.value).startswith(f"vllm_models[2].{said}")


@given(st.dictionaries(st.sampled_from([*wish.CHECKS, *wish.UNCOUNTED, "max_model_len", "seed"]), ANYTHING, max_size=4))
def test_any_flags_end_in_flags_or_a_plan_error(flags: dict[str, Any]) -> None:
    try:
        wish.flags(flags)
    except PlanError as error:
        assert str(error).startswith("flags.")  # noqa: PT017
        assert len(str(error)) < 400  # noqa: PT017
