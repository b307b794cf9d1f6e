# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""The module engine_plan: what Ansible hands it, and what it answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
MODELS = json.loads((ROOT / "tests/bench/planner/starts.json").read_text())["models"]
GIB = 1 << 30
QWEN, LLAMA = "Qwen/Qwen2.5-7B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"
Run = Callable[..., dict[str, Any]]


def model(name: str, **config: Any) -> dict[str, Any]:
    return {"source": name, "revision": "main", "config": {**MODELS[name], **config}, "files": []}


def card(index: int = 0, gib: float = 24, **changes: Any) -> dict[str, Any]:
    return {
        "index": index,
        "uuid": f"GPU-{index:08}",
        "name": "NVIDIA GeForce RTX 4090",
        "vendor": "nvidia",
        "memory_total_bytes": int(gib * GIB),
        "memory_free_bytes": int(gib * GIB) - GIB // 4,
        "compute_capability": "8.9",
        "mig": None,
        "processes": [],
        "nvlink": [],
        "problem": None,
        **changes,
    }


@pytest.fixture
def ask(run_module: Run) -> Run:
    def run(**asked: Any) -> dict[str, Any]:
        answer = run_module("engine_plan", {"gpus": [card()], "engine_version": "0.32.0", **asked})
        assert not answer.get("changed")
        return answer

    return run


def test_a_plan(ask: Run) -> None:
    plan = ask(model=model(QWEN), users=8, context=8192)["plan"]
    assert plan["gpus"] == [0]
    assert plan["flags"]["max_num_seqs"] == 8
    assert plan["environment"] == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "0"}
    assert plan["name"] == QWEN


def test_the_same_in_check_mode(run_module: Run) -> None:
    asked = {"gpus": [card()], "engine_version": "0.32.0", "model": model(QWEN)}
    assert run_module("engine_plan", asked, check=True) == run_module("engine_plan", asked)


def test_a_refusal(ask: Run) -> None:
    answer = ask(model=model(LLAMA), users=64, context=16384, variants=[model(QWEN)])
    assert "plan" not in answer
    assert f"{LLAMA} does not fit: 64 requests of 16384 tokens need" in answer["refusal"]["reason"]
    assert answer["refusal"]["fits"]


def test_several_models(ask: Run) -> None:
    wishes = [{"name": "a", "model": model(QWEN)}, {"name": "b", "model": model(LLAMA), "users": 4}]
    plans = ask(models=wishes, gpus=[card(), card(1)])["plans"]
    assert [each["name"] for each in plans] == ["a", "b"]
    assert sorted(each["plan"]["gpus"][0] for each in plans) == [0, 1]
    previous = {each["name"]: each["plan"] for each in plans}
    busy = [card(memory_free_bytes=2 * GIB), card(1, memory_free_bytes=GIB)]
    assert ask(models=wishes, gpus=busy, previous=previous)["plans"] == plans


def test_what_the_units_of_vllm_hold_is_free(ask: Run) -> None:
    processes = [{"pid": 7, "name": "VLLM::EngineCore", "memory_bytes": 21 * GIB, "unit": "vllm@qwen.service"}]
    busy = card(memory_free_bytes=2 * GIB, processes=processes)
    assert "plan" in ask(model=model(QWEN), gpus=[busy])
    assert "refusal" in ask(model=model(QWEN), gpus=[busy], own_unit="other@")


@pytest.mark.parametrize(
    ("gpus", "said"),
    [
        ([], "install NVIDIA's driver"),
        (
            [card(vendor="amd", name="AMD Instinct MI300X", compute_capability=None)],
            "MI300X is from amd.*vllm_plan: false",
        ),
        ([card(problem="it fell off the bus")], "RTX 4090 cannot be used: it fell off the bus"),
        ([card(compute_capability="7.0")], "compute capability 7.0"),
    ],
)
def test_hosts_without_a_usable_gpu(ask: Run, gpus: list[dict[str, Any]], said: str) -> None:
    reason = ask(model=model(QWEN), gpus=gpus)["refusal"]["reason"]
    with pytest.raises(ValueError, match=said):
        raise ValueError(reason)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"engine_version": "0.21.0"}, "engine_version is 0.21.0, .*: take 0.22.0 or newer"),
        ({"engine_version": "nightly"}, "engine_version is 'nightly': give a version"),
        ({"users": 0}, r"users is 0: give a whole number of at least 1"),
        ({"flags": {"enable_lora": True}}, r"flags\.enable_lora is True, .* take it out, or set vllm_plan: false"),
        ({"environment": {"CUDA_VISIBLE_DEVICES": "7"}}, "CUDA_VISIBLE_DEVICES has '7', but this host has 0"),
        ({"model": {}}, "model has no config"),
        ({"model": model(QWEN, num_attention_heads=0)}, "num_attention_heads"),
        ({"gpus": [card(memory_total_bytes="much")]}, r"gpus\[0\] is not as gpu_info returns it"),
        ({"models": []}, "mutually exclusive"),
    ],
)
def test_errors_name_what_is_wrong(ask: Run, asked: dict[str, Any], said: str) -> None:
    answer = ask(**{"model": model(QWEN), **asked})
    assert answer["failed"]
    with pytest.raises(ValueError, match=said):
        raise ValueError(answer["msg"])


def test_newer_engines_are_planned_with_a_warning(ask: Run) -> None:
    assert "planned as 0.33.0" in ask(model=model(QWEN), engine_version="0.40")["plan"]["warnings"][0]


def test_host_sizes(ask: Run) -> None:
    assert "memory are needed" in ask(model=model(QWEN), host={"ram_bytes": GIB})["refusal"]["reason"]
