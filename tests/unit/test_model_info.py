# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""model_info: folders, and the hub as tests/hub plays it. Nothing here leaves 127.0.0.1."""

from __future__ import annotations

import ast
import contextlib
import datetime
import email.utils
import importlib.util
import json
import math
import os
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
import pytest
from ansible_collections.llmfleet.serving.plugins.module_utils import _checkpoint, _hub, _model_info
from conftest import warned
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
UTILS = ROOT / "plugins/module_utils"
TOKEN = "hf_aVeryLongTokenThatNobodyMaySee"
OUTSIDER = "hf_aValidTokenOfSomebodyElse"
MIB = 2**20
Run = Callable[..., dict[str, Any]]


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


standin = load("tests/hub/hub.py")
tiny_model = load("tests/tiny_model/make_tiny_model.py")
Fault = standin.Fault

# The figures of the tiny Llama, worked out by hand: two layers, four heads of 32, two of them for keys and values.
VOCAB, HIDDEN, INTERMEDIATE = 100, 128, 256
LAYER = 2 * HIDDEN + 2 * HIDDEN * HIDDEN + 2 * 64 * HIDDEN + 3 * INTERMEDIATE * HIDDEN
PARAMETERS = 2 * VOCAB * HIDDEN + HIDDEN + 2 * LAYER


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith(("HF_", "XDG_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(_hub, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(_hub, "TIMEOUT", 5.0)


# --- models -------------------------------------------------------------------------------------------------------


def write_header(path: Path, header: object, data: int = 0, length: int | None = None) -> None:
    """A safetensors file whose data is a hole."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text) if length is None else length) + text)
        file.truncate(8 + len(text) + data)


def write_tensors(path: Path, tensors: dict[str, tuple[int, ...]], dtype: str = "BF16", width: int = 2) -> int:
    """A safetensors file with these tensors, without their values. Returns the bytes of their data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        begin, end = end, end + width * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    write_header(path, header, end)
    return end


def write_config(folder: Path, **changes: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**tiny_model.config(), **changes}))
    return folder


@cache
def tiny_weights() -> bytes:
    return tiny_model.safetensors(0)


def make_tiny(folder: Path) -> Path:
    write_config(folder)
    (folder / "model.safetensors").write_bytes(tiny_weights())
    (folder / "tokenizer.json").write_text("{}")
    return folder


def make_sharded(folder: Path, shards: int = 3) -> int:
    """The tiny model in several files. Returns the bytes of its weights."""
    write_config(folder)
    parts: list[dict[str, tuple[int, ...]]] = [{} for _ in range(shards)]
    for place, (name, shape) in enumerate(tiny_model.shapes()):
        parts[place % shards][name] = shape
    names = [f"model-{place:05}-of-{shards:05}.safetensors" for place in range(1, shards + 1)]
    total = sum(write_tensors(folder / name, part) for name, part in zip(names, parts, strict=True))
    index = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return total


def names_of(model: dict[str, Any]) -> list[str]:
    return [file["name"] for file in model["files"]]


# --- folders ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(run_module: Run) -> Run:
    def run(path: Path | str, **more: Any) -> dict[str, Any]:
        return run_module("model_info", {"path": str(path)}, **more)

    return run


def test_folder(tmp_path: Path, folder: Run) -> None:
    path = make_tiny(tmp_path / "tiny")
    answer = folder(path, check=True)
    assert (answer["changed"], answer["problem"]) == (False, None)
    model = answer["model"]
    assert model.pop("config") == tiny_model.config()
    tensors = {row["name"]: row for row in model.pop("tensors")}
    assert tensors["model.layers.*.self_attn.k_proj.weight"] == {
        "name": "model.layers.*.self_attn.k_proj.weight",
        "dtype": "BF16",
        "shape": [64, 128],
        "count": 2,
    }
    assert tensors["lm_head.weight"]["count"] == 1
    assert len(tensors) == 12
    assert model == {
        "architecture": "LlamaForCausalLM",
        "parameters": PARAMETERS,
        "weights_bytes": 2 * PARAMETERS,
        "dtype": "bfloat16",
        "quantization": None,
        "max_position_embeddings": 4096,
        "kv": {
            "layers": 2,
            "bytes_per_token": 512,
            "state_bytes": 0,
            "groups": [
                {
                    "kind": "full",
                    "layers": 2,
                    "kv_heads": 2,
                    "head_dim": 32,
                    "window": None,
                    "bytes_per_token": 256,
                }
            ],
        },
        "source": str(path),
        "revision": None,
        "files": [{"name": each.name, "bytes": each.stat().st_size} for each in sorted(path.iterdir())],
    }


def test_shards_are_one_model_and_what_vllm_does_not_load_is_left_out(tmp_path: Path, folder: Run) -> None:
    total = make_sharded(tmp_path)
    for name in (
        *("consolidated-00001.safetensors", "original/consolidated.00.pth", "onnx/model.onnx", "onnx/config.json"),
        *("pytorch_model.bin", "model.gguf", "optimizer.bin", "checkpoint-5/model.safetensors", "tf_model.h5"),
        *(".cache/huggingface/x", "model-left-over.safetensors", "metal/model.bin"),
    ):
        write_tensors(tmp_path / name, {"model.embed_tokens.weight": (VOCAB, HIDDEN)})
    for name in ("1_Pooling/config.json", "2_Dense/model.safetensors", "tokenizer.model", "modeling.py"):
        write_header(tmp_path / name, {})
    model = folder(tmp_path)["model"]
    assert model["weights_bytes"] == total == 2 * PARAMETERS
    assert sum(row["count"] for row in model["tensors"]) == len(list(tiny_model.shapes()))
    assert {row["count"] for row in model["tensors"] if ".layers." in row["name"]} == {2}
    assert names_of(model) == [
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
        "config.json",
        *(f"model-0000{place}-of-00003.safetensors" for place in (1, 2, 3)),
        "model.safetensors.index.json",
        "modeling.py",
        "tokenizer.model",
    ]


def test_only_whole_components_of_names_are_numbers(tmp_path: Path, folder: Run) -> None:
    make_tiny(tmp_path)
    tensors = {"3.w1": (2,), "h.10.experts.7.w1_0": (2,), "h.11.experts.7.w1_0": (2,), "h.11.experts.8.w1_0": (3,)}
    write_tensors(tmp_path / "model.safetensors", tensors)
    rows = [(row["name"], row["shape"], row["count"]) for row in folder(tmp_path)["model"]["tensors"]]
    assert rows == [("*.w1", [2], 1), ("h.*.experts.*.w1_0", [2], 2), ("h.*.experts.*.w1_0", [3], 1)]


def test_mistrals_own_files_are_the_weights_where_there_are_no_others(tmp_path: Path, folder: Run) -> None:
    write_config(tmp_path)
    write_tensors(tmp_path / "consolidated.safetensors", {"norm.weight": (128,)})
    assert folder(tmp_path)["model"]["weights_bytes"] == 256
    write_tensors(tmp_path / "model.safetensors", {"model.norm.weight": (128,)})
    assert folder(tmp_path)["model"]["weights_bytes"] == 256, "not twice"


def test_links_to_files_are_followed(tmp_path: Path, folder: Run) -> None:
    """The hub's own cache is a folder of links."""
    make_tiny(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    (tmp_path / "snapshot/.locks").mkdir()
    (tmp_path / "snapshot/.locks/gone").symlink_to(tmp_path / "none")  # not the model's
    assert folder(tmp_path / "snapshot")["model"]["weights_bytes"] == 2 * PARAMETERS


MODELOPT = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}


def test_quantization_of_modelopt_is_merged(tmp_path: Path, folder: Run) -> None:
    make_tiny(tmp_path)
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(MODELOPT))
    model = folder(tmp_path)["model"]
    assert model["config"]["quantization_config"] == MODELOPT
    assert model["quantization"] == "modelopt"
    own = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    write_config(tmp_path, quantization_config=own)
    model = folder(tmp_path)["model"]
    assert model["config"]["quantization_config"] == own
    assert model["quantization"] == "fp8"


def test_other_weights_are_sized_by_arithmetic(tmp_path: Path, folder: Run) -> None:
    write_config(tmp_path)
    for name in ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "training_args.bin"):
        (tmp_path / name).write_bytes(b"PK")
    model = folder(tmp_path)["model"]
    assert model["tensors"] is None
    assert model["weights_bytes"] == 2 * PARAMETERS
    assert model["files"][1:] == [{"name": f"pytorch_model-0000{n}-of-00002.bin", "bytes": 2} for n in (1, 2)]


def test_unknown_architecture_is_told_and_not_guessed(tmp_path: Path, folder: Run) -> None:
    """engine_plan refuses it; here it must not end a play for models that are not planned."""
    make_tiny(tmp_path)
    write_config(tmp_path, architectures=["MysteryForCausalLM"])
    answer = folder(tmp_path)
    assert "MysteryForCausalLM" in answer["problem"]
    model = answer["model"]
    assert (model["parameters"], model["kv"], model["max_position_embeddings"]) == (None, None, None)
    assert (model["architecture"], model["dtype"]) == ("MysteryForCausalLM", "bfloat16")
    assert model["weights_bytes"] == 2 * PARAMETERS


def test_broken_config_of_a_known_architecture_ends_in_the_planners_words(tmp_path: Path, folder: Run) -> None:
    make_tiny(tmp_path)
    write_config(tmp_path, hidden_size="big")
    answer = folder(tmp_path)
    assert answer["failed"]
    assert f"source is {str(tmp_path)!r}: " in answer["msg"]
    assert "hidden_size" in answer["msg"]
    assert answer["msg"].endswith("; or set vllm_plan: false, to start it by its flags alone.")


def test_kv_of_windows_latents_and_states() -> None:
    """As the sizes of kv_cache are: each kind with its own arithmetic."""
    parts = _model_info.architecture
    full = parts.Attention("full", 8, 128, 128)
    sliding = parts.Attention("sliding", 8, 128, 128, 4096)
    latent = parts.Attention("mla", 1, 576, 512)
    indexer = parts.Attention("indexer", 1, 128, 128)
    state = parts.State("short_conv", (("size", 64), ("kernel", 3)), ("bfloat16",))
    layers = [parts.Layer(caches, ()) for caches in ((full,), (sliding,), (sliding,), (latent, indexer), (state,), ())]
    kv = _model_info._kv(layers)
    assert kv["layers"] == 5
    assert kv["bytes_per_token"] == 3 * 8 * 256 * 2 + 576 * 2 + 132
    assert kv["state_bytes"] == sum(math.prod(shape) for shape, _ in state.shapes(1)) * 2
    assert [(group["kind"], group["layers"]) for group in kv["groups"]] == [
        ("full", 1),
        ("sliding", 2),
        ("mla", 1),
        ("indexer", 1),
        ("short_conv", 1),
    ]
    assert kv["groups"][1]["window"] == 4096


NAMED = {
    "adapter": (["adapter_config.json", "adapter_model.safetensors"], "is an adapter and no model"),
    "merged": (["config.json", "adapter_config.json", "adapter_model.safetensors"], "is an adapter and no model"),
    "diffusers": (["model_index.json", "unet/x.safetensors"], "is a diffusers pipeline"),
    "gguf": (["README.md", "model-Q4.gguf"], "has GGUF files only"),
    "gguf and config": (["config.json", "model-Q4.gguf"], "has GGUF files only"),
    "mistral": (["params.json", "consolidated.safetensors"], "Mistral's own format only"),
    "data": (["README.md", "train.parquet"], "there is no config.json"),
    "bare": (["config.json", "tokenizer.json"], "there are no weights"),
    "below": (["config.json", "sub/model.safetensors"], "there are no weights"),
    "trained": (["config.json", "training_args.bin", "tf_model.h5"], "there are no weights"),
}


@pytest.mark.parametrize(("names", "message"), NAMED.values(), ids=NAMED)
def test_what_vllm_cannot_load_is_refused(names: list[str], message: str, tmp_path: Path, folder: Run) -> None:
    write_config(tmp_path)
    (tmp_path / "config.json").rename(tmp_path / "kept")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(tmp_path / "kept", tmp_path / name)
    (tmp_path / "kept").unlink()
    said = folder(tmp_path)["msg"]
    assert message in said
    assert said.startswith(f"vllm_models[].source is {str(tmp_path)!r}, wh")
    assert ": " in said, "a refusal has a remedy"
    assert said.count(". ") == 0, "and is one sentence"


TENSOR = {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}
HEADERS: dict[str, tuple[Any, int, int | None, str]] = {
    "empty": (b"", 0, 0, "has a broken safetensors header"),
    "html": (b"", 0, int.from_bytes(b"<!DOCTYP", "little"), "is no safetensors file"),
    "long": (b"{}", 0, 100_000_001, "is no safetensors file"),
    "cut header": (b"{}", 0, 99_000, "is cut short (10 bytes, of which 99008"),
    "no json": (b"{nope}", 0, None, "has a broken safetensors header"),
    "list": ([1], 0, None, "has a broken safetensors header"),
    "no offsets": ({"a": {"dtype": "BF16", "shape": [2]}}, 4, None, "has a broken safetensors header"),
    "backwards": ({"a": {**TENSOR, "data_offsets": [4, 0]}}, 4, None, "has a broken safetensors header"),
    "half": ({"a": {**TENSOR, "shape": [0.5]}}, 4, None, "has a broken safetensors header"),
    "cut data": ({"a": TENSOR}, 3, None, "is cut short (73 of 74 bytes)"),
    "deep": (b"[" * 100_000, 0, None, "has a broken safetensors header"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_broken_headers(case: str, tmp_path: Path, folder: Run) -> None:
    header, data, length, message = HEADERS[case]
    write_config(tmp_path)
    write_header(tmp_path / "model.safetensors", header, data, length)
    said = folder(tmp_path)["msg"]
    assert f"whose model.safetensors {message}" in said
    assert said.endswith(": copy the model there again, whole.")


def test_file_without_any_header(tmp_path: Path, folder: Run) -> None:
    write_config(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"PK")
    assert "has 2 bytes and no header" in folder(tmp_path)["msg"]


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=4),
        lambda each: (
            st.lists(each)
            | st.dictionaries(
                st.sampled_from(["a", "dtype", "shape", "data_offsets", "__metadata__"]), each, max_size=4
            )
        ),
        max_leaves=8,
    )
)
def test_no_header_is_an_accident(header: object) -> None:
    store = Store({"model.safetensors": 100})
    with contextlib.suppress(_checkpoint.ModelError):
        _checkpoint.parse_header(store, "model.safetensors", json.dumps(header).encode())


@dataclass
class Store:
    sizes: dict[str, int]
    what = "it"
    remedy = "no"


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('{"weight_map": {"a": "model-1.safetensors"}}', "names 1 of 1 files that are not there, such as 'model-1."),
        ('{"weight_map": {"a": "../model.safetensors"}}', "names 1 of 1 files that are not there"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": ["model.safetensors"]}', "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "has no weight_map"),
        ("{", "is not valid JSON (Expecting property name"),
        ("[]", "is no JSON object"),
        ("\udcff", "is not valid JSON (it is not text)"),
        ("[" * 100_000, "is not valid JSON"),
    ],
)
def test_broken_index(index: str, message: str, tmp_path: Path, folder: Run) -> None:
    make_tiny(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_bytes(index.encode(errors="surrogateescape"))
    assert f"whose model.safetensors.index.json {message}" in folder(tmp_path)["msg"]


def test_enormous_config_is_not_read(tmp_path: Path, folder: Run) -> None:
    make_tiny(tmp_path)
    os.truncate(tmp_path / "config.json", 65 * MIB)
    assert "whose config.json has 68157440 bytes, more than any model's" in folder(tmp_path)["msg"]


def test_folders_that_cannot_be_read(tmp_path: Path, folder: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_tiny(tmp_path / "tiny")
    assert "which does not exist: correct the path" in folder(tmp_path / "none")["msg"]
    assert "which is no folder" in folder(path / "config.json")["msg"]
    assert "which is no absolute path" in folder("models/tiny")["msg"]
    (path / "lost.safetensors").symlink_to(tmp_path / "none")
    said = folder(path)["msg"]
    assert f"where '{path}/lost.safetensors' leads to a file that does not exist" in said

    def closed(top: Path, onerror: Callable[[OSError], None]) -> Iterator[Any]:
        onerror(PermissionError(13, "Permission denied", str(top)))
        return iter(())

    monkeypatch.setattr(_checkpoint.os, "walk", closed)
    assert "which cannot be read (Permission denied): let this task's user read it" in folder(path)["msg"]


def test_file_that_vanishes_is_an_error_of_one_sentence(tmp_path: Path) -> None:
    store = _checkpoint.Folder(str(make_tiny(tmp_path / "tiny")))
    shutil.rmtree(tmp_path / "tiny")
    with pytest.raises(_checkpoint.ModelError, match=r"config\.json' leads to a file that does not exist"):
        _checkpoint.checkpoint(store)


def test_one_of_path_and_source(run_module: Run) -> None:
    assert "one of the following is required: path, source" in run_module("model_info", {})["msg"]
    for more in ({"source": "a/b"}, {"revision": "main"}):
        assert "mutually exclusive" in run_module("model_info", {"path": "/x", **more})["msg"]


# --- the hub ------------------------------------------------------------------------------------------------------


@dataclass
class Served:
    """The stand-in, what it was asked, and a shorthand to ask it."""

    hub: Any
    url: str
    run_module: Run
    cache: Path

    def __call__(self, source: str = "acme/tiny", **options: Any) -> dict[str, Any]:
        self.hub.requests.clear()
        options = {"endpoint": self.url, "cache_dir": str(self.cache), **options}
        options = {name: value for name, value in options.items() if value is not None}
        return self.run_module("model_info", {"source": source, **options})

    @property
    def asked(self) -> list[str]:
        """Which files, and "api" for the listing; each request once."""
        return sorted(
            "api" if request.path.startswith("/api/") else request.path.rpartition("/")[2]
            for request in self.hub.requests
        )

    @property
    def sent(self) -> int:
        return sum(request.sent for request in self.hub.requests)

    def path(self, name: str = "acme/tiny") -> Path:
        return self.hub.root / name


@pytest.fixture
def serving(tmp_path: Path, run_module: Run) -> Iterator[Served]:
    with contextlib.ExitStack() as servers:
        hub = standin.Hub(
            tmp_path / "root",
            TOKEN,
            frozenset({"acme/closed"}),
            private=frozenset({"acme/private"}),
            outsider=OUTSIDER,
        )
        for name in ("tiny", "closed", "private"):
            make_tiny(hub.root / "acme" / name)
        server = servers.enter_context(standin.Server(hub, "127.0.0.1", 0))
        standin.Handler.log_message = lambda *_: None
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        servers.callback(thread.join)
        servers.callback(server.shutdown)
        hub.servers = servers
        hub.server = server
        url = f"http://127.0.0.1:{server.server_address[1]}"
        huggingface_hub.close_session()
        yield Served(hub, url, run_module, tmp_path / "models")
        huggingface_hub.close_session()


def commit_of(serving: Served, name: str = "acme/tiny") -> str:
    return standin.Repository(name, serving.path(name)).commit()


def no_network(serving: Served) -> None:
    """From here on nobody listens there."""
    serving.hub.server.shutdown()
    serving.hub.server.server_close()
    huggingface_hub.close_session()


def test_hub_gives_the_model_that_the_folder_gives(serving: Served, folder: Run) -> None:
    answer = serving()
    assert (answer["changed"], answer["problem"]) == (False, None)
    model, own = answer["model"], folder(serving.path())["model"]
    assert model == {**own, "source": "acme/tiny", "revision": commit_of(serving)}
    assert serving.asked == ["api", "config.json", "model.safetensors"]
    assert serving.sent < 110_000, "the weights stay where they are"
    for request in serving.hub.requests:
        assert "Authorization" not in {name.title() for name in request.headers}
        agent = {name.title(): value for name, value in request.headers.items()}["User-Agent"]
        assert agent.startswith("llmfleet.serving/model_info; hf_hub/")


def test_nothing_is_asked_for_twice(serving: Served) -> None:
    first = serving()["model"]
    assert serving()["model"] == first
    assert serving.asked == ["api"], "what the branch stands for"
    assert serving(revision=commit_of(serving))["model"] == first
    assert serving.asked == []
    no_network(serving)
    answer = serving(revision=commit_of(serving))
    assert answer["model"] == first
    assert "warnings" not in answer


def test_commit_that_is_not_known_is_fetched(serving: Served) -> None:
    assert serving(revision=commit_of(serving))["model"]["weights_bytes"] == 2 * PARAMETERS
    assert len(serving.asked) == 3


def test_branch_that_has_moved_on_is_read_anew(serving: Served) -> None:
    before = serving()["model"]
    write_config(serving.path(), max_position_embeddings=8192)
    after = serving()["model"]
    assert (before["max_position_embeddings"], after["max_position_embeddings"]) == (4096, 8192)
    assert after["revision"] == commit_of(serving) != before["revision"]


def test_without_a_network_a_branch_is_what_it_was(serving: Served, capfd: pytest.CaptureFixture[str]) -> None:
    first = serving()
    no_network(serving)
    second = serving()
    assert second["model"] == first["model"]
    warning = warned(second, capfd)
    assert f"{serving.url} refuses connections" in str(warning)
    assert f"'main' is what it was at the last look, {first['model']['revision']}" in str(warning)
    assert "refuses connections: check vllm_hf_endpoint" in serving(revision="v2")["msg"]
    assert serving(cache_dir=str(serving.cache / "other"))["failed"]


def test_hub_that_is_down_is_as_good_as_none_but_a_no_is_a_no(
    serving: Served, capfd: pytest.CaptureFixture[str]
) -> None:
    serving()
    serving.hub.faults = [Fault("/api/", 99, 503)]
    assert "answers 503" in warned(serving(), capfd)
    serving.hub.faults = [Fault("/api/", 99, 404, "RepoNotFound")]
    assert "does not have (404)" in serving()["msg"]


def test_interrupted_run_goes_on_where_it_stopped(serving: Served) -> None:
    make_sharded(serving.path(), 6)
    serving.hub.faults = [Fault("model-00006", 99, 500)]
    assert "answers 500 for 'acme/tiny': run the task again, it goes on" in serving()["msg"]
    serving.hub.faults = []
    answer = serving()
    assert answer["model"]["weights_bytes"] == 2 * PARAMETERS
    assert "model-00006-of-00006.safetensors" in serving.asked
    assert not {"config.json", "model.safetensors.index.json", "model-00001-of-00006.safetensors"} & set(serving.asked)
    (index,) = serving.cache.rglob("model.safetensors.index.json.json")
    assert "embed_tokens" not in index.read_text(), "an index can have 10 MB, of which only the files' names count"


def test_last_known_commit_is_one_that_was_read_to_the_end(serving: Served) -> None:
    first = serving()["model"]
    write_config(serving.path(), max_position_embeddings=8192)
    serving.hub.faults = [Fault("config.json", 99, 500)]
    assert serving()["failed"]
    no_network(serving)
    assert serving()["model"] == first


def test_long_header_takes_two_requests(serving: Served) -> None:
    write_tensors(serving.path() / "model.safetensors", {f"layer{n}.{'x' * 200}.weight": (8,) for n in range(1000)})
    answer = serving()
    assert answer["model"]["weights_bytes"] == 16_000
    assert serving.asked.count("model.safetensors") == 2
    header = struct.unpack("<Q", (serving.path() / "model.safetensors").read_bytes()[:8])[0]
    ranges = [request.headers["Range"] for request in serving.hub.requests if ".safetensors" in request.path]
    assert ranges == ["bytes=0-99999", f"bytes=100000-{header + 7}"]
    coded = {request.headers["Accept-Encoding"] for request in serving.hub.requests if "/api/" not in request.path}
    assert coded == {"identity"}, "ranges are of the file itself"


@pytest.mark.parametrize("tensors", [{"a": (8, MIB, 8)}, {f"layer{n}.{'x' * 200}": (65536,) for n in range(1000)}])
def test_server_that_ignores_ranges_sends_no_gigabytes(tensors: dict[str, Any], serving: Served) -> None:
    total = write_tensors(serving.path() / "model.safetensors", tensors)
    serving.hub.faults = [Fault("/model.safetensors", 99, whole=True)]
    assert serving()["model"]["weights_bytes"] == total > 120 * MIB
    time.sleep(0.2)
    assert serving.sent < 16 * MIB, "what is on its way when the connection is closed"


def test_token_goes_to_the_hub_and_not_to_its_cdn(serving: Served) -> None:
    with contextlib.ExitStack() as servers:
        cdn = standin.start_cdn(servers, serving.hub, "127.0.0.1")
        answer = serving("acme/closed", token=TOKEN)
        assert answer["model"]["weights_bytes"] == 2 * PARAMETERS
    assert serving.asked == ["api", "config.json", "model.safetensors", "model.safetensors"]
    for request in serving.hub.requests:
        given = {name.title(): value for name, value in request.headers.items()}.get("Authorization")
        assert given == (None if request.port == cdn.server_address[1] else f"Bearer {TOKEN}")
    assert {request.status for request in serving.hub.requests} == {200, 206, 302}


def test_at_most_four_requests_at_a_time(serving: Served) -> None:
    make_sharded(serving.path(), 12)
    serving.hub.faults = [Fault(".safetensors", 99, delay=0.1)]
    assert serving()["model"]["weights_bytes"] == 2 * PARAMETERS
    assert 2 <= serving.hub.busiest <= 4


def test_several_at_once_share_one_cache(serving: Served) -> None:
    make_sharded(serving.path(), 4)
    options = _hub.Options("acme/tiny", "main", serving.cache, serving.url)

    def look() -> dict[str, Any]:
        hub = _hub.Hub(options)
        document, _ = _model_info.look(hub, "acme/tiny", hub.commit)
        hub.remember()
        return document

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: look(), range(6)))
    assert all(each == found[0] for each in found)
    assert [path for path in serving.cache.rglob("*") if path.is_file() and path.suffix != ".json"] == []


def test_cache_that_was_spoilt_is_fetched_anew(serving: Served) -> None:
    first = serving()
    kept = list(serving.cache.rglob("*.json"))
    assert len(kept) == 4  # the listing, the branch, the config and a header
    for text in ("", "{", "null", "7"):
        for path in kept:
            path.write_text(text)
        assert serving() == first
        assert len(serving.asked) == 3


def test_cache_is_for_its_owner(serving: Served) -> None:
    serving()
    for path in serving.cache.rglob("*.json"):
        assert path.stat().st_mode & 0o077 == 0


def test_cache_below_the_users_own(serving: Served, tmp_path: Path) -> None:
    serving(cache_dir=None)
    assert (tmp_path / "cache/llmfleet/models").is_dir()


def test_cache_that_cannot_be_written(serving: Served, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = serving(cache_dir=str(tmp_path / "file"))["msg"]
    assert f"cache_dir is '{tmp_path}/file/v1" in said
    assert "cannot be written (Not a directory): set vllm_plan_cache_dir" in said


# --- what the hub refuses ---------------------------------------------------------------------------------------


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "gated": ({"source": "acme/closed"}, "'acme/closed', which is gated: accept its licence at {url}/acme/closed, and"),
    "wrong token": ({"source": "acme/closed", "token": "hf_no"}, "vllm_hf_token is refused by {url} (401)"),
    "not granted": ({"source": "acme/closed", "token": OUTSIDER}, "which the account of vllm_hf_token may not read"),
    "private": ({"source": "acme/private"}, "which {url} does not have (401): check the spelling, and if the model"),
    "no access": ({"source": "acme/private", "token": OUTSIDER}, "set vllm_hf_token to a token that may read it"),
    "nowhere": ({"source": "acme/none"}, "'acme/none', which {url} does not have (404): check the spelling"),
    "revision": ({"revision": "v9"}, "vllm_models[].revision is 'v9', which 'acme/tiny' does not have: choose one"),
    "short": ({"revision": "abc1234"}, "write all 40 digits of the commit"),
    "commit": ({"revision": "0" * 40}, "does not have: choose one that {url}/acme/tiny/tree/main lists"),
    "id": ({"source": "tiny"}, "'tiny', which is neither a folder ('/...') nor a model of the hub"),
    "url": ({"source": "https://huggingface.co/acme/tiny"}, "write it as organisation/name"),
    "odd revision": ({"revision": "a b"}, "vllm_models[].revision is 'a b', which is no revision"),
    "endpoint": ({"endpoint": "hub.example.org"}, "vllm_hf_endpoint is 'hub.example.org', which is no address"),
    "credentials": ({"endpoint": "https://me:geheim@hub"}, "vllm_hf_endpoint is 'https://********@hub'"),
    "token of two lines": ({"token": "hf_one\nhf_two"}, "vllm_hf_token has a space, a line end"),
}


@pytest.mark.parametrize(("options", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(options: dict[str, Any], message: str, serving: Served) -> None:
    said = serving(**options)["msg"]
    assert message.format(url=serving.url) in said
    assert ": " in said, "a refusal has a remedy"
    for secret in ("hf_one", "hf_two", OUTSIDER, "geheim"):
        assert secret not in said
    assert len(serving.hub.requests) <= 1, "and is not asked for again"


@pytest.mark.parametrize("token", [TOKEN, f" {TOKEN}\n"])
def test_token_opens(token: str, serving: Served) -> None:
    for name in ("acme/closed", "acme/private"):
        assert serving(name, token=token)["model"]["weights_bytes"] == 2 * PARAMETERS


def test_gated_model_that_shows_its_files(serving: Served) -> None:
    """As the real hub does; the files themselves are not for everybody."""
    serving.hub.listed = True
    assert "which is gated" in serving("acme/closed")["msg"]
    assert len(serving.hub.requests) == 2
    assert "may not read (403)" in serving("acme/closed", token=OUTSIDER)["msg"]
    assert serving("acme/closed", token=TOKEN)["model"]["weights_bytes"] == 2 * PARAMETERS


def test_token_from_the_environment(serving: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", serving.url)
    assert serving("acme/closed", endpoint=None)["model"]["revision"] == commit_of(serving, "acme/closed")


# --- what goes wrong on the way ---------------------------------------------------------------------------------


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What it would have slept."""
    slept: list[float] = []

    class Clock:
        sleep = staticmethod(slept.append)
        monotonic, time = staticmethod(time.monotonic), staticmethod(time.time)

    monkeypatch.setattr(_hub, "time", Clock)
    return slept


def test_busy_hub_is_asked_again_when_it_says(serving: Served, pauses: list[float]) -> None:
    date = email.utils.format_datetime(datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=40))
    serving.hub.faults = [
        Fault("/api/", 1, 429, headers={"Retry-After": "7"}),
        Fault("/api/", 1, 429, headers={"RateLimit": '"api";r=0;t=55'}),
        Fault("/api/", 1, 503, headers={"Retry-After": date}),
        Fault("config.json", 1, 500),
        Fault("config.json", 1, 502),
    ]
    assert serving()["model"]["weights_bytes"] == 2 * PARAMETERS
    assert pauses[:2] == [7, 55]
    assert 30 < pauses[2] <= 40
    assert pauses[3:] == [0.01, 0.02]


@pytest.mark.parametrize(
    ("headers", "said", "requests"),
    [({"Retry-After": "3600"}, "answers no more requests for now (429): try in 3600 s", 1), ({}, "try later", 5)],
)
def test_hub_that_stays_busy(
    headers: dict[str, str], said: str, requests: int, serving: Served, pauses: list[float]
) -> None:
    serving.hub.faults = [Fault("/api/", 99, 429, headers=headers)]
    assert said in serving()["msg"]
    assert len(serving.hub.requests) == requests
    assert pauses == [0.01, 0.02, 0.04, 0.08][: requests - 1]


def test_cut_connection_is_mended(serving: Served) -> None:
    serving.hub.faults = [Fault("model.safetensors", 2, cut=1000)]
    assert serving()["model"]["weights_bytes"] == 2 * PARAMETERS
    assert serving.asked.count("model.safetensors") == 3


def test_connection_that_is_always_cut(serving: Served) -> None:
    serving.hub.faults = [Fault("model.safetensors", 99, cut=1000)]
    assert f"{serving.url} cut the connection (RemoteProtocolError): run the task again" in serving()["msg"]
    assert serving.asked.count("model.safetensors") == 5


def test_silence_ends(serving: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_hub, "TIMEOUT", 0.2)
    monkeypatch.setattr(_hub, "ATTEMPTS", 2)
    serving.hub.faults = [Fault("/api/", 99, delay=0.5)]
    assert "does not answer within 0.2 s: check the controller's network" in serving()["msg"]


def test_dribble_ends(serving: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_hub, "DEADLINE", 0.3)
    monkeypatch.setattr(_hub, "ATTEMPTS", 1)
    serving.hub.bytes_per_second = 1000
    began = time.monotonic()
    assert "does not answer within" in serving()["msg"]
    assert time.monotonic() - began < 3


def test_name_that_cannot_be_resolved(serving: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_args: object, **_more: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(_hub, "FIRST_PAUSE", 60.0)  # no use to wait for it
    said = serving(endpoint="http://hub.test")["msg"]
    assert "http://hub.test cannot be resolved (Name or service not known): check vllm_hf_endpoint" in said


def test_port_without_tls(serving: Served) -> None:
    assert "speaks no TLS (" in serving(endpoint=serving.url.replace("http:", "https:"))["msg"]


def test_certificate_of_an_unknown_authority(serving: Served, tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "pem").write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "pem")
    serving.hub.server.socket = context.wrap_socket(serving.hub.server.socket, server_side=True)
    url = f"https://localhost:{serving.hub.server.server_address[1]}"
    assert f"the certificate of {url} is not trusted (" in serving(endpoint=url)["msg"]
    assert len(serving.hub.requests) == 0


@pytest.mark.parametrize(
    "body",
    [
        b"<html>Please log in</html>",
        b"{}",
        b'{"sha": "main"}',
        b'{"id": "a/b", "sha": "../x", "siblings": []}',
        b"[]",
        b'"x"',
    ],
)
def test_something_that_is_no_hub(body: bytes, serving: Served) -> None:
    serving.hub.faults = [Fault("/api/", 99, body=body)]
    assert f"{serving.url} does not answer as the hub does: check vllm_hf_endpoint" in serving()["msg"]


def test_mirror_that_tells_no_sizes(serving: Served) -> None:
    body = {"id": "acme/tiny", "sha": "0" * 40, "siblings": [{"rfilename": "config.json"}]}
    serving.hub.faults = [Fault("/api/", 99, body=json.dumps(body).encode())]
    assert "does not answer as the hub does" in serving()["msg"]


def test_revision_is_one_name_in_the_cache(serving: Served) -> None:
    assert serving(revision="refs/heads/main")["model"]["revision"] == commit_of(serving)
    assert [path.name for path in serving.cache.rglob("refs/*")] == ["refs%2Fheads%2Fmain.json"]


def test_broken_files_of_the_hub(serving: Served) -> None:
    (serving.path() / "config.json").write_text("{")
    assert "whose config.json is not valid JSON (Expecting property name" in serving()["msg"]
    (serving.path() / "config.json").write_bytes(b"\xff\xfe\xff")
    assert "whose config.json is not valid JSON (it is not text)" in serving()["msg"]
    write_config(serving.path())
    write_header(serving.path() / "model.safetensors", b"{}", 0, 10**12)
    said = serving()["msg"]
    assert "whose model.safetensors is no safetensors file (a header of 1000000000000 bytes)" in said
    assert "name another model or vllm_models[].revision (it is 'main')" in said


# --- as Ansible runs it -----------------------------------------------------------------------------------------


def ansible(options: dict[str, Any], *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ansible", "adhoc", "localhost", "-m", "llmfleet.serving.model_info"]
    return subprocess.run(
        [*command, "-a", json.dumps(options), *flags],
        cwd=ROOT,
        env={**os.environ, "ANSIBLE_CALLBACK_RESULT_FORMAT": "json", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_secrets_are_nowhere(serving: Served) -> None:
    options = {"source": "acme/closed", "endpoint": serving.url, "cache_dir": str(serving.cache)}
    passing = ansible({**options, "token": TOKEN}, "-vvv", "--check", "--diff")
    failing = ansible({**options, "source": "acme/none", "token": TOKEN}, "-vvv")
    debugging = ansible(options, "-vvv", HF_TOKEN=TOKEN, HF_DEBUG="1")
    assert passing.returncode == debugging.returncode == 0, passing.stdout + passing.stderr + debugging.stdout
    assert f'"parameters": {PARAMETERS}' in passing.stdout
    assert failing.returncode == 2
    assert "does not have (404)" in failing.stdout
    for done in (passing, failing, debugging):
        assert TOKEN not in done.stdout + done.stderr
    kept = [path for path in serving.cache.rglob("*") if path.is_file()]
    assert kept
    assert not [path for path in kept if TOKEN in path.read_text()]


def test_offline_by_the_hubs_own_variable(serving: Served) -> None:
    options = {"source": "acme/tiny", "endpoint": serving.url, "cache_dir": str(serving.cache)}
    assert "HF_HUB_OFFLINE keeps the hub from being asked: unset it" in ansible(options, HF_HUB_OFFLINE="1").stdout
    first = serving()["model"]["revision"]
    done = ansible(options, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert first in done.stdout
    assert "'main' is what it was at the last look" in done.stdout + done.stderr


def test_token_of_whoever_is_logged_in_is_not_taken(serving: Served, tmp_path: Path) -> None:
    """The engine hosts have not got it: the download would fail where the plan has not."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home/token").write_text(TOKEN)
    options = {"source": "acme/tiny", "endpoint": serving.url, "cache_dir": str(serving.cache)}
    done = ansible(options, HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(serving.asked) == 3
    assert "authorization" not in {name.lower() for request in serving.hub.requests for name in request.headers}


def test_folder_needs_no_package_and_the_hub_says_which(tmp_path: Path) -> None:
    make_tiny(tmp_path / "tiny")
    for name in ("huggingface_hub", "httpx2", "safetensors", "packaging"):
        (tmp_path / "poison" / name).mkdir(parents=True)
        (tmp_path / "poison" / name / "__init__.py").write_text("raise ImportError('not on this host')\n")
    where = str(tmp_path / "poison")
    done = ansible({"path": str(tmp_path / "tiny")}, PYTHONPATH=where)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f'"parameters": {PARAMETERS}' in done.stdout
    done = ansible({"source": "acme/tiny"}, PYTHONPATH=where)
    assert "Failed to import the required Python library (huggingface_hub)" in done.stdout


@pytest.mark.parametrize("name", ["_checkpoint.py", "_model_info.py", "../modules/model_info.py"])
def test_python_of_the_oldest_host_parses_it(name: str) -> None:
    ast.parse((UTILS / name).read_text(), feature_version=(3, 9))
