"""Files as other programs write them: read as they were written, or refused with the cause and the remedy."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from unisono.config.sections import Data
from unisono.data.ingest import dialects
from unisono.data.ingest.column_batch import join_column_batches, list_values
from unisono.data.ingest.input_splits import find_input_splits, read_file, read_input_split
from unisono.data.ingest.read import read_records, read_texts
from unisono.errors import DataError

PAIRS = [("saw drill", "tool"), ("pear café", "fruit"), ("two\nlines", "tool"), ('a "word"', "fruit")]


def read(path: Path, content: str | bytes, **data: object) -> list[tuple[str, str | None]]:
    """The records of a file with this content; none has a fault."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    records = read_records(path, Data(**data))
    assert [record.fault for record in records] == [""] * len(records)
    return [(record.text, record.label) for record in records]


def table(pairs: list[tuple[str, str]] = PAIRS, **options: object) -> str:
    return pd.DataFrame(pairs, columns=["text", "label"]).to_csv(index=False, lineterminator="\n", **options)


# --- delimiters


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", ["csv", "csv.gz"])
def test_delimiter_by_which_the_header_has_the_columns(tmp_path: Path, delimiter: str, suffix: str) -> None:
    content = table(sep=delimiter).encode()
    path = tmp_path / f"a.{suffix}"
    assert read(path, gzip.compress(content) if suffix.endswith("gz") else content) == PAIRS


def test_delimiter_that_is_given(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    assert read(path, table(sep="^"), delimiter="^") == PAIRS
    assert read(path, "text\tlabel\na,b\tx\n", delimiter="tab") == [("a,b", "x")]
    assert read(tmp_path / "a.tsv", "text;label\na\tb;x\n", delimiter=";") == [("a\tb", "x")]
    assert read(path, "a;x\nb, c;y\n", header_lines=0, columns=("text", "label")) == [("a", "x"), ("b, c", "y")]


def test_columns_that_a_task_needs_show_the_delimiter(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x;y,z\n1;2\n")
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"x;y,z\n1;2\n"))
    for name in ("a.csv", "a.csv.gz"):
        assert list(read_file(tmp_path / name, Data(), ("x",)).columns) == ["x", "y,z"]
    (tmp_path / "a.jsonl").write_text('{"turns": [{"by": "a"}], "y": 1}\n')  # one record, no document
    assert list(read_file(tmp_path / "a.jsonl", Data(), ("turns", "y")).columns) == ["turns", "y"]


def test_delimiter_is_the_usual_one_unless_another_is_certain(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    assert read(path, 'text,label,a;b\n"x;y",z,1\n') == [("x;y", "z")]
    data = Data(header_lines=0, columns=("text", "label"))
    path.write_text("a, b; c, x\nd,y\n")  # the first row is a bad one; it does not make the file one with semicolons
    assert [record.fault for record in read_records(path, data)] == ["3 fields, not 2", ""]
    path.write_text("title;body;kind\na;b;c\n")
    with pytest.raises(DataError, match=r"no column 'text'.*There are: 'title', 'body', 'kind'"):
        read_records(path, Data())


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz"])
def test_separator_line_of_excel(tmp_path: Path, name: str) -> None:
    content = b"sep=;\r\ntext;label\r\na,b;x\r\n"
    assert read(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content) == [("a,b", "x")]
    path = tmp_path / "b.csv"
    path.write_bytes(b'sep=;\n"a";"x"\n"b;y\n')
    with pytest.raises(DataError, match="line 3 never closes"):
        read_records(path, Data(header_lines=0, columns=("text", "label")))


# --- quotes, escapes, comments


def test_quoted_tsv_is_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    assert read(path, table(sep="\t")) == PAIRS
    assert read(path, table(sep="\t", quoting=csv.QUOTE_ALL)) == PAIRS
    assert len(find_input_splits(path, Data(), input_split_bytes=10)) == 1


def test_quotes_of_tsv_that_are_text(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    plain = [('"bye", he said', "x"), ('"so', "y"), ('say "hi"', "x")]
    assert read(path, "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in plain)) == plain
    assert read(path, 'text\tlabel\n"all of it"\tx\n') == [('"all of it"', "x")]  # either may be meant: said
    (split,) = find_input_splits(path, Data())
    assert "set data.quote = '\"'" in split.notes[0]
    assert read(path, 'text\tlabel\n"all of it"\tx\n', quote='"') == [("all of it", "x")]
    path.write_text('text\tlabel\n"two\nlines"\tx\n"bye", he said\ty\n')
    with pytest.raises(DataError, match="from line 2 is whole only if quotes enclose fields"):
        read_records(path, Data())
    assert len(read_records(path, Data(quote="none"))) == 3
    path.write_text('text\tlabel\n"so\tx\nfine\ty\n5"\tx\n')  # three rows, or one
    with pytest.raises(DataError, match="from line 2 on several lines are one row if quotes enclose fields"):
        read_records(path, Data())
    assert [record.label for record in read_records(path, Data(quote="none"))] == ["x", "y", "x"]
    assert [record.label for record in read_records(path, Data(quote='"'))] == ["x"]


def test_quotes_of_tsv_that_come_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialects, "HEAD_BYTES", 30)
    path = tmp_path / "a.tsv"
    path.write_text("text\tlabel\n" + "word\tx\n" * 9 + '"two\nlines"\tx\n')
    with pytest.raises(DataError, match=r"a quote opens in it.*data\.quote"):
        read_records(path, Data())
    assert len(read_records(path, Data(quote='"'))) == 10


def test_other_quotes_none_and_escapes(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    assert read(path, table(quotechar="'"), quote="'") == PAIRS
    assert read(path, 'text,label\n"a,x\nb",y\n', quote="none") == [('"a', "x"), ('b"', "y")]
    assert len(find_input_splits(path, Data(quote="none"), input_split_bytes=3)) > 2
    escaped = table(doublequote=False, escapechar="\\")
    assert '\\"word' in escaped and read(path, escaped, escape="\\") == PAIRS
    bare = table([("a\tb\\", "x"), ("c\nd", "y")], sep="\t", quoting=csv.QUOTE_NONE, escapechar="\\")
    assert read(tmp_path / "a.tsv", bare, escape="\\") == [("a\tb\\", "x"), ("c\nd", "y")]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_comments(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    between = "," if name == "a.csv" else "\t"
    content = '# from here\ntext,label\n# more\na #1,x\n#, "\nb,y\n'.replace(",", between)
    assert read(path, content, comment="#") == [("a #1", "x"), ("b", "y")]
    assert read(path, '#text,label\n"a\n# b",x\n'.replace(",", between), quote='"', comment="%", text="#text") == [
        ("a\n# b", "x")
    ]
    assert read(path, 'text,label\n"a\n# b",x\n'.replace(",", between), quote='"', comment="#") == [("a\n# b", "x")]


def test_quote_that_swallows_rows_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    content = 'text,label\na,x\n"b,y\n' + "c,x\n" * 30 + 'd",y\n'
    assert len(read_records(path_of(path, content), Data())) == 2
    with pytest.raises(DataError, match=r"from line 3 has more than data\.max_lines = 20 lines"):
        read_records(path, Data(max_lines=20))
    assert len(read_records(path, Data(max_lines=32))) == 2
    path.write_text('text,label\na,x\n"b,y\nc,x\n"d",y\n')
    assert read_records(path, Data())[1].fault == "not CSV, lines 3 to 5"


def path_of(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


# --- encodings


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "utf-16", "utf-16-le", "utf-8-sig", "utf-32", "cp850"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "csv.gz"])
def test_encodings(tmp_path: Path, encoding: str, kind: str) -> None:
    rows = [{"text": text, "label": label} for text, label in PAIRS]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    content = {"jsonl": lines, "json": json.dumps(rows, ensure_ascii=False), "tsv": table(sep="\t")}.get(kind, table())
    encoded = content.encode(encoding)
    assert (
        read(tmp_path / f"a.{kind}", gzip.compress(encoded) if kind == "csv.gz" else encoded, encoding=encoding)
        == PAIRS
    )


@pytest.mark.parametrize("mark", list(dialects.MARKS))
def test_a_byte_order_mark_is_certain(tmp_path: Path, mark: bytes) -> None:
    encoding = dialects.MARKS[mark]
    content = mark + table().encode(encoding)
    assert read(tmp_path / "a.csv", content) == PAIRS
    with pytest.raises(DataError, match=f"byte-order mark of {encoding.upper()}.*Set data.encoding = 'auto'"):
        read(tmp_path / "a.csv", content, encoding="cp1252")


def test_what_is_no_utf8_is_refused_with_cause_and_remedy(tmp_path: Path) -> None:
    for name, content in {"a.csv": table(), "a.tsv": table(sep="\t"), "a.csv.gz": table()}.items():
        encoded = content.encode("cp1252")
        with pytest.raises(DataError, match=r"byte 0xE9 in line 3 is no UTF-8.*data\.encoding = 'cp1252'"):
            read(tmp_path / name, gzip.compress(encoded) if name.endswith("gz") else encoded)
    chinese = "text,label\n今天天气很好,好\n".encode("gb18030")
    with pytest.raises(DataError, match="in line 2 is no UTF-8"):
        read(tmp_path / "a.csv", chinese)
    assert read(tmp_path / "a.csv", chinese, encoding="gb18030") == [("今天天气很好", "好")]


def test_another_encoding_that_shows_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line is the same however the file is cut, and whether it is packed."""
    monkeypatch.setattr(dialects, "HEAD_BYTES", 20)
    content = b"".join(b'{"text":"word %d","label":"x"}\n' % number for number in range(9)) + b'{"text":"caf\xe9"}\n'
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    for name, size in [("a.jsonl", 7), ("a.jsonl", 31), ("a.jsonl", 10_000), ("a.jsonl.gz", 10_000)]:
        with pytest.raises(DataError, match="byte 0xE9 in line 10 is no UTF-8"):
            for split in find_input_splits(tmp_path / name, Data(), input_split_bytes=size):
                list(read_input_split(split, Data()))


def test_damage_in_a_file_that_is_utf8_spoils_its_own_record(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("text,label\ncafé à la crème,x\n".encode() + b"b\xff,y\n")
    assert [record.fault for record in read_records(path, Data())] == ["", "not UTF-8"]


def test_encodings_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with pytest.raises(DataError, match=r"is UTF-8, but data\.encoding = 'cp1252'"):
        read(path, table(), encoding="cp1252")
    with pytest.raises(DataError, match=r"looks like UTF-16 without.*data\.encoding = 'utf-16-le'"):
        read(path, table().encode("utf-16-le"))
    with pytest.raises(DataError, match=r"looks like UTF-16 without.*data\.encoding = 'utf-16-be'"):
        read(path, table().encode("utf-16-be"))
    with pytest.raises(DataError, match="byte 0x81 in line 2 means nothing in cp1252"):
        read(path, b"text,label\na\x81,x\n", encoding="cp1252")
    with pytest.raises(DataError, match="means nothing in utf-16-le"):
        read(path, codecs.BOM_UTF16_LE + table().encode("utf-16-le") + b"a")


# --- any number of parts

FIELDS = st.text("ab é中\n\r\t,;|'\"\\#", max_size=8)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(FIELDS, FIELDS), min_size=1, max_size=12),
    st.sampled_from([",", ";", "\t", "|"]),
    st.sampled_from(["auto", "none", '"', "'"]),
    st.sampled_from(["", "\\"]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    st.sampled_from(["csv", "tsv"]),
    st.integers(1, 40),
    st.integers(8, 60),
)
def test_the_same_rows_for_any_cut(
    tmp_path: Path,
    pairs: list[tuple[str, str]],
    delimiter: str,
    quote: str,
    escape: str,
    encoding: str,
    kind: str,
    size: int,
    head: int,
) -> None:
    """Whatever is written, all cuts read the same or refuse it; with all keys given, it is what was written."""
    quotes = {"auto": '"', "none": '"'}.get(quote, quote)
    style = csv.QUOTE_NONE if quote == "none" else csv.QUOTE_ALL
    content = io.StringIO(newline="")
    try:
        options = {"quotechar": quotes, "quoting": style, "escapechar": escape or None, "doublequote": not escape}
        csv.writer(content, delimiter=delimiter, lineterminator="\n", **options).writerows([("text", "label"), *pairs])
    except csv.Error:  # a delimiter in a field, and nothing to write it with
        assume(False)
    path = tmp_path / f"a.{kind}"
    path.write_bytes(content.getvalue().encode(encoding))
    packed = tmp_path / f"b.{kind}.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    data = Data(delimiter=delimiter, quote=quote, escape=escape)

    def read_cut(path: Path, data: Data, size: int) -> object:
        try:
            splits = find_input_splits(path, data, input_split_bytes=size)
            batches = [batch for split in splits for batch in read_input_split(split, data)]
        except DataError:
            return "refused"
        if not batches:
            return []
        whole = join_column_batches(batches, "all")
        return [
            (*(list_values(c)[row] for c in whole.columns.values()), whole.faults.get(row)) for row in range(whole.rows)
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dialects, "HEAD_BYTES", head)
        assert read_cut(path, data, size) == read_cut(path, data, 2**20) == read_cut(packed, data, 2**20)
    if quote in ('"', "'"):
        assert read_cut(path, data, size) == [(*pair, None) for pair in pairs]


# --- JSON documents


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_json_documents(tmp_path: Path, indent: int | None, name: str, wrapped: bool) -> None:
    rows = [{"text": text, "label": label} for text, label in PAIRS]
    content = json.dumps(
        {"version": 1, "tags": ["a"], "data": rows, "n": {}} if wrapped else rows, indent=indent
    ).encode()
    assert read(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content) == PAIRS


def test_json_lines_under_any_name(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text, "label": label}) for text, label in PAIRS]
    assert read(tmp_path / "a.json", "\n".join(lines)) == PAIRS
    assert read(tmp_path / "a.jsonl", "\n".join(lines), format="json") == PAIRS
    assert read(tmp_path / "a.jsonl", ",\n".join(lines) + ",\n") == PAIRS
    assert read(tmp_path / "a.jsonl", "[\n" + ",\n".join(lines) + "\n]\n") == PAIRS
    chat = json.dumps({"label": "x", "turns": [{"by": "a"}], "text": "t"})
    assert read(tmp_path / "a.jsonl", chat) == [("t", "x")]
    assert len(find_input_splits(tmp_path / "a.jsonl", Data(), input_split_bytes=5)) > 3


def test_documents_in_blocks_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    rows = [{"text": "é" * number, "label": "x", "n": number * 111} for number in range(40)]
    path.write_text(json.dumps({"n": 123, "data": rows}, ensure_ascii=False))
    for size in (1, 7, 300):
        monkeypatch.setattr(dialects, "BLOCK_BYTES", size)
        assert list_values(read_file(path, Data()).columns["n"]) == [row["n"] for row in rows]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"}', "cut off in line 1"),
        ('[{"text": "a"} {', "no ',' in line 1"),
        ('[\n{"text": "a"}\n]\n[]', "more follows the JSON document, in line 4"),
        ('{"a": [{"text": "b"}],\n"b": [{"text": "c"}]}', "two arrays of objects, under 'a' and 'b'"),
        ('{\n"a": 1\n}', "without an array of objects"),
        ('[{"text": "a", "label": ' + "[" * 9_000, "nested too deep|not whole"),
        ("nothing\nlike it\n", "no line is JSON, for instance 'nothing'"),
        ("[1]\n[2]\n", r"no line is JSON, for instance '\[1\]'"),
    ],
)
def test_damaged_documents_and_what_is_no_json(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_records(path, Data())
    with pytest.raises(DataError, match=message):
        read_texts(path, Data())


def test_bad_elements_of_a_document_spoil_only_themselves(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    rows = [
        {"text": "a", "label": "x"},
        [1],
        {"text": "b" * 5_000},
        {"text": [[[[[[1]]]]]]},
        {"text": "c", "label": "y"},
    ]
    path.write_text(json.dumps(rows))
    found = read_records(path, Data(max_record_bytes=2_000, max_depth=4))
    assert [record.fault for record in found] == [
        "", "no object", "larger than data.max_record_bytes", "nested deeper than data.max_depth", "",
    ]  # fmt: skip
