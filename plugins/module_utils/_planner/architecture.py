# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: what vLLM builds from a model's config.json.

A family is a function that makes the tensors and the caches of one layer, as the model's file in vLLM's
``model_executor/models`` does; ``KNOWN`` says which architecture is of which family. What is not there is refused
by name, never guessed. Tensors are vLLM's, with its names: ``qkv_proj`` is one matrix, ``q_proj`` is not a tensor.
"""

# ruff: noqa: PLR0917 (a matrix is told by its sizes)
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Union

from .errors import PlanError, UnknownArchitecture

# A config that says more than this of anything is broken or malicious.
MOST = 1 << 24
MOST_LAYERS = 1024
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Attention:
    """The KV cache of one attention layer; ``kind`` is full, sliding, chunked, mla, indexer or encoder."""

    kind: str
    kv_heads: int
    head_dim: int
    v_head_dim: int
    window: int | None = None


@dataclass(frozen=True)
class State:
    """The state that a layer keeps per request instead of a cache per token; ``kind`` is one of ``_STATES``."""

    kind: str
    sizes: tuple[tuple[str, int], ...]
    dtypes: tuple[str, ...]

    def shapes(self, tp: int) -> tuple[tuple[tuple[int, ...], str], ...]:
        """(shape, dtype) of each tensor on one of ``tp`` GPUs, as vLLM's MambaStateShapeCalculator has it."""
        return tuple(zip(_STATES[self.kind](tp=tp, **dict(self.sizes)), self.dtypes))  # noqa: B905 (Python 3.9)


Cache = Union[Attention, State]  # noqa: UP007 (Python 3.9)


@dataclass(frozen=True)
class Tensor:
    """A parameter (or, with ``parameter=False``, a buffer) of vLLM's model, before it is cut for a rank.

    ``parallel`` says how it is cut:
    column      rows (the first dimension) over tensor parallel ranks
    row         columns (the last dimension)
    vocab       rows, after padding them to a multiple of 64
    qkv         rows, but the last two of ``parts`` over ``kv_heads`` heads, replicated where ranks outnumber them
    replicated  not at all
    expert_column, expert_row, expert_replicated
                the first dimension counts experts; without expert parallelism the others are cut as above

    ``parts`` are the rows of the matrices that are merged into it. ``stage`` is the pipeline rank that has a tensor
    outside the layers: first, last, ends (both) or every. ``dtype`` None is the model's.
    """

    name: str
    shape: tuple[int, ...]
    parallel: str = "replicated"
    quantizable: bool = False
    parts: tuple[int, ...] = ()
    kv_heads: int = 0
    dtype: str | None = None
    parameter: bool = True
    stage: str = "every"


@dataclass(frozen=True)
class Layer:
    """One decoder layer. ``caches`` is empty where it keeps none or shares another layer's."""

    caches: tuple[Cache, ...]
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Architecture:
    """A model as vLLM builds it. ``outer`` are the tensors outside the layers; ``vision`` those of its encoders."""

    name: str
    family: str
    hidden_size: int
    vocab_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    layers: tuple[Layer, ...]
    outer: tuple[Tensor, ...]
    tied: bool
    experts: int
    experts_per_token: int
    moe_intermediate_size: int
    max_position_embeddings: int
    dtype: str
    multimodal: bool = False
    pooling: bool = False
    sinks: bool = False
    mm_prefix: bool = False
    vision: tuple[Tensor, ...] = ()


# --- state shapes: vLLM's model_executor/layers/mamba/mamba_utils.py (0.25.1 to 0.33.0) ---------------------------


def _mamba1_shapes(tp: int, intermediate: int, state: int, kernel: int) -> tuple[tuple[int, ...], ...]:
    return (kernel - 1, intermediate // tp), (intermediate // tp, state)


def _mamba2_shapes(
    *, tp: int, intermediate: int, groups: int, heads: int, head_dim: int, state: int, kernel: int
) -> tuple[tuple[int, ...], ...]:
    groups += (tp - groups) if groups % tp else 0
    return (kernel - 1, (intermediate + 2 * groups * state) // tp), (heads // tp, head_dim, state)


def _gdn_shapes(
    *, tp: int, k_heads: int, v_heads: int, k_dim: int, v_dim: int, kernel: int
) -> tuple[tuple[int, ...], ...]:
    return (kernel - 1, (2 * k_dim * k_heads + v_dim * v_heads) // tp), (v_heads // tp, v_dim, k_dim)


def _kda_shapes(tp: int, heads: int, head_dim: int, kernel: int) -> tuple[tuple[int, ...], ...]:
    return (kernel - 1, 3 * heads * head_dim // tp), (heads // tp, head_dim, head_dim)


def _short_conv_shapes(tp: int, size: int, kernel: int) -> tuple[tuple[int, ...], ...]:
    return ((kernel - 1, size // tp),)


_STATES: dict[str, Callable[..., tuple[tuple[int, ...], ...]]] = {
    "mamba1": _mamba1_shapes,
    "mamba2": _mamba2_shapes,
    "gdn": _gdn_shapes,
    "kda": _kda_shapes,
    "short_conv": _short_conv_shapes,
}


# --- config.json --------------------------------------------------------------------------------------------------

_REQUIRED = object()


class Config:
    """config.json, or a part of it, with what is missing or absurd named. ``defaults`` are transformers' own."""

    def __init__(self, data: Mapping[str, Any], where: str = "config.json", defaults: Mapping[str, Any] | None = None):
        if not isinstance(data, Mapping):
            raise PlanError(f"{where} is {data!r:.80}, which is not a mapping")
        self.data, self.where, self.defaults = data, where, defaults or {}

    def get(self, key: str, default: Any = None) -> Any:
        value = self.data.get(key)
        return self.defaults.get(key, default) if value is None else value

    def count(self, *keys: str, default: Any = _REQUIRED, least: int = 1) -> int:
        """A whole number under the first of ``keys`` that is there."""
        for key in keys:
            value = self.get(key)
            if value is not None:
                if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MOST:
                    raise PlanError(
                        f"{self.where} says {key}: {value!r:.80}, which is not a number from {least} to {MOST}"
                    )
                return value
        if default is _REQUIRED:
            raise PlanError(f"{self.where} has no {keys[0]}, which the planner needs: is it the whole file?")
        return default

    def flag(self, key: str, default: bool = False) -> bool:
        return bool(self.get(key, default))

    def sub(self, key: str, defaults: Mapping[str, Any] | None = None, needed: bool = True) -> Config:
        if self.data.get(key) is None and needed:
            raise PlanError(f"{self.where} has no {key}, which the planner needs: is it the whole file?")
        return Config(self.data.get(key) or {}, f"{self.where}'s {key}", defaults)

    def types(self, layers: int) -> tuple[str, ...]:
        """``layer_types``, one for each layer, or () where there are none."""
        value = self.get("layer_types") or ()
        if value and (not isinstance(value, (list, tuple)) or len(value) < layers):
            raise PlanError(f"{self.where} says layer_types for {len(value)} of {layers} layers")
        return tuple(value[:layers])

    @property
    def layers(self) -> int:
        number = self.count("num_hidden_layers", "n_layer", "num_layers")
        if number > MOST_LAYERS:
            raise PlanError(f"{self.where} says num_hidden_layers: {number}, which is more than {MOST_LAYERS}")
        return number

    @property
    def hidden(self) -> int:
        return self.count("hidden_size", "n_embd")

    @property
    def heads(self) -> int:
        return self.count("num_attention_heads", "n_head")

    @property
    def kv_heads(self) -> int:
        number = self.count(
            "n_head_kv", "num_kv_heads", "num_key_value_heads", "multi_query_group_num", default=self.heads
        )
        if self.heads % number:
            raise PlanError(
                f"{self.where} says {self.heads} attention heads and {number} key/value heads, which do not divide"
            )
        return number

    @property
    def head_dim(self) -> int:
        size = self.count("head_dim", "attention_head_dim", default=0)
        if not size and self.hidden % self.heads:
            raise PlanError(f"{self.where} says hidden_size: {self.hidden}, which {self.heads} heads do not divide")
        return size or self.hidden // self.heads

    @property
    def vocab(self) -> int:
        return self.count("vocab_size", "padded_vocab_size")

    @property
    def positions(self) -> int:
        keys = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length")
        return self.count(*keys, "max_sequence_length", "max_seq_length", "seq_len", default=2048)

    @property
    def rope(self) -> dict[str, Any]:
        """``rope_parameters`` (transformers 5) or ``rope_scaling`` with the keys beside it, as vLLM reads them."""
        found = self.get("rope_parameters") or self.get("rope_scaling") or {}
        if not isinstance(found, Mapping):
            raise PlanError(f"{self.where} says rope_scaling: {found!r:.80}, which is not a mapping")
        rope = dict(found)
        rope.setdefault("rope_type", rope.get("type") or "default")
        rope["rope_type"] = {"su": "longrope", "mrope": "default"}.get(rope["rope_type"], rope["rope_type"])
        for key in ("partial_rotary_factor", "original_max_position_embeddings"):
            if self.get(key) is not None:
                rope.setdefault(key, self.get(key))
        return rope

    def window(self) -> int | None:
        """``sliding_window`` where it is in use (Qwen's configs say that it is not)."""
        return (
            self.count("sliding_window", default=0, least=0) or None if self.flag("use_sliding_window", True) else None
        )


# --- tensors ------------------------------------------------------------------------------------------------------


def _column(name: str, rows: int, columns: int, bias: bool = False, **more: Any) -> Iterable[Tensor]:
    """ColumnParallelLinear; with ``parts``, MergedColumnParallelLinear."""
    return _linear(name, rows, columns, "column", bias, **more)


def _row(name: str, rows: int, columns: int, bias: bool = False, **more: Any) -> Iterable[Tensor]:
    """RowParallelLinear: its bias is whole on every rank."""
    return _linear(name, rows, columns, "row", bias, **more)


def _replicated(name: str, rows: int, columns: int, bias: bool = False, **more: Any) -> Iterable[Tensor]:
    return _linear(name, rows, columns, "replicated", bias, **more)


def _linear(name: str, rows: int, columns: int, parallel: str, bias: bool, **more: Any) -> Iterable[Tensor]:
    yield Tensor(f"{name}.weight", (rows, columns), parallel, **{"quantizable": True, **more})
    if bias:
        cut = "replicated" if parallel == "row" else parallel
        yield Tensor(f"{name}.bias", (rows,), cut, **{**more, "quantizable": False})


def _qkv(
    name: str,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    v_head_dim: int = 0,
    bias: bool = False,
    **more: Any,
) -> Iterable[Tensor]:
    """QKVParallelLinear."""
    parts = (heads * head_dim, kv_heads * head_dim, kv_heads * (v_head_dim or head_dim))
    return _linear(name, sum(parts), hidden, "qkv", bias, parts=parts, kv_heads=kv_heads, **more)


def _norms(prefix: str, size: int, *names: str, bias: bool = False) -> Iterable[Tensor]:
    for name in names:
        yield Tensor(f"{prefix}.{name}.weight", (size,))
        if bias:
            yield Tensor(f"{prefix}.{name}.bias", (size,))


def _mlp(prefix: str, hidden: int, size: int, bias: bool = False, gated: bool = True, **more: Any) -> Iterable[Tensor]:
    if gated:
        yield from _column(f"{prefix}.gate_up_proj", 2 * size, hidden, bias, parts=(size, size), **more)
    else:
        yield from _column(f"{prefix}.up_proj", size, hidden, bias, **more)
    yield from _row(f"{prefix}.down_proj", hidden, size, bias, **more)


def _experts(
    prefix: str, experts: int, hidden: int, size: int, bias: bool = False, gated: bool = True
) -> Iterable[Tensor]:
    """FusedMoE: w13_weight and w2_weight with all experts in one tensor."""
    parts = (size, size) if gated else (size,)
    yield Tensor(f"{prefix}.w13_weight", (experts, sum(parts), hidden), "expert_column", True, parts)
    yield Tensor(f"{prefix}.w2_weight", (experts, hidden, size), "expert_row", True)
    if bias:
        yield Tensor(f"{prefix}.w13_bias", (experts, sum(parts)), "expert_column", False, parts)
        yield Tensor(f"{prefix}.w2_bias", (experts, hidden), "expert_replicated")


def _embedding(name: str, vocab: int, hidden: int, stage: str = "first") -> Tensor:
    return Tensor(f"{name}.weight", (vocab, hidden), "vocab", stage=stage)


def _ends(config: Config, tied: bool, norm: Iterable[Tensor] = (), head_bias: bool = False) -> tuple[Tensor, ...]:
    """Embedding, final norm and lm_head, which is the embedding once more where they are tied."""
    found = [_embedding("model.embed_tokens", config.vocab, config.hidden, "ends" if tied else "first")]
    found += [replace(tensor, stage="last") for tensor in norm]
    if not tied:
        found.append(_embedding("lm_head", config.vocab, config.hidden, "last"))
    if head_bias:
        found.append(Tensor("lm_head.bias", (config.vocab,), "vocab", stage="last"))
    return tuple(found)


def _rotary(rope: Mapping[str, Any], head_dim: int, positions: int, name: str = "rotary_emb") -> tuple[Tensor, ...]:
    """The cos/sin cache of get_rope, one for all layers (model_executor/layers/rotary_embedding, 0.25.1)."""
    kind, factor = rope.get("rope_type", "default"), rope.get("factor") or 1
    original = rope.get("original_max_position_embeddings") or positions
    size = rope.get("rope_dim") or int(head_dim * (rope.get("partial_rotary_factor") or 1))
    dtype = None
    if kind in ("yarn", "deepseek_yarn", "deepseek_llama_scaling"):
        positions = int(original * factor)
    elif kind == "linear":
        positions = int(positions * factor)
    elif kind == "longrope":
        positions += original
    if "mrope_section" in rope:
        name = f"m{name}"  # mrope.py: weights.py knows how long it is
    elif kind.startswith("deepseek") and head_dim in (64, 128, 256, 512):
        dtype = "float32"  # deepseek_scaling_rope.py: kept as it is for FlashInfer
    return (Tensor(f"{name}.cos_sin_cache", (positions, size), dtype=dtype, parameter=False),)


# --- decoders -----------------------------------------------------------------------------------------------------


def _build(
    config: Config, root: Config, family: str, layers: Sequence[Layer], outer: Iterable[Tensor], **more: Any
) -> Architecture:
    """An Architecture with what is the same for all decoders."""
    values: dict[str, Any] = {
        "name": root.get("architectures")[0],
        "family": family,
        "hidden_size": config.hidden,
        "vocab_size": config.vocab,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": 0,
        "layers": tuple(layers),
        "outer": tuple(outer),
        "tied": config.flag("tie_word_embeddings"),
        "experts": 0,
        "experts_per_token": 0,
        "moe_intermediate_size": 0,
        "max_position_embeddings": _longest(config, root),
        "dtype": _dtype(config, root),
    }
    return Architecture(**{**values, **more})


def _dtype(config: Config, root: Config) -> str:
    for part in (root, config):
        found = part.get("dtype") or part.get("torch_dtype")
        if found:
            name = str(found).rpartition(".")[2]
            if name not in DTYPES:
                raise PlanError(f"{part.where} says dtype: {name!r:.40}, which is none of {', '.join(DTYPES)}")
            return name
    return "bfloat16"  # config/model.py: float32 is assumed, and served as bfloat16


def _longest(config: Config, root: Config) -> int:
    """max_model_len as vLLM derives it (config/model.py _get_and_verify_max_len, 0.25.1)."""
    longest, rope = config.get("model_max_length") or config.positions, config.rope
    kind = rope.get("rope_type")
    if "gemma3" in str(root.get("model_type")) or isinstance(rope.get("full_attention"), Mapping):
        return longest
    if kind == "longrope":
        return config.count("original_max_position_embeddings", default=longest)
    if kind not in ("su", "llama3"):
        if kind == "yarn" and rope.get("original_max_position_embeddings"):
            longest = rope["original_max_position_embeddings"]
        longest = int(longest * (rope.get("factor") or 1))
    return longest


def _cache(config: Config, index: int, reads_types: bool = True) -> Attention:
    """The cache of one attention layer. Models that do not read ``layer_types`` slide in all layers or in none."""
    window, types = config.window(), config.types(config.layers)
    if window and types and len(set(types)) > 1:
        window = window if reads_types and types[index] == "sliding_attention" else None
    return _attention(config.kv_heads, config.head_dim, window)


def _attention(
    kv_heads: int, head_dim: int, window: int | None = None, v_head_dim: int = 0, kind: str = ""
) -> Attention:
    return Attention(kind or ("sliding" if window else "full"), kv_heads, head_dim, v_head_dim or head_dim, window)


@dataclass(frozen=True)
class _Dense:
    """How a dense decoder's layer differs from Llama's. A bias is a flag or the key that says it."""

    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    gated: bool = True
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    norm_bias: bool = False
    qk_norm: str = ""  # "head": over head_dim, "full": over all heads, "cut": the same, but cut as they are
    final_norm: bool = True
    head_bias: bool = False
    tied: bool = False
    reads_types: bool = True
    rotary: bool = True


def _says(config: Config, bias: bool | str) -> bool:
    return config.flag(bias) if isinstance(bias, str) else bias


def _attention_tensors(config: Config, prefix: str, how: _Dense) -> Iterable[Tensor]:
    hidden, heads, kv_heads, size = config.hidden, config.heads, config.kv_heads, config.head_dim
    yield from _qkv(f"{prefix}.qkv_proj", hidden, heads, kv_heads, size, bias=_says(config, how.qkv_bias))
    yield from _row(f"{prefix}.o_proj", hidden, heads * size, _says(config, how.o_bias))
    if how.qk_norm == "head":
        yield from _norms(prefix, size, "q_norm", "k_norm")
    elif how.qk_norm == "full":
        yield from _norms(prefix, heads * size, "q_norm")
        yield from _norms(prefix, kv_heads * size, "k_norm")
    elif how.qk_norm == "cut":
        yield Tensor(f"{prefix}.q_norm.weight", (heads * size,), "column")
        yield Tensor(f"{prefix}.k_norm.weight", (kv_heads * size,), "qkv", False, (0, kv_heads * size), kv_heads)


def _dense(config: Config, root: Config, how: _Dense = _Dense()) -> Architecture:
    size = config.count("intermediate_size", "n_inner", default=0) or 4 * config.hidden
    layers = []
    for index in range(config.layers):
        prefix = f"model.layers.{index}"
        tensors = [*_attention_tensors(config, f"{prefix}.self_attn", how)]
        tensors += _mlp(f"{prefix}.mlp", config.hidden, size, _says(config, how.mlp_bias), how.gated)
        tensors += _norms(prefix, config.hidden, *how.norms, bias=how.norm_bias)
        layers.append(Layer((_cache(config, index, how.reads_types),), tuple(tensors)))
    tied = config.flag("tie_word_embeddings", how.tied)
    norm = _norms("model", config.hidden, "norm", bias=how.norm_bias) if how.final_norm else ()
    outer = [*_ends(config, tied, norm, how.head_bias)]
    if how.rotary:
        outer += _rotary(config.rope, config.head_dim, config.positions)
    return _build(config, root, "dense", layers, outer, intermediate_size=size, tied=tied)


# --- mixtures of experts ------------------------------------------------------------------------------------------


def _moe(
    config: Config,
    prefix: str,
    experts: int,
    size: int,
    *,
    gate: str = "gate",
    gate_dtype: str | None = None,
    gate_bias: bool = False,
    score_bias: bool = False,
    shared: int = 0,
    shared_name: str = "shared_experts",
    shared_gate: bool = False,
    expert_bias: bool = False,
    gated: bool = True,
    hidden: int = 0,
    shared_gated: bool = True,
) -> Iterable[Tensor]:
    """Router, shared expert of ``shared`` rows, and experts of ``size`` rows over ``hidden`` columns."""
    yield from _replicated(f"{prefix}.{gate}", experts, config.hidden, gate_bias, quantizable=False, dtype=gate_dtype)
    if score_bias:
        yield Tensor(f"{prefix}.{gate}.e_score_correction_bias", (experts,), dtype="float32")
    if shared_gate:
        yield from _replicated(f"{prefix}.{shared_name}_gate", 1, config.hidden, quantizable=False)
    if shared:
        yield from _mlp(f"{prefix}.{shared_name}", config.hidden, shared, gated=shared_gated)
    yield from _experts(f"{prefix}.experts", experts, hidden or config.hidden, size, expert_bias, gated)


def _experts_of(config: Config) -> dict[str, int]:
    per_token = config.count("num_experts_per_tok", "num_experts_per_token", "top_k_experts", default=0, least=0)
    return {"experts": _expert_count(config), "experts_per_token": per_token}


def _expert_count(config: Config) -> int:
    keys = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
    return config.count(*keys, default=0, least=0)


def _decoder(
    config: Config,
    root: Config,
    family: str,
    layer: Callable[[int, str], tuple[Sequence[Cache], Iterable[Tensor]]],
    *,
    at: str = "model",
    norms: Sequence[str] = ("input_layernorm", "post_attention_layernorm"),
    final: str = "norm",
    tied: bool | None = None,
    rotary: Iterable[Tensor] | None = None,
    extra: Iterable[Tensor] = (),
    **more: Any,
) -> Architecture:
    """A decoder of RMSNorms whose layers ``layer(index, prefix)`` makes."""
    layers = []
    for index in range(config.layers):
        prefix = f"{at}.layers.{index}"
        caches, tensors = layer(index, prefix)
        layers.append(Layer(tuple(caches), (*tensors, *_norms(prefix, config.hidden, *norms))))
    tied = config.flag("tie_word_embeddings") if tied is None else tied
    outer = [*_ends(config, tied, _norms(at, config.hidden, final)), *extra]
    outer += _rotary(config.rope, config.head_dim, config.positions) if rotary is None else rotary
    return _build(config, root, family, layers, outer, tied=tied, **more)


def _mixtral(config: Config, root: Config) -> Architecture:
    experts, size = config.count("num_local_experts"), config.count("intermediate_size")

    def layer(index: int, prefix: str) -> tuple[Sequence[Cache], Iterable[Tensor]]:
        tensors = [*_attention_tensors(config, f"{prefix}.self_attn", _Dense())]
        tensors += _moe(config, f"{prefix}.block_sparse_moe", experts, size)
        return [_cache(config, index, False)], tensors

    return _decoder(config, root, "moe", layer, moe_intermediate_size=size, **_experts_of(config))


def _qwen_moe(config: Config, root: Config, how: _Dense) -> Architecture:
    """qwen2_moe.py and qwen3_moe.py."""
    experts, size = config.count("num_experts"), config.count("moe_intermediate_size")
    shared = config.count("shared_expert_intermediate_size", default=0, least=0)
    dense, step = config.get("mlp_only_layers") or (), config.count("decoder_sparse_step", default=1)
    sparse = [index not in dense and (index + 1) % step == 0 for index in range(config.layers)]

    def layer(index: int, prefix: str) -> tuple[Sequence[Cache], Iterable[Tensor]]:
        tensors = [*_attention_tensors(config, f"{prefix}.self_attn", how)]
        if sparse[index]:
            more = {"shared": shared, "shared_name": "shared_expert", "shared_gate": shared > 0}
            tensors += _moe(config, f"{prefix}.mlp", experts, size, **more)
        else:
            tensors += _mlp(f"{prefix}.mlp", config.hidden, config.count("intermediate_size"))
        return [_cache(config, index, False)], tensors

    largest = shared if all(sparse) else config.count("intermediate_size")
    more = {"intermediate_size": largest, "moe_intermediate_size": size, **_experts_of(config)}
    return _decoder(config, root, "moe", layer, **more)


def _gpt_oss(config: Config, root: Config) -> Architecture:
    experts, size = config.count("num_local_experts"), config.count("intermediate_size")
    how = _Dense(qkv_bias=True, o_bias=True)

    def layer(index: int, prefix: str) -> tuple[Sequence[Cache], Iterable[Tensor]]:
        window = config.count("sliding_window") if index % 2 == 0 else None
        tensors = [Tensor(f"{prefix}.attn.sinks", (config.heads,), "column")]
        tensors += _attention_tensors(config, f"{prefix}.attn", how)
        tensors += _moe(config, f"{prefix}.mlp", experts, size, gate="router", gate_bias=True, expert_bias=True)
        return [_attention(config.kv_heads, config.head_dim, window)], tensors

    rope = {**config.rope, "rope_type": "yarn"}
    rotary = [replace(each, dtype="float32") for each in _rotary(rope, config.head_dim, config.positions)]
    more = {"rotary": rotary, "moe_intermediate_size": size, "sinks": True, **_experts_of(config)}
    return _decoder(config, root, "moe", layer, **more)


def _glm4_moe(config: Config, root: Config) -> Architecture:
    experts, size = config.count("n_routed_experts"), config.count("moe_intermediate_size")
    shared = config.count("n_shared_experts", default=0, least=0) * size
    dense, how = config.count("first_k_dense_replace", least=0), _Dense(qkv_bias="attention_bias", qk_norm="")
    how = replace(how, qk_norm="head" if config.flag("use_qk_norm") else "")

    def layer(index: int, prefix: str) -> tuple[Sequence[Cache], Iterable[Tensor]]:
        tensors = [*_attention_tensors(config, f"{prefix}.self_attn", how)]
        if index < dense:
            tensors += _mlp(f"{prefix}.mlp", config.hidden, config.count("intermediate_size"))
        else:
            more = {"gate_dtype": "float32", "score_bias": True, "shared": shared}
            tensors += _moe(config, f"{prefix}.mlp", experts, size, **more)
        return [_cache(config, index, False)], tensors

    rope = {"partial_rotary_factor": 0.5, **config.rope}
    more = {"intermediate_size": config.count("intermediate_size"), "moe_intermediate_size": size}
    rotary = _rotary(rope, config.head_dim, config.positions)
    return _decoder(config, root, "moe", layer, rotary=rotary, **more, **_experts_of(config))


def _minimax_m2(config: Config, root: Config) -> Architecture:
    experts, size = config.count("num_local_experts"), config.count("intermediate_size")

    def layer(index: int, prefix: str) -> tuple[Sequence[Cache], Iterable[Tensor]]:
        how = _Dense(qkv_bias="attention_bias", qk_norm="cut")
        tensors = [*_attention_tensors(config, f"{prefix}.self_attn", how)]
        more = {"gate_dtype": "float32", "score_bias": config.flag("use_routing_bias")}
        tensors += _moe(config, f"{prefix}.block_sparse_moe", experts, size, **more)
        return [_cache(config, index, False)], tensors

    rope = {"rope_dim": config.count("rotary_dim", default=0) or None, **config.rope}
    rotary = _rotary(rope, config.head_dim, config.positions)
    return _decoder(config, root, "moe", layer, rotary=rotary, moe_intermediate_size=size, **_experts_of(config))


def _mimo_v2(config: Config, root: Config) -> Architecture:
    experts, size = config.count("n_routed_experts"), config.count("moe_intermediate_size")
    slides, sparse = _pattern(config, "hybrid_layer_pattern"), _pattern(config, "moe_layer_freq")
    heads, hidden = config.heads, config.hidden

    def layer(index: int, prefix: str) -> tuple[Sequence[Cache], Iterable[Tensor]]:
        swa = "swa_" if slides[index] else ""
        kv_heads, head_dim = config.count(f"{swa}num_key_value_heads"), config.count(f"{swa}head_dim")
        v_head_dim = config.count(f"{swa}v_head_dim")
        tensors = [*_qkv(f"{prefix}.self_attn.qkv_proj", hidden, heads, kv_heads, head_dim, v_head_dim)]
        tensors += _row(f"{prefix}.self_attn.o_proj", hidden, heads * v_head_dim)
        if config.flag(f"add_{'swa' if swa else 'full'}_attention_sink_bias"):
            tensors.append(Tensor(f"{prefix}.self_attn.attention_sink_bias", (heads,), "column"))
        if sparse[index]:
            tensors += _moe(config, f"{prefix}.mlp", experts, size, gate_dtype="float32", score_bias=True)
        else:
            tensors += _mlp(f"{prefix}.mlp", hidden, config.count("intermediate_size"))
        window = config.count("sliding_window") if swa else None
        return [_attention(kv_heads, head_dim, window, v_head_dim)], tensors

    # Two thetas, two caches.
    rotary = 2 * _rotary(config.rope, config.head_dim, config.positions)
    more = {"intermediate_size": config.count("intermediate_size"), "moe_intermediate_size": size, "sinks": True}
    return _decoder(config, root, "moe", layer, rotary=rotary, **more, **_experts_of(config))


def _pattern(config: Config, key: str) -> Sequence[Any]:
    """A list with one entry for each layer."""
    found = config.get(key)
    if not isinstance(found, (list, tuple)) or len(found) < config.layers:
        raise PlanError(
            f"{config.where} says {key}: {found!r:.80}, which is not one entry for each of {config.layers} layers"
        )
    return found


# --- multi-head latent attention (deepseek_v2.py) -----------------------------------------------------------------


def _mla_tensors(config: Config, prefix: str, heads: int) -> Iterable[Tensor]:
    hidden, lora, rope = config.hidden, config.count("kv_lora_rank"), config.count("qk_rope_head_dim")
    nope, v_head, q_lora = (
        config.count("qk_nope_head_dim"),
        config.count("v_head_dim"),
        config.count("q_lora_rank", default=0),
    )
    if q_lora:
        parts = (q_lora, lora + rope)
        yield from _replicated(f"{prefix}.fused_qkv_a_proj", sum(parts), hidden, parts=parts)
        yield from _norms(prefix, q_lora, "q_a_layernorm")
        yield from _column(f"{prefix}.q_b_proj", heads * (nope + rope), q_lora)
    else:
        yield from _replicated(f"{prefix}.kv_a_proj_with_mqa", lora + rope, hidden)
        yield from _column(f"{prefix}.q_proj", heads * (nope + rope), hidden)
    yield from _norms(prefix, lora, "kv_a_layernorm")
    yield from _column(f"{prefix}.kv_b_proj", heads * (nope + v_head), lora)
    yield from _row(f"{prefix}.o_proj", hidden, heads * v_head)


def _mla_cache(config: Config) -> Attention:
    lora, rope = config.count("kv_lora_rank"), config.count("qk_rope_head_dim")
    return _attention(1, lora + rope, v_head_dim=lora, kind="mla")


def _indexer(config: Config, prefix: str) -> Iterable[Tensor]:
    size, heads = config.count("index_head_dim"), config.count("index_n_heads")
    yield from _replicated(f"{prefix}.wq_b", size * heads, config.count("q_lora_rank"))
    # Upcast to the model's dtype on loading: quant_config=None.
    yield from _replicated(f"{prefix}.wk_weights_proj", size + heads, config.hidden, quantizable=False)
    yield Tensor(f"{prefix}.k_norm.weight", (size,), dtype="float32")
    yield Tensor(f"{prefix}.k_norm.bias", (size,), dtype="float32")


def _indexed(config: Config) -> list[bool]:
    """Which layers have an indexer of their own (GLM-5.2 shares them between layers)."""
    if config.get("index_topk") is None:
        return [False] * config.layers
    types = config.get("indexer_types")
    return [kind == "full" for kind in _pattern(config, "indexer_types")] if types else [True] * config.layers


def _mla(config: Config, root: Config) -> Architecture:
    experts, size = config.count("n_routed_experts"), config.count("moe_intermediate_size")
    shared = config.count("n_shared_experts", default=0, least=0) * size
    dense, step = config.count("first_k_dense_replace", least=0), config.count("moe_layer_freq", default=1)
    indexed, rope = _indexed(config), config.rope

    def layer(index: int, prefix: str) -> tuple[Sequence[Cache], Iterable[Tensor]]:
        caches = [_mla_cache(config)]
        tensors = [*_mla_tensors(config, f"{prefix}.self_attn", config.heads)]
        if indexed[index]:
            tensors += _indexer(config, f"{prefix}.self_attn.indexer")
            caches.append(_attention(1, config.count("index_head_dim"), kind="indexer"))
        if index < dense or index % step:
            tensors += _mlp(f"{prefix}.mlp", config.hidden, config.count("intermediate_size"))
        else:
            more = {"score_bias": config.get("topk_method") == "noaux_tc", "shared": shared}
            tensors += _moe(config, f"{prefix}.mlp", experts, size, **more)
        return caches, tensors

    if rope["rope_type"] != "default":
        rope["rope_type"] = "deepseek_yarn"
    rotary = _rotary(rope, config.count("qk_rope_head_dim"), config.positions)
    if any(indexed) and not config.flag("indexer_rope_interleave"):
        rotary = 2 * rotary
    more = {"head_dim": config.count("qk_nope_head_dim") + config.count("qk_rope_head_dim"), "rotary": rotary}
    more.update(intermediate_size=config.count("intermediate_size"), moe_intermediate_size=size)
    return _decoder(config, root, "mla", layer, **more, **_experts_of(config))


def _kimi_k25(root: Config, _root: Config) -> Architecture:
    """The language model of Kimi-K2.5 is DeepSeek-V3; its encoder is MoonViT (kimi_k25_vit.py)."""
    return replace(_mla(root.sub("text_config"), root), multimodal=True, vision=tuple(_moonvit(root)))


# --- Gemma --------------------------------------------------------------------------------------------------------

_GEMMA_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
# transformers' Gemma3TextConfig: Google's files leave out what is as in here.
_GEMMA3 = {
    "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072,
    "sliding_window": 4096,
}  # fmt: skip


def _gemma(
    config: Config, root: Config, norms: tuple[str, ...] = _GEMMA_NORMS, period: int = 0, qk_norm: str = ""
) -> Architecture:
    """gemma.py, gemma2.py and gemma3.py; every ``period``-th layer has full attention, the others slide."""
    config = Config(config.data, config.where, {"head_dim": 256, "tie_word_embeddings": True, **config.defaults})
    size, types, window = config.count("intermediate_size"), config.types(config.layers), config.window()
    period = config.count("sliding_window_pattern", "_sliding_window_pattern", default=period) if period else 0
    how = _Dense(qkv_bias="attention_bias", o_bias="attention_bias", qk_norm=qk_norm)

    def layer(index: int, prefix: str) -> tuple[Sequence[Cache], Iterable[Tensor]]:
        slides = types[index] == "sliding_attention" if types else bool(period and (index + 1) % period)
        tensors = [*_attention_tensors(config, f"{prefix}.self_attn", how)]
        tensors += _mlp(f"{prefix}.mlp", config.hidden, size)
        return [_attention(config.kv_heads, config.head_dim, window if slides else None)], tensors

    rotary: tuple[Tensor, ...] = _rotary(config.rope, config.head_dim, config.positions)
    if qk_norm:  # gemma3.py: the sliding layers have a rope of their own, not scaled
        rotary += _rotary({}, config.head_dim, config.positions)
    return _decoder(config, root, "dense", layer, norms=norms, rotary=rotary, intermediate_size=size)


def _gemma3_mm(root: Config, _root: Config) -> Architecture:
    config = root.sub("text_config", _GEMMA3)
    found = _gemma(config, root, period=6, qk_norm="head")
    vision, hidden = root.sub("vision_config"), config.hidden
    tower = [*_siglip(vision, "vision_tower.vision_model")]
    tower.append(Tensor("multi_modal_projector.mm_input_projection_weight", (vision.hidden, hidden)))
    tower += _norms("multi_modal_projector", vision.hidden, "mm_soft_emb_norm")
    return replace(found, multimodal=True, mm_prefix=True, vision=tuple(tower))


def _gemma4(config: Config, root: Config) -> Architecture:
    config = Config(config.data, config.where, {"tie_word_embeddings": True})
    hidden, heads, size, types = (
        config.hidden,
        config.heads,
        config.count("intermediate_size"),
        _pattern(config, "layer_types"),
    )
    shared_from = config.layers - config.count("num_kv_shared_layers", default=0, least=0)
    experts = config.count("num_experts", default=0) if config.flag("enable_moe_block") else 0
    moe_size = config.count("moe_intermediate_size") if experts else 0
    per_layer = config.count("hidden_size_per_layer_input", default=0, least=0)
    global_dim = config.count("global_head_dim", default=config.head_dim)

    def layer(index: int, prefix: str) -> tuple[Sequence[Cache], Iterable[Tensor]]:
        slides, shares = types[index] == "sliding_attention", index >= shared_from
        head_dim, kv_heads = (config.head_dim if slides else global_dim), config.kv_heads
        if not slides and config.flag("attention_k_eq_v"):
            kv_heads = config.count("num_global_key_value_heads", default=kv_heads)
        at = f"{prefix}.self_attn"
        tensors = [*_norms(at, head_dim, "q_norm")]
        if shares:
            tensors += _column(f"{at}.q_proj", heads * head_dim, hidden, config.flag("attention_bias"))
        else:
            tensors += _qkv(f"{at}.qkv_proj", hidden, heads, kv_heads, head_dim, bias=config.flag("attention_bias"))
            tensors += _norms(at, head_dim, "k_norm")
        tensors += _row(f"{at}.o_proj", hidden, heads * head_dim, config.flag("attention_bias"))
        tensors += _mlp(f"{prefix}.mlp", hidden, size * (2 if shares and config.flag("use_double_wide_mlp") else 1))
        if experts:
            tensors.append(Tensor(f"{prefix}.router.scale", (hidden,)))
            tensors.append(Tensor(f"{prefix}.router.per_expert_scale", (experts,)))
            tensors += _replicated(f"{prefix}.router.proj", experts, hidden, quantizable=False)
            tensors += _experts(f"{prefix}.experts", experts, hidden, moe_size)
            more = ("post_feedforward_layernorm_1", "post_feedforward_layernorm_2", "pre_feedforward_layernorm_2")
            tensors += _norms(prefix, hidden, *more)
        if per_layer:
            tensors += _replicated(f"{prefix}.per_layer_input_gate", per_layer, hidden)
            tensors += _replicated(f"{prefix}.per_layer_projection", hidden, per_layer)
            tensors += _norms(prefix, hidden, "post_per_layer_input_norm")
        cache = _attention(kv_heads, head_dim, config.count("sliding_window") if slides else None)
        return [] if shares else [cache], tensors

    extra: list[Tensor] = []
    if per_layer:
        every = config.layers * per_layer
        table = _embedding(
            "model.embed_tokens_per_layer", config.count("vocab_size_per_layer_input", default=config.vocab), every
        )
        extra = [table, *_column("model.per_layer_model_projection", every, hidden, stage="first")]
        extra.append(Tensor("model.per_layer_projection_norm.weight", (per_layer,), stage="first"))
    rotary = (*_rotary({}, config.head_dim, config.positions), *_rotary({}, global_dim, config.positions))
    largest = size * (2 if config.flag("use_double_wide_mlp") else 1)
    more = {"norms": _GEMMA_NORMS, "rotary": rotary, "extra": extra, "intermediate_size": largest}
    return _decoder(
        config, root, "dense", layer, **more, moe_intermediate_size=moe_size, **(_experts_of(config) if experts else {})
    )


def _gemma4_mm(root: Config, _root: Config) -> Architecture:
    if root.get("audio_config") is not None:
        raise PlanError(
            "config.json has an audio_config: the planner does not know the size of Gemma-4's audio encoder"
        )
    config, vision = root.sub("text_config"), root.sub("vision_config")
    hidden, heads, size = vision.hidden, vision.heads * vision.head_dim, vision.count("intermediate_size")
    kv = vision.count("num_key_value_heads", default=vision.heads) * vision.head_dim
    tower = [
        Tensor(
            "vision_tower.patch_embedder.position_embedding_table", (2, vision.count("position_embedding_size"), hidden)
        )
    ]
    tower.append(Tensor("vision_tower.patch_embedder.input_proj.weight", (hidden, 3 * vision.count("patch_size") ** 2)))
    for index in range(vision.layers):
        at = f"vision_tower.encoder.layers.{index}"
        shapes = [
            (heads, hidden),
            (kv, hidden),
            (kv, hidden),
            (hidden, heads),
            (size, hidden),
            (size, hidden),
            (hidden, size),
        ]
        names = (
            "attn.q_proj",
            "attn.k_proj",
            "attn.v_proj",
            "attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        )
        tower += [Tensor(f"{at}.{n}.linear.weight", shape) for n, shape in zip(names, shapes)]  # noqa: B905
        tower += _norms(at, vision.head_dim, "self_attn.q_norm", "self_attn.k_norm")
        tower += _norms(at, hidden, *_GEMMA_NORMS)
    tower += _replicated("embed_vision.embedding_projection", config.hidden, hidden, quantizable=False)
    return replace(_gemma4(config, root), multimodal=True, vision=tuple(tower))


# --- hybrids ------------------------------------------------------------------------------------------------------


def _ssm_dtype(config: Config, key: str = "mamba_ssm_dtype") -> str:
    """The dtype of the recurrent state where the config sets it, else the model's."""
    return str(config.get(key) or "auto").rpartition(".")[2]


def _mamba2(
    prefix: str,
    hidden: int,
    inner: int,
    groups: int,
    heads: int,
    state: int,
    kernel: int,
    *,
    bias: bool,
    conv_bias: bool,
    norm: bool,
) -> Iterable[Tensor]:
    """MambaMixer2: the groups' B and C are replicated as key/value heads are."""
    grouped = (groups * state, groups * state)
    projected, convolved = (inner, inner, heads, *grouped), (inner, *grouped)
    yield from _linear(f"{prefix}.in_proj", sum(projected), hidden, "qkv", bias, parts=projected, kv_heads=groups)
    yield Tensor(f"{prefix}.conv1d.weight", (sum(convolved), 1, kernel), "qkv", False, convolved, groups)
    if conv_bias:
        yield Tensor(f"{prefix}.conv1d.bias", (sum(convolved),), "qkv", False, convolved, groups)
    yield Tensor(f"{prefix}.A", (heads,), "column", dtype="float32")
    yield Tensor(f"{prefix}.D", (heads,), "column")
    yield Tensor(f"{prefix}.dt_bias", (heads,), "column")
    if norm:
        yield Tensor(f"{prefix}.norm.weight", (inner,), "column")
    yield from _row(f"{prefix}.out_proj", hidden, inner, bias)


def _mamba2_state(inner: int, groups: int, heads: int, state: int, kernel: int, dtype: str) -> State:
    sizes = (
        ("intermediate", inner),
        ("groups", groups),
        ("heads", heads),
        ("head_dim", inner // heads),
        ("state", state),
    )
    return State("mamba2", (*sizes, ("kernel", kernel)), ("auto", dtype))


def _granite_hybrid(config: Config, root: Config) -> Architecture:
    experts, shared = config.count("num_local_experts", default=0, least=0), config.count("shared_intermediate_size")
    size, types = config.count("intermediate_size"), config.get("layers_block_type") or _pattern(config, "layer_types")
    heads, groups, state = config.count("mamba_n_heads"), config.count("mamba_n_groups"), config.count("mamba_d_state")
    inner, kernel = config.count("mamba_expand") * config.hidden, config.count("mamba_d_conv")
    cache = _mamba2_state(inner, groups, heads, state, kernel, _ssm_dtype(config))
    how = _Dense(qkv_bias="attention_bias", o_bias="attention_bias")

    def layer(index: int, prefix: str) -> tuple[Sequence[Cache], Iterable[Tensor]]:
        if types[index] == "mamba":
            flags = {
                "bias": config.flag("mamba_proj_bias"),
                "conv_bias": config.flag("mamba_conv_bias", True),
                "norm": True,
            }
            tensors = [*_mamba2(f"{prefix}.mamba", config.hidden, inner, groups, heads, state, kernel, **flags)]
        else:
            tensors = [*_attention_tensors(config, f"{prefix}.self_attn", how)]
        if experts:
            tensors += _moe(config, f"{prefix}.block_sparse_moe", experts, size)
        tensors += _mlp(f"{prefix}.shared_mlp", config.hidden, shared)
        return [cache if types[index] == "mamba" else _attention(config.kv_heads, config.head_dim)], tensors

    rotary = None if config.get("position_embedding_type") == "rope" else ()
    more = {"rotary": rotary, "intermediate_size": shared, "moe_intermediate_size": size if experts else 0}
    return _decoder(config, root, "hybrid", layer, **more, **_experts_of(config))


def _falcon_h1(config: Config, root: Config) -> Architecture:
    size = config.count("intermediate_size")
    heads, groups, state = config.count("mamba_n_heads"), config.count("mamba_n_groups"), config.count("mamba_d_state")
    inner = config.count("mamba_d_ssm", default=0) or config.count("mamba_expand") * config.hidden
    kernel, how = config.count("mamba_d_conv"), _Dense(qkv_bias="attention_bias", o_bias="attention_bias")
    cache = _mamba2_state(inner, groups, heads, state, kernel, _ssm_dtype(config))
    flags = {"bias": config.flag("mamba_proj_bias"), "conv_bias": config.flag("mamba_conv_bias", True)}
    flags["norm"] = config.flag("mamba_rms_norm")

    def layer(index: int, prefix: str) -> tuple[Sequence[Cache], Iterable[Tensor]]:
        tensors = [*_attention_tensors(config, f"{prefix}.self_attn", how)]
        tensors += _mamba2(f"{prefix}.mamba.mamba", config.hidden, inner, groups, heads, state, kernel, **flags)
        parts = (inner, inner, heads, groups * state, groups * state)
        tensors.append(
            Tensor(f"{prefix}.mamba.mup_vector", (sum(parts),), "qkv", False, parts, groups, parameter=False)
        )
        tensors += _mlp(f"{prefix}.feed_forward", config.hidden, size, config.flag("mlp_bias"))
        return [_attention(config.kv_heads, config.head_dim), cache], tensors

    more = {"norms": ("input_layernorm", "pre_ff_layernorm"), "final": "final_layernorm", "intermediate_size": size}
    return _decoder(config, root, "hybrid", layer, **more)


def _nemotron_h(config: Config, root: Config) -> Architecture:
    kinds = {"mamba": "M", "attention": "*", "mlp": "-", "moe": "E"}
    pattern = config.get("hybrid_override_pattern") or [
        kinds.get(kind) for kind in config.get("layers_block_type") or ()
    ]
    if not pattern or len(pattern) > MOST_LAYERS or set(pattern) - set(kinds.values()):
        raise PlanError(
            f"{config.where} says hybrid_override_pattern: {pattern!r:.80}, which is not made of M, *, - and E"
        )
    config = Config({**config.data, "num_hidden_layers": len(pattern)}, config.where, config.defaults)
    hidden, heads, groups = config.hidden, config.count("mamba_num_heads"), config.count("n_groups")
    inner, state, kernel = (
        heads * config.count("mamba_head_dim"),
        config.count("ssm_state_size"),
        config.count("conv_kernel"),
    )
    cache = _mamba2_state(inner, groups, heads, state, kernel, _ssm_dtype(config, "mamba_ssm_cache_dtype"))
    if (
        cache.dtypes[1] == "auto"
    ):  # models/config.py NemotronHForCausalLMConfig: float32 unless the config says otherwise
        cache = replace(cache, dtypes=("auto", "float32"))
    flags = {"bias": config.flag("use_bias"), "conv_bias": config.flag("use_conv_bias", True), "norm": True}
    size = config.count("intermediate_size") if "-" in pattern else 0
    experts = config.count("n_routed_experts") if "E" in pattern else 0
    moe_size = config.count("moe_intermediate_size") if experts else 0
    latent = config.count("moe_latent_size", default=0)
    shared = config.count("n_shared_experts", default=0, least=0) if experts else 0
    shared *= config.count("moe_shared_expert_intermediate_size") if shared else 0

    def layer(index: int, prefix: str) -> tuple[Sequence[Cache], Iterable[Tensor]]:
        at, kind = f"{prefix}.mixer", pattern[index]
        if kind == "M":
            return [cache], _mamba2(at, hidden, inner, groups, heads, state, kernel, **flags)
        if kind == "*":
            how = _Dense(qkv_bias="attention_bias", o_bias="attention_bias")
            return [_attention(config.kv_heads, config.head_dim)], _attention_tensors(config, at, how)
        if kind == "-":
            return [], _mlp(at, hidden, size, config.flag("mlp_bias"), gated=False)
        more = {"score_bias": True, "shared": shared, "shared_gated": False, "gated": False, "hidden": latent}
        tensors = [*_moe(config, at, experts, moe_size, **more)]
        if latent:
            tensors += _replicated(f"{at}.fc1_latent_proj", latent, hidden, config.flag("mlp_bias"))
            tensors += _replicated(f"{at}.fc2_latent_proj", hidden, latent, config.flag("mlp_bias"))
        return [], tensors

    more = {"norms": ("norm",), "final": "norm_f", "rotary": (), "intermediate_size": max(size, shared)}
    found = _experts_of(config) if experts else {}
    return _decoder(config, root, "hybrid", layer, **more, moe_intermediate_size=moe_size, **found)


def _mamba1(
    config: Config, prefix: str, inner: int, rank: int, state: int, kernel: int, norms: bool
) -> Iterable[Tensor]:
    """MambaMixer."""
    bias = config.flag("mamba_proj_bias") or config.flag("use_bias")
    yield from _column(f"{prefix}.in_proj", 2 * inner, config.hidden, bias, parts=(inner, inner))
    yield Tensor(f"{prefix}.conv1d.weight", (inner, 1, kernel), "column")
    if config.flag("mamba_conv_bias", True) and config.flag("use_conv_bias", True):
        yield Tensor(f"{prefix}.conv1d.bias", (inner,), "column")
    yield from _row(f"{prefix}.x_proj", rank + 2 * state, inner)
    yield from _column(f"{prefix}.dt_proj", inner, rank, True)
    yield Tensor(f"{prefix}.A", (inner, state), "column", dtype="float32")
    yield Tensor(f"{prefix}.D", (inner,), "column")
    if norms:
        yield from _norms(prefix, rank, "dt_layernorm")
        yield from _norms(prefix, state, "b_layernorm", "c_layernorm")
    yield from _row(f"{prefix}.out_proj", config.hidden, inner, bias)


def _mamba1_state(inner: int, state: int, kernel: int) -> State:
    return State("mamba1", (("intermediate", inner), ("state", state), ("kernel", kernel)), ("auto", "auto"))


def _jamba(config: Config, root: Config) -> Architecture:
    experts, size = config.count("num_experts"), config.count("intermediate_size")
    inner, rank = config.count("mamba_expand") * config.hidden, config.get("mamba_dt_rank")
    rank = -(-config.hidden // 16) if rank == "auto" else config.count("mamba_dt_rank")
    state, kernel = config.count("mamba_d_state"), config.count("mamba_d_conv")
    attends = _every(config, "attn_layer_period", "attn_layer_offset")
    sparse = _every(config, "expert_layer_period", "expert_layer_offset")

    def layer(index: int, prefix: str) -> tuple[Sequence[Cache], Iterable[Tensor]]:
        if attends(index):
            cache: Cache = _attention(config.kv_heads, config.head_dim)
            tensors = [*_attention_tensors(config, prefix, _Dense())]
        else:
            cache = _mamba1_state(inner, state, kernel)
            tensors = [*_mamba1(config, f"{prefix}.mamba", inner, rank, state, kernel, True)]
        if experts > 1 and sparse(index):
            tensors += _moe(config, f"{prefix}.feed_forward", experts, size, gate="router")
        else:
            tensors += _mlp(f"{prefix}.feed_forward", config.hidden, size)
        return [cache], tensors

    more = {
        "norms": ("input_layernorm", "pre_ff_layernorm"),
        "final": "final_layernorm",
        "rotary": (),
        "intermediate_size": size,
    }
    return _decoder(config, root, "hybrid", layer, **more, moe_intermediate_size=size, **_experts_of(config))


def _every(config: Config, period: str, offset: str) -> Callable[[int], bool]:
    every, first = config.count(period), config.count(offset, least=0)
    return lambda index: index % every == first


def _mamba(config: Config, root: Config) -> Architecture:
    """mamba.py: no attention at all."""
    inner = config.count("intermediate_size", default=0) or config.count("expand", default=2) * config.hidden
    state, kernel = config.count("state_size", default=16), config.count("conv_kernel", default=4)
    rank = -(-config.hidden // 16) if config.get("time_step_rank", "auto") == "auto" else config.count("time_step_rank")

    def layer(index: int, prefix: str) -> tuple[Sequence[Cache], Iterable[Tensor]]:
        tensors = _mamba1(config, f"{prefix}.mixer", inner, rank, state, kernel, False)
        return [_mamba1_state(inner, state, kernel)], tensors

    headless = Config({**config.data, "num_attention_heads": 1, "head_dim": 1}, config.where, config.defaults)
    found = _decoder(headless, root, "hybrid", layer, at="backbone", norms=("norm",), final="norm_f", rotary=())
    return replace(found, heads=0, kv_heads=0, head_dim=0)


def _gdn(config: Config, prefix: str) -> Iterable[Tensor]:
    """Qwen's gated delta net (qwen3_next.py, qwen3_5.py)."""
    k_heads, v_heads = config.count("linear_num_key_heads"), config.count("linear_num_value_heads")
    k_size, v_dim = k_heads * config.count("linear_key_head_dim"), config.count("linear_value_head_dim")
    v_size, kernel = v_heads * v_dim, config.count("linear_conv_kernel_dim")
    parts = (k_size, k_size, v_size, v_size)
    yield from _column(f"{prefix}.in_proj_qkvz", sum(parts), config.hidden, parts=parts)
    yield from _column(f"{prefix}.in_proj_ba", 2 * v_heads, config.hidden, parts=(v_heads, v_heads))
    yield Tensor(f"{prefix}.conv1d.weight", (2 * k_size + v_size, 1, kernel), "column")
    yield Tensor(f"{prefix}.dt_bias", (v_heads,), "column")
    yield Tensor(f"{prefix}.A_log", (v_heads,), "column", dtype="float32")
    yield from _norms(prefix, v_dim, "norm")
    yield from _row(f"{prefix}.out_proj", config.hidden, v_size)


def _gdn_state(config: Config) -> State:
    sizes = {
        "k_heads": config.count("linear_num_key_heads"),
        "v_heads": config.count("linear_num_value_heads"),
        "k_dim": config.count("linear_key_head_dim"),
        "v_dim": config.count("linear_value_head_dim"),
        "kernel": config.count("linear_conv_kernel_dim"),
    }
    return State("gdn", tuple(sizes.items()), ("auto", _ssm_dtype(config)))


def _qwen3_next(config: Config, root: Config, at: str = "model") -> Architecture:
    """Qwen3-Next and Qwen3.5: attention with an output gate in every fourth layer, a gated delta net in the others."""
    types, interval = config.types(config.layers), config.count("full_attention_interval", default=4)
    experts = _expert_count(config)
    size = config.count("moe_intermediate_size") if experts else config.count("intermediate_size")
    shared = config.count("shared_expert_intermediate_size", default=0, least=0) if experts else 0
    dense, step = config.get("mlp_only_layers") or (), config.count("decoder_sparse_step", default=1)
    doubled = 2 if config.flag("attn_output_gate", True) else 1
    hidden, heads, kv_heads, head_dim = (
        config.hidden,
        config.heads,
        config.kv_heads,
        config.count("head_dim", default=256),
    )

    def layer(index: int, prefix: str) -> tuple[Sequence[Cache], Iterable[Tensor]]:
        if types[index] == "full_attention" if types else (index + 1) % interval == 0:
            cache: Cache = _attention(kv_heads, head_dim)
            name, bias = f"{prefix}.self_attn", config.flag("qkv_bias")
            tensors = [*_qkv(f"{name}.qkv_proj", hidden, doubled * heads, kv_heads, head_dim, bias=bias)]
            tensors += _row(f"{name}.o_proj", hidden, heads * head_dim)
            tensors += _norms(name, head_dim, "q_norm", "k_norm")
        else:
            cache = _gdn_state(config)
            tensors = [*_gdn(config, f"{prefix}.linear_attn")]
        if experts and index not in dense and (index + 1) % step == 0:
            more = {"shared": shared, "shared_name": "shared_expert", "shared_gate": shared > 0}
            tensors += _moe(config, f"{prefix}.mlp", experts, size, **more)
        else:
            tensors += _mlp(f"{prefix}.mlp", hidden, config.count("intermediate_size"))
        return [cache], tensors

    rope = {"partial_rotary_factor": 0.25, **config.rope}
    more = {"rotary": _rotary(rope, head_dim, config.positions), "head_dim": head_dim}
    more.update(
        intermediate_size=shared or config.count("intermediate_size", default=0),
        moe_intermediate_size=size if experts else 0,
    )
    return _decoder(config, root, "hybrid", layer, at=at, **more, **(_experts_of(config) if experts else {}))


def _lfm2(config: Config, root: Config) -> Architecture:
    """lfm2.py: short convolutions, attention in some layers."""
    types, hidden = _pattern(config, "layer_types"), config.hidden
    size, conv, kernel = (
        config.count("block_ff_dim", "intermediate_size"),
        config.count("conv_dim", "hidden_size"),
        config.count("conv_L_cache"),
    )
    if config.flag("block_auto_adjust_ff_dim", config.get("block_ff_dim") is not None):
        size = 2 * size // 3
        size = int((config.get("block_ffn_dim_multiplier") or 1) * size)
        multiple = config.count("block_multiple_of", default=256)
        size = -(-size // multiple) * multiple
    bias = config.flag("conv_bias")

    def layer(index: int, prefix: str) -> tuple[Sequence[Cache], Iterable[Tensor]]:
        if types[index] == "full_attention":
            cache: Cache = _attention(config.kv_heads, config.head_dim)
            tensors = [*_attention_tensors(config, f"{prefix}.self_attn", _Dense(qk_norm="head"))]
        else:
            cache = State("short_conv", (("size", conv), ("kernel", kernel)), ("auto",))
            tensors = [*_column(f"{prefix}.short_conv.in_proj", 3 * conv, hidden, bias, parts=(conv,) * 3)]
            tensors += _row(f"{prefix}.short_conv.out_proj", hidden, conv, bias)
            tensors.append(Tensor(f"{prefix}.short_conv.conv.weight", (conv, 1, kernel), "column"))
            tensors += [Tensor(f"{prefix}.short_conv.conv.bias", (conv,), "column")] if bias else []
        return [cache], [*tensors, *_mlp(f"{prefix}.feed_forward", hidden, size)]

    tied = config.flag("tie_embedding", config.flag("tie_word_embeddings", True))
    more = {"norms": ("operator_norm", "ffn_norm"), "final": "embedding_norm", "tied": tied, "intermediate_size": size}
    return _decoder(config, root, "hybrid", layer, **more)


# --- Llama-4 ------------------------------------------------------------------------------------------------------


def _llama4(config: Config, root: Config) -> Architecture:
    experts, size = config.count("num_local_experts"), config.count("intermediate_size")
    dense, step = config.count("intermediate_size_mlp"), config.count("interleave_moe_layer_step", default=1)
    chunk, nope = config.count("attention_chunk_size", default=0, least=0), config.get("no_rope_layers") or ()
    nope = nope or [(index + 1) % 4 for index in range(config.layers)]

    def layer(index: int, prefix: str) -> tuple[Sequence[Cache], Iterable[Tensor]]:
        bias = config.flag("attention_bias")
        tensors = [*_attention_tensors(config, f"{prefix}.self_attn", _Dense(qkv_bias=bias, o_bias=bias))]
        if (index + 1) % step == 0:
            more = {"gate": "router", "shared": size, "shared_name": "shared_expert"}
            tensors += _moe(config, f"{prefix}.feed_forward", experts, size, **more)
        else:
            tensors += _mlp(f"{prefix}.feed_forward", config.hidden, dense)
        chunked = bool(chunk and nope[index])
        return [
            _attention(config.kv_heads, config.head_dim, chunk if chunked else None, kind="chunked" if chunked else "")
        ], tensors

    more = {"intermediate_size": dense if step > 1 else size, "moe_intermediate_size": size}
    return _decoder(config, root, "moe", layer, **more, **_experts_of(config))


def _llama4_mm(root: Config, _root: Config) -> Architecture:
    config, vision = root.sub("text_config"), root.sub("vision_config", _LLAMA4_VISION, needed=False)
    hidden, size = vision.hidden, vision.count("intermediate_size")
    patches = (vision.count("image_size") // vision.count("patch_size")) ** 2 + 1
    tower = [
        Tensor("vision_model.class_embedding", (hidden,)),
        Tensor("vision_model.positional_embedding_vlm", (patches, hidden)),
    ]
    tower += _column(
        "vision_model.patch_embedding.linear", hidden, 3 * vision.count("patch_size") ** 2, quantizable=False
    )
    tower += _norms("vision_model", hidden, "layernorm_pre", "layernorm_post", bias=True)
    for index in range(vision.layers):
        at = f"vision_model.model.layers.{index}"
        tower += _qkv(f"{at}.self_attn.qkv_proj", hidden, vision.heads, vision.heads, hidden // vision.heads, bias=True)
        tower += _row(f"{at}.self_attn.o_proj", hidden, hidden, True)
        tower += _column(f"{at}.mlp.fc1", size, hidden, True)
        tower += _row(f"{at}.mlp.fc2", hidden, size, True)
        tower += _norms(at, hidden, "input_layernorm", "post_attention_layernorm", bias=True)
    projector, output = vision.count("projector_input_dim"), vision.count("projector_output_dim")
    tower += _column("vision_model.vision_adapter.mlp.fc1", projector, size)
    tower += _row("vision_model.vision_adapter.mlp.fc2", output, projector)
    tower += _column(
        "multi_modal_projector.linear_1", config.hidden, vision.count("vision_output_dim"), quantizable=False
    )
    return replace(_llama4(config, root), multimodal=True, vision=tuple(tower))


# transformers' Llama4VisionConfig: Meta's files say the rest in full or not at all.
_LLAMA4_VISION = {
    "hidden_size": 768, "num_hidden_layers": 34, "num_attention_heads": 16, "intermediate_size": 5632,
    "image_size": 448, "patch_size": 14, "projector_input_dim": 4096, "projector_output_dim": 4096,
    "vision_output_dim": 7680,
}  # fmt: skip


# --- vision towers ------------------------------------------------------------------------------------------------


def _siglip(vision: Config, at: str) -> Iterable[Tensor]:
    """siglip.py, as Gemma-3 uses it: without a pooling head."""
    hidden, size, patch = vision.hidden, vision.count("intermediate_size"), vision.count("patch_size")
    yield Tensor(f"{at}.embeddings.patch_embedding.weight", (hidden, 3, patch, patch))
    yield Tensor(f"{at}.embeddings.patch_embedding.bias", (hidden,))
    patches = (vision.count("image_size") // patch) ** 2
    yield Tensor(f"{at}.embeddings.position_embedding.weight", (patches, hidden))
    for index in range(vision.layers):
        name = f"{at}.encoder.layers.{index}"
        yield from _qkv(
            f"{name}.self_attn.qkv_proj", hidden, vision.heads, vision.heads, hidden // vision.heads, bias=True
        )
        yield from _row(f"{name}.self_attn.out_proj", hidden, hidden, True)
        yield from _column(f"{name}.mlp.fc1", size, hidden, True)
        yield from _row(f"{name}.mlp.fc2", hidden, size, True)
        yield from _norms(name, hidden, "layer_norm1", "layer_norm2", bias=True)
    yield from _norms(at, hidden, "post_layernorm", bias=True)


def _qwen3_vit(vision: Config) -> Iterable[Tensor]:
    """qwen3_vl.py Qwen3_VisionTransformer."""
    hidden, size, patch = vision.hidden, vision.count("intermediate_size"), vision.count("patch_size")
    output, merged = vision.count("out_hidden_size"), vision.hidden * vision.count("spatial_merge_size") ** 2
    kernel = (vision.count("in_channels", default=3), vision.count("temporal_patch_size"), patch, patch)
    yield Tensor("visual.patch_embed.proj.weight", (hidden, *kernel))
    yield Tensor("visual.patch_embed.proj.bias", (hidden,))
    yield Tensor("visual.pos_embed.weight", (vision.count("num_position_embeddings"), hidden))
    mergers = [
        "merger",
        *(f"deepstack_merger_list.{index}" for index in range(len(vision.get("deepstack_visual_indexes") or ()))),
    ]
    for name in mergers:
        yield from _norms(f"visual.{name}", hidden if name == "merger" else merged, "norm", bias=True)
        yield from _column(f"visual.{name}.linear_fc1", merged, merged, True)
        yield from _row(f"visual.{name}.linear_fc2", output, merged, True)
    for index in range(vision.count("depth")):
        at = f"visual.blocks.{index}"
        heads = vision.count("num_heads")
        yield from _norms(at, hidden, "norm1", "norm2", bias=True)
        yield from _qkv(f"{at}.attn.qkv", hidden, heads, heads, hidden // heads, bias=True)
        yield from _row(f"{at}.attn.proj", hidden, hidden, True)
        yield from _column(f"{at}.mlp.linear_fc1", size, hidden, True)
        yield from _row(f"{at}.mlp.linear_fc2", hidden, size, True)
    rotary = _rotary({"partial_rotary_factor": 0.5}, hidden // vision.count("num_heads"), 8192, "visual.rotary_pos_emb")
    yield from rotary


# transformers' vision configs of Qwen3-VL and Qwen3.5, for files that leave them out.
_QWEN3_VIT = {
    "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "in_channels": 3, "patch_size": 16,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 3584, "num_position_embeddings": 2304,
}  # fmt: skip


def _with_qwen3_vit(found: Architecture, root: Config, defaults: Mapping[str, Any]) -> Architecture:
    vision = Config(root.get("vision_config") or {}, "config.json's vision_config", defaults)
    return replace(found, multimodal=True, vision=tuple(_qwen3_vit(vision)))


def _text(root: Config) -> Config:
    """``text_config``; the flag that ties embeddings may stand beside it."""
    config = root.sub("text_config")
    return Config(config.data, config.where, {"tie_word_embeddings": root.get("tie_word_embeddings")})


def _qwen3_vl(root: Config, _root: Config) -> Architecture:
    how, defaults = (
        _Dense(qkv_bias="attention_bias", qk_norm="head", reads_types=False),
        {**_QWEN3_VIT, "deepstack_visual_indexes": (8, 16, 24)},
    )
    config = _text(root)
    found = _qwen_moe(config, root, how) if _expert_count(config) else _dense(config, root, how)
    return _with_qwen3_vit(found, root, defaults)


def _qwen3_5(root: Config, _root: Config) -> Architecture:
    return _with_qwen3_vit(_qwen3_next(_text(root), root), root, _QWEN3_VIT)


def _mistral3(root: Config, _root: Config) -> Architecture:
    """mistral3.py: Mistral with Pixtral's encoder (Mistral-Small-3.1, Ministral-3, Devstral-2)."""
    config, vision = _text(root), root.sub("vision_config")
    hidden, size, patch = vision.hidden, vision.count("intermediate_size"), vision.count("patch_size")
    merge, head_dim, bias = root.count("spatial_merge_size"), vision.head_dim, root.flag("multimodal_projector_bias")
    tower = [
        Tensor("vision_tower.patch_conv.weight", (hidden, 3, patch, patch)),
        *_norms("vision_tower", hidden, "ln_pre"),
    ]
    for index in range(vision.layers):
        at = f"vision_tower.transformer.layers.{index}"
        tower += _qkv(f"{at}.attention.qkv_proj", hidden, vision.heads, vision.heads, head_dim)
        tower += _row(f"{at}.attention.o_proj", hidden, vision.heads * head_dim)
        tower += _mlp(f"{at}.feed_forward", hidden, size)
        tower += _norms(at, hidden, "attention_norm", "ffn_norm")
    tower += _norms("multi_modal_projector", hidden, "norm")
    tower += _replicated(
        "multi_modal_projector.patch_merger.merging_layer", hidden, hidden * merge**2, quantizable=False
    )
    tower += _column("multi_modal_projector.linear_1", config.hidden, hidden, bias)
    tower += _row("multi_modal_projector.linear_2", config.hidden, config.hidden, bias)
    return replace(_dense(config, root, _LLAMA), multimodal=True, vision=tuple(tower))


def _moonvit(root: Config) -> Iterable[Tensor]:
    """kimi_k25_vit.py: never quantized (kimi_k25.py _maybe_ignore_quant_config)."""
    vision, text = root.sub("vision_config"), root.sub("text_config")
    hidden, size, patch = (
        vision.count("vt_hidden_size"),
        vision.count("vt_intermediate_size"),
        vision.count("patch_size"),
    )
    heads, merge = vision.count("vt_num_attention_heads"), vision.get("merge_kernel_size") or (2, 2)
    yield Tensor("vision_tower.patch_embed.proj.weight", (hidden, 3, patch, patch))
    yield Tensor("vision_tower.patch_embed.proj.bias", (hidden,))
    rows, columns = vision.count("init_pos_emb_height"), vision.count("init_pos_emb_width")
    yield Tensor("vision_tower.patch_embed.pos_emb.weight", (rows, columns, hidden))
    yield Tensor(
        "vision_tower.patch_embed.pos_emb.time_weight",
        (vision.count("init_pos_emb_time"), 1, hidden),
        dtype="float32",
        parameter=False,
    )
    for index in range(vision.count("vt_num_hidden_layers")):
        at = f"vision_tower.encoder.blocks.{index}"
        yield from _norms(at, hidden, "norm0", "norm1", bias=True)
        yield from _qkv(f"{at}.wqkv", hidden, heads, heads, hidden // heads, bias=True, quantizable=False)
        yield from _row(f"{at}.wo", hidden, hidden, True, quantizable=False)
        yield from _column(f"{at}.mlp.fc0", size, hidden, True, quantizable=False)
        yield from _row(f"{at}.mlp.fc1", hidden, size, True, quantizable=False)
    yield from _norms("vision_tower.encoder", hidden, "final_layernorm", bias=True)
    merged = hidden * merge[0] * merge[1]
    yield from _norms("mm_projector", hidden, "pre_norm", bias=True)
    yield from _replicated("mm_projector.linear_1", merged, merged, True, quantizable=False)
    yield from _replicated("mm_projector.linear_2", text.hidden, merged, True, quantizable=False)


# --- other decoders -----------------------------------------------------------------------------------------------


def _mistral(config: Config, root: Config) -> Architecture:
    if "sliding_window" not in config.data:  # transformers' MistralConfig
        config = Config({**config.data, "sliding_window": 4096}, config.where)
    return _dense(config, root, _LLAMA)


def _hunyuan(config: Config, root: Config) -> Architecture:
    return _dense(config, root, replace(_LLAMA, qk_norm="head" if config.flag("use_qk_norm") else ""))


def _olmo2(config: Config, root: Config) -> Architecture:
    how = _Dense(qk_norm="full", norms=("post_attention_layernorm", "post_feedforward_layernorm"))
    defaults: dict[str, Any] = {}
    if root.get("model_type") == "olmo3" and not config.get("layer_types"):  # transformers' Olmo3Config
        defaults["layer_types"] = [
            "full_attention" if (index + 1) % 4 == 0 else "sliding_attention" for index in range(config.layers)
        ]
        defaults["sliding_window"] = 4096
    config = Config(config.data, config.where, defaults)
    return _dense(config, root, how)


def _cohere(config: Config, root: Config) -> Architecture:
    """commandr.py: attention and MLP side by side behind one norm; embeddings always tied."""
    size, types, period = (
        config.count("intermediate_size"),
        config.types(config.layers),
        config.count("sliding_window_pattern", default=4),
    )
    cohere2 = root.get("model_type") == "cohere2"

    def layer(index: int, prefix: str) -> tuple[Sequence[Cache], Iterable[Tensor]]:
        slides = cohere2 and (types[index] == "sliding_attention" if types else bool((index + 1) % period))
        tensors = [*_attention_tensors(config, f"{prefix}.self_attn", _Dense())]
        if config.flag("use_qk_norm"):
            for name, heads in (("q_norm", config.heads), ("k_norm", config.kv_heads)):
                tensors.append(Tensor(f"{prefix}.self_attn.{name}.weight", (heads, config.head_dim), "column"))
        tensors += _mlp(f"{prefix}.mlp", config.hidden, size)
        return [_attention(config.kv_heads, config.head_dim, config.window() if slides else None)], tensors

    return _decoder(config, root, "dense", layer, norms=("input_layernorm",), tied=True, intermediate_size=size)


def _minicpm3(config: Config, root: Config) -> Architecture:
    """minicpm3.py: latent projections, but a cache of whole heads as wide as the key."""
    size, lora, heads = config.count("intermediate_size"), config.count("kv_lora_rank"), config.heads
    q_lora, rope, nope = config.count("q_lora_rank"), config.count("qk_rope_head_dim"), config.count("qk_nope_head_dim")
    v_head = config.count("v_head_dim", default=config.hidden // heads)

    def layer(index: int, prefix: str) -> tuple[Sequence[Cache], Iterable[Tensor]]:
        at = f"{prefix}.self_attn"
        tensors = [*_replicated(f"{at}.q_a_proj", q_lora, config.hidden), *_norms(at, q_lora, "q_a_layernorm")]
        tensors += _column(f"{at}.q_b_proj", heads * (nope + rope), q_lora)
        tensors += [
            *_replicated(f"{at}.kv_a_proj_with_mqa", lora + rope, config.hidden),
            *_norms(at, lora, "kv_a_layernorm"),
        ]
        tensors += _column(f"{at}.kv_b_proj", heads * (nope + v_head), lora)
        tensors += _row(f"{at}.o_proj", config.hidden, heads * v_head)
        return [_attention(heads, nope + rope)], [*tensors, *_mlp(f"{prefix}.mlp", config.hidden, size)]

    rotary = _rotary(config.rope, rope, config.positions)
    more = {
        "tied": config.flag("tie_word_embeddings", True),
        "rotary": rotary,
        "intermediate_size": size,
        "head_dim": nope + rope,
    }
    return _decoder(config, root, "dense", layer, **more)


def _gpt2(config: Config, root: Config) -> Architecture:
    size, heads = config.count("n_inner", default=0) or 4 * config.hidden, config.heads
    layers = []
    for index in range(config.layers):
        at = f"transformer.h.{index}"
        tensors = [*_norms(at, config.hidden, "ln_1", "ln_2", bias=True)]
        tensors += _qkv(f"{at}.attn.c_attn", config.hidden, heads, heads, config.head_dim, bias=True)
        tensors += _row(f"{at}.attn.c_proj", config.hidden, config.hidden, True)
        tensors += _column(f"{at}.mlp.c_fc", size, config.hidden, True)
        tensors += _row(f"{at}.mlp.c_proj", config.hidden, size, True)
        layers.append(Layer((_attention(heads, config.head_dim),), tuple(tensors)))
    tied = config.flag("tie_word_embeddings", True)
    outer = [*_ends(config, tied, _norms("transformer", config.hidden, "ln_f", bias=True))]
    outer.append(Tensor("transformer.wpe.weight", (config.positions, config.hidden), stage="first"))
    return _build(config, root, "dense", layers, outer, intermediate_size=size, tied=tied)


def _phi(config: Config, root: Config) -> Architecture:
    """phi.py: attention and MLP side by side behind one LayerNorm, biases everywhere."""
    how = _Dense(
        True, True, True, gated=False, norms=("input_layernorm",), norm_bias=True, head_bias=True, rotary=False
    )
    rope = {"partial_rotary_factor": config.get("partial_rotary_factor") or 0.5}
    if config.get("rotary_dim"):
        rope = {"rope_dim": config.count("rotary_dim")}
    found = _dense(config, root, how)
    return replace(found, outer=(*found.outer, *_rotary(rope, config.head_dim, config.positions)))


def _stablelm(config: Config, root: Config) -> Architecture:
    if config.flag("qk_layernorm"):
        raise PlanError("config.json says qk_layernorm: the planner knows StableLM without it alone")
    found = _dense(config, root, _Dense(qkv_bias="use_qkv_bias", norm_bias=True, rotary=False))
    rope = {"partial_rotary_factor": config.get("partial_rotary_factor") or 0.25}
    return replace(found, outer=(*found.outer, *_rotary(rope, config.head_dim, config.positions)))


def _chatglm(config: Config, root: Config) -> Architecture:
    kv_heads = config.count("multi_query_group_num") if config.flag("multi_query_attention") else config.heads
    same = {
        "num_key_value_heads": kv_heads,
        "multi_query_group_num": kv_heads,
        "intermediate_size": config.count("ffn_hidden_size"),
    }
    config = Config(
        {**config.data, **same, "head_dim": config.count("kv_channels", default=config.hidden // config.heads)}
    )
    linear = config.flag("add_bias_linear")
    how = _Dense(linear or config.flag("add_qkv_bias"), linear, linear, rotary=False)
    if config.get("rmsnorm", True) is not True or config.flag("apply_residual_connection_post_layernorm"):
        raise PlanError("config.json says another norm than RMSNorm, which the planner does not know for ChatGLM")
    found = _dense(config, root, how)
    rotary = _rotary({"partial_rotary_factor": 0.5}, config.head_dim, config.positions)
    return replace(found, outer=(*found.outer, *rotary))


# --- encoders -----------------------------------------------------------------------------------------------------


def _bert(config: Config, root: Config, at: str = "", positions: int = 0) -> Architecture:
    """bert.py and roberta.py; ``positions`` are those that RoBERTa keeps for padding."""
    hidden, heads, size = config.hidden, config.heads, config.count("intermediate_size")
    layers = []
    for index in range(config.layers):
        name = f"{at}encoder.layer.{index}"
        tensors = [*_qkv(f"{name}.attention.self.qkv_proj", hidden, heads, heads, config.head_dim, bias=True)]
        tensors += _row(f"{name}.attention.output.dense", hidden, hidden, True)
        tensors += _column(f"{name}.intermediate.dense", size, hidden, True)
        tensors += _row(f"{name}.output.dense", hidden, size, True)
        tensors += _norms(name, hidden, "attention.output.LayerNorm", "output.LayerNorm", bias=True)
        layers.append(Layer((_attention(heads, config.head_dim, kind="encoder"),), tuple(tensors)))
    outer = [_embedding(f"{at}embeddings.word_embeddings", config.vocab, hidden)]
    outer.append(Tensor(f"{at}embeddings.position_embeddings.weight", (config.positions, hidden), "vocab"))
    outer.append(
        Tensor(
            f"{at}embeddings.token_type_embeddings.weight",
            (config.count("type_vocab_size", default=2), hidden),
            "vocab",
        )
    )
    outer += _norms(f"{at}embeddings", hidden, "LayerNorm", bias=True)
    if str(root.get("architectures")[0]).endswith("ForSequenceClassification"):
        labels = len(root.get("id2label") or {}) or config.count("num_labels", default=2)
        outer += _replicated("classifier.dense", hidden, hidden, True, quantizable=False, dtype="float32")
        outer += _replicated("classifier.out_proj", labels, hidden, True, quantizable=False, dtype="float32")
    found = _build(config, root, "encoder", layers, outer, intermediate_size=size, tied=False, pooling=True)
    return replace(found, max_position_embeddings=found.max_position_embeddings - positions)


# --- the table ----------------------------------------------------------------------------------------------------

_LLAMA = _Dense(qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias")
_QWEN2 = _Dense(qkv_bias=True, reads_types=False)
_QWEN3 = _Dense(qkv_bias="attention_bias", qk_norm="head", reads_types=False)

# Architecture to parser, after vLLM's model_executor/models/registry.py (0.22.0 to 0.33.0). Not in it, and so
# refused, among others: DeepSeek-V4, Kimi-K3 and Kimi-Linear, MiniMax-M3, Step-3.7, Gemma-3n, Phi-3-vision, Qwen2.5-VL,
# GPTBigCode, DeciLM (block_configs), Baichuan (gone from vLLM), ModernBERT, Whisper and other encoder-decoders.
KNOWN: dict[str, Callable[[Config, Config], Architecture]] = {
    "LlamaForCausalLM": partial(_dense, how=_LLAMA),
    "MistralForCausalLM": _mistral,
    "HunYuanDenseV1ForCausalLM": _hunyuan,
    "GraniteForCausalLM": partial(_dense, how=replace(_LLAMA, reads_types=False)),
    "Ministral3ForCausalLM": partial(_dense, how=_LLAMA),
    "SmolLM3ForCausalLM": partial(_dense, how=replace(_LLAMA, tied=True)),
    "Phi3ForCausalLM": partial(_dense, how=replace(_LLAMA, reads_types=False)),
    "InternLM2ForCausalLM": partial(_dense, how=_Dense(reads_types=False)),
    "Qwen2ForCausalLM": partial(_dense, how=_QWEN2),
    "MiMoForCausalLM": partial(_dense, how=_QWEN2),
    "Qwen3ForCausalLM": partial(_dense, how=_QWEN3),
    "OrionForCausalLM": partial(_dense, how=_Dense(norm_bias=True, reads_types=False)),
    "MiniCPMForCausalLM": partial(_dense, how=_Dense(reads_types=False)),
    "MiniCPM3ForCausalLM": _minicpm3,
    "Starcoder2ForCausalLM": partial(
        _dense,
        how=_Dense("use_bias", "use_bias", "use_bias", gated=False, norm_bias=True, tied=True, reads_types=False),
    ),
    "StableLmForCausalLM": _stablelm,
    "PhiForCausalLM": _phi,
    "GPT2LMHeadModel": _gpt2,
    "ChatGLMModel": _chatglm,
    "Olmo2ForCausalLM": _olmo2,
    "Olmo3ForCausalLM": _olmo2,
    "CohereForCausalLM": _cohere,
    "Cohere2ForCausalLM": _cohere,
    "GemmaForCausalLM": partial(_gemma, norms=_GEMMA_NORMS[:2]),
    "Gemma2ForCausalLM": partial(_gemma, period=2),
    "Gemma3ForCausalLM": partial(_gemma, period=6, qk_norm="head"),
    "Gemma3ForConditionalGeneration": _gemma3_mm,
    "Gemma4ForConditionalGeneration": _gemma4_mm,
    "MixtralForCausalLM": _mixtral,
    "Qwen2MoeForCausalLM": partial(_qwen_moe, how=_QWEN2),
    "Qwen3MoeForCausalLM": partial(_qwen_moe, how=_QWEN3),
    "GptOssForCausalLM": _gpt_oss,
    "Glm4MoeForCausalLM": _glm4_moe,
    "MiniMaxM2ForCausalLM": _minimax_m2,
    "MiMoV2FlashForCausalLM": _mimo_v2,
    "DeepseekV2ForCausalLM": _mla,
    "DeepseekV3ForCausalLM": _mla,
    "DeepseekV32ForCausalLM": _mla,
    "GlmMoeDsaForCausalLM": _mla,
    "KimiK25ForConditionalGeneration": _kimi_k25,
    "Llama4ForConditionalGeneration": _llama4_mm,
    "Qwen3NextForCausalLM": _qwen3_next,
    "Qwen3_5ForConditionalGeneration": _qwen3_5,
    "Qwen3_5MoeForConditionalGeneration": _qwen3_5,
    "Qwen3VLForConditionalGeneration": _qwen3_vl,
    "Qwen3VLMoeForConditionalGeneration": _qwen3_vl,
    "Mistral3ForConditionalGeneration": _mistral3,
    "GraniteMoeHybridForCausalLM": _granite_hybrid,
    "FalconH1ForCausalLM": _falcon_h1,
    "NemotronHForCausalLM": _nemotron_h,
    "JambaForCausalLM": _jamba,
    "MambaForCausalLM": _mamba,
    "FalconMambaForCausalLM": _mamba,
    "Lfm2ForCausalLM": _lfm2,
    "BertModel": _bert,
    "BertForSequenceClassification": _bert,
    "XLMRobertaModel": partial(_bert, positions=2),
    "XLMRobertaForSequenceClassification": partial(_bert, positions=2),
    "RobertaModel": partial(_bert, positions=2),
    "RobertaForSequenceClassification": partial(_bert, positions=2),
}


def parse(config: Mapping[str, Any]) -> Architecture:
    """What vLLM builds from this config.json; PlanError where the planner cannot say."""
    root = Config(config)
    names = root.get("architectures")
    known = [name for name in names if name in KNOWN] if isinstance(names, (list, tuple)) else []
    if not known:
        raise UnknownArchitecture(
            f"config.json says architectures: {names!r:.200}, which the planner does not know: "
            "it will not guess what such a model needs"
        )
    return KNOWN[known[0]](root, root)
