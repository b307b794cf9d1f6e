# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: plans for all models of one host, on GPUs of their own or sharing one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from . import kv_cache, support
from .describe import document
from .errors import PlanError, UnknownArchitecture
from .refuse import refusal
from .search import (
    Batch,
    Outcome,
    Split,
    Task,
    Try,
    attempt,
    batches,
    guard,
    least_cache,
    parse_model,
    shortfall,
    solve,
    unsupported,
)
from .units import gib
from .wish import Gpu, Host, Wish, visible, without_gpus

UNKNOWN_HOST = Host()
SAME_UTILIZATION = 0.01  # other processes on a card come and go by this much of it
FORMULAE = 1  # counted up when they change: a stored plan made by older ones is made anew


def pack(
    wishes: Sequence[Wish],
    gpus: Sequence[Gpu],
    engine: support.Version,
    host: Host = UNKNOWN_HOST,
    previous: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    no_gpus: str = "",
) -> list[dict[str, Any]]:
    """``{"name", "plan"}`` or ``{"name", "refusal"}`` for each wish, in their order.

    Those that need most choose first. Each takes GPUs of its own while there are some; what one GPU can carry then
    shares one, with a KV cache of fixed size, so that the order of starts does not matter.
    ``previous`` are the plans that the host runs: they stay while nothing that they hang on changes, for free memory
    alone is no reason to restart an engine. ``no_gpus`` says why there are none, where there are none.
    """
    mark = fingerprint(wishes, gpus, engine)
    kept = {name: plan for name, plan in (previous or {}).items() if isinstance(plan, Mapping)}
    if all(kept.get(wish.name, {}).get("fingerprint") == mark for wish in wishes):
        return [{"name": wish.name, "plan": dict(kept[wish.name])} for wish in wishes]
    placed: dict[int, Try] = {}
    tasks, refused = _tasks(wishes, engine)
    seen = {place: _seen(task.wish, gpus) for place, task in tasks.items()}
    alone = {
        place: solve(task, seen[place]) if gpus else Outcome(reason=no_gpus or without_gpus(()))
        for place, task in tasks.items()
    }
    tenants: dict[str, list[int]] = {}
    for place in sorted(tasks, key=lambda at: _size(alone[at]), reverse=True):
        if alone[place].found is None:
            refused[place] = refusal(tasks[place], seen[place], alone[place])
            continue
        unused = [gpu for gpu in seen[place] if gpu.uuid not in tenants]
        found = (alone[place] if len(unused) == len(seen[place]) else solve(tasks[place], unused)).found
        single = [gpu for gpu in seen[place] if all(placed[at].split.gpus == 1 for at in tenants.get(gpu.uuid, ()))]
        chosen = found.gpus if found else _roomiest(place, single, tenants, tasks)
        if not chosen:
            refused[place] = _no_room(tasks[place], alone[place].found, seen[place], tenants, tasks)
            continue
        for gpu in chosen:
            tenants.setdefault(gpu.uuid, []).append(place)
        if found:
            placed[place] = found
        else:
            together = tenants[chosen[0].uuid]
            placed.update(divided(chosen[0], {at: tasks[at] for at in together}))
    answers = []
    for place, wish in enumerate(wishes):
        if place in placed:
            made = {**document(placed[place]), "fingerprint": mark}
            answers.append({"name": wish.name, "plan": _steady(made, kept.get(wish.name, {}))})
        else:
            answers.append({"name": wish.name, "refusal": refused[place]})
    return _within_host(answers, host)


def _steady(made: dict[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """The old plan where just the utilization has moved by a little: a model that has come restarts no other one."""
    before, now = dict(old.get("flags") or {}), dict(made["flags"])
    moved = abs(float(before.pop("gpu_memory_utilization", 0)) - now.pop("gpu_memory_utilization"))
    same = before == now and all(
        old.get(key) == made[key] for key in ("gpus", "environment", "engine_version", "model")
    )
    return {**old, "fingerprint": made["fingerprint"]} if same and moved <= SAME_UTILIZATION else made


def _tasks(wishes: Sequence[Wish], engine: support.Version) -> tuple[dict[int, Task], dict[int, dict[str, Any]]]:
    """What can be planned, by place, and the refusals of what cannot."""
    tasks: dict[int, Task] = {}
    refused: dict[int, dict[str, Any]] = {}
    for place, wish in enumerate(wishes):
        try:
            tasks[place] = Task(parse_model(wish.model), wish, engine)
        except UnknownArchitecture as error:
            refused[place] = _unknown(error)
        except PlanError as error:
            raise PlanError(f"{wish.name}: {error}") from None
    return tasks, refused


def fingerprint(wishes: Sequence[Wish], gpus: Sequence[Gpu], engine: support.Version) -> str:
    """Of all that the plans of a host hang on, but for the memory that happens to be free."""
    asked = [
        (
            wish.name,
            {key: wish.model.get(key) for key in ("source", "revision", "config", "weights_bytes")},
            wish.users,
            wish.context,
            dict(wish.flags),
            sorted(wish.visible) if wish.visible is not None else None,
        )
        for wish in wishes
    ]
    cards = [(gpu.index, gpu.uuid, gpu.total_bytes) for gpu in gpus]
    said = json.dumps([FORMULAE, engine.text, cards, asked], sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _size(outcome: Outcome) -> tuple[int, int]:
    if outcome.found is None:
        return (0, 0)
    found = outcome.found
    need = max(kv_cache.bytes_for(found.layouts, found.max_model_len, 1), default=0)
    return (found.split.gpus, max(rank.counted_bytes for rank in found.ranks) + need)


def _roomiest(
    place: int, gpus: Sequence[Gpu], tenants: Mapping[str, Sequence[int]], tasks: Mapping[int, Task]
) -> tuple[Gpu, ...]:
    """The GPU where one more instance leaves most for KV caches; none where it fits on no one."""
    left: list[tuple[int, int]] = []
    for at, gpu in enumerate(gpus):
        tries = divided(gpu, {each: tasks[each] for each in (*tenants.get(gpu.uuid, ()), place)})
        if tries:
            left.append((sum(found.available[0] for found in tries.values()), -at))
    return (gpus[-max(left)[1]],) if left else ()


def divided(gpu: Gpu, together: Mapping[int, Task]) -> dict[int, Try]:
    """One GPU for several instances: to each the KV cache that it needs, and of the rest a part as large as its need.

    Nothing where they do not fit.
    """
    if not all(_can_share(task, gpu) for task in together.values()):
        return {}
    options = {
        place: [batch for batch in batches(task, gpu) if not batch.eager or task.wish.flags.get("enforce_eager")]
        for place, task in together.items()
    }
    for step in range(max(map(len, options.values()))):
        chosen = {place: each[min(step, len(each) - 1)] for place, each in options.items()}
        tries = _divided(gpu, together, chosen)
        if tries and not any(shortfall(found) for found in tries.values()):
            return tries
    return {}


def _can_share(task: Task, gpu: Gpu) -> bool:
    several = any(task.wish.flags.get(name, 1) > 1 for name in ("tensor_parallel_size", "pipeline_parallel_size"))
    return not several and not unsupported(task, gpu)


def _divided(gpu: Gpu, together: Mapping[int, Task], chosen: Mapping[int, Batch]) -> dict[int, Try]:
    try:
        least = {place: attempt(task, Split(1), (gpu,), chosen[place], share=1) for place, task in together.items()}
    except PlanError:
        return {}
    fixed = {place: task.wish.flags.get("kv_cache_memory_bytes") for place, task in together.items()}
    needs = {place: fixed[place] or least_cache(found) for place, found in least.items()}
    bases = {place: max(rank.footprint_bytes for rank in found.ranks) for place, found in least.items()}
    spare = gpu.free_bytes - guard(gpu.total_bytes) - sum(bases.values()) - sum(needs.values())
    if spare < 0:
        return {}
    free = sum(need for place, need in needs.items() if not fixed[place])
    caches = {place: need if fixed[place] else need + spare * need // max(free, 1) for place, need in needs.items()}
    taken = {place: bases[place] + caches[place] for place in together}
    return {
        place: attempt(
            task,
            Split(1),
            (replace(gpu, free_bytes=gpu.free_bytes - sum(taken.values()) + taken[place]),),
            chosen[place],
            share=caches[place],
        )
        for place, task in together.items()
    }


def _no_room(
    task: Task, alone: Try, gpus: Sequence[Gpu], tenants: Mapping[str, Sequence[int]], tasks: Mapping[int, Task]
) -> dict[str, Any]:
    """It would fit on this host by itself, but not beside the others."""
    names = ", ".join(sorted({tasks[at].wish.name for each in tenants.values() for at in each}))

    def beside(other: Task) -> Try | None:
        for gpu in gpus:
            tries = divided(gpu, {**{at: tasks[at] for at in tenants.get(gpu.uuid, ())}, NEW: other})
            if tries:
                return tries[NEW]
        return None

    reason = (
        f"fits on this host alone, but not beside {names}: move one of them to another host, "
        "or take less context or fewer users for them"
    )
    return refusal(task, gpus, Outcome(reason=reason, nearest=alone), find=beside)


NEW = -1  # the place of a model that is tried beside those that have one


def _seen(wish: Wish, gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    try:
        return visible(gpus, wish.visible) if gpus else ()
    except PlanError as error:
        raise PlanError(f"{wish.name}: {error}") from None


def _unknown(error: UnknownArchitecture) -> dict[str, Any]:
    nothing = {"what": "a known architecture", "bytes": 0}
    reason = f"{error} With vllm_plan: false this host's models are started without a plan, by their flags alone."
    return {"reason": reason, "needs": nothing, "has": nothing, "fits": []}


def _within_host(answers: list[dict[str, Any]], host: Host) -> list[dict[str, Any]]:
    """What the plans together take of the host's memory and disk, in order; the first that is too much is refused."""
    left = {"ram_bytes": host.ram_bytes, "shm_bytes": host.shm_bytes, "disk_bytes": host.disk_bytes}
    words = {
        "ram_bytes": ("memory", "add memory, or take fewer users or a shorter context"),
        "shm_bytes": ("room in /dev/shm", "mount /dev/shm larger, or run the model on one GPU"),
        "disk_bytes": ("disk below /var/lib/vllm", "make room, or mount a larger disk there"),
    }
    checked = []
    for answer in answers:
        needs = (answer.get("plan") or {}).get("host", {})
        short = [name for name, amount in needs.items() if left.get(name) is not None and amount > left[name]]
        if short:
            (what, remedy), amount, free = words[short[0]], needs[short[0]], left[short[0]]
            reason = f"{answer['plan']['model']['source']} does not fit: {gib(amount)} of {what} are needed, "
            reason += f"and {gib(max(0, free))} are left: {remedy}."
            needs, has = {"what": what, "bytes": amount}, {"what": what, "bytes": free}
            checked.append(
                {"name": answer["name"], "refusal": {"reason": reason, "needs": needs, "has": has, "fits": []}}
            )
        else:
            left = {name: None if free is None else free - needs.get(name, 0) for name, free in left.items()}
            checked.append(answer)
    return checked
