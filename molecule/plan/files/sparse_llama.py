"""Writes a Llama of 13 billion parameters whose weights are a hole in a file: sizes and headers are right, numbers nil.

Usage: sparse_llama.py FOLDER ARCHITECTURE
"""

import json
import os
import struct
import sys
from pathlib import Path

HIDDEN, INTERMEDIATE, LAYERS, HEADS, VOCABULARY = 5120, 13824, 40, 40, 32000
folder, architecture = Path(sys.argv[1]), sys.argv[2]
folder.mkdir(parents=True, exist_ok=True)
config = {
    "architectures": [architecture],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
shapes["model.norm.weight"] = (HIDDEN,)
for layer in range(LAYERS):
    at = f"model.layers.{layer}"
    shapes |= {f"{at}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
    shapes |= {f"{at}.mlp.{name}_proj.weight": (INTERMEDIATE, HIDDEN) for name in ("gate", "up")}
    shapes[f"{at}.mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
    shapes |= {f"{at}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
header, end = {}, 0
for name, shape in shapes.items():
    begin, end = end, end + 2 * (shape[0] * shape[-1] if len(shape) > 1 else shape[0])
    header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
text = json.dumps(header).encode()
with (folder / "model.safetensors").open("wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    os.truncate(file.fileno(), 8 + len(text) + end)
(folder / "config.json").write_text(json.dumps(config))
