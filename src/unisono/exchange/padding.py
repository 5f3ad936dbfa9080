"""Contents of different sizes, gathered by an exchange of equal shards: each is padded to the longest."""

from __future__ import annotations

import torch

from unisono.exchange.protocol import Exchange


def gather_padded(exchange: Exchange, content: bytes) -> list[bytes]:
    """Return what every worker passed, in order of rank. Messages lie in host memory."""
    sizes = torch.zeros(exchange.workers, dtype=torch.int64)
    sizes[exchange.rank] = len(content)
    lengths: list[int] = exchange.add_integers(sizes).tolist()
    longest = max(1, *lengths)
    mine = torch.zeros(longest, dtype=torch.uint8)
    mine[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else mine[:0]
    rows = torch.zeros(exchange.workers * longest, dtype=torch.uint8)
    exchange.gather_shards(mine, rows)
    return [bytes(row[:length].numpy().tobytes()) for row, length in zip(rows.view(-1, longest), lengths, strict=True)]
