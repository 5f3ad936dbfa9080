"""Sources behind URLs: a real S3 server and a plain HTTP server on this machine, asked over HTTP."""

from __future__ import annotations

import gzip
import http.server
import json
import logging
import multiprocessing
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unisono.config.sections import Data
from unisono.data.ingest.input_splits import InputSplit, find_input_splits, hash_input_split, read_input_split
from unisono.data.ingest.locations import hide_secrets
from unisono.data.ingest.read import read_records
from unisono.errors import DataError

DATA = Data()
LINES = [
    json.dumps({"text": f"text {n} " + "好" * (n % 7), "label": "xy"[n % 2]}, ensure_ascii=False) for n in range(2000)
]
CONTENT = "\n".join(LINES).encode()
EXPECTED = [(json.loads(line)["text"], json.loads(line)["label"]) for line in LINES]


def contents(location: str) -> list[tuple[str, str | None]]:
    return [(record.text, record.label) for record in read_records(location, DATA)]


def texts_of(input_split: InputSplit) -> list[object]:
    return [text for column_batch in read_input_split(input_split, DATA) for text in column_batch.columns["text"]]


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket on an S3 server of this module, found by the variables that s3fs reads."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        store = s3fs.S3FileSystem()
        store.mkdir("reviews")
        store.pipe("reviews/all.jsonl", CONTENT)
        store.pipe("reviews/all.jsonl.gz", gzip.compress(CONTENT))
        for number in range(4):
            store.pipe(
                f"reviews/parts/part-{number}.jsonl", "\n".join(LINES[number * 500 : number * 500 + 500]).encode()
            )
        store.pipe("reviews/classes/x/1.txt", b"one")
        store.pipe("reviews/classes/y/deep/2.txt", b"two")
        store.touch("reviews/classes/y/empty.txt")
        sink = pa.BufferOutputStream()
        pq.write_table(
            pa.table(dict(zip(("text", "label"), zip(*EXPECTED, strict=True), strict=True))), sink, row_group_size=300
        )
        store.pipe("reviews/all.parquet", sink.getvalue().to_pybytes())
        yield "s3://reviews"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.mark.parametrize("name", ["all.jsonl", "all.jsonl.gz", "all.parquet", "parts/part-*.jsonl", "**/part-?.jsonl"])
def test_objects_are_read_as_files_are(bucket: str, name: str) -> None:
    assert contents(f"{bucket}/{name}") == EXPECTED


@pytest.mark.parametrize("name", ["all.jsonl", "all.parquet"])
def test_pieces_fetch_their_range_in_forked_workers(bucket: str, name: str) -> None:
    pieces = find_input_splits(f"{bucket}/{name}", DATA, input_split_bytes=10_000)
    assert len(pieces) > 3
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = [str(text) for texts in pool.map(texts_of, pieces) for text in texts]
        hashes = pool.map(hash_input_split, pieces)
    assert found == [text for text, _ in EXPECTED]
    assert len(set(hashes)) == len(pieces) and hashes == [hash_input_split(input_split) for input_split in pieces]


def test_folder_of_classes(bucket: str) -> None:
    records = read_records(f"{bucket}/classes", DATA)
    assert [(one.file, one.label, one.text) for one in records] == [
        ("x/1.txt", "x", "one"),
        ("y/deep/2.txt", "y", "two"),
        ("y/empty.txt", "y", ""),
    ]
    (input_split,) = find_input_splits(f"{bucket}/classes", DATA)
    assert hash_input_split(input_split) == hash_input_split(input_split)


def test_objects_that_change_are_noticed(bucket: str) -> None:
    import s3fs

    store = s3fs.S3FileSystem()
    store.pipe("reviews/new.jsonl", CONTENT)
    (input_split,) = find_input_splits(f"{bucket}/new.jsonl", DATA)
    assert find_input_splits(f"{bucket}/new.jsonl", DATA) == [input_split]
    store.pipe("reviews/new.jsonl", CONTENT.swapcase())  # as many bytes
    with pytest.raises(DataError, match=r"s3://reviews/new\.jsonl.*changed"):
        list(read_input_split(input_split, DATA))
    (other,) = find_input_splits(f"{bucket}/new.jsonl", DATA)
    assert hash_input_split(other) != hash_input_split(input_split)
    store.rm("reviews/new.jsonl")
    with pytest.raises(DataError, match=r"s3://reviews/new\.jsonl.*no such file"):
        list(read_input_split(other, DATA))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("alll.jsonl", r"s3://reviews/alll\.jsonl.*no such file"),
        ("parts/*.csv", r"s3://reviews/parts/\*\.csv.*no file matches.*part-0\.jsonl"),
        ("all.doc", "no such file"),
    ],
)
def test_missing_objects_are_named(bucket: str, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        find_input_splits(f"{bucket}/{name}", DATA)


def test_missing_bucket_and_server(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    with pytest.raises(DataError, match=r"s3://no-such-bucket/a\.jsonl"):
        find_input_splits("s3://no-such-bucket/a.jsonl", DATA)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    with pytest.raises(DataError, match=r"'s3://reviews/all\.jsonl'.*127\.0\.0\.1:9"):
        find_input_splits(f"{bucket}/all.jsonl", DATA)
    s3fs.S3FileSystem.clear_instance_cache()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT: with ranges under /ranged, without under /plain, and breaks off under /broken."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        content, status = CONTENT, 200
        if "missing" in self.path:
            content, status = b"", 404
        asked = self.headers.get("Range")
        ranged = self.path.startswith("/ranged")
        if asked and ranged:
            start, _, stop = asked.removeprefix("bytes=").partition("-")
            content, status = CONTENT[int(start) : int(stop) + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        if ranged:
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", '"one"')
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{int(start) + len(content) - 1}/{len(CONTENT)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2] if self.path.startswith("/broken") else content)
            self.close_connection = self.path.startswith("/broken")

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    pytest.importorskip("aiohttp")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_web_with_and_without_ranges(web: str) -> None:
    assert contents(f"{web}/ranged/all.jsonl?signature=secret") == EXPECTED
    assert contents(f"{web}/plain/all.jsonl") == EXPECTED
    assert len(find_input_splits(f"{web}/ranged/all.jsonl", DATA, input_split_bytes=10_000)) > 3
    (input_split,) = find_input_splits(f"{web}/plain/all.jsonl", DATA, input_split_bytes=10_000)
    assert input_split.stream and hash_input_split(input_split) == hash_input_split(input_split)


@pytest.mark.parametrize("path", ["broken/a.jsonl", "missing/a.jsonl"])
def test_web_that_fails_is_named_without_secrets(web: str, path: str) -> None:
    with pytest.raises(DataError) as caught:
        contents(f"{web}/{path}?signature=secret")
    assert f"{web}/{path}'" in str(caught.value) and "secret" not in str(caught.value)


def test_secrets_are_not_told(tmp_path: Path) -> None:
    assert hide_secrets("https://user:password@host/a.csv?sig=x") == "https://host/a.csv"
    assert hide_secrets("s3://bucket/a?.csv") == "s3://bucket/a?.csv"
    assert hide_secrets(str(tmp_path / "a?@b.csv")) == str(tmp_path / "a?@b.csv")


def test_unknown_protocol() -> None:
    pytest.importorskip("fsspec")
    with pytest.raises(DataError, match=r"'sss://a/b\.csv'.*s3://"):
        find_input_splits("sss://a/b.csv", DATA)
