"""Convolutions and BatchNorm on ten digits, which this script draws: the same bits from any number of workers.

python examples/own/digits.py --workers 3
torchrun --nproc-per-node 2 examples/own/digits.py
"""

import argparse

import numpy as np
import torch.nn.functional as F
from torch import nn

import unisono

GLYPHS = 75557, 26227, 71747, 71717, 55711, 74717, 74757, 71111, 75757, 75717  # five rows of three dots, in octal


def draw(count: int, seed: int) -> dict[str, np.ndarray]:
    """Digits of 6 × 10 dots, anywhere on a noisy 16 × 16 page."""
    random = np.random.default_rng(seed)
    labels = random.integers(10, size=count)
    images = random.normal(0, 0.3, (count, 1, 16, 16)).astype(np.float32)
    for image, label in zip(images, labels, strict=True):
        dots = [[int(row) >> bit & 1 for bit in (2, 1, 0)] for row in str(GLYPHS[label])]
        y, x = random.integers(0, (7, 11))
        image[0, y : y + 10, x : x + 6] += np.kron(dots, np.ones((2, 2)))
    return {"image": images, "label": labels}


class Digits(unisono.Task):
    def build(self):
        layers = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))

    def loss(self, module, microbatch):
        scores = module(microbatch["image"])
        return F.cross_entropy(scores, microbatch["label"], reduction="sum"), len(scores)

    def measure(self, module, microbatch):
        scores, label = module(microbatch["image"]), microbatch["label"]
        return {"loss": F.cross_entropy(scores, label, reduction="none"), "predicted": scores.argmax(1), "label": label}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", default="auto")
    settings = {"epochs": 4, "learning_rate": 0.03, "microbatches": 6}
    unisono.train(Digits(), draw(2000, seed=1), test=draw(500, seed=2), **settings, **vars(parser.parse_args()))
