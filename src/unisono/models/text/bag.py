"""A bag of features: one embedding per bucket, added up; then a linear or a hidden layer.

Owns its scaling and initial weights. Knows nothing of how a text becomes buckets.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unisono.recipe import Bag

_INITIAL_STD = 0.1


class BagClassifier(nn.Module):
    """Ragged rows of buckets to logits; fastText (Joulin et al., 2016) with another scaling.

    A sample's embeddings are added and divided by the square root of their number, not by the number itself: so the sum
    keeps its size whatever the length, while what sets a long text apart still counts for more than in a short one.
    """

    def __init__(self, model: Bag, classes: int, buckets: int) -> None:
        super().__init__()
        # Dense gradients: the engine adds flat ones, in which a sparse row has no fixed place.
        self.embedding = nn.EmbeddingBag(buckets, model.width, mode="sum", sparse=False)
        nn.init.normal_(self.embedding.weight, std=_INITIAL_STD)
        self.head = nn.Sequential(nn.Dropout(model.dropout))
        if model.hidden:
            self.head.extend([nn.Linear(model.width, model.hidden), nn.ReLU(), nn.Dropout(model.dropout)])
        self.head.append(nn.Linear(model.hidden or model.width, classes))

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """Return logits [n, classes]; int64 ids [features], of which sample i has those from offsets[i] (int64 [n])."""
        end = torch.full_like(offsets[:1], len(ids))
        features = torch.diff(offsets, append=end).unsqueeze(-1)
        return self.head(self.embedding(ids, offsets) / features.sqrt())
