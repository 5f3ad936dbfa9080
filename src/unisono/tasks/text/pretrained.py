"""A pretrained BERT encoder, read from a folder in Hugging Face's layout, with a new classification head.

Owns which folders can be used, the names and shapes of their tensors, and the `config.json` that is written
to a folder. Runs no code from a folder and reads no pickle. Does not read or write tokenizers.

The encoder is that of Devlin et al. (2018), with its pooler if the recipe says so. A parameter's name is `bert.`
and its name in transformers' BertModel, so that transformers can open a folder with the trained weights, too; as a
classifier only where it would compute the same.

Shapes: n samples, m tokens of all samples, w = hidden_size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from unisono.config.sections import Pretrained
from unisono.config.small_files import read_small
from unisono.errors import ModelError
from unisono.kernels.attention import attend, attend_once, mean_over_tokens, run_blocks
from unisono.kernels.dropout import Dropout
from unisono.kernels.gelu import Gelu
from unisono.kernels.linear import Linear, project
from unisono.kernels.packing import Packing, pack

PREFIX = "bert."

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": Gelu,
    "gelu_new": partial(nn.GELU, approximate="tanh"),
    "gelu_pytorch_tanh": partial(nn.GELU, approximate="tanh"),
    "relu": nn.ReLU,
}
_OLD_NAMES = {".gamma": ".weight", ".beta": ".bias"}  # of norms, in folders converted from TensorFlow
NOT_A_CLASSIFIER = 2.0
_MOST = {"num_hidden_layers": 1000}  # modules are made one by one, before the weights show that there are fewer
_FILES = "config.json, model.safetensors and tokenizer.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class BertConfig:
    """The keys of config.json that decide the encoder's shapes and arithmetic."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"


class PretrainedClassifier(nn.Module):
    """Packed token numbers to logits; made by `read_classifier`."""

    def __init__(self, config: BertConfig, bert: Bert, model: Pretrained, classes: int) -> None:
        super().__init__()
        self.pooling = model.pooling
        self.bert = bert
        self.dropout = Dropout(model.dropout)
        self.classifier = Linear(config.hidden_size, classes)
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """Return logits [n, classes] for int64 ids [m]; sample i begins at offsets[i]."""
        packing = pack(len(ids), offsets)
        if self.pooling == "mean":
            pooled = mean_over_tokens(self.bert(ids, packing), packing)
        else:
            pooled = self.bert(ids, packing, first_only=True)
        return self.classifier(self.dropout(pooled))


class Bert(nn.Module):
    """BERT's encoder. Dropout is applied to the embeddings and the residual branches, and to attention weights if the
    recipe says so."""

    def __init__(self, config: BertConfig, model: Pretrained, recompute: bool) -> None:
        super().__init__()
        width, dropout = config.hidden_size, 0.0 if model.freeze else model.dropout
        self.recompute = recompute
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": _embedding(config.vocab_size, width, sparse=True),
                "position_embeddings": _embedding(config.max_position_embeddings, width),
                "token_type_embeddings": _embedding(config.type_vocab_size, width),
                "LayerNorm": nn.LayerNorm(width, config.layer_norm_eps),
            }
        )
        layers = [_Layer(config, model, dropout) for _ in range(config.num_hidden_layers)]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        self.pooler = nn.ModuleDict({"dense": Linear(width, width)} if model.pooling == "pooler" else {})
        self.dropout = Dropout(dropout)

    def forward(self, ids: Tensor, packing: Packing, *, first_only: bool = False) -> Tensor:
        """Return the last hidden states [m, w] of int64 ids [m]; with `first_only` those of each sample's first token
        [n, w], through the pooler where there is one."""
        embed = self.embeddings
        kind = embed["token_type_embeddings"](torch.zeros(1, dtype=ids.dtype, device=ids.device))
        states = embed["word_embeddings"](ids) + kind + embed["position_embeddings"](packing.positions)
        states = self.dropout(embed["LayerNorm"](states))
        *layers, last = self.encoder["layer"].children()
        states = run_blocks(layers, states, packing, recompute=self.recompute)
        states = run_blocks([partial(last, first_only=first_only)], states, packing, recompute=self.recompute)
        return torch.tanh(self.pooler["dense"](states)) if first_only and self.pooler else states


class _Layer(nn.Module):
    def __init__(self, config: BertConfig, model: Pretrained, dropout: float) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        projections = {name: Linear(width, width) for name in ("query", "key", "value")}
        self.heads = config.num_attention_heads
        self.attention_dropout = 0.0 if model.freeze else model.attention_dropout
        self.attention = nn.ModuleDict({"self": nn.ModuleDict(projections), "output": _Branch(width, config, dropout)})
        self.intermediate = nn.ModuleDict({"dense": Linear(width, inner)})
        self.output = _Branch(inner, config, dropout)
        self.activation = _ACTIVATIONS[config.hidden_act]()

    def forward(self, states: Tensor, packing: Packing, first_only: bool = False) -> Tensor:
        """Return the states [m, w]; with `first_only`, only what the first tokens need is computed."""
        ask, offer, give = self.attention.get_submodule("self").children()
        dropout = self.attention_dropout if self.training else 0.0
        if first_only:
            everyone, states = states, states.index_select(0, packing.starts)
            mixed = attend_once(ask(states), everyone, offer, give, packing, self.heads, dropout=dropout)
        else:
            mixed = attend(project(states, ask, offer, give), packing, self.heads, dropout=dropout)
        states = self.attention["output"](mixed, states)
        return self.output(self.activation(self.intermediate["dense"](states)), states)


class _Branch(nn.Module):
    """The end of a residual branch: back to the hidden size, added to the states, then normalised."""

    def __init__(self, inputs: int, config: BertConfig, dropout: float) -> None:
        super().__init__()
        self.dense = Linear(inputs, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = Dropout(dropout)

    def forward(self, inner: Tensor, states: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout.add(self.dense(inner), states))


def read_classifier(model: Pretrained, classes: int, *, recompute: bool) -> PretrainedClassifier:
    """Make the classifier with the folder's encoder; the head's weights come from torch's global generator.

    Raises:
        ModelError: the folder is missing, incomplete, damaged, not BERT, or has pickled weights only.
    """
    folder = Path(model.folder)
    config = read_config(folder)
    weights = _weights_path(folder)
    with torch.device("meta"):  # only shapes: every weight is read later
        bert = Bert(config, model, recompute)
    bert.load_state_dict(_read_weights(weights, bert.state_dict()), assign=True)
    bert.requires_grad_(not model.freeze)
    return PretrainedClassifier(config, bert, model, classes)


def _embedding(rows: int, width: int, *, sparse: bool = False) -> nn.Embedding:
    """An embedding without values: for the meta device, a random start would import torch's compiler."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False, sparse=sparse)


def read_config(folder: Path) -> BertConfig:
    """Read and check a folder's config.json.

    Raises:
        ModelError: it is missing or not readable, or describes something else than a BERT encoder.
    """
    table = _read_table(folder)
    if table.get("model_type") != "bert":
        raise ModelError(
            f"{folder / 'config.json'}: model_type {table.get('model_type')!r} is not supported; allowed is "
            f"'bert' (BERT, MiniLM, others of that kind). Choose such a folder, or write a Task of your own."
        )
    _check_table(folder, table)
    known = {field.name: table[field.name] for field in fields(BertConfig) if field.name in table}
    return BertConfig(**known)


def write_config(model: Pretrained, folder: Path, labels: Sequence[str]) -> None:
    """Write to `folder` the config.json of the trained classifier, with the classes' names.

    transformers' BertForSequenceClassification always has a pooler. It would make one of random weights where the model
    has none, so it must not open such a folder: a dropout that is no probability stops every class with a head.
    BertForTokenClassification computes the same logits for each token; docs/tasks.md shows how.
    """
    table = _read_table(Path(model.folder))
    pooled = model.pooling == "pooler"
    table["architectures"] = ["BertForSequenceClassification" if pooled else "BertForTokenClassification"]
    table["classifier_dropout"] = None if pooled else NOT_A_CLASSIFIER
    table["id2label"] = {str(number): label for number, label in enumerate(labels)}
    table["label2id"] = {label: number for number, label in enumerate(labels)}
    for stale in ("_name_or_path", "dtype", "torch_dtype", "num_labels", "problem_type"):
        table.pop(stale, None)
    text = json.dumps(table, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def _read_table(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not folder.is_dir():
        raise ModelError(f"model.folder = {str(folder)!r}: no such folder. Give one with {_FILES}.")
    try:
        table = json.loads(read_small(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: missing or no JSON ({error}). Give a folder with {_FILES}.") from None
    if not isinstance(table, dict):
        raise ModelError(f"{path}: holds a {type(table).__name__}, allowed is an object. Fetch it again.")
    return table


def _check_table(folder: Path, table: dict[str, Any]) -> None:
    """Refuse a configuration whose results would differ from those of the folder's author."""
    faults = []
    for field in fields(BertConfig):
        if field.type == "int" and (type(table.get(field.name)) is not int or table[field.name] < 1):
            faults.append(f"{field.name} = {table.get(field.name)!r}: allowed is a whole number from 1")
        elif field.type == "int" and table[field.name] > _MOST.get(field.name, 2**31):
            faults.append(f"{field.name} = {table[field.name]}: allowed are {_MOST.get(field.name, 2**31)} at most")
    if not faults and table["hidden_size"] % table["num_attention_heads"]:
        faults.append(f"hidden_size = {table['hidden_size']}: no multiple of num_attention_heads")
    if table.get("hidden_act", "gelu") not in list(_ACTIVATIONS):  # a list: the value may not be hashable
        faults.append(f"hidden_act = {table['hidden_act']!r}: allowed are {', '.join(_ACTIVATIONS)}")
    positions = table.get("position_embedding_type", "absolute")
    if positions != "absolute":
        faults.append(f"position_embedding_type = {positions!r}: allowed is 'absolute'")
    if not isinstance(table.get("layer_norm_eps", 0.0), float):
        faults.append(f"layer_norm_eps = {table['layer_norm_eps']!r}: allowed is a number with a point")
    if table.get("is_decoder", False):
        faults.append("is_decoder = true: allowed is false")
    if faults:
        raise ModelError(f"{folder / 'config.json'}: {'; '.join(faults)}. Choose another model.")


def _weights_path(folder: Path) -> Path:
    path = folder / "model.safetensors"
    pickles = [found.name for found in folder.iterdir() if found.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if not path.is_file() and pickles:
        raise ModelError(
            f"{folder}: weights only as pickle ({', '.join(sorted(pickles))}), which can run code when it is "
            f"opened and is never read. Convert them to model.safetensors: in transformers, "
            f"model.save_pretrained(folder, safe_serialization=True)."
        )
    for needed in (path, folder / "tokenizer.json"):
        if not needed.is_file():
            raise ModelError(f"{folder}: has no {needed.name}. Give a folder with {_FILES}.")
    return path


def _read_weights(path: Path, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Read the needed tensors as float32, each in memory of its own; names may begin with `bert.` in the file."""
    try:
        with safe_open(path, framework="pt") as file:
            stored = {_plain(name): name for name in file.keys()}  # noqa: SIM118 (no mapping)
            for name, tensor in wanted.items():
                _check_tensor(path, name, tensor, file.get_slice(stored[name]) if name in stored else None)
            # Always a copy: the file's tensors may lie at odd addresses, where kernels give other bits.
            return {name: file.get_tensor(stored[name]).to(torch.float32, copy=True) for name in wanted}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not readable as safetensors ({error}). Fetch it again.") from None


def _check_tensor(path: Path, name: str, wanted: Tensor, found: Any) -> None:
    remedy = "Take config.json and the weights from one model."
    if found is None:
        if name.startswith("pooler."):
            remedy = 'Set model.pooling = "mean" or "cls", which need no pooler.'
            raise ModelError(f"{path}: lacks tensor {name!r}, which model.pooling = 'pooler' asks for. {remedy}")
        raise ModelError(f"{path}: lacks tensor {name!r}, which config.json asks for. {remedy}")
    given, asked = found.get_shape(), list(wanted.shape)
    if given != asked:
        raise ModelError(f"{path}: tensor {name!r} has shape {given}, config.json asks for {asked}. {remedy}")
    kind = found.get_dtype()
    if kind not in ("F64", "F32", "F16", "BF16"):
        raise ModelError(f"{path}: tensor {name!r} is {kind}; allowed are F32, F16, BF16 and F64. Convert it.")


def _plain(name: str) -> str:
    name = name.removeprefix(PREFIX)
    for old, new in _OLD_NAMES.items():
        if name.endswith("LayerNorm" + old):
            return name.removesuffix(old) + new
    return name
