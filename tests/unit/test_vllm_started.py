# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""What vLLM logs at its start against the plan: the pure comparison, and the module with a stand-in for the journal.

The lines are what the format strings give that module_utils/_planner/started.py names, with the prefix that vLLM's
logger puts before them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.llmfleet.serving.plugins.module_utils._planner.started import compare, figures, warnings
from conftest import warned

GIB = 1 << 30
CARD = 80 * GIB
Module = Callable[..., dict[str, Any]]

# vLLM 0.22.0 to 0.28: the size of the cache and the concurrency in lines of their own.
OLDER = """\
(APIServer pid=811) INFO 11-21 09:46:40 [utils.py:299] vLLM API server version 0.22.0
(EngineCore pid=9) INFO 11-21 09:47:01 [gpu_model_runner.py:5133] Model loading took 14.99 GiB memory and 3.123 seconds
(EngineCore pid=9) INFO 11-21 09:47:20 [gpu_worker.py:467] Available KV cache memory: 53.02 GiB
(EngineCore pid=9) INFO 11-21 09:47:20 [kv_cache_utils.py:1733] GPU KV cache size: 434,336 tokens
(EngineCore pid=9) INFO 11-21 09:47:20 [kv_cache_utils.py:1734] \
Maximum concurrency for 16,384 tokens per request: 26.51x
(EngineCore pid=9) INFO 11-21 09:47:31 [gpu_model_runner.py:6457] Graph capturing finished in 9 secs, took 0.52 GiB
(APIServer pid=811) INFO:     Application startup complete.
"""
# From 0.29.0 on in one.
NEWER = """\
(EngineCore pid=9) INFO 11-21 09:47:01 [model_runner.py:425] Model loading took 14.99 GiB memory and 3.123456 seconds
(EngineCore pid=9) INFO 11-21 09:47:20 [gpu_worker.py:760] Available KV cache memory: 53.02 GiB
(EngineCore pid=9) INFO 11-21 09:47:20 [kv_cache_utils.py:2327] GPU KV cache size: 434,336 tokens, \
Maximum concurrency for 16,384 tokens per request: 26.51x
(EngineCore pid=9) INFO 11-21 09:47:31 [model_runner.py:1128] Graph capturing finished in 9 secs, took 0.52 GiB
"""
# With several GPUs: the newer model runner logs on each rank, in whatever order; the worker on the first one only.
RANKS = """\
(Worker_PP1_TP0 pid=3) INFO 11-21 09:47:01 [model_runner.py:425] Model loading took 16.0 GiB memory and 3.1 seconds
(Worker_PP0_TP1 pid=2) INFO 11-21 09:47:01 [model_runner.py:425] Model loading took 15.0 GiB memory and 3.1 seconds
(Worker_PP0_TP0 pid=1) INFO 11-21 09:47:01 [model_runner.py:425] Model loading took 15.0 GiB memory and 3.1 seconds
(Worker_PP1_TP1_EP1 pid=4) INFO 11-21 09:47:01 [model_runner.py:425] Model loading took 20.0 GiB memory and 3.1 seconds
(Worker_PP0_TP0 pid=1) INFO 11-21 09:47:20 [gpu_worker.py:760] Available KV cache memory: 40.0 GiB
"""
CPU = """\
(EngineCore pid=9) INFO 11-21 09:47:20 [cpu_worker.py:260] Explicitly set (1.0/23.5) GiB for KV cache on node 0.
(EngineCore pid=9) INFO 11-21 09:47:20 [kv_cache_utils.py:2327] CPU KV cache size: 32,768 tokens, \
Maximum concurrency for 2,048 tokens per request: 16.00x
"""
FIXED = (
    "(EngineCore pid=9) INFO 11-21 09:47:20 [gpu_worker.py:669] Initial free memory 78.6 GiB, reserved 8.0 GiB memory "
    "for KV Cache as specified by kv_cache_memory_bytes config and skipped memory profiling."
)


def plan(*rows: dict[str, int], **changes: Any) -> dict[str, Any]:
    row = {"weights_bytes": 15 * GIB, "kv_cache_bytes": 53 * GIB, "cudagraph_bytes": GIB // 2, "total_bytes": CARD}
    memory = [{**row, **each} for each in rows or ({},)]
    return {"memory": memory, "flags": {}, "kv_cache_tokens": 434_000, "max_concurrency": 26.5, **changes}


def percents(found: list[dict[str, Any]]) -> dict[str, float]:
    return {each["what"]: each["percent"] for each in found}


@pytest.mark.parametrize("log", [OLDER, NEWER, OLDER.replace(" memory and", " and")])
def test_figures_of_a_start(log: str) -> None:
    """The last form is that of 0.22.0's newer model runner."""
    assert figures(log) == {
        "weights_bytes": [{"rank": [0, 0], "bytes": round(14.99 * GIB)}],
        "kv_cache_bytes": [{"rank": [0, 0], "bytes": round(53.02 * GIB)}],
        "kv_cache_tokens": 434336,
        "max_model_len": 16384,
        "max_concurrency": 26.51,
        "cudagraph_bytes": [{"rank": [0, 0], "bytes": round(0.52 * GIB)}],
    }


def test_figures_of_a_start_on_a_cpu_and_with_a_fixed_cache() -> None:
    assert figures(CPU) == {"kv_cache_tokens": 32768, "max_model_len": 2048, "max_concurrency": 16.0}
    assert figures(FIXED) == {"kv_cache_bytes": [{"rank": [0, 0], "bytes": 8 * GIB}]}


@pytest.mark.parametrize("log", ["", "\n", "GPU KV cache size:", "Available KV cache memory: much", "\x00\ufffd"])
def test_log_that_says_nothing(log: str) -> None:
    assert figures(log) == {}
    assert compare(plan(), log) == []


def test_start_as_planned() -> None:
    found = compare(plan(), NEWER)
    assert [each["what"] for each in found] == [
        *("weights_bytes", "kv_cache_bytes", "cudagraph_bytes", "kv_cache_tokens", "max_concurrency")
    ]
    assert found[1] == {
        "what": "kv_cache_bytes",
        "planned": 53 * GIB,
        "measured": round(53.02 * GIB),
        "percent": pytest.approx(0.02 / 80 * 100, abs=0.01),
    }
    assert all(abs(each["percent"]) < 0.1 for each in found)
    assert warnings("qwen", found) == []


def test_bytes_count_against_the_card_and_tokens_against_the_plan() -> None:
    wrong = plan({"kv_cache_bytes": 57 * GIB, "weights_bytes": 11 * GIB}, kv_cache_tokens=217_168, max_concurrency=26.0)
    found = compare(wrong, OLDER)
    assert percents(found) == {
        "weights_bytes": 4.99,
        "kv_cache_bytes": -4.98,
        "cudagraph_bytes": 0.02,
        "kv_cache_tokens": 100.0,
        "max_concurrency": 1.96,
    }
    assert warnings("qwen", found) == [
        "qwen: weights 14.99 GiB, planned 11.00 GiB: 5.0 % of the GPU's memory more than planned.",
        "qwen: KV cache 53.02 GiB, planned 57.00 GiB: 5.0 % of the GPU's memory less than planned.",
        "qwen: KV cache 434,336 tokens, planned 217,168 tokens: 100.0 % of the plan more than planned.",
    ]


def test_three_percent_are_no_more_than_three_percent() -> None:
    log = "Available KV cache memory: 50.6 GiB"
    assert percents(compare(plan(), log)) == {"kv_cache_bytes": -3.0}
    assert warnings("a", compare(plan(), log)) == []
    assert len(warnings("a", compare(plan(), "Available KV cache memory: 50.5 GiB"))) == 1


def test_each_rank_counts_against_its_own_gpu_and_the_worst_is_told() -> None:
    rows = [{"weights_bytes": amount * GIB, "kv_cache_bytes": 40 * GIB} for amount in (15, 15, 16, 16)]
    found = compare(plan(*rows, flags={"tensor_parallel_size": 2, "pipeline_parallel_size": 2}), RANKS)
    assert found == [
        {"what": "weights_bytes", "planned": 16 * GIB, "measured": 20 * GIB, "percent": 5.0},
        {"what": "kv_cache_bytes", "planned": 40 * GIB, "measured": 40 * GIB, "percent": 0.0},
    ]


def test_model_without_a_cache_and_instance_without_a_plan() -> None:
    pooling = plan(kv_cache_tokens=0, max_concurrency=None)
    assert [each["what"] for each in compare(pooling, OLDER)] == ["weights_bytes", "kv_cache_bytes", "cudagraph_bytes"]
    assert compare({}, OLDER) == []
    assert compare({"memory": [{"gpu": 0}]}, OLDER) == []


# --- the module ---------------------------------------------------------------------------------------------


@pytest.fixture
def module(run_module: Any, systemd: Any) -> Module:
    def run(*names: str, check: bool = False) -> dict[str, Any]:
        folders = {"config_dir": str(systemd.config_dir), "started_dir": str(systemd.folder / "lib/started")}
        return run_module("vllm_started", {"names": names, **folders}, environment=systemd.environment, check=check)

    return run


def written(systemd: Any, name: str) -> dict[str, Any]:
    return json.loads((systemd.folder / f"lib/started/{name}.json").read_text())


def test_start_is_written_down_with_the_plan_beside_it(module: Module, systemd: Any, capfd: Any) -> None:
    systemd.unit("qwen", started=time.time() - 60)
    # The process before it, whose lines stand in the same unit's journal, had another plan.
    systemd.log("qwen", *NEWER.splitlines(), before=("Available KV cache memory: 1.0 GiB",))
    (systemd.config_dir / "qwen.plan.json").write_text(json.dumps(plan({"kv_cache_bytes": 60 * GIB})))
    answer = module("qwen")
    (found,) = answer["started"]
    assert found["measured"]["kv_cache_tokens"] == 434336
    assert percents(found["compared"])["kv_cache_bytes"] == -8.73
    assert written(systemd, "qwen") == found
    assert (systemd.folder / "lib/started/qwen.json").stat().st_mode & 0o777 == 0o644
    assert "qwen: KV cache 53.02 GiB, planned 60.00 GiB" in warned(answer, capfd)


@pytest.mark.parametrize("stored", [None, "{", "[]", "{}"])
def test_start_without_a_plan_is_written_down_as_well(
    module: Module, systemd: Any, capfd: Any, stored: str | None
) -> None:
    systemd.unit("tiny")
    systemd.log("tiny", *CPU.splitlines())
    if stored is not None:
        (systemd.config_dir / "tiny.plan.json").write_text(stored)
    module("tiny")
    assert "WARNING" not in capfd.readouterr().err
    assert written(systemd, "tiny")["measured"]["kv_cache_tokens"] == 32768
    assert written(systemd, "tiny")["compared"] == []


def test_quiet_instance_is_no_error(module: Module, systemd: Any) -> None:
    """With VLLM_LOGGING_LEVEL=WARNING, with a journal that was emptied, and a unit that systemd does not know."""
    systemd.unit("quiet")
    systemd.unit("lost", InvocationID="")
    assert [each["measured"] for each in module("quiet", "lost", "unknown")["started"]] == [{}, {}, {}]


def test_check_mode_writes_nothing(module: Module, systemd: Any) -> None:
    systemd.unit("qwen")
    assert module("qwen", check=True)["changed"]
    assert not Path(systemd.folder / "lib").exists()
    assert not module()["changed"]
