"""A memory of words and their tokens: most words of a text were seen before.

Owns the condition under which a text's tokens are those of its words one after the other. The tokenizers library gives
a word's tokens, once for each word; ASCII texts go through a table (`word_table.py`), others word by word.

That holds for tokenizers in the manner of BERT (Devlin et al., 2019): their normalizer changes a text character by
character, and no token reaches across a space, nor in ASCII across a punctuation mark. The ids are the library's own,
tested on any text; it takes ten to twenty times as long.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Self

import numpy as np

from unisono.data.encoding.word_table import LONGEST_WORD, MOST_WORDS, WordTable

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_WHOLE = re.compile(r"[A-Za-z0-9]{1,100}|[!-/:-@\[-`{-~]")


class Words:
    """A pure function from texts to their tokens."""

    def __init__(self, tokenizer: Tokenizer, added: list[str], *, lowercase: bool) -> None:
        self._tokenizer = tokenizer
        self._added = added
        begins = {token[0] for token in added}
        begins |= {letter for first in begins for letter in (first.lower(), first.upper())}
        self._begins = [letter for letter in begins if letter.isascii()]  # an ASCII text may hold one
        # a word that is a token itself is not cut further, since the longest token is taken first
        known = {word: id_ for word, id_ in tokenizer.get_vocab().items() if _WHOLE.fullmatch(word)}
        if lowercase:
            known = {word: id_ for word, id_ in known.items() if word == word.lower()}
        self._table = WordTable(self._ask, lowercase=lowercase)
        self._table.add([word.encode("ascii") for word in known], [[id_] for id_ in known.values()])
        self._chunks = _Memory(lambda chunk: next(iter(self._ask([chunk]))))

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Self | None:
        """Return the memory for a tokenizer; None if its tokens may reach across words."""
        fields = json.loads(tokenizer.to_str())
        normalizer, cutter, model = (fields[part] or {} for part in ("normalizer", "pre_tokenizer", "model"))
        kinds = normalizer.get("type"), cutter.get("type"), model.get("type")
        if kinds != ("BertNormalizer", "BertPreTokenizer", "WordPiece") or not normalizer["clean_text"]:
            return None
        added = [token["content"].casefold() for token in fields["added_tokens"]]
        return cls(tokenizer, added, lowercase=normalizer["lowercase"])

    def encode(
        self, texts: Sequence[str], most: int, begin: Sequence[int], end: Sequence[int]
    ) -> list[np.ndarray | None]:
        """Return int32 [tokens] for each text: `begin`, at most `most` tokens of its words, and `end`; None if it holds
        an added token, which only the library can treat."""
        rows: list[np.ndarray | None] = [None] * len(texts)
        plain = []
        for number, text in enumerate(texts):
            if self._has_added(text):
                continue
            if text.isascii():
                plain.append(number)
            else:
                rows[number] = np.array([*begin, *self._encode_any(text, most).tolist(), *end], np.int32)
        encoded = self._table.encode([texts[number] for number in plain], most, begin, end)
        for number, row in zip(plain, encoded, strict=True):
            rows[number] = row
        return rows

    def _ask(self, words: list[str]) -> Iterable[Sequence[int]]:
        return (found.ids for found in self._tokenizer.encode_batch_fast(words, add_special_tokens=False))

    def _has_added(self, text: str) -> bool:
        if text.isascii() and not any(letter in text for letter in self._begins):
            return False
        folded = text.casefold()
        return any(token in folded for token in self._added)

    def _encode_any(self, text: str, most: int) -> np.ndarray:
        """The tokens of the text between two spaces."""
        if len(self._chunks) > MOST_WORDS:
            self._chunks.clear()
        chunks = text.split(" ", most)
        ids = b"".join(map(self._chunks.__getitem__, chunks[:most]))
        if len(chunks) > most and len(ids) < 4 * most:  # some words gave no token
            ids += b"".join(map(self._chunks.__getitem__, chunks[-1].split(" ")))
        return np.frombuffer(ids, np.int32)[:most]


class _Memory(dict[str, bytes]):
    """The tokens of a word, remembered; the library gives those of a new word. Long words (whole texts, in scripts
    without spaces) rarely occur again, and are not remembered."""

    def __init__(self, ask: Callable[[str], Sequence[int]]) -> None:
        self._ask = ask

    def __missing__(self, chunk: str) -> bytes:
        found = np.array(self._ask(chunk), np.int32).tobytes()
        if len(chunk) <= LONGEST_WORD:
            self[chunk] = found
        return found
