"""Tokens of words that were seen before: a text is mostly made of them.

Owns when a text's tokens are those of its words one after the other, and the memory of words. What a word's tokens are,
the tokenizers library says, once for each word.

That holds for tokenizers in the manner of BERT (Devlin et al., 2019): their normalizer changes a text character by
character, and no token reaches across a space, nor in ASCII across a punctuation mark. The ids are the library's own,
tested on any text; it takes about an eighth of the time.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MOST_WORDS, LONGEST_WORD = 300_000, 48
"""Words that are remembered, some 50 MB, and how many letters one may have: what is longer (a whole text, in scripts
without spaces) hardly comes again. Of too many, all are forgotten, and the frequent ones soon learned again."""

_MARKS = r"!-/:-@\[-`{-~"
_ASCII_WORDS = re.compile(rf"[^\s{_MARKS}]+|[{_MARKS}]")
_WHOLE = re.compile(rf"[A-Za-z0-9]{{1,100}}|[{_MARKS}]")
_CONTROL = bytes([*range(9), *range(11, 13), *range(14, 32), 127])
"""What the normalizer removes from ASCII texts: control characters but tab and line ends."""


class Words:
    """A pure function from a text to the bytes of its tokens (int32, without special ones)."""

    def __init__(self, tokenizer: Tokenizer, added: list[str], *, lowercase: bool) -> None:
        self._added = added
        self._lowercase = lowercase
        begins = "".join(re.escape(token[0]) for token in added)
        self._may_be_added = re.compile(f"[{begins}]", re.IGNORECASE).search if added else _never
        # what is a token itself is cut no further, for the longest one is taken first
        known = {word: id_ for word, id_ in tokenizer.get_vocab().items() if _WHOLE.fullmatch(word)}
        if lowercase:
            known = {word: id_ for word, id_ in known.items() if word == word.lower()}
        words = _Memory(lambda word: np.array(tokenizer.encode(word, add_special_tokens=False).ids, np.int32).tobytes())
        words |= {word: id_.to_bytes(4, sys.byteorder) for word, id_ in known.items()}
        self._words = words
        self._chunks = _Memory(self._cut)

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

    def encode(self, text: str, most: int) -> bytes | None:
        """Return the ids of a text's tokens, of the first `most` at least; None if it holds an added token, which the
        library alone can judge."""
        if self._added and self._may_be_added(text) and any(token in text.casefold() for token in self._added):
            return None
        if text.isascii():
            text = text.lower() if self._lowercase else text
            text = _without_control(text)
            chunks = text.split(None, most)
        else:
            chunks = text.split(" ", most)
        self._forget()
        ids = b"".join(map(self._chunks.__getitem__, chunks[:most]))
        if len(chunks) > most and len(ids) < 4 * most:  # some gave none
            ids += b"".join(map(self._chunks.__getitem__, chunks[-1].split(None if text.isascii() else " ")))
        return ids

    def _cut(self, chunk: str) -> bytes:
        """The ids of what stands between two spaces."""
        if chunk.isascii() and _without_control(chunk) == chunk:
            words = _ASCII_WORDS.findall(chunk.lower() if self._lowercase else chunk)
            return b"".join(map(self._words.__getitem__, words))
        return self._words[chunk]

    def _forget(self) -> None:
        for memory in (self._words, self._chunks):
            if len(memory) > MOST_WORDS:
                memory.clear()


def _without_control(text: str) -> str:
    """An ASCII text without control characters. Bytes are filtered four times as fast as a regular expression looks."""
    return text.encode("ascii").translate(None, _CONTROL).decode("ascii")


def _never(text: str) -> None:
    return None


class _Memory(dict[str, bytes]):
    """What was answered; of what is new it is asked."""

    def __init__(self, ask: Callable[[str], bytes]) -> None:
        self._ask = ask

    def __missing__(self, word: str) -> bytes:
        found = self._ask(word)
        if len(word) <= LONGEST_WORD:
            self[word] = found
        return found
