"""A bag of features: the sum of one embedding for each; then a linear or a hidden layer.

Owns its weighting, scaling and initial weights. It relies on this form of tokens: a token is LEVELS · feature + level,
features are numbered by falling frequency, and level is ⌊log2⌋ of how often the feature occurs in the text.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unisono.config.sections import Bag
from unisono.kernels.dropout import Dropout
from unisono.kernels.linear import Linear

LEVELS = 4

_INITIAL_STD = 0.03
_GAIN = 4.0  # of the bag, whose weights have length 1: the head's first inputs have a deviation of 0.12
_COMMON = 40.0  # features that occur in nearly all texts; on news, this gives the weights of counted frequencies


class BagClassifier(nn.Module):
    """Ragged rows of tokens to logits: fastText (Joulin et al., 2016) on TF-IDF.

    The embeddings of a text's features are added up with weights of Euclidean length 1; see `weigh`.
    """

    def __init__(self, model: Bag, classes: int, vocabulary_size: int) -> None:
        super().__init__()
        features = math.ceil(vocabulary_size / LEVELS)
        self.embedding = nn.Embedding(features, model.width, sparse=True)  # a microbatch touches few rows
        nn.init.normal_(self.embedding.weight, std=_INITIAL_STD)
        self.head = nn.Sequential(Dropout(model.dropout))
        if model.hidden:
            self.head.extend([Linear(model.width, model.hidden), nn.ReLU(), Dropout(model.dropout)])
        self.head.append(Linear(model.hidden or model.width, classes))

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """Return logits [n, classes] for int64 ids [tokens]; sample i begins at offsets[i] and has at least one."""
        features = ids // LEVELS
        weights = weigh(features, ids % LEVELS)
        added = F.embedding_bag(
            features,
            self.embedding.weight,
            offsets,
            mode="sum",
            per_sample_weights=weights,
            sparse=self.embedding.sparse,
        )
        tokens = torch.diff(offsets, append=torch.full_like(offsets[:1], len(ids)))
        squares = torch.segment_reduce(weights * weights, "sum", lengths=tokens)
        return self.head(added * (_GAIN / squares.sqrt()).unsqueeze(-1).to(added.dtype))


def weigh(features: Tensor, levels: Tensor) -> Tensor:
    """Return float32 TF-IDF weights: (1 + log of how often in the text) · (1 + log(texts / texts with the feature)).

    The share of texts with a feature falls about as 1 / its number (Zipf), so it follows from the number alone.
    """
    often = 1.0 + math.log(2.0) * levels.to(torch.float32)
    return often * (1.0 + torch.log1p(features.to(torch.float32) / _COMMON))
