# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""Several models on one host: GPUs of their own, sharing one, and plans that are kept."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
from ansible_collections.llmfleet.serving.plugins.module_utils._planner import pack, support, wish
from ansible_collections.llmfleet.serving.plugins.module_utils._planner.errors import PlanError
from hypothesis import given, settings
from hypothesis import strategies as st
from planned import BERT, BIG, GIB, LLAMA, MIB, MODELS, QWEN, TINY, cards, document, gpu, planned, wished


def plans(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [answer["plan"] for answer in answers]


@settings(max_examples=20)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(MODELS)), st.none() | st.integers(1, 64), st.none() | st.integers(256, 16384)),
        min_size=1,
        max_size=4,
    ),
    st.lists(st.tuples(st.sampled_from([16, 24, 80, 141]), st.floats(0, 1)), max_size=3),
    st.sampled_from(["0.22.0", "0.26.0", "0.32.0"]),
)
def test_plans_of_one_host_never_use_more_than_is_free(
    models: list[tuple[str, int | None, int | None]], sizes: list[tuple[int, float]], version: str
) -> None:
    """And each satisfies the checks of a start, whichever starts last: planned() looks."""
    gpus = [gpu(size, at, free_bytes=int(size * free * GIB)) for at, (size, free) in enumerate(sizes)]
    wishes = [wished(name, f"{at}", users=users, context=context) for at, (name, users, context) in enumerate(models)]
    planned(wishes, gpus, version)


def test_each_gets_a_gpu_of_its_own_while_there_are_some() -> None:
    wishes = [wished(TINY), wished(QWEN), wished("microsoft/phi-4")]
    found = plans(planned(wishes, cards(4)))
    assert [each["gpus"] for each in found] == [[3], [2], [0, 1]], "those that need most choose first"
    assert all("kv_cache_memory_bytes" not in each["flags"] for each in found)


def test_three_models_on_one_card() -> None:
    wishes = [wished(QWEN, "a", users=8, context=8192), wished(TINY, "b", users=8, context=8192), wished(BERT, "c")]
    found = plans(planned(wishes, [gpu(48)]))
    assert [each["gpus"] for each in found] == [[0], [0], [0]]
    assert ["kv_cache_memory_bytes" in each["flags"] for each in found] == [True, True, False]
    for each in found[:2]:
        assert each["flags"]["kv_cache_memory_bytes"] == each["memory"][0]["kv_cache_bytes"]
        assert any("which instance starts first" in reason for reason in each["reasons"])
    assert sum(each["flags"]["gpu_memory_utilization"] for each in found) < 1
    spare = found[0]["memory"][0]["spare_bytes"]
    assert [each["memory"][0]["spare_bytes"] for each in found] == [spare] * 3
    assert spare < 2 * GIB, "the rest is KV cache"


def test_one_that_fits_alone_and_not_beside_the_others() -> None:
    refused = planned([wished(QWEN, "a", users=8, context=8192), wished(LLAMA, "b", users=4, context=8192)], [gpu(24)])
    assert "plan" in refused[0] or "plan" in refused[1]
    loser = next(each for each in refused if "refusal" in each)["refusal"]
    assert "fits on this host alone, but not beside" in loser["reason"]
    assert loser["needs"]["bytes"] > 0
    assert not any("user" in fit["change"] for fit in loser["fits"]), "what would fit alone is no help"


def test_fewer_users_beside_the_others() -> None:
    wishes = [wished(QWEN, "a", users=8, context=8192), wished(LLAMA, "b", users=10, context=8192)]
    answers = planned(wishes, [gpu(48)])
    at = next(place for place, answer in enumerate(answers) if "refusal" in answer)
    fit = answers[at]["refusal"]["fits"][0]
    assert f"instead of {wishes[at].users}" in fit["change"]
    wishes[at] = replace(wishes[at], users=fit["users"])
    assert all("plan" in answer for answer in planned(wishes, [gpu(48)]))


def test_flags_that_cannot_be_shared() -> None:
    for flags in ({"gpu_memory_utilization": 0.9}, {"tensor_parallel_size": 2}):
        wishes = [wished(TINY, "a", flags=flags), wished(TINY, "b"), wished(TINY, "c")]
        answers = planned(wishes, cards(2))
        assert sum("plan" in answer for answer in answers) >= 1
    wishes = [wished(TINY, "a", flags={"kv_cache_memory_bytes": GIB}), wished(TINY, "b")]
    found = plans(planned(wishes, [gpu(24)]))
    assert found[0]["memory"][0]["kv_cache_bytes"] == GIB
    assert found[1]["memory"][0]["kv_cache_bytes"] > 10 * GIB


def test_what_runs_is_kept_while_only_free_memory_changes() -> None:
    wishes = [wished(QWEN, "a", users=8, context=8192), wished(TINY, "b")]
    first = planned(wishes, cards(2))
    previous = {answer["name"]: answer["plan"] for answer in first}
    assert pack.pack(wishes, cards(2, free_bytes=GIB), support.version("0.32.0"), previous=previous) == first


@pytest.mark.parametrize(
    "changed",
    [
        {"users": 9},
        {"context": 4096},
        {"flags": {"enforce_eager": True}},
        {"model": document({**MODELS[QWEN], "num_hidden_layers": 27})},
        {"model": document(QWEN, revision="other")},
        {"environment": {"CUDA_VISIBLE_DEVICES": "1"}},
    ],
)
def test_a_changed_wish_is_planned_anew(changed: dict[str, Any]) -> None:
    asked = {"name": "a", "model": document(QWEN), "users": 8, "context": 8192}
    first = planned([wish.wish(asked)], cards(2))[0]["plan"]
    again = planned([wish.wish({**asked, **changed})], cards(2), previous={"a": first})[0]["plan"]
    assert again["fingerprint"] != first["fingerprint"]


def test_other_gpus_or_another_engine_are_planned_anew() -> None:
    asked = [wished(QWEN, "a")]
    first = planned(asked, cards(2))[0]["plan"]
    for gpus, version in ((cards(1), "0.32.0"), (cards(2, 48), "0.32.0"), (cards(2), "0.33.0")):
        assert planned(asked, gpus, version, previous={"a": first})[0]["plan"]["fingerprint"] != first["fingerprint"]


@pytest.mark.parametrize("previous", [{"a": None}, {"a": "x"}, {"a": {}}, {"a": {"fingerprint": None}}, {"b": 1}, None])
def test_what_is_not_a_plan_is_not_kept(previous: Any) -> None:
    assert planned([wished(TINY, "a")], [gpu()], previous=previous)[0]["plan"]["flags"]


def test_an_unknown_architecture_is_refused_and_the_others_planned() -> None:
    answers = planned([wished({"architectures": ["BrandNewForCausalLM"]}, "new"), wished(TINY)], [gpu()])
    assert "BrandNewForCausalLM" in answers[0]["refusal"]["reason"]
    assert "vllm_plan: false" in answers[0]["refusal"]["reason"]
    assert "plan" in answers[1]


def test_a_broken_config_is_an_error_that_names_the_model() -> None:
    with pytest.raises(PlanError, match=r"^broken: "):
        planned([wished({**MODELS[QWEN], "hidden_size": "x"}, "broken")], [gpu()])


def test_devices_that_are_not_there_name_the_model() -> None:
    asked = wished(QWEN, "a", environment={"CUDA_VISIBLE_DEVICES": "5"})
    with pytest.raises(PlanError, match=r"^a: environment\.CUDA_VISIBLE_DEVICES has '5', but this host has 0: name"):
        planned([asked], [gpu()])
    asked = wished(QWEN, "a", environment={"CUDA_VISIBLE_DEVICES": "1"})
    assert planned([asked, wished(TINY)], cards(2))[0]["plan"]["gpus"] == [1]


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ({"ram_bytes": GIB}, "6.0. GiB of memory are needed, and 1.00 GiB are left: add memory"),
        ({"disk_bytes": GIB}, "9.31 GiB of disk below /var/lib/vllm are needed, and 1.00 GiB are left: make room"),
    ],
)
def test_what_a_host_lacks_besides_gpus(host: dict[str, int], said: str) -> None:
    asked = wish.wish({"name": "a", "model": document(QWEN, files=[{"name": "x", "bytes": 10**10}])})
    refused = planned([asked], [gpu()], host=wish.Host(**host))[0]["refusal"]
    with pytest.raises(PlanError, match=said):
        raise PlanError(refused["reason"])
    assert refused["has"]["bytes"] == GIB


def test_shared_memory_is_only_needed_between_processes() -> None:
    host = wish.Host(shm_bytes=64 << 20)
    assert "plan" in planned([wished(QWEN)], cards(2), host=host)[0]
    assert (
        "GiB of room in /dev/shm are needed"
        in planned([wished("microsoft/phi-4")], cards(2), host=host)[0]["refusal"]["reason"]
    )


def test_the_second_model_that_is_too_much_for_the_host_is_refused() -> None:
    answers = planned([wished(QWEN, "a"), wished(TINY, "b")], cards(2), host=wish.Host(ram_bytes=9 * GIB))
    assert ["plan" in answer for answer in answers] == [True, False]


@pytest.mark.parametrize("said", ["", "MI300X is from amd: set vllm_plan: false for this host"])
def test_a_host_without_gpus(said: str) -> None:
    refused = planned([wished(QWEN)], [], no_gpus=said)[0]["refusal"]
    assert (said or "install NVIDIA's driver") in refused["reason"]
    assert refused["fits"] == []


def test_planning_is_quick() -> None:
    """100 hosts in under 5 s, each in a process of its own: 0.05 s for one where nothing else runs."""
    wishes = [wished(QWEN, users=16, context=8192), wished("openai/gpt-oss-20b", users=32), wished(LLAMA)]
    began = time.process_time()
    for _ in range(3):
        planned(wishes, cards(4, 80))
    assert (time.process_time() - began) / 3 < 0.3
    assert support.version("0.32.0").warning is None
    assert "refusal" in planned([wished(BIG)], [gpu(24)])[0]


def test_model_that_has_come_restarts_no_other_one() -> None:
    """What is free has moved a little since the first plan was made; that is no reason, but much less room is one."""
    asked = wished(QWEN, "a", users=2, context=8192)
    first = planned([asked], cards(2))[0]["plan"]
    both = [asked, wished(TINY, "b", users=2, context=8192)]
    less = cards(2, free_bytes=first["memory"][0]["total_bytes"] - 300 * MIB)
    again = planned(both, less, previous={"a": first})[0]["plan"]
    assert planned(both, less)[0]["plan"]["flags"] != first["flags"]
    assert again["flags"] == first["flags"]
    much_less = cards(2, free_bytes=first["memory"][0]["total_bytes"] - 2 * GIB)
    assert planned(both, much_less, previous={"a": first})[0]["plan"]["flags"] != first["flags"]
