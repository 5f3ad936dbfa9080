"""What fuzzing begins with: valid inputs of every kind and nasty ones, the words they are made of, and how they change.

Owns seeds, dictionaries and mutations. Compressed inputs are unpacked, changed and packed again, or a checksum would
stop nearly all of them. An input's first byte chooses settings (`fuzz_checks.Choice`); seeds are tried with several.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random

import pyarrow as pa
from fuzz_tables import MAKERS, build_parquet

TARGETS = ("jsonl", "csv", "tsv", "parquet", "gz", "bz2", "xz", "zst", "folder", "screen", "review")
PACKED = ("gz", "bz2", "xz", "zst")
MOST_UNPACKED = 2**16
RAW_SHARE = 0.3
"""Of the mutations of compressed inputs that change the packed bytes."""
CHOICES = (0b0000_0000, 0b0101_0101, 0b1010_1010, 0b0001_1111, 0b1110_0101, 0b0011_1000)

JSONL = (
    b'{"text": "one good line", "label": "a"}\n{"text": "another \xc3\xa4", "label": "b"}\n',
    b'\xef\xbb\xbf{"text": "a mark", "label": "a"}\r\n\r\n{"label": "b", "text": "CRLF"}',
    b'{"text": "\\ud800 \\udc00 \\ud83d\\ude00", "label": "\\udfff"}\n{"\\ud800": 1, "text": 2}\n',
    b'{"text": ' + b"[" * 70 + b"]" * 70 + b"}\n" + b'{"a":' * 600 + b"1" + b"}" * 600 + b"\n",
    b'{"text": NaN, "label": Infinity}\n{"text": 1e999, "label": -1E-5}\n{"text": 3.0}\n{"text": true, "label": null}',
    b'{"text": ' + b"9" * 5_000 + b', "label": 12345678901234567890123}\n',
    b'{"text": "nul \0 \\u0000", "label": "\0"}\n\0\n[1]\n"text"\n{"text": "open\n{}\n{"text": {"a": ["b"]}}\n',
    b"".join(b'{"k%d": %d}\n' % (number, number) for number in range(40)),
    b'{"text": "' + b"long " * 300 + b'", "label": "a"}\n{"text": "next", "label": "a"}\n',
    b"\xff\xfe{\0}\0",
    b"\xff\xfe",
    b"\xef\xbb",
    b"\n\n \n\t\n\xc2\xa0\n",
)
FIELDS = (
    b"text,label\none good line,a\nanother \xc3\xa4,b\n",
    b'\xef\xbb\xbf"text","label"\r\n"a ""quoted"" one\r\nwith a newline","a"\r\n\r\nplain,b\r\n',
    b'text,label\n"never closed,a\nb,c\n',
    b'text,label\n"a"b,c\nd,e,f\ng\n,\n\xff,\xfe\n\0,\0\n\r,x\ny\rz,w\n',
    b"text,text\n1,2\n",
    b'text,"lab\nel"\n1,2\n',
    b" text ,,label\n1,2,3\n",
    b"text,label\n" + b"x" * 1_100 + b",a\n" + b'"' + b"line\n" * 250 + b'",b\nafter,c\n',
    b"text,label",
    b"text,label\n",
    b"\xff,\xff\n1,2\n",
)
TEXTS = (
    b"\x01one good text\x1e\x02another one\x1e\x01one good text\x1e\x02one good text",
    b"\x01write to jane.doe@example.org or +49 30 1234567, card 4111 1111 1111 1111\x1e\x02(555) 234-5678",
    b"\x01caf\xc3\x83\xc2\xa9 \xe2\x80\x8b\xe2\x80\xae\xf3\xa0\x81\xa1 \xef\xbb\xbf\x1e\x03<script>1</script>&amp;",
    b"\xc1a@\x1e\xc2+49 \x1e\xc10 \x1e\xc2\xc3\x83\x1e\xc1a.\x1e\xc2\n\x1e\xc14 ",
    b"\xf9a@",
    b"\xf9+49 ",
    b"\xf94 ",
    b"\xf9\xc3\x83",
    b"\x81line\n\x1e\x82\xe4\xb8\xad\xe6\x96\x87\xf0\xa0\x80\x80\x1e\x01\xff\xed\xa0\x80\x1e\x00",
    b"\x01a\x1e\x07=1+1\x1e\x06-2\x1e\x01\t@x",
    b"\x41jane@example.org \x1e\x42040 123456789 \x1e\x435500000000000004 \x1e\x01 \xe2\x80\xa8\x85\x0b ",
)
FOLDERS = (
    b"a/1.txt\x1fone\x1ea/2.txt\x1ftwo\x1eb/1.txt\x1f\xef\xbb\xbfthree\x1ec\x1fno class",
    b"\xff/\xfe\x1f\xff\x1e.hidden/a\x1fb\x1ea/.b\x1fc\x1ea/b/c/d\x1fdeep\x1ea*[?/x\x1fy\x1e=a/\n\x1fz",
    b"a/one\x1f"
    + b"long " * 300
    + b"\x1ea/two\x1f\x1eb/loop\x1f->b\x1eb/self\x1f->b/self\x1eb/out\x1f->a\x1eb/no\x1f->x",
)
WORDS = {
    "jsonl": b'{"text": "|", "label": "|"}|\n|\r\n|\\ud800|\\u0000|NaN|1e999|[[[[[|]]]]]|{"text":'
    b"|-Infinity|\xef\xbb\xbf|\xff|null",
    "fields": b'"|""|","|\n|\r\n|\r|,|\t|text,label\n|text\tlabel\n|\xef\xbb\xbf|\xff|\0',
    "folder": b"\x1e|\x1f|/|a/|->|\xff|\xef\xbb\xbf|.|..|\x1fx\x1e",
    "texts": b"\x1e|\x1e\1|\x1e\xc2|@|a@b.de|.com|+49 30 |0049|(555) 234-5678|4111111111111111|<b>|&lt;"
    b"|5500 0000 0000 0004|\xe2\x80\x8b|\xe2\x80\xae|\xc3\x83\xc2\xa9|\xe4\xb8\xad|\xf0\xa0\x80\x80|\n|\r"
    b"|\xe2\x80\xa8|=|'|\xff|[mail]|-| ",
}
DICTIONARIES = {"csv": "fields", "tsv": "fields", "screen": "texts", "review": "texts"}


def list_seeds(target: str) -> list[bytes]:
    """Return the inputs that fuzzing of a target begins with."""
    if target in PACKED:
        return [choice + pack(inner, target, number) for number, (choice, inner) in enumerate(_plain_seeds())] + [
            b"\1" + pack(b"text,label\na,b\n", target, 0)[:-5],
            b"\0" + pack(JSONL[0], target, 0) + pack(JSONL[1], target, 0) + b"rubbish",
            b"\0" + pack(b"\n" * 2**19, target, 0),
            b"\0" + pack(JSONL[0], target, 0) + bytes(8),
            b"",
        ]
    if target == "parquet":
        described = [bytes([4, 1, 0, 1, kind]) + bytes(range(97, 180)) for kind in range(len(MAKERS))]
        valid = [build_parquet(bytes([5]) + one) for one in described]
        return [b"\4" + one for one in described] + [b"\0" + one for one in valid] + [b"\0", b"\0PAR1PAR1"]
    plain: dict[str, tuple[bytes, ...]] = {
        "jsonl": JSONL,
        "csv": FIELDS,
        "tsv": tuple(one.replace(b",", b"\t") for one in FIELDS),
        "folder": FOLDERS,
        "screen": TEXTS,
        "review": TEXTS,
    }
    return [b"", *(bytes([choice]) + one for one in plain[target] for choice in CHOICES)]


def list_words(target: str) -> list[str]:
    """Return the lines of a target's dictionary, in libFuzzer's form."""
    words = WORDS.get(DICTIONARIES.get(target, target), b"").split(b"|")
    return ['"' + "".join(f"\\x{byte:02X}" for byte in word) + '"' for word in words if word]


def pack(content: bytes, packing: str, number: int) -> bytes:
    """Compress, in one of several ways."""
    if number % 3 == 2 and len(content) > 1:
        half = len(content) // 2
        return pack(content[:half], packing, 0) + pack(content[half:], packing, 0)
    if packing == "gz":
        return gzip.compress(content, compresslevel=number % 10, mtime=0)
    if packing == "bz2":
        return bz2.compress(content, 1 + number % 9)
    if packing == "xz":
        return lzma.compress(content, format=(lzma.FORMAT_XZ, lzma.FORMAT_ALONE)[number % 2], preset=0)
    return pa.Codec("zstd", 1 + number % 5).compress(content, asbytes=True)


def unpack(content: bytes, packing: str) -> bytes:
    """The beginning of what is in a compressed input."""
    if packing == "gz":
        return zlib.decompressobj(31).decompress(content, MOST_UNPACKED)
    if packing == "bz2":
        return bz2.BZ2Decompressor().decompress(content, MOST_UNPACKED)
    if packing == "xz":
        return lzma.LZMADecompressor().decompress(content, MOST_UNPACKED)
    return pa.CompressedInputStream(pa.BufferReader(content), "zstd").read(MOST_UNPACKED)


def make_mutator(target: str, mutate: Callable[[bytes, int], bytes]) -> Callable[[bytes, int, int], bytes] | None:
    """Return how inputs of a target are changed, given the fuzzer's own way; None: its own way will do."""
    if target not in PACKED:
        return None

    def change(content: bytes, most: int, seed: int) -> bytes:
        random = Random(seed)
        if random.random() < RAW_SHARE:
            return mutate(content, most)
        inner = b""
        with suppress(OSError, EOFError, ValueError, zlib.error, lzma.LZMAError):
            inner = unpack(content[1:], target)
        changed = content[:1] + pack(mutate(inner, MOST_UNPACKED), target, random.randrange(30))
        return changed if len(changed) <= most else mutate(content, most)

    return change


def write_seeds(target: str, folder: Path) -> None:
    """Write the seeds of a target into a folder, a file each."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(list_seeds(target)):
        (folder / f"seed-{number:03}").write_bytes(seed)


def _plain_seeds() -> list[tuple[bytes, bytes]]:
    of_kind = (JSONL, FIELDS, tuple(one.replace(b",", b"\t") for one in FIELDS))
    return [(bytes([kind]), one) for kind, seeds in enumerate(of_kind) for one in seeds[:8]]
