# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: from a wish and GPUs to a plan, or to a refusal with numbers and what would fit.

Tried in the order in which it costs the user least: fewest GPUs first, pipelines after that; on each the batch that
vLLM would take by default, then smaller ones; CUDA graphs are given up last of all. What the user has fixed is never
changed, and neither is what a model answers: another KV cache dtype and another variant are offered, not taken.
"""

# ruff: noqa: PLR0911 (what is wrong with a try is told by the first thing that is)
from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from . import kv_cache, overhead, quantization, support, weights
from .architecture import Architecture
from .architecture import parse as parse_architecture
from .errors import PlanError
from .overhead import Rank, Setting
from .units import MIB, gib
from .wish import Gpu, Wish, without_gpus

# A step of fewer tokens slows prefill and frees little; it is vLLM's own default for cards below 70 GiB.
LEAST_BATCH = 2048
# Without `users`. Of 1024 sequences on a large card each takes memory; docs/measurements.md has what 256 cost in speed.
PLENTY_SEQS = 256
TOKENS_A_SEQ = 512
LEAST_SEQS = 8
# A context that nobody asked for is worth more GPUs only below this many tokens.
LEAST_CONTEXT = 4096
# Left free for what no formula knows.
GUARD_FRACTION = 0.01
GUARD_BYTES = 300 * MIB
UTILIZATION_STEPS = 1000
MOST_SETS = 2000


@dataclass(frozen=True)
class Split:
    """How a model is laid over GPUs."""

    tensor: int
    pipeline: int = 1
    expert_parallel: bool = False

    @property
    def gpus(self) -> int:
        return self.tensor * self.pipeline

    def __str__(self) -> str:
        parts = [f"tensor_parallel_size {self.tensor}"]
        if self.pipeline > 1:
            parts.append(f"pipeline_parallel_size {self.pipeline}")
        if self.expert_parallel:
            parts.append("enable_expert_parallel")
        return ", ".join(parts)


@dataclass(frozen=True)
class Batch:
    """``max_num_batched_tokens``, ``max_num_seqs`` and ``enforce_eager``."""

    tokens: int
    seqs: int
    eager: bool


@dataclass(frozen=True)
class Model:
    """A model document, parsed."""

    document: Mapping[str, Any]
    architecture: Architecture
    quantization: quantization.Quantization | None

    @property
    def source(self) -> str:
        return str(self.document.get("source") or self.architecture.name)


@dataclass(frozen=True)
class Task:
    """A model, what is wished for it, and the engine that is to run it."""

    model: Model
    wish: Wish
    engine: support.Version

    def wishing(self, **changes: Any) -> Task:
        return replace(self, wish=replace(self.wish, **changes))


@dataclass(frozen=True)
class Try:
    """One way to do a task on given GPUs, with what it leaves. Bytes are per GPU."""

    task: Task
    split: Split
    gpus: tuple[Gpu, ...]
    setting: Setting
    ranks: tuple[Rank, ...]
    utilization: float
    available: tuple[int, ...]
    layouts: tuple[kv_cache.Layout, ...]
    max_model_len: int
    share: int | None = None

    @property
    def concurrency(self) -> float:
        return kv_cache.concurrency(self.layouts, self.available, self.max_model_len)

    @property
    def tokens(self) -> int:
        return kv_cache.tokens(self.layouts, self.available, self.max_model_len)

    def rank_of(self, place: int) -> Rank:
        return self.ranks[place // self.split.tensor]


def parse_model(document: Mapping[str, Any]) -> Model:
    config = document.get("config") or {}
    try:
        return Model(document, parse_architecture(config), quantization.parse(config))
    except PlanError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise PlanError(
            f"config.json cannot be read as a model's ({type(error).__name__}: {str(error)[:80]}): "
            "compare it with the one on the hub, and fetch it again."
        ) from error


def splits(task: Task, most: int) -> Iterator[tuple[Split, str | None]]:
    """All ways to lay the model over up to ``most`` GPUs, each with the reason why it is not possible.

    Tensor parallelism alone comes first, fewest GPUs first; then pipelines; experts whole where they cannot be cut.
    """
    model, wish = task.model, task.wish
    fixed_tensor, fixed_pipeline = wish.flags.get("tensor_parallel_size"), wish.flags.get("pipeline_parallel_size")
    fixed_experts = wish.flags.get("enable_expert_parallel")
    for pipeline in [fixed_pipeline] if fixed_pipeline else range(1, most + 1):
        for tensor in [fixed_tensor] if fixed_tensor else range(1, most // pipeline + 1):
            if pipeline * tensor > most:
                continue
            choices = (False, True) if model.architecture.experts and tensor > 1 else (False,)
            for experts in choices if fixed_experts is None else (fixed_experts,):
                split = Split(tensor, pipeline, experts)
                why = weights.indivisible(
                    model.architecture, model.quantization, tensor, pipeline, experts, task.engine.release
                )
                yield split, why
                if why is None:
                    break


def gpu_sets(gpus: Sequence[Gpu], count: int) -> Iterator[tuple[Gpu, ...]]:
    """The best set of equal cards of each kind: most NVLink within, then most free. MIG instances go alone."""
    kinds: dict[tuple[Any, ...], list[Gpu]] = {}
    for gpu in gpus:
        if not gpu.mig or count == 1:
            kinds.setdefault((gpu.compute_capability, gpu.total_bytes, gpu.name), []).append(gpu)
    for _, alike in sorted(kinds.items(), key=lambda kind: kind[0], reverse=True):
        if len(alike) >= count:
            sets = itertools.islice(itertools.combinations(alike, count), MOST_SETS)
            yield max(sets, key=lambda chosen: (_links(chosen), min(gpu.free_bytes for gpu in chosen)))


def _links(chosen: Sequence[Gpu]) -> int:
    return sum(two.index in one.nvlink for one, two in itertools.combinations(chosen, 2))


def batches(task: Task, gpu: Gpu) -> Iterator[Batch]:
    """The batches to try, what serves best first."""
    wish = task.wish
    tokens, seqs = support.default_batch(task.engine.release, gpu.total_bytes, gpu.name, gpu.compute_capability)
    fixed_tokens = wish.flags.get("max_num_batched_tokens")
    fixed_seqs = wish.flags.get("max_num_seqs") or wish.users
    all_seqs = [fixed_seqs] if fixed_seqs else halved(seqs, LEAST_SEQS)
    if fixed_tokens and not fixed_seqs:
        all_seqs = sorted({min(each, fixed_tokens) for each in all_seqs}, reverse=True)
    fixed_eager = wish.flags.get("enforce_eager")
    for eager in (False, True) if fixed_eager is None else (fixed_eager,):
        for number_of_seqs in all_seqs:
            least = max(number_of_seqs, _longest_step(task))
            all_tokens = {max(each, least) for each in halved(tokens, LEAST_BATCH)}
            for number_of_tokens in [fixed_tokens] if fixed_tokens else sorted(all_tokens, reverse=True):
                yield Batch(number_of_tokens, number_of_seqs, eager)


def _longest_step(task: Task) -> int:
    """Tokens of a prompt that cannot be cut into steps (config/model.py is_chunked_prefill_supported); else one."""
    architecture, flags = task.model.architecture, task.wish.flags
    encodes = any(cache.kind == "encoder" for layer in architecture.layers for cache in layer.caches)
    if not flags.get("enable_chunked_prefill", not encodes):
        return flags.get("max_model_len") or task.wish.context or architecture.max_position_embeddings
    return 1


def halved(most: int, least: int) -> list[int]:
    return [most >> step for step in range(most.bit_length()) if most >> step >= least] or [most]


def attempt(task: Task, split: Split, gpus: Sequence[Gpu], batch: Batch, share: int | None = None) -> Try:
    """Run the numbers of one way. ``share``: bytes of KV cache where several instances are on the card.

    ``available`` of the answer is zero or less where nothing is left for the KV cache.
    """
    model, wish = task.model, task.wish
    architecture = model.architecture
    total = min(gpu.total_bytes for gpu in gpus)
    capability = gpus[0].compute_capability
    wanted = wish.flags.get("max_model_len") or wish.context
    setting = Setting(
        architecture=architecture,
        quantization=model.quantization,
        tensors=model.document.get("tensors"),
        version=task.engine.release,
        compute_capability=capability,
        total_bytes=total,
        tensor_parallel_size=split.tensor,
        pipeline_parallel_size=split.pipeline,
        enable_expert_parallel=split.expert_parallel,
        dtype=support.resolve_dtype(architecture, model.quantization, wish.flags.get("dtype", "auto"), capability),
        kv_cache_dtype=wish.flags.get("kv_cache_dtype", "auto"),
        max_model_len=min(wanted or architecture.max_position_embeddings, architecture.max_position_embeddings),
        max_num_seqs=batch.seqs,
        max_num_batched_tokens=batch.tokens,
        enforce_eager=batch.eager,
        language_model_only=bool(wish.flags.get("language_model_only", False)),
        block_size=wish.flags.get("block_size"),
        enable_prefix_caching=wish.flags.get("enable_prefix_caching"),
        async_scheduling=wish.flags.get("async_scheduling", True),
    )
    result = _laid_out(task, split, tuple(gpus), setting, share)
    if wanted is None and min(result.available) > 0:
        # Of a context that nobody asked for: as long as it goes, for the users there are.
        longest = kv_cache.longest(result.layouts, result.available, wish.users or 1, setting.max_model_len)
        if 0 < longest < setting.max_model_len:
            result = _laid_out(task, split, tuple(gpus), replace(setting, max_model_len=longest), share)
    return result


def _laid_out(task: Task, split: Split, gpus: tuple[Gpu, ...], setting: Setting, share: int | None) -> Try:
    wish, free = task.wish, min(gpu.free_bytes for gpu in gpus)
    ranks = overhead.ranks(setting)
    layouts = kv_cache.layout(setting, hybrid=not wish.flags.get("disable_hybrid_kv_cache_manager"))
    total = setting.total_bytes
    # Of a model without KV cache vLLM allocates none: v1/engine/core.py _initialize_kv_caches.
    cache = share or wish.flags.get("kv_cache_memory_bytes") if kv_cache.needed(layouts) else 0
    if wish.flags.get("gpu_memory_utilization"):
        utilization = float(wish.flags["gpu_memory_utilization"])
    elif cache is not None:
        utilization = steps(max(rank.counted_bytes for rank in ranks) + cache, total)
    else:
        outside = max(rank.context_bytes + rank.unaccounted_bytes for rank in ranks)
        utilization = steps(free - outside - guard(total), total)
    requested = math.ceil(total * utilization)
    return Try(
        task=task,
        split=split,
        gpus=gpus,
        setting=setting,
        ranks=ranks,
        utilization=utilization,
        available=tuple(requested - rank.counted_bytes if cache is None else cache for rank in ranks),
        layouts=layouts,
        max_model_len=setting.max_model_len,
        share=share,
    )


def steps(amount: int, total: int) -> float:
    """A utilization in thousandths, rounded down; at least one thousandth."""
    return max(1, amount * UTILIZATION_STEPS // total) / UTILIZATION_STEPS


def guard(total: int) -> int:
    return max(GUARD_BYTES, int(total * GUARD_FRACTION))


def shortfall(found: Try) -> str | None:
    """Why this way does not do, as a sentence with numbers; None if it does."""
    wish, total, free = found.task.wish, found.setting.total_bytes, min(gpu.free_bytes for gpu in found.gpus)
    context = max(rank.context_bytes for rank in found.ranks)
    outside = max(rank.context_bytes + rank.unaccounted_bytes for rank in found.ranks)
    requested = math.ceil(total * found.utilization)
    if wish.flags.get("gpu_memory_utilization") and requested > free - context:
        return (
            f"flags.gpu_memory_utilization is {found.utilization}, which asks for {gib(requested)}, but of "
            f"{gib(total)} only {gib(free - context)} are free once vLLM's own CUDA context is there: "
            f"give at most {steps(free - outside, total)}"
        )
    spare = min(spare_bytes(found, place) for place in range(found.split.gpus))
    cached, cache = kv_cache.needed(found.layouts), min(found.available)
    if spare < 0 < cache + spare:
        fixed = "kv_cache_memory_bytes" if wish.flags.get("kv_cache_memory_bytes") else "gpu_memory_utilization"
        most = cache + spare if fixed == "kv_cache_memory_bytes" else steps(requested + spare, total)
        return (
            f"flags.{fixed} is {wish.flags.get(fixed, found.utilization)}, and under load vLLM would hold "
            f"{gib(-spare)} more than is free, for it does not count everything that it allocates: give at most {most}"
        )
    if spare < 0 or (cached and cache <= 0):
        rank = max(found.ranks, key=lambda each: each.footprint_bytes)
        if rank.footprint_bytes < free and wish.flags.get("gpu_memory_utilization"):
            return (
                f"flags.gpu_memory_utilization is {found.utilization}, which gives vLLM {gib(requested)}, and "
                f"{gib(rank.counted_bytes)} are needed on {each_gpu(found)} before any KV cache: "
                f"give more than {steps(rank.counted_bytes, total)}"
            )
        return (
            f"{gib(rank.footprint_bytes)} are needed on {each_gpu(found)} before any KV cache, "
            f"{gib(rank.weights_bytes)} of them for weights, and {gib(free)} are free"
        )
    if not cached:
        return None
    wanted = wish.users or 1
    if kv_cache.users(found.layouts, found.available, found.max_model_len) < wanted:
        need = max(kv_cache.bytes_for(found.layouts, found.max_model_len, wanted))
        return (
            f"{count(wanted, 'request')} of {found.max_model_len} tokens need {gib(need)} of KV cache "
            f"on {each_gpu(found)}, and {gib(cache)} are left for it"
        )
    blocks = kv_cache.num_blocks(found.layouts, found.available)
    states = any(group.kind == "state" for layout in found.layouts for group in layout.groups)
    if states and not found.setting.enforce_eager and found.setting.max_num_seqs > blocks:
        # config/compilation.py resolve_cudagraph_mode_and_sizes
        return (
            f"max_num_seqs is {found.setting.max_num_seqs}, and there is room for {count(blocks, 'Mamba state')}: "
            f"give at most {blocks}"
        )
    floor = min(LEAST_CONTEXT, found.setting.architecture.max_position_embeddings)
    if wish.context is None and "max_model_len" not in wish.flags and found.max_model_len < floor:
        return f"only {found.max_model_len} tokens of context are left for {count(wanted, 'request')}"
    return None


def crowds(found: Try) -> bool:
    """Whether the batch has room for more sequences than the KV cache has, at a short chat's length."""
    wish, seqs = found.task.wish, found.setting.max_num_seqs
    chosen = not (wish.users or wish.flags.get("max_num_seqs"))
    return chosen and seqs > PLENTY_SEQS and kv_cache.needed(found.layouts) and found.tokens < seqs * TOKENS_A_SEQ


def spare_bytes(found: Try, place: int) -> int:
    """What stays free on one of the GPUs when the engine runs at full load."""
    cache = found.available[place // found.split.tensor]
    return found.gpus[place].free_bytes - found.rank_of(place).footprint_bytes - cache


def each_gpu(found: Try) -> str:
    return "each GPU" if found.split.gpus > 1 else "the GPU"


def least_cache(found: Try) -> int:
    """Bytes of KV cache on each GPU without which the wish does not fit."""
    wish, tokens = found.task.wish, found.max_model_len
    if not wish.context and "max_model_len" not in wish.flags:
        tokens = min(tokens, LEAST_CONTEXT)
    return max(kv_cache.bytes_for(found.layouts, tokens, wish.users or 1), default=0)


def count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


@dataclass(frozen=True)
class Outcome:
    """What came of a search: ``found``, or why nothing did, with the try that came nearest."""

    found: Try | None = None
    reason: str = ""
    nearest: Try | None = None


def solve(task: Task, gpus: Sequence[Gpu]) -> Outcome:
    """The first way that does, in the order that the module's docstring gives."""
    if not gpus:
        return Outcome(reason=without_gpus(()))
    if why := contradiction(task):
        return Outcome(reason=why)
    ways, impossible = _ways(task, gpus)
    nearest: Try | None = None
    why_nearest = ""
    hopeless = set()
    crowded: dict[tuple[Any, ...], Try] = {}
    # CUDA graphs are given up last of all; otherwise the order stands.
    for split, chosen, batch in sorted(ways, key=lambda way: way[-1].eager):
        if (split, chosen) in hopeless or (split, chosen, batch.seqs) in crowded:
            continue
        try:
            found = attempt(task, split, chosen, batch)
        except PlanError as error:  # vLLM itself could not lay the KV cache out so
            impossible.append(str(error).rstrip("."))
            hopeless.add((split, chosen))
            continue
        why = shortfall(found)
        if why is None and crowds(found):
            crowded[split, chosen, batch.seqs] = found
            continue
        if why is None:
            return Outcome(found=found)
        if any(gpu.free_bytes < found.rank_of(place).weights_bytes for place, gpu in enumerate(chosen)):
            hopeless.add((split, chosen))  # with any batch: told by the one that takes least
            found = attempt(task, split, chosen, list(batches(task, chosen[0]))[-1])
            why = shortfall(found) or why
        if nearest is None or _closeness(found) > _closeness(nearest):
            nearest, why_nearest = found, why
    if crowded:
        return Outcome(found=next(iter(crowded.values())))
    if nearest is None:
        return Outcome(reason=impossible[0] if impossible else _not_so_many(task.wish, gpus))
    return Outcome(reason=why_nearest, nearest=nearest)


def _ways(task: Task, gpus: Sequence[Gpu]) -> tuple[list[tuple[Split, tuple[Gpu, ...], Batch]], list[str]]:
    """What can be tried, in order, and why other splits and GPUs cannot."""
    ways: list[tuple[Split, tuple[Gpu, ...], Batch]] = []
    impossible: list[str] = []
    sets: dict[int, list[tuple[Gpu, ...]]] = {}
    for split, why in splits(task, len(gpus)):
        if why:
            impossible.append(why)
            continue
        if split.gpus not in sets:
            sets[split.gpus] = list(gpu_sets(gpus, split.gpus))
        for chosen in sets[split.gpus]:
            if problem := unsupported(task, chosen[0]):
                impossible.append(problem)
            else:
                ways += [(split, chosen, batch) for batch in batches(task, chosen[0])]
    return ways, impossible


def contradiction(task: Task) -> str | None:
    """What is asked for that no GPU can give."""
    flags, longest = task.wish.flags, task.model.architecture.max_position_embeddings
    name = "flags.max_model_len" if "max_model_len" in flags else "context"
    wanted = flags.get("max_model_len") or task.wish.context or longest
    if wanted > longest:
        return f"{name} is {wanted}, and the model's own limit is {longest} tokens: give at most {longest}"
    steps_of, seqs = flags.get("max_num_batched_tokens"), flags.get("max_num_seqs") or task.wish.users or 1
    if steps_of and steps_of < seqs:  # config/scheduler.py verify_max_model_len, as the next one
        return f"flags.max_num_batched_tokens is {steps_of}, and requests at a time are {seqs}: give at least {seqs}"
    if steps_of and steps_of < _longest_step(task):
        return (
            f"flags.max_num_batched_tokens is {steps_of}, and a prompt of {_longest_step(task)} tokens has to go into "
            f"one step: give at least {_longest_step(task)}"
        )
    return None


def unsupported(task: Task, gpu: Gpu) -> str | None:
    model, flags = task.model, task.wish.flags
    return support.problem(model.architecture, model.quantization, flags, gpu.compute_capability, task.engine.release)


def _closeness(found: Try) -> float:
    """In users; below none, by how much of a GPU is missing."""
    if not kv_cache.needed(found.layouts):
        return min(spare_bytes(found, place) for place in range(found.split.gpus)) / found.setting.total_bytes
    left = min(found.available)
    return left / found.setting.total_bytes - 1.0 if left <= 0 else found.concurrency


def _not_so_many(wish: Wish, gpus: Sequence[Gpu]) -> str:
    asked = (wish.flags.get("tensor_parallel_size") or 1) * (wish.flags.get("pipeline_parallel_size") or 1)
    kinds = len({(gpu.name, gpu.total_bytes) for gpu in gpus})
    alike = "" if kinds == 1 else f" of {kinds} kinds; cards that share a model must be alike"
    return (
        f"flags.tensor_parallel_size times flags.pipeline_parallel_size asks for {count(asked, 'GPU')}, "
        f"and {count(len(gpus), 'GPU')} can be used{alike}"
    )
