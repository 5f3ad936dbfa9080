"""A torch module that you already have, an LSTM here: the same bits from any number of workers.

python examples/own/module.py --workers 3, or torchrun --nproc-per-node 3 examples/own/module.py
"""

import argparse

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import unisono

SYMBOLS = 8  # 0 to 7; the mark is 8


def make_sequences(count: int, seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    sequence = torch.randint(SYMBOLS, (count, 12), generator=random)
    place = torch.randint(11, (count, 1), generator=random)
    return {"label": sequence.gather(1, place + 1)[:, 0], "sequence": sequence.scatter(1, place, SYMBOLS)}


class Reader(nn.Module):  # yours, unchanged: it says which symbol follows the mark
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS + 1, 64)
        self.lstm, self.head = nn.LSTM(64, 64, batch_first=True), nn.Linear(64, SYMBOLS)

    def forward(self, sequence: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(sequence))[0][:, -1])


class Reading(unisono.Task):
    def build(self):
        return Reader()

    def loss(self, module, microbatch):
        label = microbatch["label"]
        return cross_entropy(module(microbatch["sequence"]), label, reduction="sum"), len(label)

    def measure(self, module, microbatch):
        return {"predicted": module(microbatch["sequence"]).argmax(1), "label": microbatch["label"]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", default="auto")
    settings = {"epochs": 2, "learning_rate": 1e-2, **vars(parser.parse_args())}
    unisono.train(Reading(), make_sequences(4000, seed=1), test=make_sequences(500, seed=2), **settings)
