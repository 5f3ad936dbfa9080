"""A transformer encoder that is trained from scratch.

Owns its blocks, its initial weights and its head. Blocks are pre-norm, positions are learned, and the head
reads the mean of the tokens. Only parameters outlive a call.

Shapes: n samples, m tokens of all samples, w = width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unisono.config.sections import Transformer
from unisono.kernels.attention import attend, mean_over_tokens, run_blocks
from unisono.kernels.dropout import Dropout
from unisono.kernels.gelu import Gelu
from unisono.kernels.linear import Linear
from unisono.kernels.packing import Packing, pack

_INITIAL_STD = 0.02  # as in BERT and GPT-2


class TransformerClassifier(nn.Module):
    """Packed token numbers to logits.

    Args:
        model: layers, width, heads, feedforward and dropout.
        classes: logits per sample.
        vocabulary_size: token numbers are below it.
        padding: token number whose embedding stays zero.
        max_tokens: longest sample.
        recompute: recompute activations in backward, to save memory.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        classes: int,
        vocabulary_size: int,
        padding: int,
        max_tokens: int,
        recompute: bool,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.tokens = nn.Embedding(vocabulary_size, model.width, padding_idx=padding, sparse=True)
        self.positions = nn.Embedding(max_tokens, model.width)
        self.dropout = Dropout(model.dropout)
        blocks = [_Block(model) for _ in range(model.layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(model.width)
        self.classifier = Linear(model.width, classes)
        self.apply(_initialize)
        for block in blocks:  # so that more blocks do not start with a larger sum of branches (GPT-2)
            for last in (block.mix, block.contract):
                nn.init.normal_(last.weight, std=_INITIAL_STD / (2 * model.layers) ** 0.5)

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """Return logits [n, classes] for int64 ids [m]; sample i begins at offsets[i]."""
        packing = pack(len(ids), offsets)
        states = self.dropout(self.tokens(ids) + self.positions(packing.positions))
        states = run_blocks(self.blocks, states, packing, recompute=self.recompute)
        return self.classifier(self.dropout(mean_over_tokens(self.norm(states), packing)))


class _Block(nn.Module):
    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.heads = model.heads
        self.attention_norm = nn.LayerNorm(model.width)
        self.query_key_value = Linear(model.width, 3 * model.width)
        self.mix = Linear(model.width, model.width)
        self.feedforward_norm = nn.LayerNorm(model.width)
        self.expand = Linear(model.width, model.feedforward)
        self.contract = Linear(model.feedforward, model.width)
        self.activation = Gelu()
        self.dropout = Dropout(model.dropout)

    def forward(self, states: Tensor, packing: Packing) -> Tensor:
        projected = self.query_key_value(self.attention_norm(states))
        states = self.dropout.add(self.mix(attend(projected, packing, self.heads)), states)
        inner = self.activation(self.expand(self.feedforward_norm(states)))
        return self.dropout.add(self.contract(inner), states)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=_INITIAL_STD)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=_INITIAL_STD)
        if module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
