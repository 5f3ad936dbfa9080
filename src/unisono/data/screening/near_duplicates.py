"""Near-duplicates: texts of which most is in another text, found without comparing pairs.

Owns the sketch of a text and the decisions from sketches: which records repeat an earlier one, and which have a class
that their near-duplicates do not have. Reads no files; records are rows of arrays here.

A text is the set of its shingles: the runs of SHINGLE letters in it, after case, punctuation and spaces are evened out.
Chinese, Japanese and Korean characters count as two letters each, as they carry about as much meaning.
MinHash (Broder, 1997, On the resemblance and containment of documents): under a random order of all shingles, two sets
have the same least shingle with probability J, their Jaccard similarity |A ∩ B| / |A ∪ B|. A text here has BINS =
ROWS · BANDS least shingles, from one pass: a shingle's hash, SplitMix64's finaliser, says in which bin it stands, and
each bin keeps its least one (Li, Owen, Zhang, 2012, One permutation hashing); an empty bin borrows that of the next
full one, with the distance added (Shrivastava, Li, 2014, Densifying one permutation hashing).

Banding (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, 3.4): ROWS bins together are a band, kept as one hash,
and texts that share a band are near-duplicates: with probability 1 - (1 - J^ROWS)^BANDS, for 12 bands of 10 rows

    J            0.5    0.6    0.7    0.75   0.8    0.85   0.9    0.95
    probability  0.01   0.07   0.29   0.50   0.74   0.93   0.99   1.00

Texts of a few words, with fewer shingles than bins, are found more rarely than that if they differ at all. Texts
with a third in common, such as filled-in forms, are found by chance among tens of thousands (J = 0.3: 0.00007).

The keys are constants and the arithmetic is that of integers, so a sketch is the same on every machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from unisono.data.hashing import PRIME, cut_texts, mix

BANDS = 12
ROWS = 10
BINS = BANDS * ROWS
SHINGLE = 8

STAYS, IN_SPLIT, IN_TRAIN = range(3)
"""What `find_near_duplicates` returns for a record."""
REASONS = ("", "near-duplicate", "near-duplicate of train")
"""By those numbers."""
CONTRADICTED = "neighbours contradict its label"
TRAIN = 0
"""The number of the training split."""

_LETTERS_AT_ONCE = 2**16
_TEXTS_AT_ONCE = 2**12  # their bins take 4 MB

_GAP = re.compile("[\0-/:-@\\[-`{-\xa9\xab-\xb4\xb6-\xb9\xbb-\xbf\u2000-\u206f\u3000-\u303f]+")
_GAPS_OF_ASCII = bytes(0x20 if _GAP.match(chr(code)) else code for code in range(128)) + bytes(128)

_WIDE = 0x2E80  # from here on: Chinese, Japanese, Korean, and halves of what is beyond 16 bits
_KEY_1 = np.uint64(0x9E3779B97F4A7C15)
_KEY_2 = np.uint64(0xC2B2AE3D27D4EB4F)
_STEP = np.uint64(0xD1342543DE82EF95)  # odd, so that borrowing from other distances gives other values
_NONE = np.uint64(2**64 - 1)


def sketch(texts: Sequence[str]) -> np.ndarray:
    """Return the hashes of each text's bands: uint64 [texts, BANDS]. A row depends on its own text alone."""
    bands = np.empty((len(texts), BANDS), np.uint64)
    for group in cut_texts(texts, most_letters=_LETTERS_AT_ONCE, most_texts=_TEXTS_AT_ONCE):
        bands[group] = _join_rows(_fill(_find_minima([_spell(text) for text in texts[group]])))
    return bands


def find_near_duplicates(
    bands: np.ndarray, splits: np.ndarray, kept: np.ndarray, like: np.ndarray | None = None
) -> np.ndarray:
    """Return STAYS, IN_SPLIT or IN_TRAIN for each record: int8 [records].

    The first seen wins: a record leaves if it shares a band with an earlier kept record of its split, whether that one
    stays or leaves itself; so records added at the end change nothing before them. Outside of train, a record leaves
    first of all if it shares a band with any kept one of train; those that are left are then compared with each other.

    Columns are sorted one after the other: about 40 bytes per record besides the arguments. A column is read at once,
    so `bands` is best stored by column (the transpose of a [bands, records] array).

    Args:
        bands: uint64 [records, bands], from `sketch`.
        splits: int8 [records], TRAIN for train.
        kept: bool [records]; others are not looked at, and stay as they are.
        like: int64 [records]; the number of the first record that one resembles is written here, if it leaves.
    """
    found = np.full(len(kept), STAYS, np.int8)
    first = np.full(len(kept), len(kept), np.int64)
    if np.any(splits[kept] != TRAIN):
        for members, runs in _find_runs(bands, kept):
            learned = splits[members] == TRAIN
            leaks = np.full(runs[-1] + 1, len(kept))
            np.minimum.at(leaks, runs[learned], members[learned])
            chosen = (leaks[runs] < len(kept)) & ~learned
            found[members[chosen]] = IN_TRAIN
            first[members[chosen]] = np.minimum(first[members[chosen]], leaks[runs[chosen]])
    for members, runs in _find_runs(bands, kept & (found == STAYS)):
        order = np.lexsort((members, splits[members], runs))
        members, runs = members[order], runs[order]
        follows = (runs[1:] == runs[:-1]) & (splits[members[1:]] == splits[members[:-1]])
        found[members[1:][follows]] = IN_SPLIT
        begins = np.flatnonzero(np.concatenate([[True], ~follows]))
        firsts = np.repeat(members[begins], np.diff(begins, append=len(members)))[1:][follows]
        first[members[1:][follows]] = np.minimum(first[members[1:][follows]], firsts)
    if like is not None:
        like[found != STAYS] = first[found != STAYS]
    return found


def find_contradicted(
    labels: np.ndarray, bands: np.ndarray, splits: np.ndarray, kept: np.ndarray, *, neighbours: int, share: float
) -> np.ndarray:
    """Return which records have a class that most of their near-duplicates do not have: bool [records].

    A record's neighbours are the kept records of its split that share a band with it. Each has one vote per band that
    it shares, so the nearer it is, the more it counts. A record is contradicted if in some band it has at least
    `neighbours` of them, and more than `share` of all votes are for other classes. All are judged at once, by what was
    kept before; where two classes have half of a group each, neither is known to be right, and the whole group can go.

    Args:
        labels: int32 [records], the number of each record's class.
        bands, splits, kept: as in `find_near_duplicates`; the memory needed is a little more.
    """
    votes, against, most = (np.zeros(len(kept), np.int64) for _ in range(3))
    for members, runs in _find_runs(bands, kept):
        order = np.lexsort((labels[members], splits[members], runs))
        members, runs = members[order], runs[order]
        new = (runs[1:] != runs[:-1]) | (splits[members[1:]] != splits[members[:-1]])
        all_ = _count_equal(new)
        same = _count_equal(new | (labels[members[1:]] != labels[members[:-1]]))
        votes[members] += all_ - 1
        against[members] += all_ - same
        most[members] = np.maximum(most[members], all_ - 1)
    return (most >= neighbours) & (against > share * votes)


def _find_runs(bands: np.ndarray, kept: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each band that several kept records share a value of, yield these records and the number of the value.

    Both are int64 [sharing records], the values' numbers ascending from 0; each record stands there once.
    """
    numbers = np.flatnonzero(kept)
    if len(numbers) < 2:
        return
    for band in range(bands.shape[1]):
        column = bands[numbers, band]
        order = np.argsort(column)
        column = column[order]
        like_last = np.concatenate([[False], column[1:] == column[:-1], [False]])
        shared = like_last[1:] | like_last[:-1]
        if shared.any():
            yield numbers[order[shared]], np.cumsum(~like_last[:-1][shared]) - 1


def _count_equal(new: np.ndarray) -> np.ndarray:
    """Return for each of n ordered values how many equal it: int64 [n]. `new` [n - 1]: where another value begins."""
    begins = np.concatenate([[0], np.flatnonzero(new) + 1])
    lengths = np.diff(begins, append=len(new) + 1)
    return np.repeat(lengths, lengths)


def _spell(text: str) -> bytes:
    """Return a text in UTF-16 and lower case, with one space between words; one without words as it is."""
    lower = text.lower()
    if lower.isascii():
        spelled = b" ".join(lower.encode("ascii").translate(_GAPS_OF_ASCII).split()).decode("ascii")
    else:
        spelled = _GAP.sub(" ", lower).strip(" ")
    return (spelled or text.strip()).encode("utf-16-le", "surrogatepass")


def _find_minima(spelled: Sequence[bytes]) -> np.ndarray:
    """Return the least hash of a shingle in each bin: uint64 [texts, BINS], _NONE where there is none.

    A text shorter than a shingle is one shingle, filled up with zeros.
    """
    units = np.frombuffer(b"".join(text + bytes(2 * SHINGLE) for text in spelled), "<u2")
    lengths = np.fromiter(map(len, spelled), np.int64, len(spelled)) // 2 + SHINGLE
    wide = units >= _WIDE
    if wide.any():
        units = np.repeat(units, 1 + wide)
        lengths += np.add.reduceat(wide, np.cumsum(lengths) - lengths, dtype=np.int64)
    buffer = units.tobytes() + bytes(2 * SHINGLE)
    first, second = (
        np.ndarray(lengths.sum(), "<u8", buffer, offset, strides=(2,)).astype(np.uint64) for offset in (0, SHINGLE)
    )
    first *= _KEY_1
    second *= _KEY_2
    first += second
    hashes = mix(first)
    bins = hashes >> np.uint64(32)
    bins *= np.uint64(BINS)
    bins >>= np.uint64(32)
    rest = np.minimum(lengths - 1, 2 * SHINGLE - 1)  # blanking windows over a text's end is faster
    ends = np.cumsum(lengths) - np.cumsum(rest)
    hashes[np.arange(rest.sum()) + np.repeat(ends, rest)] = _NONE
    minima = np.full(len(spelled) * BINS, _NONE)
    bins += np.repeat(np.arange(len(spelled), dtype=np.uint64) * np.uint64(BINS), lengths)
    np.minimum.at(minima, bins.view(np.int64), hashes)
    return minima.reshape(len(spelled), BINS)


def _fill(minima: np.ndarray) -> np.ndarray:
    """Give each empty bin the value of the next full one, after the last the first, plus _STEP · its distance."""
    rows = np.flatnonzero((minima == _NONE).any(axis=1))
    some = minima[rows]
    full = np.concatenate([some, some], axis=1) != _NONE
    own = np.arange(2 * BINS, dtype=np.int32)
    following = np.minimum.accumulate(np.where(full, own, np.int32(2 * BINS))[:, ::-1], axis=1)[:, ::-1][:, :BINS]
    values = np.take_along_axis(some, following % BINS, axis=1)
    minima[rows] = values + (following - own[:BINS]).astype(np.uint64) * _STEP
    return minima


def _join_rows(bins: np.ndarray) -> np.ndarray:
    """Hash the bins of each band together: uint64 [texts, BANDS]. A band's bins are far apart, as neighbours may have
    borrowed from the same one."""
    apart = bins.reshape(len(bins), ROWS, BANDS)
    joined = apart[:, 0].copy()
    for row in range(1, ROWS):
        joined = joined * PRIME + apart[:, row]
    return mix(joined)
