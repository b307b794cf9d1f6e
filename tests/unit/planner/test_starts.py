# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""What the planner says of real starts of vLLM (tests/bench/planner/starts.json), and of what guides advise."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.llmfleet.serving.plugins.module_utils._planner import pack, support, wish

sys.path.insert(0, str(Path(__file__).parents[2] / "bench" / "planner"))
import bench

GIB = 1 << 30
COUNTED = [start for start in bench.STARTS if start["id"] not in bench.LEFT_OUT and not start.get("refused")]
CONFIGS = bench.DATA["models"]


def card(gib: float, name: str, capability: str, at: int = 0) -> dict[str, Any]:
    total = int(gib * GIB)
    memory = {"memory_total_bytes": total, "memory_free_bytes": total}
    return {"index": at, "uuid": f"GPU-{at}", "name": name, "compute_capability": capability, **memory}


def answer(engine: str, config: dict[str, Any], *cards: dict[str, Any], **wanted: Any) -> dict[str, Any]:
    asked = wish.wish({"name": "one", "model": {"config": config, "source": "org/model", "files": []}, **wanted})
    return pack.pack([asked], wish.gpus(cards), support.version(engine))[0]


@pytest.mark.parametrize("held_out", [True, False])
def test_kv_cache_is_foretold(held_out: bool) -> None:
    chosen = [start for start in COUNTED if start.get("held_out", False) is held_out]
    errors = {start["id"]: bench.error(start, min(bench.predict(start).available)) for start in chosen}
    assert len(chosen) >= 14
    assert statistics.median(map(abs, errors.values())) <= 0.5
    assert max(map(abs, errors.values())) <= 2, errors
    assert max(errors.values()) <= 0.3, errors


def test_each_start_that_vllm_refused_has_nothing_left() -> None:
    refused = [start for start in bench.STARTS if start.get("refused")]
    assert refused
    assert all(min(bench.predict(start).available) <= 0 for start in refused)


@pytest.mark.parametrize("start", [each for each in COUNTED if "kv_cache_tokens" in each["measured"]], ids=bench.mark)
def test_tokens_follow_from_the_bytes(start: dict[str, Any]) -> None:
    assert bench.tokens_of(start)[0] == pytest.approx(start["measured"]["kv_cache_tokens"], rel=0.01)


def test_a_7b_on_24_gb_has_what_its_first_start_had() -> None:
    flags = {"max_model_len": 16384, "max_num_seqs": 128, "gpu_memory_utilization": 0.9}
    planned = answer("0.25.1", CONFIGS["Qwen/Qwen2.5-7B-Instruct"], card(23.99, "24 GB", "9.0"), flags=flags)["plan"]
    measured = next(start for start in bench.STARTS if start["id"] == "q25-7b-24g-16k-128-cold")
    assert planned["memory"][0]["kv_cache_bytes"] == pytest.approx(bench.measured_cache(measured), abs=0.1 * GIB)


def test_a_72b_in_four_bits_does_not_fit_24_gb() -> None:
    config = CONFIGS["Qwen/Qwen2.5-72B-Instruct-AWQ"]
    refused = answer("0.25.1", config, card(23.99, "24 GB", "9.0"), users=1, context=8192)["refusal"]
    assert "39.5" in refused["reason"], refused["reason"]  # 39.56 GiB were logged on this capability


def test_an_8b_on_16_gb_is_refused_with_what_fits() -> None:
    config = CONFIGS["meta-llama/Llama-3.1-8B-Instruct"]
    refused = answer("0.32.0", config, card(15.99, "16 GB", "8.9"), users=4, context=8192)["refusal"]
    assert "for weights" in refused["reason"] or "KV cache" in refused["reason"], refused["reason"]
    assert refused["fits"]


def test_a_70b_in_fp8_takes_two_cards_of_80_gb() -> None:
    cards = [card(79.18, "NVIDIA H100 80GB HBM3", "9.0", at) for at in range(2)]
    planned = answer("0.32.0", CONFIGS["nvidia/Llama-3.1-70B-Instruct-FP8"], *cards, users=8, context=8192)["plan"]
    assert planned["flags"]["tensor_parallel_size"] == 2
