"""A BERT of some thousand weights, in a folder as transformers writes it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from zoo import WORDS

CONFIG = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
}
LAYER = {
    "attention.self.query": (32, 32),
    "attention.self.key": (32, 32),
    "attention.self.value": (32, 32),
    "attention.output.dense": (32, 32),
    "intermediate.dense": (48, 32),
    "output.dense": (32, 48),
}


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (WORDS, 32),
        "embeddings.position_embeddings.weight": (24, 32),
        "embeddings.token_type_embeddings.weight": (2, 32),
    }
    norms = ["embeddings.LayerNorm"]
    for layer in ("encoder.layer.0.", "encoder.layer.1."):
        for name, shape in LAYER.items():
            shapes |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
        norms += [f"{layer}attention.output.LayerNorm", f"{layer}output.LayerNorm"]
    for name in norms:
        shapes |= {f"{name}.weight": (32,), f"{name}.bias": (32,)}
    shapes |= {"pooler.dense.weight": (32, 32), "pooler.dense.bias": (32,)}
    made = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: tensor + 1 if name.endswith("LayerNorm.weight") else tensor for name, tensor in made.items()}


def write_bert(folder: Path) -> Path:
    """Write it to a new folder, which is returned."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    save_file(weights(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder
