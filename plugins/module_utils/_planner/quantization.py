# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: how a checkpoint is quantized, and what a matrix takes on the GPU after loading.

After vLLM's ``model_executor/layers/quantization`` (0.25.1 and 0.32.0): kernels repack weights and scales when they
are loaded, so what is counted here is what is kept afterwards, not what is in the file.
"""

# ruff: noqa: PLR0911, PLR0917 (tables in the form of functions)
from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

from .architecture import Tensor
from .errors import PlanError

METHODS = (
    "awq",
    "gptq",
    "fp8",
    "compressed-tensors",
    "modelopt",
    "modelopt_fp4",
    "modelopt_mixed",
    "mxfp4",
    "bitsandbytes",
)
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "half": 2, "float32": 4, "float": 4, "float8_e4m3fn": 1, "int8": 1}

# What vLLM merges, by the names in checkpoints: packed_modules_mapping of its models.
MERGED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj", "w1", "w3"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkvz", "in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_ba", "in_proj_b", "in_proj_a"),
    "wk_weights_proj": ("wk", "weights_proj"),
    "shared_mlp.gate_up_proj": ("shared_mlp.input_linear",),
}


@dataclass(frozen=True)
class Quantization:
    """How linear layers are stored. ``scheme`` is what the weights are: int, fp8, nvfp4, mxfp4 or nf4.

    ``group_size``: columns that share a scale, -1 for one scale per row; ``block``: rows and columns that do;
    both empty where one scale serves a matrix. ``activations`` None: weights only. ``modules`` are those of a
    checkpoint of mixed precision, each with its own Quantization.
    """

    method: str
    scheme: str
    bits: int
    group_size: int | None = None
    block: tuple[int, int] | None = None
    zero_point: bool = False
    desc_act: bool = False
    activations: int | None = None
    static: bool = False
    ignore: tuple[str, ...] = ()
    kv_cache_dtype: str = "auto"
    modules: tuple[tuple[str, Quantization], ...] = ()

    def of(self, name: str) -> Quantization | None:
        """The Quantization of one of vLLM's linear layers; None where it is left as it is."""
        if self.method == "mxfp4":  # quantization/mxfp4.py: linear layers are not quantized
            return self if ".experts." in name else None
        names = _spelled(name, self.method == "awq")
        if self.modules:
            return next((found for pattern, found in self.modules if _matcher((pattern,), False)(names)), None)
        return None if self.ignore and _matcher(self.ignore, self.method == "awq")(names) else self


def module_names(name: str) -> Iterable[str]:
    """A tensor's module by the names that checkpoints and their ignore lists give it, beginning at ``layers.``."""
    module = name.rpartition(".")[0]
    if module.endswith(".experts"):
        yield from (f"{module}.0.{matrix}" for matrix in ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"))
    for merged, parts in MERGED.items():
        if module.endswith(f".{merged}"):
            yield from (module[: -len(merged)] + part for part in parts)
            return
    yield module


def _spelled(name: str, whole: bool) -> tuple[str, ...]:
    """The names of a module in the file: nested models have their layers under other names there than in vLLM.

    ``whole``: experts go by the name of all of them alone (AWQ).
    """
    module = name.rpartition(".")[0]
    names = [module] if whole and module.endswith(".experts") else [*module_names(name)]
    nested = [each.replace("model.", "model.language_model.", 1) for each in names]
    return (*names, *(f"model.{each}" for each in names), *nested, *(f"language_model.{each}" for each in names))


@lru_cache(maxsize=4096)
def _matcher(patterns: tuple[str, ...], within: bool) -> Callable[[Sequence[str]], bool]:
    """As compressed-tensors ("re:"), ModelOpt ("*"), AWQ (any part of the name) and FP8 (the name) read their lists."""
    expressions = []
    for pattern in patterns:
        try:
            if pattern.startswith("re:"):
                expressions.append(re.compile(pattern[3:]))
            elif "*" in pattern:
                expressions.append(re.compile(fnmatch.translate(pattern)))
        except re.error as error:
            raise PlanError(
                f"quantization_config ignores {pattern!r:.80}, which is no regular expression: {error}"
            ) from error
    plain = frozenset(patterns)
    tails = frozenset(found[0] for found in map(_TAIL.search, patterns) if found)

    def matches(names: Sequence[str]) -> bool:
        for name in names:
            if not plain.isdisjoint(accumulate(name.split("."), "{}.{}".format)):
                return True
            tail = _TAIL.search(name) if tails and "vision" not in name else None
            if (tail and tail[0] in tails) or any(expression.match(name) for expression in expressions):
                return True
        return within and any(pattern in name for name in names for pattern in plain)

    return matches


_TAIL = re.compile(r"\blayers\.\d+\..*")


# --- config.json --------------------------------------------------------------------------------------------------


def parse(config: Mapping[str, Any]) -> Quantization | None:
    """From ``quantization_config``, at the top or in the text model's part; None where there is none."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        found = part.get("quantization_config") or part.get("compression_config")
        if found:
            if not isinstance(found, Mapping):
                raise PlanError(f"config.json says quantization_config: {found!r:.80}, which is not a mapping")
            return _parse(found)
    return None


def _parse(found: Mapping[str, Any]) -> Quantization:
    method = str(found.get("quant_method") or "").lower().replace("compressed_tensors", "compressed-tensors")
    nested = found.get("quantization")  # hf_quant_config.json
    nested = nested if isinstance(nested, Mapping) else found
    if not method and isinstance(found.get("producer"), Mapping) and found["producer"].get("name") == "modelopt":
        method = "modelopt"
    parser = _PARSERS.get(method)
    if parser is None:
        known = ", ".join(sorted(_PARSERS))
        raise PlanError(
            f"quantization_config says quant_method: {method or None!r}, which the planner does not know: "
            f"it knows {known}"
        )
    return parser(nested if method.startswith("modelopt") else found)


def _number(found: Mapping[str, Any], key: str, allowed: Sequence[int], default: int | None = None) -> int:
    value = found.get(key, default)
    if value not in allowed or isinstance(value, bool):
        raise PlanError(
            f"quantization_config says {key}: {value!r:.40}, which is none of {', '.join(map(str, allowed))}"
        )
    return int(value)


def _group(found: Mapping[str, Any], key: str = "group_size", default: int | None = None) -> int:
    value = found.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not (value == -1 or 0 < value <= 1 << 16):
        raise PlanError(f"quantization_config says {key}: {value!r:.40}, which is no number of columns")
    return value


def _patterns(*values: Any) -> tuple[str, ...]:
    return tuple(str(each) for value in values for each in (value if isinstance(value, (list, tuple)) else ()))


def _awq(found: Mapping[str, Any]) -> Quantization:
    bits = _number(found, "bits" if "bits" in found else "w_bit", (4, 8))
    group = _group(found, "group_size" if "group_size" in found else "q_group_size")
    zero = bool(found.get("zero_point", True))
    return Quantization(
        "awq", "int", bits, group, zero_point=zero, ignore=_patterns(found.get("modules_to_not_convert"))
    )


def _gptq(found: Mapping[str, Any]) -> Quantization:
    if found.get("dynamic"):
        raise PlanError("quantization_config says dynamic: the planner does not know GPTQ with rules for each module")
    if found.get("lm_head"):
        raise PlanError("quantization_config says lm_head: true: the planner does not know a quantized lm_head")
    zero, group = not found.get("sym", True), _group(found)
    bits = _number(found, "bits", (2, 3, 4, 8))
    return Quantization("gptq", "int", bits, group, zero_point=zero, desc_act=bool(found.get("desc_act")))


def _fp8(found: Mapping[str, Any]) -> Quantization:
    if found.get("quant_algo") == "MIXED_PRECISION" or found.get("moe_quant_algo"):
        raise PlanError("quantization_config mixes FP8 with other formats, which the planner does not know")
    block, static = found.get("weight_block_size"), found.get("activation_scheme") == "static"
    ignore = _patterns(found.get("ignored_layers"), found.get("modules_to_not_convert"))
    return Quantization(
        "fp8", "fp8", 8, block=_block(block) if block else None, activations=8, static=static, ignore=ignore
    )


def _block(value: Any) -> tuple[int, int]:
    if (
        not isinstance(value, (list, tuple))
        or len(value) != 2
        or not all(isinstance(each, int) and each > 0 for each in value)
    ):
        raise PlanError(f"quantization_config says weight_block_size: {value!r:.40}, which is not two numbers")
    return (value[0], value[1])


def _compressed(found: Mapping[str, Any]) -> Quantization:
    groups = found.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise PlanError("quantization_config has no config_groups, which the planner needs of compressed-tensors")
    if found.get("sparsity_config") and (found["sparsity_config"] or {}).get("format") not in (None, "dense"):
        raise PlanError("quantization_config says sparsity_config: the planner does not know sparse weights")
    ignore = _patterns(found.get("ignore"))
    each = [
        (_compressed_group(group), _patterns(group.get("targets")))
        for group in groups.values()
        if isinstance(group, Mapping)
    ]
    cached = "fp8" if found.get("kv_cache_scheme") else "auto"
    if len({scheme for scheme, _ in each}) == 1:
        return replace(each[0][0], ignore=ignore, kv_cache_dtype=cached)
    if any("Linear" in targets for _, targets in each):
        raise PlanError(
            "quantization_config has several config_groups, of which one is for all of Linear: "
            "the planner cannot tell them apart"
        )
    modules = tuple((target, scheme) for scheme, targets in each for target in targets)
    return Quantization("compressed-tensors", "mixed", 0, ignore=ignore, kv_cache_dtype=cached, modules=modules)


def _compressed_group(group: Mapping[str, Any]) -> Quantization:
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, Mapping):
        raise PlanError("quantization_config has config_groups without weights, which the planner does not know")
    bits, kind, strategy = _number(weights, "num_bits", (4, 8)), weights.get("type"), weights.get("strategy")
    activations = int(inputs.get("num_bits") or 0) or None if isinstance(inputs, Mapping) else None
    static = isinstance(inputs, Mapping) and not inputs.get("dynamic")
    same: dict[str, Any] = {"method": "compressed-tensors", "bits": bits, "activations": activations, "static": static}
    if kind == "float" and bits == 4:
        size = _group(weights)
        return Quantization(scheme="nvfp4" if size == 16 else "mxfp4", group_size=size, **same)
    if kind == "float":
        structure = weights.get("block_structure")
        if strategy == "block":
            return Quantization(scheme="fp8", block=_block(structure), **same)
        return Quantization(scheme="fp8", group_size=-1 if strategy == "channel" else None, **same)
    if kind == "int" and strategy in ("channel", "group", "tensor"):
        size = _group(weights) if strategy == "group" else -1 if strategy == "channel" else None
        order = weights.get("actorder") in ("group", "static", True) and weights.get("actorder") != "static"
        return Quantization(
            scheme="int", group_size=size, zero_point=not weights.get("symmetric", True), desc_act=order, **same
        )
    raise PlanError(
        f"quantization_config says weights of type {kind!r} and strategy {strategy!r}, which the planner does not know"
    )


# ModelOpt's algorithms: quantization/modelopt.py.
_MODELOPT = {
    "FP8": Quantization("modelopt", "fp8", 8, activations=8, static=True),
    "FP8_PER_CHANNEL_PER_TOKEN": Quantization("modelopt", "fp8", 8, -1, activations=8),
    "FP8_PB_WO": Quantization("modelopt", "fp8", 8, block=(128, 128)),
    "NVFP4": Quantization("modelopt_fp4", "nvfp4", 4, 16, activations=4, static=True),
    "W4A16_NVFP4": Quantization("modelopt_fp4", "nvfp4", 4, 16),
}


def _modelopt(found: Mapping[str, Any]) -> Quantization:
    algorithm = str(found.get("quant_algo") or "").upper()
    ignore = _patterns(found.get("exclude_modules"), found.get("ignore"))
    cached = "fp8" if found.get("kv_cache_quant_algo") or found.get("kv_cache_scheme") else "auto"
    if algorithm == "MIXED_PRECISION":
        layers = found.get("quantized_layers")
        if not isinstance(layers, Mapping) or not layers:
            raise PlanError(
                "quantization_config says MIXED_PRECISION and has no quantized_layers, which the planner needs"
            )
        modules = tuple(
            (str(name), _modelopt_algorithm(str((layer or {}).get("quant_algo")).upper()))
            for name, layer in layers.items()
        )
        return Quantization("modelopt_mixed", "mixed", 0, ignore=ignore, kv_cache_dtype=cached, modules=modules)
    return replace(_modelopt_algorithm(algorithm), ignore=ignore, kv_cache_dtype=cached)


def _modelopt_algorithm(algorithm: str) -> Quantization:
    if algorithm not in _MODELOPT:
        raise PlanError(
            f"quantization_config says quant_algo: {algorithm!r}, which the planner does not know: "
            f"it knows {', '.join(_MODELOPT)}"
        )
    return _MODELOPT[algorithm]


def _mxfp4(found: Mapping[str, Any]) -> Quantization:
    return Quantization("mxfp4", "mxfp4", 4, 32, ignore=_patterns(found.get("modules_to_not_convert")))


def _bitsandbytes(found: Mapping[str, Any]) -> Quantization:
    ignore = _patterns(found.get("llm_int8_skip_modules"))
    if found.get("load_in_8bit"):
        return Quantization("bitsandbytes", "int", 8, -1, ignore=ignore)
    return Quantization("bitsandbytes", "nf4", 4, 64, ignore=ignore)


_PARSERS = {
    "awq": _awq,
    "gptq": _gptq,
    "fp8": _fp8,
    "compressed-tensors": _compressed,
    "modelopt": _modelopt,
    "modelopt_fp4": _modelopt,
    "modelopt_mixed": _modelopt,
    "mxfp4": _mxfp4,
    "bitsandbytes": _bitsandbytes,
}


# --- what a matrix takes ------------------------------------------------------------------------------------------


def matrices(
    tensor: Tensor,
    shape: Sequence[int],
    parts: Sequence[int],
    how: Quantization | None,
    capability: tuple[int, int] | None,
    item: int,
) -> tuple[int, ...]:
    """Bytes of each tensor that vLLM keeps for this one, whose cut for a rank is of ``shape`` and ``parts``.

    Without a ``capability``, those of the file.
    """
    if how is None or not tensor.quantizable:
        return (math.prod(shape) * item,)
    experts, (rows, columns) = (shape[0] if len(shape) == 3 else 1), shape[-2:]
    parts = parts or (rows,)
    if how.scheme == "mxfp4" and capability:
        rows, columns = mxfp4_padded(tensor, rows, columns, capability)
    weight, scales = rows * columns * how.bits // 8, _scales(how, rows, columns, parts, capability, item)
    extra, zeros = [], _groups(how, columns) * rows * how.bits // 8
    if how.scheme == "int" and how.activations is None and len(shape) == 2 and _machete(how, rows, columns, capability):
        if how.zero_point:
            extra.append(_groups(how, columns) * rows * item)  # multiplied with the scales
        elif how.method == "gptq":
            extra.append(zeros)
        extra += [columns * 4] if how.method == "gptq" or how.desc_act else []
        extra += [columns * 4] if how.desc_act else []
    elif capability is None and how.method == "gptq":
        extra += [zeros, columns * 4]
    elif how.zero_point or how.desc_act:
        extra += ([zeros] if how.zero_point else []) + ([columns * 4] * 2 if how.desc_act else [])
    if how.scheme == "nvfp4" or how.static:
        extra += [4, 4]
    return tuple(experts * size for size in (weight, scales, *extra))


def _machete(how: Quantization, rows: int, columns: int, capability: tuple[int, int] | None) -> bool:
    """Whether Hopper's kernel takes the place of Marlin's (kernels/linear/mixed_precision/machete.py, 0.25.1)."""
    return capability == (9, 0) and how.group_size in (-1, 128) and columns % 64 == 0 and rows % 128 == 0


def _groups(how: Quantization, columns: int) -> int:
    return -(-columns // how.group_size) if how.group_size and how.group_size > 0 else 1


def _scales(
    how: Quantization, rows: int, columns: int, parts: Sequence[int], capability: tuple[int, int] | None, item: int
) -> int:
    if how.scheme in ("nvfp4", "mxfp4"):
        return rows * _groups(how, columns)
    if how.scheme == "nf4":
        return rows * columns // 64 * 4
    if how.scheme == "int" and how.activations is None and how.method != "bitsandbytes":
        return rows * _groups(how, columns) * item
    if how.scheme == "int":
        return rows * 4
    if capability and capability < (8, 9):  # Marlin has a scale for each row (utils/marlin_utils_fp8.py)
        return rows * (-(-columns // how.block[1]) if how.block else 1) * item
    if how.block is None:
        return rows * 4 if how.group_size == -1 else 4
    tall, wide = how.block
    if capability and capability[0] == 10:  # DeepGEMM's packed UE8M0 scales, one for each row (utils/deep_gemm.py)
        return rows * -(-columns // (4 * wide)) * 4
    return sum(-(-part // tall) for part in parts) * -(-columns // wide) * 4


def mxfp4_padded(tensor: Tensor, rows: int, columns: int, capability: tuple[int, int]) -> tuple[int, int]:
    """Experts as padded by the backend of that GPU (fused_moe/oracle/mxfp4.py, 0.25.1): TRTLLM, Triton or Marlin."""
    hidden, inner = (256, 256) if capability[0] == 10 else (1, 64) if capability[0] == 9 else (256, 128)
    if tensor.parallel == "expert_column":
        merged = max(1, len(tensor.parts))
        return merged * _up(rows // merged, inner), _up(columns, hidden)
    return _up(rows, hidden), _up(columns, inner)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
