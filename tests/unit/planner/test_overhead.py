# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""What an engine takes of a GPU besides its KV cache."""

# ruff: noqa: PLR0917 (what Hypothesis draws)
from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from ansible_collections.llmfleet.serving.plugins.module_utils._planner import overhead, quantization
from ansible_collections.llmfleet.serving.plugins.module_utils._planner.architecture import parse
from hypothesis import given, settings
from hypothesis import strategies as st
from planned import GIB, LLAMA, MIB, MODELS, QWEN


def setting(model: str = QWEN, **changes: Any) -> overhead.Setting:
    config = MODELS[model]
    plain: dict[str, Any] = {
        "architecture": parse(config),
        "quantization": quantization.parse(config),
        "tensors": None,
        "version": (0, 32, 0),
        "compute_capability": (9, 0),
        "total_bytes": 80 * GIB,
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "enable_expert_parallel": False,
        "dtype": "bfloat16",
        "kv_cache_dtype": "auto",
        "max_model_len": 16384,
        "max_num_seqs": 128,
        "max_num_batched_tokens": 2048,
        "enforce_eager": False,
        "language_model_only": False,
        "block_size": None,
        "enable_prefix_caching": None,
        "async_scheduling": True,
    }
    return overhead.Setting(**{**plain, **changes})


ANY_MODEL = st.sampled_from(sorted(MODELS))
VERSIONS = st.sampled_from([(0, 22, 0), (0, 25, 1), (0, 27, 1), (0, 29, 0), (0, 32, 0), (0, 33, 0)])


@settings(max_examples=40)
@given(ANY_MODEL, VERSIONS, st.integers(1, 256), st.integers(0, 256), st.sampled_from([1, 2]), st.booleans())
def test_more_sequences_never_take_less(
    model: str, version: tuple[int, int, int], seqs: int, more: int, tensor: int, eager: bool
) -> None:
    few = setting(model, version=version, max_num_seqs=min(seqs, 256), tensor_parallel_size=tensor, enforce_eager=eager)
    many = replace(few, max_num_seqs=min(seqs + more, 256))
    for less, much in zip(overhead.ranks(few), overhead.ranks(many), strict=True):
        assert less.footprint_bytes <= much.footprint_bytes
        assert min(vars(less).values()) >= 0


@settings(max_examples=40)
@given(ANY_MODEL, VERSIONS, st.integers(256, 16384), st.integers(0, 16384))
def test_larger_batches_never_take_less(model: str, version: tuple[int, int, int], tokens: int, more: int) -> None:
    small = setting(model, version=version, max_num_batched_tokens=tokens)
    large = replace(small, max_num_batched_tokens=tokens + more)
    assert overhead.ranks(small)[0].footprint_bytes <= overhead.ranks(large)[0].footprint_bytes


@settings(max_examples=20)
@given(ANY_MODEL, VERSIONS)
def test_eager_takes_no_graphs(model: str, version: tuple[int, int, int]) -> None:
    graphs = setting(model, version=version)
    eager = overhead.ranks(replace(graphs, enforce_eager=True))[0]
    assert eager.cudagraph_bytes == 0
    assert eager.footprint_bytes < overhead.ranks(graphs)[0].footprint_bytes


def test_releases_count_different_things() -> None:
    old, new = (overhead.ranks(setting(version=version))[0] for version in ((0, 25, 1), (0, 32, 0)))
    assert old.cudagraph_bytes == 0 < new.cudagraph_bytes, "runner v2 estimates its graphs from 0.29 on"
    assert old.unaccounted_bytes > new.unaccounted_bytes
    assert old.context_bytes == new.context_bytes


def test_pipeline_ranks_differ() -> None:
    first, last = overhead.ranks(setting(pipeline_parallel_size=2))
    assert first.weights_bytes == pytest.approx(last.weights_bytes, rel=0.01), "an embedding here, a head there"
    assert first.context_bytes == last.context_bytes > overhead.ranks(setting())[0].context_bytes
    assert first.unaccounted_bytes <= last.unaccounted_bytes, "only the last samples"


def test_tensor_parallel_halves() -> None:
    one, two = overhead.ranks(setting(LLAMA))[0], overhead.ranks(setting(LLAMA, tensor_parallel_size=2))[0]
    assert two.weights_bytes == pytest.approx(one.weights_bytes / 2, rel=0.01)


def test_what_is_kept_of_an_architecture_belongs_to_it_and_its_split() -> None:
    small, large = setting("Qwen/Qwen3-0.6B"), setting("google/gemma-3-1b-it")
    for _ in range(2):
        each = [overhead.ranks(replace(one, tensor_parallel_size=tp))[0] for one in (small, large) for tp in (1, 2)]
        assert len({rank.activation_bytes for rank in each}) == 4


def test_host_needs() -> None:
    files = {"files": [{"name": "a", "bytes": 5}, {"name": "b", "bytes": 7}]}
    one, two = (overhead.host_needs(setting(tensor_parallel_size=number), files) for number in (1, 2))
    assert one["disk_bytes"] == two["disk_bytes"] == 12
    assert one["shm_bytes"] == 0 < two["shm_bytes"] < GIB
    assert 6 * GIB <= one["ram_bytes"] < two["ram_bytes"]
    assert overhead.host_needs(setting(), {})["disk_bytes"] == 0
    assert one["ram_bytes"] - 6 * GIB < 16 * MIB
