"""The encoder that a recipe names, or that a folder holds.

Owns the choice. The encoders are in `ngrams.py` and `tokens.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from unisono.config.recipe import Recipe
from unisono.config.sections import Pretrained
from unisono.config.small_files import read_small
from unisono.data.encoding.encoder import Encoder
from unisono.data.encoding.ngrams import FEATURES, NGrams
from unisono.data.encoding.tokens import SubwordEncoder, read_tokenizer, train_bpe, train_wordpiece
from unisono.errors import DataError, ModelError
from unisono.storage.run_folder import model_folder

VERSION = 2
"""Raise it whenever the same text and settings begin to give other numbers."""


def find_settings(recipe: Recipe) -> dict[str, object]:
    """Return what decides the encoder, except the training texts: its kind and that kind's settings.

    Raises:
        DataError: the recipe needs a tokenizer.json, and it is not named or does not exist.
    """
    encode = recipe.encode
    automatic = {"bag": "ngrams", "transformer": "wordpiece", "pretrained": "tokenizer"}
    kind = automatic[recipe.model.kind] if encode.kind == "auto" else encode.kind
    settings: dict[str, object] = {"kind": kind, "max_tokens": encode.max_tokens}
    if recipe.train.start_from:
        return settings | {"files_sha256": _hash_encoder(_started_from(recipe))}
    if kind == "tokenizer":
        path = _find_tokenizer(recipe)
        if not path.is_file():
            raise DataError(f"{str(path)!r}: no such file. Set encode.tokenizer to a tokenizer.json.")
        return settings | {"tokenizer_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    settings |= {"lowercase": encode.lowercase}
    if kind == "ngrams":
        return settings | {"ngrams": encode.ngrams, "features": encode.features, "prefix": encode.prefix}
    return settings | {"vocabulary_size": encode.vocabulary_size}


def choose_encoder(recipe: Recipe, texts: Iterable[Sequence[str]], *, workers: int = 1) -> Encoder:
    """Make the recipe's encoder; a vocabulary is learned from `texts`, the training texts.

    Args:
        texts: in lists; their number and sizes must depend on the texts alone. They may be read twice.
        workers: processes that count; the result does not depend on it.

    Raises:
        DataError: a tokenizer.json is missing or unusable, or a setting leaves no room for text.
    """
    encode = recipe.encode
    if recipe.train.start_from:
        return load_encoder(_started_from(recipe))
    kind = str(find_settings(recipe)["kind"])
    if kind == "ngrams":
        return NGrams.learn(
            texts,
            encode.features,
            words=encode.max_tokens,
            order=encode.ngrams,
            lowercase=encode.lowercase,
            prefix=encode.prefix,
            workers=workers,
        )
    if kind == "tokenizer":
        tokenizer = read_tokenizer(_find_tokenizer(recipe))
    else:
        train = train_wordpiece if kind == "wordpiece" else train_bpe
        tokenizer = train(texts, encode.vocabulary_size, encode.lowercase)
    return SubwordEncoder(tokenizer, kind=kind, max_tokens=encode.max_tokens)


def load_encoder(folder: Path) -> Encoder:
    """Read the encoder of a dataset or a model from its `encoder.json`.

    Raises:
        ModelError: the file is missing or not what `Encoder.save` writes.
    """
    path = folder / "encoder.json"
    try:
        fields = json.loads(read_small(path))
    except (OSError, ValueError, RecursionError) as error:
        message = f"{str(path)!r}: cannot be read: {error}. Give a folder that unisono wrote."
        raise ModelError(message) from None
    if not isinstance(fields, dict):
        raise ModelError(f"{str(path)!r}: not an object with a kind. Give a folder that unisono wrote.")
    return NGrams.load(folder, fields) if fields.get("kind") == "ngrams" else SubwordEncoder.load(folder, fields)


def _started_from(recipe: Recipe) -> Path:
    """The model folder whose encoder is used again."""
    return model_folder(recipe.train.start_from)


def _hash_encoder(folder: Path) -> str:
    """SHA-256 of the files of an encoder."""
    found = hashlib.sha256()
    for name in ("encoder.json", "tokenizer.json", FEATURES):
        if (folder / name).is_file():
            found.update(name.encode() + (folder / name).read_bytes())
    return found.hexdigest()


def _find_tokenizer(recipe: Recipe) -> Path:
    if recipe.encode.tokenizer:
        return Path(recipe.encode.tokenizer)
    if isinstance(recipe.model, Pretrained) and recipe.model.folder:
        return Path(recipe.model.folder) / "tokenizer.json"
    raise DataError("encode.kind = 'tokenizer': none is named. Set encode.tokenizer to a tokenizer.json.")
