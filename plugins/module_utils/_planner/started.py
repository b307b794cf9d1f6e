# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: what vLLM logs of its memory when it starts, against what was planned.

Format strings, vLLM 0.22.0 to 0.33.0: vllm/v1/worker/gpu_model_runner.py and vllm/v1/worker/gpu/model_runner.py
(loading, CUDA graphs), vllm/v1/worker/gpu_worker.py (available KV cache memory), vllm/v1/core/kv_cache_utils.py (tokens
and concurrency: two lines, from 0.29.0 on one). Names of workers: vllm/v1/executor/multiproc_executor.py.
Pure; modules run it on hosts, so it imports nothing of its siblings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from .units import GIB, gib

WARN_PERCENT = 3.0

# "(Worker_PP1_TP0 pid=812) INFO 11-21 09:47:22 [...]". With one GPU the engine's own process is the worker.
RANK = re.compile(r"^\(Worker(?:_DP\d+)?(?:_PP(?P<pp>\d+))?(?:_PCP\d+)?(?:_TP(?P<tp>\d+))?")
# What each rank may log for itself: of its bytes, in GiB with two decimals.
BYTES = {
    "weights_bytes": re.compile(r"Model loading took (-?[\d.]+) GiB"),
    "kv_cache_bytes": re.compile(
        r"Available KV cache memory: (-?[\d.]+) GiB|reserved (-?[\d.]+) GiB memory for KV Cache"
    ),
    "cudagraph_bytes": re.compile(r"Graph capturing finished in \d+ secs, took (-?[\d.]+) GiB"),
}
# What the engine logs once. On a CPU the words are "CPU KV cache size".
TOKENS = re.compile(r"\bKV cache size: ([\d,]+) tokens")
CONCURRENCY = re.compile(r"Maximum concurrency for ([\d,]+) tokens per request: ([\d.]+)x")

WORDS = {
    "weights_bytes": "weights",
    "kv_cache_bytes": "KV cache",
    "cudagraph_bytes": "CUDA graphs",
    "kv_cache_tokens": "KV cache",
    "max_concurrency": "concurrency",
}


def figures(log: str) -> dict[str, Any]:
    """What a start has logged: bytes as a list of ``{"rank": [pp, tp], "bytes"}``, and the engine's own figures.

    What is not in the log, is not in the answer. Of a figure that is logged again, the last counts.
    """
    by_rank: dict[str, dict[tuple[int, int], int]] = {}
    found: dict[str, Any] = {}
    for line in log.splitlines():
        for what, pattern in BYTES.items():
            if match := pattern.search(line):
                amount = next(group for group in match.groups() if group is not None)
                by_rank.setdefault(what, {})[_rank(line)] = round(float(amount) * GIB)
        if match := TOKENS.search(line):
            found["kv_cache_tokens"] = _number(match[1])
        if match := CONCURRENCY.search(line):
            found["max_model_len"], found["max_concurrency"] = _number(match[1]), float(match[2])
    for what, amounts in by_rank.items():
        found[what] = [{"rank": list(rank), "bytes": amount} for rank, amount in sorted(amounts.items())]
    return found


def _rank(line: str) -> tuple[int, int]:
    match = RANK.match(line)
    return (int(match["pp"] or 0), int(match["tp"] or 0)) if match else (0, 0)


def _number(text: str) -> int:
    return int(text.replace(",", ""))


def compare(plan: Mapping[str, Any], log: str) -> list[dict[str, Any]]:
    """For each figure that was planned and logged ``{what, planned, measured, percent}``.

    ``percent`` is by how much more was measured than planned: of bytes in percent of the GPU's memory, of the rank
    where they differ most; of tokens and concurrency in percent of what was planned.
    """
    measured = figures(log)
    return [
        *(found for what in BYTES if (found := _worst(what, plan, measured.get(what, ())))),
        *_counts(plan, measured),
    ]


def _worst(what: str, plan: Mapping[str, Any], measured: Any) -> dict[str, Any] | None:
    rows, found = list(plan.get("memory") or ()), []
    tensor = int((plan.get("flags") or {}).get("tensor_parallel_size") or 1)
    for each in measured:
        pp, tp = each["rank"]
        place = pp * tensor + tp
        if place >= len(rows) or what not in rows[place] or not rows[place].get("total_bytes"):
            continue
        planned = rows[place][what]
        percent = 100 * (each["bytes"] - planned) / rows[place]["total_bytes"]
        found.append({"what": what, "planned": planned, "measured": each["bytes"], "percent": round(percent, 2)})
    return max(found, key=lambda each: abs(each["percent"]), default=None)


def _counts(plan: Mapping[str, Any], measured: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for what in ("kv_cache_tokens", "max_concurrency"):
        if plan.get(what) and what in measured:
            percent = 100 * (measured[what] - plan[what]) / plan[what]
            yield {"what": what, "planned": plan[what], "measured": measured[what], "percent": round(percent, 2)}


def warnings(name: str, compared: list[dict[str, Any]]) -> list[str]:
    """A sentence for each figure that is off by more than WARN_PERCENT, with both numbers."""
    return [
        f"{name}: {WORDS[each['what']]} {_shown(each['what'], each['measured'])}, planned "
        f"{_shown(each['what'], each['planned'])}: {abs(each['percent']):.1f} % of {_whole(each['what'])} "
        f"{'more' if each['percent'] > 0 else 'less'} than planned."
        for each in compared
        if abs(each["percent"]) > WARN_PERCENT
    ]


def _shown(what: str, value: float) -> str:
    if what.endswith("_bytes"):
        return gib(value)
    return f"{value:,} tokens" if what == "kv_cache_tokens" else f"{value:.2f} requests"


def _whole(what: str) -> str:
    return "the GPU's memory" if what.endswith("_bytes") else "the plan"
