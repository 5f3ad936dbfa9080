"""Texts as token numbers of a vocabulary, by the tokenizers library.

Owns the trained vocabularies (WordPiece, byte-level BPE), the use of a given `tokenizer.json`, and how both
are kept in a folder. Does not choose between them: `encode.py` does.

The same texts give a vocabulary of the same bytes, in any order and in any process; `train_wordpiece` explains
how. The library's own threads stay off: a machine's cores are used by running more workers, and a
process whose threads have run cannot be forked safely.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeGuard

import numpy as np

from unisono.config.small_files import read_small
from unisono.data.encoding.words import Words
from unisono.errors import DataError, ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # read whenever the library would start threads

MOST_TOKENIZER_BYTES = 2**30
KINDS = ("wordpiece", "bpe", "tokenizer")
_PADDING, _UNKNOWN, _FIRST, _LAST = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


class SubwordEncoder:
    """A pure function from a text to the numbers of its tokens, cut to `max_tokens`, special ones included.

    Args:
        tokenizer: its own settings of truncation and padding are replaced.
        kind: where its vocabulary came from, one of `KINDS`.
        max_tokens: longest result.
    """

    def __init__(self, tokenizer: Tokenizer, *, kind: str, max_tokens: int) -> None:
        special = tokenizer.num_special_tokens_to_add(False)
        if max_tokens <= special:
            raise DataError(
                f"encode.max_tokens = {max_tokens}: the tokenizer adds {special} special tokens, "
                f"which leaves no room for text. Set it to {special + 1} or more."
            )
        self.padding = _find_padding(tokenizer)
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_tokens)
        self.kind = kind
        self.max_tokens = max_tokens
        self.vocabulary_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
        self._tokenizer = tokenizer
        self._can_shorten = kind != "tokenizer" or _keeps_words_apart(tokenizer)
        self._words = Words.of(tokenizer)
        self._frame = _find_frame(tokenizer) if self._words else None

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return one int32 [tokens] array per text, never empty."""
        if self._words is None or self._frame is None:
            return self._ask(texts)
        begin, end = self._frame
        found = self._words.encode(texts, self.max_tokens - len(begin) - len(end), begin, end)
        left = [number for number, row in enumerate(found) if row is None]
        for number, asked in zip(left, self._ask([texts[number] for number in left]), strict=True):
            found[number] = asked
        return [row if row is not None and len(row) else np.array([self.padding], np.int32) for row in found]

    def _ask(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As `encode`, by the library."""
        given = [self._shorten(text) for text in texts] if self._can_shorten else list(texts)
        found = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(given)]
        for number, text in enumerate(texts):
            if len(found[number]) < self.max_tokens and len(given[number]) < len(text):
                found[number] = self._tokenizer.encode(text).ids  # the shortened text gave fewer tokens than expected
        return [np.array(ids or [self.padding], np.int32) for ids in found]

    def save(self, folder: Path) -> None:
        """Write `encoder.json` and `tokenizer.json`, from which `SubwordEncoder.load` makes an equal encoder."""
        fields = {"kind": self.kind, "max_tokens": self.max_tokens, "padding": self.padding}
        (folder / "encoder.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        (folder / "tokenizer.json").write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")

    def describe(self, folder: Path) -> None:
        """Write `tokenizer_config.json`, with which transformers uses the folder's `tokenizer.json` as it is: the limit
        of tokens, and the padding. Other special tokens stay unnamed: within a text they are words like others."""
        fields = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.max_tokens,
            "pad_token": self._tokenizer.id_to_token(self.padding),
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, fields: Mapping[str, Any]) -> Self:
        """Make the encoder whose `save` wrote the fields and the folder.

        Raises:
            ModelError: a field or `tokenizer.json` is missing or unusable.
        """
        kind, max_tokens, padding = (fields.get(name) for name in ("kind", "max_tokens", "padding"))
        if kind not in KINDS or not _is_count(max_tokens) or not _is_count(padding):
            kinds = ", ".join(KINDS)
            raise ModelError(f"{folder}/encoder.json: needed are kind ({kinds}), max_tokens, padding. Export it again.")
        try:
            encoder = cls(read_tokenizer(folder / "tokenizer.json"), kind=kind, max_tokens=max_tokens)
        except DataError as error:
            raise ModelError(str(error)) from None
        if padding >= encoder.vocabulary_size:
            raise ModelError(
                f"{folder}/encoder.json: padding = {padding}; allowed are numbers below {encoder.vocabulary_size}, the "
                "size of tokenizer.json. Export it again."
            )
        encoder.padding = padding
        return encoder

    def _shorten(self, text: str) -> str:
        """Drop words that cannot matter: usually each word gives at least one token; `encode` checks it.

        Never cuts within a run of white space, which can be a token of its own.
        """
        words = text.split(" ", self.max_tokens)
        shorter = text[: len(text) - len(words[-1]) - 1]
        return text if len(words) <= self.max_tokens or shorter[-1:].isspace() else shorter


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**31


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json`. Raises DataError if it does not exist, or if the library cannot read it."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(read_small(path, MOST_TOKENIZER_BYTES))
    except OSError as error:
        raise DataError(f"{str(path)!r}: cannot be read: {error.strerror}. Give a tokenizer.json.") from None
    except Exception as error:  # the library raises bare Exceptions
        raise DataError(f"{str(path)!r} is no tokenizer.json: {error}.") from error


def train_wordpiece(texts: Iterable[Sequence[str]], vocabulary_size: int, lowercase: bool) -> Tokenizer:
    """Find the parts of words that describe the texts best; never fewer than there are characters. The texts come in
    lists, and are read twice.

    The library numbers characters in the order of a hash table, which differs from process to process, and
    breaks ties between merges by those numbers. Here the characters are given to it as if they were special
    tokens, so that their numbers are fixed.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token=_UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    first = list(dict.fromkeys([*SPECIAL, *_find_characters(tokenizer, texts)]))
    trainer = trainers.WordPieceTrainer(vocab_size=vocabulary_size, special_tokens=first, show_progress=False)
    tokenizer.train_from_iterator(iter(texts), trainer)
    return _finish(tokenizer)


def train_bpe(texts: Iterable[Sequence[str]], vocabulary_size: int, lowercase: bool) -> Tokenizer:
    """Find the runs of bytes that describe the texts best: nothing is unknown, in any language. The texts come in
    lists."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC()] + [normalizers.Lowercase()] * lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(iter(texts), trainer)
    return _finish(tokenizer)


def _find_characters(tokenizer: Tokenizer, texts: Iterable[Sequence[str]]) -> list[str]:
    """Characters as they begin a word, then as they continue one (`##x`); each in a fixed order."""
    begin: set[str] = set()
    go_on: set[str] = set()
    for some in texts:
        for word in {word for text in some for word in text.split(" ")}:
            for input_split, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(word)):
                begin.add(input_split[0])
                go_on.update(input_split[1:])
    return [*sorted(begin), *(f"##{character}" for character in sorted(go_on))]


def _finish(tokenizer: Tokenizer) -> Tokenizer:
    """Frame every text in [CLS] … [SEP]; let "[CLS]" or "[SEP]" within a text be words like others."""
    from tokenizers import Tokenizer, processors

    fields = json.loads(tokenizer.to_str())
    fields["added_tokens"] = []
    finished = Tokenizer.from_str(json.dumps(fields))
    numbers = [(name, finished.token_to_id(name)) for name in (_FIRST, _LAST)]
    template = f"{_FIRST} $A {_LAST}"
    finished.post_processor = processors.TemplateProcessing(single=template, special_tokens=numbers)
    return finished


def _find_padding(tokenizer: Tokenizer) -> int:
    """The number of the padding token; 0 where none is known, since nothing is padded."""
    if tokenizer.padding:
        return int(tokenizer.padding["pad_id"])
    known = (tokenizer.token_to_id(name) for name in (_PADDING, "<pad>"))
    return next((number for number in known if number is not None), 0)


def _find_frame(tokenizer: Tokenizer) -> tuple[list[int], list[int]] | None:
    """The special tokens before and after every text; None if the tokenizer sets them in another way."""
    word = next(iter(sorted(tokenizer.get_vocab())), "")
    inner = tokenizer.encode(word, add_special_tokens=False).ids[:1]
    whole = tokenizer.encode(word).ids
    if not inner or whole.count(inner[0]) != 1 or len(whole) != 1 + tokenizer.num_special_tokens_to_add(False):
        return None
    place = whole.index(inner[0])
    return whole[:place], whole[place + 1 :]


def _keeps_words_apart(tokenizer: Tokenizer) -> bool:
    """Whether no token reaches across a space, for the settings where that is known."""
    fields = json.loads(tokenizer.to_str())
    kinds = [(fields[part] or {}).get("type") for part in ("normalizer", "pre_tokenizer")]
    if any(" " in token["content"] for token in fields["added_tokens"]):
        return False
    return kinds == ["BertNormalizer", "BertPreTokenizer"]
