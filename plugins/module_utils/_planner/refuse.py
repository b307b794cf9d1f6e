# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: a refusal as a document: what is needed, what is there, the nearest things that fit.

Each thing that is offered has been planned like any other wish, so that what is offered does fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from . import kv_cache
from .errors import PlanError
from .search import LEAST_CONTEXT, Outcome, Task, Try, count, guard, least_cache, parse_model, shortfall, solve
from .units import GIB
from .wish import Gpu

Find = Callable[[Task], "Try | None"]


def refusal(task: Task, gpus: Sequence[Gpu], outcome: Outcome, find: Find | None = None) -> dict[str, Any]:
    """The refusal as engine_plan returns it: what is needed, what is there, and the nearest things that fit.

    ``find`` looks for a plan for a changed task; without it, on these GPUs.
    """
    nearest = outcome.nearest
    stored = task.model.document.get("weights_bytes")
    needs = {"what": "GPU memory for the weights alone", "bytes": stored if isinstance(stored, int) else 0}
    has = {"what": "free GPU memory", "bytes": sum(gpu.free_bytes for gpu in gpus)}
    if nearest is not None:
        rank = max(nearest.ranks, key=lambda each: each.counted_bytes)
        total = nearest.setting.total_bytes
        each = "on each GPU" if nearest.split.gpus > 1 else "on one GPU"
        needed = rank.footprint_bytes + guard(total) + least_cache(nearest)
        needs = {"what": f"GPU memory {each}, {nearest.split}", "bytes": needed}
        has = {"what": f"free GPU memory {each}", "bytes": min(gpu.free_bytes for gpu in nearest.gpus)}
    return {
        "reason": f"{task.model.source} {'' if find else 'does not fit: '}{outcome.reason}.",
        "needs": needs,
        "has": has,
        "fits": list(_fits(task, gpus, nearest, find or (lambda other: solve(other, gpus).found))),
    }


def _fits(task: Task, gpus: Sequence[Gpu], nearest: Try | None, find: Find) -> Iterator[dict[str, Any]]:
    """Each is a wish that has been planned, with its numbers; those that change least come first."""
    wish = task.wish
    if wish.users and wish.users > 1:
        fewer = largest(1, wish.users - 1, lambda users: find(task.wishing(users=users)))
        if fewer:
            yield _fit(f"{count(fewer[0], 'user')} instead of {wish.users}", fewer[1])
    if wish.context and wish.context > LEAST_CONTEXT // 4:
        most = min(wish.context - 1, task.model.architecture.max_position_embeddings)
        shorter = largest(1, most // CONTEXT_STEP, lambda steps: find(task.wishing(context=steps * CONTEXT_STEP)))
        if shorter:
            yield _fit(f"a context of {shorter[0] * CONTEXT_STEP} instead of {wish.context}", shorter[1])
    if nearest is not None and wish.flags.get("kv_cache_dtype", "auto") in ("auto", "bfloat16"):
        yield from _lighter(task.wishing(flags={**wish.flags, "kv_cache_dtype": "fp8"}), find)
    freed = {name: value for name, value in wish.flags.items() if name not in FIXABLE}
    if freed != dict(wish.flags) and (found := find(task.wishing(flags=freed))):
        without = ", ".join(f"flags.{name}" for name in wish.flags if name in FIXABLE)
        yield _fit(f"without {without}", found)
    for variant in wish.variants:
        try:
            other = replace(task, model=parse_model(variant))
        except PlanError:  # what cannot be planned is not offered
            continue
        if found := find(other):
            yield _fit(f"the variant {other.model.source}", found)
    yield from _more_gpus(task, gpus, alone=nearest is None or bool(shortfall(nearest)))


def _lighter(task: Task, find: Find) -> Iterator[dict[str, Any]]:
    change, users = "flags.kv_cache_dtype: fp8, which changes answers a little", task.wish.users
    if users is None:
        if found := find(task):
            yield _fit(change, found)
    elif more := largest(1, users, lambda number: find(task.wishing(users=number))):
        fewer = f" and {count(more[0], 'user')} instead of {users}" if more[0] != users else ""
        yield _fit(change + fewer, more[1])


CONTEXT_STEP = 256  # tokens
# Flags that a user may have fixed to what cannot be, and that the planner would choose itself.
FIXABLE = (
    "gpu_memory_utilization",
    "max_model_len",
    "max_num_seqs",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "max_num_batched_tokens",
    "kv_cache_memory_bytes",
    "enforce_eager",
    "enable_expert_parallel",
)
HOSTS = (1, 2, 4, 8)  # GPUs that hosts have


def _more_gpus(task: Task, gpus: Sequence[Gpu], alone: bool) -> Iterator[dict[str, Any]]:
    """With more cards like the best one that is there, all of them free; beside other models with as many again."""
    cards = [gpu for gpu in gpus if not gpu.mig]
    if not cards:
        return
    best = max(cards, key=lambda gpu: (gpu.total_bytes, gpu.compute_capability))
    there = sum(gpu.name == best.name and gpu.total_bytes == best.total_bytes for gpu in cards)
    empty = [replace(gpu, free_bytes=gpu.total_bytes) for gpu in gpus]
    if alone and any(gpu.free_bytes < gpu.total_bytes - GIB for gpu in gpus) and (found := solve(task, empty).found):
        yield _fit("the same GPUs without the other processes on them", found)
        return
    for number_of in HOSTS:
        if number_of > there or not alone:
            alike = [replace(best, index=place, free_bytes=best.total_bytes) for place in range(number_of)]
            if found := solve(task, alike).found:
                change = f"instead of {there}" if alone else "of its own"
                yield _fit(f"{count(found.split.gpus, 'GPU')} like {best.name} {change}", found)
                return


def largest(low: int, high: int, fits: Callable[[int], Try | None]) -> tuple[int, Try] | None:
    """The largest number that fits, with its try; None if the lowest does not. What fits less does not fit more."""
    best: tuple[int, Try] | None = None
    while low <= high:
        middle = (low + high + 1) // 2 if best else low
        found = fits(middle)
        if found:
            best, low = (middle, found), middle + 1
        elif best is None:
            return None
        else:
            high = middle - 1
    return best


def _fit(change: str, found: Try) -> dict[str, Any]:
    wish = found.task.wish
    flags = dict(wish.flags)
    if found.split.tensor > 1:
        flags["tensor_parallel_size"] = found.split.tensor
    if found.split.pipeline > 1:
        flags["pipeline_parallel_size"] = found.split.pipeline
    cached = bool(found.layouts) and kv_cache.needed(found.layouts)
    return {
        "change": change,
        "users": wish.users,
        "context": found.max_model_len,
        "gpus": found.split.gpus,
        "flags": flags,
        "kv_cache_bytes": min(found.available),
        "max_concurrency": round(found.concurrency, 2) if cached else None,
        "source": found.task.model.source,
    }
