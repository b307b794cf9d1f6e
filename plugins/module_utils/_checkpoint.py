# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""PRIVATE to the collection: what a model's files say of it, without its weights.

No Ansible import, and the standard library only: it runs on bare hosts too. What lists and reads the files is a
``Store``; here is the one for folders, the one for the hub is in ``_hub``. Which files count is vLLM's own choice
(model_executor/model_loader/default_loader.py, 0.22 to 0.33): those in the model's top folder, safetensors before
``.bin``, and of them those that the index names.
"""

from __future__ import annotations

import errno
import json
import os
import posixpath
import re
import stat
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

CONFIG, QUANTIZATION, INDEX = "config.json", "hf_quant_config.json", "model.safetensors.index.json"
PREFIX = 8  # bytes of a safetensors file that tell how long its header is
LONGEST_HEADER = 100_000_000  # the format's own limit
LONGEST_JSON = 64 * 1024 * 1024

# What vLLM never loads, in whatever folder it lies: other formats' weights, and what training has left.
OTHER_FORMATS = (
    ".gguf",
    ".onnx",
    ".onnx_data",
    ".h5",
    ".msgpack",
    ".ot",
    ".tflite",
    ".pth",
    ".ckpt",
    ".mlmodel",
    ".nemo",
)
LEFT_OVER = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")
WEIGHTS = (".safetensors", ".bin", ".pt")
ADAPTER = re.compile(r"adapter_(model|config)\b")
# Folders of a sentence-transformers model, the only ones whose weights vLLM loads too.
MODULE = re.compile(r"\d+_[A-Za-z]+/[^/]+")
NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


class ModelError(Exception):
    """Why a model cannot be described: one sentence with the variable, its value and the remedy."""


@dataclass(frozen=True)
class Tensors:
    """The tensors of one file: how many there are of each (name without numbers, dtype, shape), and their bytes."""

    counts: Mapping[tuple[str, str, tuple[int, ...]], int]
    size: int

    def as_json(self) -> dict[str, Any]:
        rows = [{"name": n, "dtype": d, "shape": list(s), "count": c} for (n, d, s), c in sorted(self.counts.items())]
        return {"tensors": rows, "bytes": self.size}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Tensors:
        rows = {(each["name"], each["dtype"], tuple(each["shape"])): each["count"] for each in data["tensors"]}
        return cls(rows, data["bytes"])


class Store(Protocol):
    """Where a model's files are."""

    what: str  # what a message begins with: the variable and its value
    remedy: str  # what helps against a file that is broken

    @property
    def sizes(self) -> Mapping[str, int]:
        """Every file's path below the model's folder, with its bytes."""

    def read(self, name: str) -> bytes:
        """The whole of a small file."""

    def tensors(self, names: Sequence[str]) -> Iterable[Tensors]:
        """What the headers of these safetensors files say."""


@dataclass(frozen=True)
class Checkpoint:
    """``tensors`` and ``weights_bytes`` are None where the weights are no safetensors."""

    config: Mapping[str, Any]
    tensors: list[dict[str, Any]] | None
    weights_bytes: int | None
    files: list[dict[str, Any]]


def checkpoint(store: Store) -> Checkpoint:
    """What the store's files say. Raises ModelError for what vLLM would not load."""
    config = _config(store)
    weights = _weights(store)
    files = [{"name": name, "bytes": size} for name, size in sorted(store.sizes.items()) if _needed(name, weights)]
    if not weights[0].endswith(".safetensors"):
        return Checkpoint(config, None, None, files)
    found = list(store.tensors(weights))
    counts: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
    for each in found:
        counts.update(each.counts)
    whole = Tensors(counts, sum(each.size for each in found)).as_json()
    return Checkpoint(config, whole["tensors"], whole["bytes"], files)


def _config(store: Store) -> dict[str, Any]:
    if CONFIG not in store.sizes:
        raise ModelError(_without_config(store))
    config = read_json(store, CONFIG)
    if config.get("quantization_config") is None and QUANTIZATION in store.sizes:
        config["quantization_config"] = read_json(store, QUANTIZATION)
    return config


def _without_config(store: Store) -> str:
    names = store.sizes
    if "adapter_config.json" in names:
        return _adapter(store)
    if "model_index.json" in names:
        return f"{store.what}, which is a diffusers pipeline (model_index.json): vLLM serves language models, name one"
    if "params.json" in names:
        return (
            f"{store.what}, which has Mistral's own format only (params.json): name a variant of the model that has "
            "a config.json"
        )
    if _has(names, ".gguf"):
        return _gguf(store)
    return f"{store.what}, where there is no config.json: name a model in the format of transformers"


def _adapter(store: Store) -> str:
    return (
        f"{store.what}, which is an adapter and no model (adapter_config.json): name the base model, and give it the "
        "adapter with the flags enable_lora and lora_modules"
    )


def _gguf(store: Store) -> str:
    return f"{store.what}, which has GGUF files only: name a variant with safetensors, such as the original"


def _has(names: Iterable[str], suffix: str) -> bool:
    return any(name.endswith(suffix) for name in names)


def _weights(store: Store) -> list[str]:
    """The files that vLLM loads: all of one format, at least one."""
    top = sorted(name for name in store.sizes if "/" not in name and name not in LEFT_OVER and not ADAPTER.match(name))
    safetensors = [name for name in top if name.endswith(".safetensors")]
    # Mistral's repositories have the same weights twice.
    safetensors = [name for name in safetensors if not name.startswith("consolidated")] or safetensors
    if INDEX in store.sizes and safetensors:
        return _indexed(store, safetensors)
    # Weights of other libraries may stand beside them, but never without them.
    for found in (safetensors, *([n for n in top if n.endswith(suffix)] for suffix in (".bin", ".pt"))):
        if found:
            return found
    if _has(store.sizes, ".gguf"):
        raise ModelError(_gguf(store))
    if "adapter_config.json" in store.sizes:
        raise ModelError(_adapter(store))
    raise ModelError(f"{store.what}, where there are no weights (*.safetensors or *.bin): {store.remedy}")


def _indexed(store: Store, safetensors: Sequence[str]) -> list[str]:
    mapped = read_json(store, INDEX).get("weight_map")
    if not isinstance(mapped, dict) or not mapped or not all(isinstance(name, str) for name in mapped.values()):
        raise ModelError(f"{store.what}, whose {INDEX} has no weight_map: {store.remedy}")
    named = sorted(set(mapped.values()))
    if missing := [name for name in named if name not in safetensors]:
        raise ModelError(
            f"{store.what}, whose {INDEX} names {len(missing)} of {len(named)} files that are not there, such as "
            f"{missing[0]!r:.200}: {store.remedy}"
        )
    return named


def _needed(name: str, weights: Sequence[str]) -> bool:
    """Whether vLLM needs the file, or may: what is not known to be useless is small."""
    if name in weights:
        return True
    if name.endswith(OTHER_FORMATS) or posixpath.basename(name) in LEFT_OVER:
        return False
    if name.endswith(WEIGHTS):
        return bool(MODULE.fullmatch(name)) and name.endswith(os.path.splitext(weights[0])[1])
    return not name.startswith(("original/", "onnx/", "."))


def read_json(store: Store, name: str) -> dict[str, Any]:
    size = store.sizes[name]
    if size > LONGEST_JSON:
        raise ModelError(f"{store.what}, whose {name} has {size} bytes, more than any model's: {store.remedy}")
    try:
        found = json.loads(store.read(name))
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, json.JSONDecodeError) else "it is not text"
        raise ModelError(f"{store.what}, whose {name} is not valid JSON ({reason}): {store.remedy}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{store.what}, whose {name} is no JSON object: {store.remedy}")
    return found


# --- safetensors headers ------------------------------------------------------------------------------------------


def header_length(store: Store, name: str, start: bytes) -> int:
    """Bytes of the header that follows the file's first eight; refused where the file cannot have so many."""
    size = store.sizes[name]
    if len(start) < PREFIX:
        raise ModelError(f"{store.what}, whose {name} has {size} bytes and no header: {store.remedy}")
    (length,) = struct.unpack("<Q", start[:PREFIX])
    if length > LONGEST_HEADER:
        raise ModelError(
            f"{store.what}, whose {name} is no safetensors file (a header of {length} bytes): {store.remedy}"
        )
    if PREFIX + length > size:
        raise ModelError(
            f"{store.what}, whose {name} is cut short ({size} bytes, of which {PREFIX + length} would be the header): "
            f"{store.remedy}"
        )
    return length


def parse_header(store: Store, name: str, header: bytes) -> Tensors:
    """What the header says; refused where the file has not the bytes that it promises."""
    counts: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
    size = end = 0
    try:
        for tensor, info in json.loads(header).items():
            if tensor == "__metadata__":
                continue
            first, last = info["data_offsets"]
            shape = tuple(info["shape"])
            if not 0 <= first <= last or not all(isinstance(each, int) and each >= 0 for each in (first, last, *shape)):
                raise ValueError(tensor)
            counts[NUMBER.sub("*", tensor), str(info["dtype"]), shape] += 1
            size, end = size + last - first, max(end, last)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ModelError(f"{store.what}, whose {name} has a broken safetensors header: {store.remedy}") from None
    whole = PREFIX + len(header) + end
    if store.sizes[name] < whole:
        raise ModelError(
            f"{store.what}, whose {name} is cut short ({store.sizes[name]} of {whole} bytes): {store.remedy}"
        )
    return Tensors(counts, size)


# --- folders ------------------------------------------------------------------------------------------------------


class Folder:
    """A model in a folder of the host that this runs on."""

    remedy = "copy the model there again, whole"

    def __init__(self, path: str) -> None:
        self.what = f"vllm_models[].source is {path!r}"
        self.path = Path(path)
        if not self.path.is_absolute():
            raise ModelError(f"{self.what}, which is no absolute path: begin it with '/'")
        self.sizes = self._sizes()

    def _sizes(self) -> dict[str, int]:
        def fail(error: OSError) -> None:
            raise error

        sizes = {}
        try:
            # A link to a folder would be a loop at worst; links to files are how the hub's own cache is built.
            for folder, folders, names in os.walk(self.path, onerror=fail):
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                for name in names:
                    path = Path(folder, name)
                    found = path.stat()
                    if stat.S_ISREG(found.st_mode):
                        sizes[path.relative_to(self.path).as_posix()] = found.st_size
        except OSError as error:
            raise self._unreadable(error) from None
        return sizes

    def _unreadable(self, error: OSError) -> ModelError:
        where = "which" if error.filename in (None, str(self.path)) else f"where {error.filename!r}"
        if error.errno == errno.ENOENT:
            missing = "does not exist" if where == "which" else "leads to a file that does not exist"
            return ModelError(f"{self.what}, {where} {missing}: correct the path or copy the model there")
        if error.errno == errno.ENOTDIR:
            return ModelError(f"{self.what}, which is no folder: name the folder that has config.json")
        return ModelError(f"{self.what}, {where} cannot be read ({error.strerror}): let this task's user read it")

    def read(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise self._unreadable(error) from None

    def tensors(self, names: Sequence[str]) -> Iterable[Tensors]:
        for name in names:
            try:
                with (self.path / name).open("rb") as file:
                    yield self._header(name, file)
            except OSError as error:
                raise self._unreadable(error) from None

    def _header(self, name: str, file: BinaryIO) -> Tensors:
        length = header_length(self, name, file.read(PREFIX))
        return parse_header(self, name, file.read(length))
