# Copyright: llmfleet developers
# GNU General Public License v3.0+ (see LICENSE)
"""The tiny model: files that fit together, made the same way each time."""

from __future__ import annotations

import importlib.util
import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import jinja2
import pytest

PROGRAM = Path(__file__).parents[1] / "tiny_model/make_tiny_model.py"
FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def make(folder: Path, *arguments: str) -> Path:
    # -I -S: without what is installed here, it needs the standard library only.
    subprocess.run([sys.executable, "-IS", str(PROGRAM), str(folder), *arguments], check=True)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("models") / "deep/tiny")


@pytest.fixture(scope="module")
def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def weights(folder: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data, by safetensors' own rules."""
    content = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    assert length % 8 == 0
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def test_files(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == FILES


def test_one_seed_is_one_model(folder: Path, tmp_path: Path) -> None:
    again = make(tmp_path / "again")
    for name in FILES:
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    other = make(tmp_path / "other", "--seed", "1")
    assert (other / "model.safetensors").read_bytes() != (folder / "model.safetensors").read_bytes()
    assert (other / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_tensors_fill_the_file_without_gaps(weights: tuple[dict[str, Any], bytes]) -> None:
    header, data = weights
    assert header.pop("__metadata__") == {"format": "pt"}
    offset = 0
    for tensor in sorted(header.values(), key=lambda tensor: tensor["data_offsets"]):
        begin, end = tensor["data_offsets"]
        assert begin == offset
        assert tensor["dtype"] == "BF16"
        assert end - begin == 2 * math.prod(tensor["shape"])
        offset = end
    assert offset == len(data)


def test_tensors_are_those_of_the_config(config: dict[str, Any], weights: tuple[dict[str, Any], bytes]) -> None:
    """Shapes as transformers' LlamaForCausalLM has them."""
    header, _ = weights
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    layer = {
        "input_layernorm": [hidden],
        "post_attention_layernorm": [hidden],
        "self_attn.q_proj": [queries, hidden],
        "self_attn.k_proj": [keys, hidden],
        "self_attn.v_proj": [keys, hidden],
        "self_attn.o_proj": [hidden, queries],
        "mlp.gate_proj": [inner, hidden],
        "mlp.up_proj": [inner, hidden],
        "mlp.down_proj": [hidden, inner],
    }
    expected = {"model.embed_tokens": [vocab, hidden], "model.norm": [hidden], "lm_head": [vocab, hidden]}
    for number in range(config["num_hidden_layers"]):
        expected |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    found = {name: tensor["shape"] for name, tensor in header.items() if name != "__metadata__"}
    assert found == {f"{name}.weight": shape for name, shape in expected.items()}


def test_weights_are_small_numbers(weights: tuple[dict[str, Any], bytes]) -> None:
    header, data = weights

    def values(name: str) -> list[float]:
        begin, end = header[name]["data_offsets"]
        return [struct.unpack("<f", b"\0\0" + data[i : i + 2])[0] for i in range(begin, end, 2)]

    assert set(values("model.norm.weight")) == {1.0}
    logits = values("lm_head.weight")
    assert all(abs(value) < 0.2 for value in logits)
    assert abs(sum(logits) / len(logits)) < 0.001
    assert len(set(logits)) > 100


def test_bfloat16_is_the_upper_half() -> None:
    spec = importlib.util.spec_from_file_location("make_tiny_model", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.bfloat16([1.0, -2.0, 0.0]) == b"\x80\x3f\x00\xc0\x00\x00"


def test_tokenizer_fits_the_config(folder: Path, config: dict[str, Any]) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(config["vocab_size"]))
    # Each ASCII character that can be seen is one token; Ġ and Ċ are the space and the newline.
    assert {*map(chr, range(33, 127)), "Ġ", "Ċ"} <= set(vocabulary)
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    assert special == {name: vocabulary[name] for name in special}
    shown = json.loads((folder / "tokenizer_config.json").read_text())
    generation = json.loads((folder / "generation_config.json").read_text())
    for kind in ("bos", "eos", "pad"):
        number = config[f"{kind}_token_id"]
        assert special[shown[f"{kind}_token"]] == number == generation[f"{kind}_token_id"]
    assert shown["model_max_length"] == config["max_position_embeddings"]


def test_chat_template(folder: Path) -> None:
    template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    render = jinja2.Environment(autoescape=False).from_string(template).render  # noqa: S701 - no HTML
    messages = [{"role": "user", "content": "Hi"}]
    assert render(messages=messages) == "<|im_start|>user\nHi<|im_end|>\n"
    assert render(messages=messages, add_generation_prompt=True).endswith("<|im_end|>\n<|im_start|>assistant\n")
