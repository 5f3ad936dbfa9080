"""Contents of different sizes, gathered by an exchange of equal shards: each is filled up to the longest."""

from __future__ import annotations

import torch

from unisono.exchange.protocol import Exchange


def gather_padded(exchange: Exchange, content: bytes, device: torch.device | None = None) -> list[bytes]:
    """Return what every worker passed, in order of rank. Messages lie on `device`; None: the CPU."""
    sizes = torch.zeros(exchange.workers, dtype=torch.int64, device=device)
    sizes[exchange.rank] = len(content)
    lengths: list[int] = exchange.add_integers(sizes).tolist()
    longest = max(1, *lengths)
    mine = torch.zeros(longest, dtype=torch.uint8, device=device)
    mine[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else mine[:0]
    rows = torch.zeros(exchange.workers * longest, dtype=torch.uint8, device=device)
    exchange.gather_shards(mine, rows)
    return [
        bytes(row[:length].cpu().numpy().tobytes()) for row, length in zip(rows.view(-1, longest), lengths, strict=True)
    ]
