"""Encoded texts as a source of microbatches.

Owns the layout of samples in memory, the hash of their content, and how some of them become tensors. The numbers may
lie in memory or in a mapped file. torch is imported only where a microbatch is made: preparing data does not need it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from unisono.data.encoding.encoder import Encoder
from unisono.storage.files import WatchedFile

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleChunk:
    """Some samples, one after the other."""

    ids: np.ndarray
    """int32 [tokens of all samples]"""
    lengths: np.ndarray
    """int32 [samples]"""
    labels: np.ndarray | None
    """int32 [samples], or None"""


class EncodedSamples:
    """A `Source`: sample i is `ids[starts[i] : starts[i] + lengths[i]]`.

    Args:
        ids: int32 [any]; may hold other things between the samples.
        starts: int64 [samples].
        lengths: int32 [samples], each at least 1.
        labels: int64 [samples], or None.
        sha256: hash of the content, see `hash_content`.
        file: where they are mapped from; None: they lie in memory of this process.
    """

    padded = False
    prefetchable = True

    def __init__(
        self,
        *,
        ids: np.ndarray,
        starts: np.ndarray,
        lengths: np.ndarray,
        labels: np.ndarray | None,
        sha256: str,
        file: WatchedFile | None = None,
    ) -> None:
        self.file = file
        self.lengths = lengths
        self.labels = labels
        self.sha256 = sha256
        self._ids = ids
        self._starts = starts

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, samples: np.ndarray, epoch: int = 0, repeats: np.ndarray | None = None) -> dict[str, Tensor]:
        """Return these samples (int64 [n]) as one microbatch.

        `ids` int64 [all tokens] and `offsets` int64 [n], where each sample starts; with classes, `label` int64 [n].
        """
        import torch

        lengths = self.lengths[samples].astype(np.int64)
        ends = np.cumsum(lengths)
        offsets = ends - lengths
        total = int(ends[-1]) if len(ends) else 0
        places = np.arange(total) + np.repeat(self._starts[samples] - offsets, lengths)
        ids = self._ids[places].astype(np.int64)
        microbatch = {"ids": torch.from_numpy(ids), "offsets": torch.from_numpy(offsets)}
        if self.labels is not None:
            microbatch["label"] = torch.from_numpy(self.labels[samples])
        return microbatch


def pack_share(encoder: Encoder, texts: Sequence[str]) -> bytes:
    """Encode texts; return the samples as bytes: their number, their lengths, their tokens, int32 each."""
    chunk = make_chunk(encoder, texts, None)
    parts = (np.array([len(chunk.lengths)]), chunk.lengths, chunk.ids)
    return b"".join(np.ascontiguousarray(part, "<i4").tobytes() for part in parts)


def join_shares(shares: Sequence[bytes], labels: Sequence[int] | np.ndarray | None = None) -> EncodedSamples:
    """The samples of all shares, each packed by `pack_share`: share k of n has samples k, k + n, k + 2n …"""
    arrays = [np.frombuffer(share, "<i4") for share in shares]
    lengths, starts = (np.empty(sum(int(array[0]) for array in arrays), kind) for kind in (np.int32, np.int64))
    begin = 0
    for number, array in enumerate(arrays):
        mine = array[1 : 1 + array[0]]
        lengths[number :: len(shares)] = mine
        starts[number :: len(shares)] = begin + np.cumsum(mine, dtype=np.int64) - mine
        begin += len(array) - 1 - len(mine)
    return EncodedSamples(
        ids=np.concatenate([array[1 + array[0] :] for array in arrays]),
        starts=starts,
        lengths=lengths,
        labels=None if labels is None else np.asarray(labels, np.int64),
        sha256="",  # of no run: nothing is compared with it
    )


def make_chunk(encoder: Encoder, texts: Sequence[str], labels: Sequence[int] | np.ndarray | None) -> SampleChunk:
    """Encode texts, in order."""
    rows = encoder.encode(texts)
    return SampleChunk(
        ids=np.concatenate(rows) if rows else np.empty(0, np.int32),
        lengths=np.fromiter(map(len, rows), np.int32, len(rows)),
        labels=None if labels is None else np.asarray(labels, np.int32),
    )


class ContentHash:
    """SHA-256 of samples, chunk by chunk; how they are cut into chunks makes no difference."""

    def __init__(self) -> None:
        self._parts = [hashlib.sha256() for _ in range(3)]

    def add(self, chunk: SampleChunk) -> None:
        labels = np.empty(0, np.int32) if chunk.labels is None else chunk.labels
        for part, column in zip(self._parts, (chunk.lengths, chunk.ids, labels), strict=True):
            part.update(np.ascontiguousarray(column, "<i4").data)

    def hexdigest(self) -> str:
        return hashlib.sha256(b"".join(part.digest() for part in self._parts)).hexdigest()


def hash_content(chunks: Iterable[SampleChunk]) -> str:
    """Return the SHA-256 of the samples in these chunks."""
    whole = ContentHash()
    for chunk in chunks:
        whole.add(chunk)
    return whole.hexdigest()
