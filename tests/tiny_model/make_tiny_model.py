#!/usr/bin/env python3
"""Write a tiny random Llama that vLLM serves on a CPU: config, tokenizer, chat template and weights.

A stand-in for a model from the hub. Needs the standard library only. The weights are random, and so is
what the model says; one seed gives one model. Every token is one visible ASCII character, so that each
token of a stream is an event of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM, CONTEXT = 128, 256, 2, 4, 2, 32, 4096
SPECIAL = ("<pad>", "<s>", "<|im_start|>", "<|im_end|>")
# GPT-2's byte-level alphabet shows a space as Ġ and a newline as Ċ.
ALPHABET = (*map(chr, range(33, 127)), "Ġ", "Ċ")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def config() -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(SPECIAL) + len(ALPHABET),
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 3,
    }


def tokenizer() -> dict[str, object]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": token, **flags} for i, token in enumerate(SPECIAL)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(SPECIAL + ALPHABET)},
            "merges": [],
        },
    }


def tokenizer_config() -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "pad_token": "<pad>",
        "model_max_length": CONTEXT,
        "chat_template": TEMPLATE,
    }


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor, as transformers names them."""
    vocab, queries, keys = len(SPECIAL) + len(ALPHABET), HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    yield "model.embed_tokens.weight", (vocab, HIDDEN)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (HIDDEN,)
        yield f"{prefix}.post_attention_layernorm.weight", (HIDDEN,)
        yield f"{prefix}.self_attn.q_proj.weight", (queries, HIDDEN)
        yield f"{prefix}.self_attn.k_proj.weight", (keys, HIDDEN)
        yield f"{prefix}.self_attn.v_proj.weight", (keys, HIDDEN)
        yield f"{prefix}.self_attn.o_proj.weight", (HIDDEN, queries)
        yield f"{prefix}.mlp.gate_proj.weight", (INTERMEDIATE, HIDDEN)
        yield f"{prefix}.mlp.up_proj.weight", (INTERMEDIATE, HIDDEN)
        yield f"{prefix}.mlp.down_proj.weight", (HIDDEN, INTERMEDIATE)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (vocab, HIDDEN)


def bfloat16(values: list[float]) -> bytes:
    """The upper two bytes of each float32."""
    packed = struct.pack(f"<{len(values)}f", *values)
    return b"".join(packed[i + 2 : i + 4] for i in range(0, len(packed), 4))


def safetensors(seed: int) -> bytes:
    rng = random.Random(seed)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    chunks: list[bytes] = []
    offset = 0
    for name, shape in shapes():
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        norm = len(shape) == 1
        chunk = bfloat16([1.0] * count if norm else [rng.gauss(0, 0.02) for _ in range(count)])
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + len(chunk)]}
        chunks.append(chunk)
        offset += len(chunk)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(chunks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("config.json", config()),
        ("tokenizer.json", tokenizer()),
        ("tokenizer_config.json", tokenizer_config()),
        ("generation_config.json", {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0}),
    ):
        (args.folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (args.folder / "model.safetensors").write_bytes(safetensors(args.seed))


if __name__ == "__main__":
    main()
