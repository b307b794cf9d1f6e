# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""What the planner's tests share: figures of real models, GPUs, and vLLM's own checks at a start."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ansible_collections.llmfleet.serving.plugins.module_utils._planner import architecture, pack, support, wish
from ansible_collections.llmfleet.serving.plugins.module_utils._planner.architecture import (
    Architecture,
    Attention,
    Layer,
)

ROOT = Path(__file__).parents[3]
MODELS: dict[str, dict[str, Any]] = json.loads((ROOT / "tests/bench/planner/starts.json").read_text())["models"]
MIB, GIB = 1 << 20, 1 << 30

QWEN, LLAMA, TINY = "Qwen/Qwen2.5-7B-Instruct", "meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen3-0.6B"
BIG = "Qwen/Qwen2.5-72B-Instruct-AWQ"
BERT = {
    "architectures": ["BertModel"],
    "hidden_size": 768,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "vocab_size": 30522,
}
PARTS = (
    "context_bytes",
    "weights_bytes",
    "activation_bytes",
    "non_torch_bytes",
    "cudagraph_bytes",
    "unaccounted_bytes",
    "kv_cache_bytes",
    "other_bytes",
    "spare_bytes",
)


MLA = Attention("mla", 1, 576, 0)
INDEXER = Attention("indexer", 1, 128, 0)


def model(*layers: Any, head_dim: int = 128, **changes: Any) -> Architecture:
    """A model with these caches, layer for layer; a tuple is a layer with several, () one with none."""
    plain: dict[str, Any] = {
        "name": "LlamaForCausalLM",
        "family": "dense",
        "hidden_size": 4096,
        "vocab_size": 128256,
        "heads": 32,
        "kv_heads": 8,
        "head_dim": head_dim,
        "intermediate_size": 14336,
        "layers": tuple(Layer(layer if isinstance(layer, tuple) else (layer,), ()) for layer in layers)
        or (Layer((Attention("full", 8, head_dim, head_dim),), ()),),
        "outer": (),
        "tied": False,
        "experts": 0,
        "experts_per_token": 0,
        "moe_intermediate_size": 0,
        "max_position_embeddings": 131072,
        "dtype": "bfloat16",
    }
    return Architecture(**{**plain, **changes})


def document(model: str | dict[str, Any], **changes: Any) -> dict[str, Any]:
    config = MODELS[model] if isinstance(model, str) else model
    source = model if isinstance(model, str) else config["architectures"][0]
    return {"source": source, "revision": "main", "config": config, "files": [], **changes}


def gpu(gib: float = 24, index: int = 0, **changes: Any) -> wish.Gpu:
    """A card of so many GiB, by default with nothing on it but what the driver holds."""
    total = int(gib * GIB)
    plain: dict[str, Any] = {
        "uuid": f"GPU-{index:08x}",
        "name": "NVIDIA Test",
        "total_bytes": total,
        "free_bytes": max(0, total - 200 * MIB),
        "compute_capability": (9, 0),
    }
    return wish.Gpu(index=index, **{**plain, **changes})


def cards(number: int, gib: float = 24, **changes: Any) -> list[wish.Gpu]:
    return [gpu(gib, index, **changes) for index in range(number)]


def wished(model: str | dict[str, Any], name: str = "", **asked: Any) -> wish.Wish:
    return wish.wish({"name": name or document(model)["source"], "model": document(model), **asked})


def planned(
    wishes: Sequence[wish.Wish], gpus: Sequence[wish.Gpu], version: str = "0.32.0", **other: Any
) -> list[dict[str, Any]]:
    answers = pack.pack(wishes, gpus, support.version(version), **other)
    assert [answer["name"] for answer in answers] == [each.name for each in wishes]
    check(answers, gpus, wishes)
    return answers


def plan(
    model: str | dict[str, Any], gpus: Sequence[wish.Gpu], version: str = "0.32.0", **asked: Any
) -> dict[str, Any]:
    answer = planned([wished(model, **asked)], gpus, version)[0]
    assert "plan" in answer, answer["refusal"]["reason"]
    return answer["plan"]


def refusal(
    model: str | dict[str, Any], gpus: Sequence[wish.Gpu], version: str = "0.32.0", **asked: Any
) -> dict[str, Any]:
    answer = planned([wished(model, **asked)], gpus, version)[0]
    assert "refusal" in answer, answer["plan"]["flags"]
    return answer["refusal"]


def check(answers: Sequence[dict[str, Any]], gpus: Sequence[wish.Gpu], wishes: Sequence[wish.Wish]) -> None:
    """What holds for every plan, and for the plans of one host together."""
    by_uuid = {each.uuid: each for each in gpus}
    used: dict[str, int] = {}
    contexts: dict[str, list[tuple[int, int, int]]] = {}
    for answer, asked in zip(answers, wishes, strict=True):
        if "plan" not in answer:
            refused = answer["refusal"]
            assert refused["reason"].endswith(".")
            assert ".." not in refused["reason"]
            assert {*refused["needs"]} == {*refused["has"]} == {"what", "bytes"}
            continue
        flags, rows = answer["plan"]["flags"], answer["plan"]["memory"]
        start_checks(answer["plan"], asked)
        names = answer["plan"]["environment"]["CUDA_VISIBLE_DEVICES"].split(",")
        places = [by_uuid.get(name) or next(card for card in gpus if str(card.index) == name) for name in names]
        assert [card.index for card in places] == answer["plan"]["gpus"] == [row["gpu"] for row in rows]
        assert len({card.uuid for card in places}) == len(places), "a GPU twice"
        assert len({(card.name, card.total_bytes) for card in places}) == 1, "cards of several kinds"
        for card, row in zip(places, rows, strict=True):
            assert sum(row[part] for part in PARTS) == row["total_bytes"] == card.total_bytes
            assert all(row[part] >= 0 for part in PARTS), row
            taken = sum(row[part] for part in PARTS[:-2])
            used[card.uuid] = used.get(card.uuid, 0) + taken
            requested = math.ceil(card.total_bytes * flags["gpu_memory_utilization"])
            contexts.setdefault(card.uuid, []).append((taken, row["context_bytes"], requested))
    for uuid, amount in used.items():
        card = by_uuid[uuid]
        assert amount <= card.free_bytes, "more than is free"
        for taken, context, requested in contexts[uuid]:
            # v1/worker/utils.py request_memory, of whichever instance starts last
            assert card.free_bytes - (amount - taken) - context >= requested


def start_checks(found: dict[str, Any], asked: wish.Wish) -> None:
    flags = found["flags"]
    for name, value in asked.flags.items():
        assert flags[name] == value
    parsed = architecture.parse(asked.model["config"])
    tensor, pipeline = flags.get("tensor_parallel_size", 1), flags.get("pipeline_parallel_size", 1)
    assert len(found["gpus"]) == len(found["memory"]) == tensor * pipeline
    assert parsed.heads % tensor == 0
    assert 0 < flags["max_model_len"] <= parsed.max_position_embeddings
    assert 0 < flags["max_num_seqs"] <= flags["max_num_batched_tokens"]
    assert 0 < flags["gpu_memory_utilization"] <= 1
    if asked.context:
        assert flags["max_model_len"] >= asked.context
    if found["max_concurrency"] is None:
        assert found["kv_cache_tokens"] == 0
        return
    assert found["max_concurrency"] >= (asked.users or 1)
    assert found["kv_cache_tokens"] >= flags["max_model_len"] * (asked.users or 1)
    assert min(row["kv_cache_bytes"] for row in found["memory"]) > 0
