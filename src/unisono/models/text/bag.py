"""A bag of features: one embedding per bucket, added up; then a linear or a hidden layer.

Owns its scaling and initial weights. Knows nothing of how a text becomes buckets.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unisono.recipe import Bag

_INITIAL_STD = 0.03
_SPEED = 3.0  # of learning importances, in the exponent; 10 was worse on news, 1 hardly did anything
_LENGTH_POWER = 0.6  # between a plain sum (0) and a mean (1); on news 0.5 to 0.7 were alike, 0.3 and 1 worse


class BagClassifier(nn.Module):
    """Ragged rows of buckets to logits: fastText (Joulin et al., 2016) with a learned importance per bucket.

    An importance is one factor on the whole embedding. It plays the part of TF-IDF's idf, but is learned from
    the classes: what tells nothing becomes quiet in all of its numbers at once.
    """

    def __init__(self, model: Bag, classes: int, buckets: int) -> None:
        super().__init__()
        # Sparse gradients: a microbatch touches few rows. Importances are so small that dense ones cost less.
        self.embedding = nn.Embedding(buckets, model.width, sparse=True)
        self.importance = nn.Embedding(buckets, 1)
        nn.init.normal_(self.embedding.weight, std=_INITIAL_STD)
        nn.init.zeros_(self.importance.weight)
        self.head = nn.Sequential(nn.Dropout(model.dropout))
        if model.hidden:
            self.head.extend([nn.Linear(model.width, model.hidden), nn.ReLU(), nn.Dropout(model.dropout)])
        self.head.append(nn.Linear(model.hidden or model.width, classes))

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """Return logits [n, classes] for int64 ids [features]; sample i has those from offsets[i] on."""
        factors = torch.exp(_SPEED * self.importance(ids)).squeeze(-1)
        added = F.embedding_bag(
            ids, self.embedding.weight, offsets, mode="sum", per_sample_weights=factors, sparse=self.embedding.sparse
        )
        features = torch.diff(offsets, append=torch.full_like(offsets[:1], len(ids))).unsqueeze(-1)
        return self.head(added / features.to(added.dtype) ** _LENGTH_POWER)
