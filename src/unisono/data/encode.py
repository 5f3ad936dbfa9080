"""Which encoder a recipe asks for, and many texts encoded by many processes.

Owns the choice and the sharing out. The encoders are `data/ngrams.py` and `data/tokens.py`. Texts are encoded
in chunks of a fixed size, each by whichever process is free, and handed out in order: the result does not
depend on their number.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from unisono.data.encoder import Encoder
from unisono.data.ngrams import NGrams
from unisono.data.samples import Chunk, make_chunk
from unisono.data.tokens import Pieces, read_tokenizer, train_bpe, train_wordpiece
from unisono.errors import DataError, ModelError, WorkerError
from unisono.recipe import Recipe
from unisono.sections import Pretrained

VERSION = 2
"""Raised whenever the same text and settings come to give other numbers."""

SAMPLES_PER_CHUNK = 4096


def find_settings(recipe: Recipe) -> dict[str, object]:
    """Return what decides the encoder, but the training texts: its kind and that kind's settings.

    Raises:
        DataError: a tokenizer.json is asked for, and not named or not there.
    """
    encode = recipe.encode
    automatic = {"bag": "ngrams", "transformer": "wordpiece", "pretrained": "tokenizer"}
    kind = automatic[recipe.model.kind] if encode.kind == "auto" else encode.kind
    settings: dict[str, object] = {"kind": kind, "max_tokens": encode.max_tokens}
    if kind == "tokenizer":
        path = _find_tokenizer(recipe)
        if not path.is_file():
            raise DataError(f"{str(path)!r}: no such file. Set encode.tokenizer to a tokenizer.json.")
        return settings | {"tokenizer_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    settings |= {"lowercase": encode.lowercase}
    if kind == "ngrams":
        return settings | {"ngrams": encode.ngrams, "features": encode.features, "prefix": encode.prefix}
    return settings | {"vocabulary_size": encode.vocabulary_size}


def choose_encoder(recipe: Recipe, texts: Sequence[str]) -> Encoder:
    """Make the encoder that the recipe asks for; a vocabulary is learned from `texts`, the training texts.

    Raises:
        DataError: a tokenizer.json is missing or unusable, or a setting leaves no room for text.
    """
    encode = recipe.encode
    kind = str(find_settings(recipe)["kind"])
    if kind == "ngrams":
        return NGrams.learn(
            texts,
            encode.features,
            words=encode.max_tokens,
            order=encode.ngrams,
            lowercase=encode.lowercase,
            prefix=encode.prefix,
        )
    if kind == "tokenizer":
        tokenizer = read_tokenizer(_find_tokenizer(recipe))
    else:
        train = train_wordpiece if kind == "wordpiece" else train_bpe
        tokenizer = train(texts, encode.vocabulary_size, encode.lowercase)
    return Pieces(tokenizer, kind=kind, max_tokens=encode.max_tokens)


def load_encoder(folder: Path) -> Encoder:
    """Read the encoder of a dataset or a model from its `encoder.json`.

    Raises:
        ModelError: the file is missing or not what `Encoder.save` writes.
    """
    path = folder / "encoder.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f"{str(path)!r}: cannot be read: {error}. Give a folder that unisono wrote."
        raise ModelError(message) from None
    if not isinstance(fields, dict):
        raise ModelError(f"{str(path)!r}: not an object with a kind. Give a folder that unisono wrote.")
    return NGrams.load(folder, fields) if fields.get("kind") == "ngrams" else Pieces.load(folder, fields)


def encode_chunks(encoder: Encoder, texts: Sequence[str], labels: np.ndarray, *, workers: int = 1) -> Iterator[Chunk]:
    """Encode texts with their class numbers (int32 [texts]) in chunks of `SAMPLES_PER_CHUNK`, in order.

    Raises:
        WorkerError: an encoding process ended before its work.
    """
    job = _Job(encoder, texts, labels)
    starts = range(0, len(texts), SAMPLES_PER_CHUNK)
    workers = min(workers, len(starts))
    if workers <= 1 or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(job.encode, starts)
        return
    context = multiprocessing.get_context("fork")  # inherits the texts instead of copying them
    try:
        with ProcessPoolExecutor(workers, context, initializer=_inherit, initargs=(job,)) as pool:
            yield from pool.map(_encode_inherited, starts)
    except BrokenProcessPool:
        message = "an encoding process was killed, perhaps for want of memory. Prepare with fewer workers."
        raise WorkerError(message) from None


class _Job:
    """What every encoding process needs to know."""

    def __init__(self, encoder: Encoder, texts: Sequence[str], labels: np.ndarray) -> None:
        self._encoder = encoder
        self._texts = texts
        self._labels = labels

    def encode(self, start: int) -> Chunk:
        chunk = slice(start, start + SAMPLES_PER_CHUNK)
        return make_chunk(self._encoder, self._texts[chunk], self._labels[chunk])


_inherited: list[_Job] = []


def _inherit(job: _Job) -> None:
    _inherited[:] = [job]


def _encode_inherited(start: int) -> Chunk:
    return _inherited[0].encode(start)


def _find_tokenizer(recipe: Recipe) -> Path:
    if recipe.encode.tokenizer:
        return Path(recipe.encode.tokenizer)
    if isinstance(recipe.model, Pretrained) and recipe.model.folder:
        return Path(recipe.model.folder) / "tokenizer.json"
    raise DataError("encode.kind = 'tokenizer': none is named. Set encode.tokenizer to a tokenizer.json.")
