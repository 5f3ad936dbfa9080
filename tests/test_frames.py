"""Frames: pandas, Polars and Arrow are taken and given, to the same bits, and their memory is shared."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import unisono
from test_parallel_guide import read_blocks
from toy import RECIPE, make_records, make_toy, run_python
from unisono.config.sections import Data
from unisono.data.columns import Columns, hold
from unisono.data.ingest.column_batch import COLUMN_BATCH_BYTES, ColumnBatch, cut_by_size, list_values
from unisono.data.ingest.frames import add_columns, is_frame, take_columns
from unisono.data.ingest.inputs import find_inputs
from unisono.data.ingest.parquet import read_frame
from unisono.data.ingest.read import read_texts
from unisono.data.own_sources import open_source
from unisono.data.share import Share
from unisono.errors import DataError, UserError

pytestmark = pytest.mark.usefixtures("warm")

Table = dict[str, Any]


def as_pandas_objects(columns: Table) -> pd.DataFrame:
    return pd.DataFrame({name: pd.Series(values, dtype=object) for name, values in columns.items()})


def as_categories(columns: Table) -> pd.DataFrame:
    return pd.DataFrame({name: pd.Series(values, dtype="category") for name, values in columns.items()})


def as_pandas_python_strings(columns: Table) -> pd.DataFrame:
    return pd.DataFrame({name: pd.Series(values, dtype="string[python]") for name, values in columns.items()})


def as_arrow_chunks(columns: Table) -> pa.Table:
    whole = pa.table(columns)
    middle = len(whole) // 2
    return pa.concat_tables([whole[:middle], whole[middle:]])


def as_arrow_slice(columns: Table) -> pa.Table:
    table = pa.table(columns)
    return pa.concat_tables([table] * 3).combine_chunks()[len(table) : 2 * len(table)]


TEXT_KINDS: dict[str, Callable[[Table], Any]] = {
    "pandas": pd.DataFrame,
    "pandas objects": as_pandas_objects,
    "pandas categories": as_categories,
    "pandas python strings": as_pandas_python_strings,
    "polars": pl.DataFrame,
    "polars categories": lambda columns: pl.DataFrame(columns).with_columns(pl.all().cast(pl.Categorical)),
    "lazy": pl.LazyFrame,
    "arrow": pa.table,
    "arrow batch": pa.record_batch,
    "arrow stream": lambda columns: pa.table(columns).to_reader(),
    "arrow chunks": as_arrow_chunks,
    "arrow slice": as_arrow_slice,
    "arrow dictionary": lambda columns: pa.table(
        {name: pa.array(values, pa.string()).dictionary_encode() for name, values in columns.items()}
    ),
    "dict of series": lambda columns: {name: pd.Series(values) for name, values in columns.items()},
}


# --- columns of numbers share their memory


def held(frame: object, name: str = "x") -> Tensor:
    return hold({"train": frame})["train"][name]


def address(column: pa.ChunkedArray, buffer: int = 1) -> int:
    (chunk,) = column.chunks
    return chunk.buffers()[buffer].address + chunk.offset * (chunk.type.bit_width // 8)


def test_numbers_share_the_memory_of_the_frame() -> None:
    numbers = np.arange(100.0)
    table = pa.table({"x": pa.array(numbers)})
    assert address(table["x"]) == numbers.ctypes.data
    for frame in (table, table.to_batches()[0], table.to_reader(), {"x": numbers}, {"x": table["x"]}):
        assert held(frame).data_ptr() == numbers.ctypes.data
    assert held(table[40:]).data_ptr() == numbers[40:].ctypes.data
    polars = pl.DataFrame({"x": numbers})
    assert held(polars).data_ptr() == polars["x"].to_numpy(allow_copy=False).ctypes.data
    assert held(polars[7:]).data_ptr() == held(polars).data_ptr() + 7 * 8
    pandas = pd.DataFrame({"x": numbers, "y": numbers})
    assert held(pandas).data_ptr() == pandas["x"].to_numpy().ctypes.data
    assert held(pandas[3:], "y").data_ptr() == pandas["y"].to_numpy()[3:].ctypes.data
    for kind in ("Int64", "Float32", "int16[pyarrow]"):
        series = pd.Series(np.arange(5), dtype=kind)
        where = address(pa.chunked_array(series.array.__arrow_array__())) if "arrow" in kind else None
        assert held({"x": series}).data_ptr() == (where or series.array._data.ctypes.data)  # type: ignore[attr-defined]


def test_embeddings_share_the_memory_of_the_frame() -> None:
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), 3)
    varying = pa.ListArray.from_arrays([0, 3, 6, 9, 12], pa.array(rows.reshape(-1)))
    shaped = pa.FixedShapeTensorArray.from_numpy_ndarray(rows)
    for column in (fixed, varying, shaped):
        found = held(pa.table({"x": column}))
        assert found.data_ptr() == rows.ctypes.data and torch.equal(found, torch.from_numpy(rows))
        assert held(pa.table({"x": column})[2:]).data_ptr() == rows[2:].ctypes.data
    polars = pl.DataFrame({"x": pl.Series(rows)})
    assert polars["x"].dtype == pl.Array(pl.Float32, 3)
    exported = pa.table(polars)["x"].chunk(0).flatten()
    assert held(polars).data_ptr() == exported.buffers()[1].address
    nested = pl.DataFrame({"x": [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]})
    assert held(nested).tolist() == nested["x"].to_list()
    assert held(pd.DataFrame({"x": list(rows)})).tolist() == rows.tolist()


def test_what_is_copied_is_equal() -> None:
    numbers = np.arange(6.0)
    cases: dict[str, tuple[Any, Any]] = {
        "bits": (pa.table({"x": [True, False, True]}), [True, False, True]),
        "chunks": (pa.table({"x": pa.chunked_array([[1, 2], [], [3]])}), [1, 2, 3]),
        "chunks of lists": (pa.table({"x": pa.chunked_array([[[1, 2]], [], [[3, 4]]])}), [[1, 2], [3, 4]]),
        "other byte order": ({"x": numbers.astype(">f8")}, numbers),
        "backwards": ({"x": numbers[::-1]}, numbers[::-1]),
        "odd address": ({"x": np.frombuffer(b"x" + numbers.tobytes(), np.float64, offset=1)}, numbers),
        "strided": (pd.DataFrame({"x": numbers[::2]}), numbers[::2]),
        "sparse": (pd.DataFrame({"x": pd.arrays.SparseArray([0, 0, 1])}), [0, 0, 1]),
        "objects": (pd.DataFrame({"x": pd.Series([1, 2, 3], dtype=object)}), [1, 2, 3]),
    }
    for name, (frame, expected) in cases.items():
        found = held(frame)
        assert found.tolist() == np.asarray(expected).tolist(), name
        assert found.is_contiguous() and found.data_ptr() % found.itemsize == 0, name


def test_microbatches_have_memory_of_their_own() -> None:
    numbers = np.arange(64.0)
    numbers.flags.writeable = False
    source = open_source(pa.table({"x": pa.array(numbers)}))
    taken = source.take(np.arange(64))["x"]
    taken.zero_()
    assert taken.data_ptr() % 64 == 0
    assert source.take(np.arange(64))["x"].tolist() == numbers.tolist() == list(range(64))


DAY = date(2024, 2, 29)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.5, None, 2.5], r"'x': 1 of 3 values are missing, first in row 1\. Fill or drop"),
        ([None, 1, None], r"'x': 2 of 3 values are missing, first in row 0"),
        ([True, None], "1 of 2 values are missing"),
        (["a", "b"], r"'x' has \w*string\w* values; allowed are numbers.*astype\('category'\).*pl\.Enum"),
        ([DAY, DAY], "'x' has date32.* values; .*days since"),
        ([timedelta(1)], "'x' has duration.* values"),
        ([Decimal("1.5")], "decimal128.*Cast them to float64"),
        ([{"a": 1}], "struct.*Unnest"),
        ([b"a"], "binary"),
        ([[1, 2], [3]], "lists have 1 to 2 values; allowed is one length"),
        ([[1, None], [3, 4]], "missing values within its lists: 1"),
        ([[1, 2], None], "1 of 2 values are missing, first in row 1"),
    ],
)
def test_what_is_no_numbers_is_refused(values: list[object], message: str) -> None:
    for kind in (pd.DataFrame, pl.DataFrame, pa.table, dict, lambda columns: {"x": pl.Series(columns["x"])}):
        with pytest.raises(DataError, match=rf"(?s)train: column {message}|train: column 'x'.*{message}"):
            hold({"train": kind({"x": values})})


def test_mixed_objects_and_what_cannot_be_collected_are_refused() -> None:
    with pytest.raises(DataError, match=r"column 'x' has int, str values; allowed are numbers"):
        held(pd.DataFrame({"x": pd.Series([1, "a"], dtype=object)}))
    with pytest.raises(DataError, match=r"cannot be collected: ColumnNotFoundError"):
        held(pl.LazyFrame({"x": [1]}).select("y"))
    with pytest.raises(DataError, match="two columns are named 'x'"):
        held(pd.DataFrame([[1, 2]], columns=["x", "x"]))
    with pytest.raises(DataError, match="no table"):
        take_columns(object(), "frame")


def test_categories_are_their_codes() -> None:
    order = ["low", "mid", "high"]
    words = ["mid", "low", "mid"]
    dictionary = pa.DictionaryArray.from_arrays(pa.array([1, 0, 1], pa.int8()), order)
    frames = [
        pd.DataFrame({"x": pd.Categorical(words, categories=order)}),
        pl.DataFrame({"x": pl.Series(words, dtype=pl.Enum(order))}),
        pa.table({"x": dictionary}),
        pa.table({"x": pa.chunked_array([dictionary[:1], dictionary[1:]])}),
        {"x": pd.Series(pd.Categorical(words, categories=order))},
    ]
    for frame in frames:
        assert held(frame).tolist() == [1, 0, 1] and held(frame).dtype == torch.int64
    hold({"train": frames[0], "test": frames[2]})
    other = pd.DataFrame({"x": pd.Categorical(words)})
    with pytest.raises(
        DataError, match=r"'x' has other categories in test than in train: \['low', 'mid'\], not \['low'"
    ):
        hold({"train": frames[1], "test": other})
    with pytest.raises(DataError, match="1 of 2 values are missing"):
        held(pd.DataFrame({"x": pd.Categorical(["a", None])}))


def test_a_series_is_no_frame() -> None:
    for kind in (pd.DataFrame, pl.DataFrame, pl.LazyFrame, pa.table, pa.record_batch):
        assert is_frame(kind({"x": [1]}))
    for value in (pd.Series([1]), pl.Series([1]), pa.array([1]), pa.chunked_array([[1]]), {"x": [1]}, [1], "a"):
        assert not is_frame(value)


numbers_of = st.integers(1, 6).flatmap(
    lambda rows: st.fixed_dictionaries(
        {
            "i": st.lists(st.integers(-(2**63), 2**63 - 1), min_size=rows, max_size=rows),
            "f": st.lists(st.floats(allow_nan=False), min_size=rows, max_size=rows),
            "b": st.lists(st.booleans(), min_size=rows, max_size=rows),
            "e": st.lists(st.lists(st.floats(-9, 9), min_size=3, max_size=3), min_size=rows, max_size=rows),
        }
    )
)


@given(numbers_of)
def test_numbers_are_the_same_from_every_kind(columns: Table) -> None:
    arrays = {name: np.array(values) for name, values in columns.items()}
    sources = [open_source(kind(columns)) for kind in (pd.DataFrame, pl.DataFrame, pl.LazyFrame, pa.table, dict)]
    sources += [open_source(arrays), open_source(as_arrow_chunks(columns)), open_source(as_arrow_slice(columns))]
    assert len({source.sha256 for source in sources}) == 1
    rows = np.arange(len(arrays["i"]))[::-1].copy()
    for source in sources:
        for name, taken in source.take(rows).items():
            assert taken.numpy().tobytes() == arrays[name][rows].tobytes()


# --- texts


texts_of = st.lists(
    st.one_of(st.none(), st.text(st.characters(exclude_categories=["Cs"]), max_size=40)), min_size=1, max_size=12
)


def join(column_batches: list[ColumnBatch]) -> list[str | None]:
    found = [value for column_batch in column_batches for value in list_values(column_batch.columns["text"])]
    return [value.decode() if isinstance(value, bytes) else value for value in found]  # type: ignore[misc]


@given(texts_of, st.integers(1, 60))
def test_texts_are_the_same_from_every_kind(texts: list[str | None], size_bytes: int) -> None:
    """Cut in the same places, and hashed to the same key."""
    columns = {"text": texts, "label": [text and text[:1] for text in texts]}
    cuts, hashes = [], set()
    here = cast(Share, SimpleNamespace(map=map))  # without processes
    for name, kind in TEXT_KINDS.items():
        column_batches = list(cut_by_size(read_frame(kind(columns), Data(), "frame"), ["text"], size_bytes))
        assert join(column_batches) == texts, name
        cuts.append([column_batch.rows for column_batch in column_batches])
        hashes.add(find_inputs(Data(), {"train": kind(columns)}, here)["train"].sha256)
    assert len(hashes) == 1
    assert all(cut == cuts[0] for cut in cuts)
    for rows, start in zip(cuts[0], np.cumsum(cuts[0]) - cuts[0], strict=True):
        sizes = [len((text or "").encode()) for text in texts[start : start + rows]]
        assert sum(sizes[:-1]) < size_bytes and (sum(sizes) >= size_bytes or start + rows == len(texts))


def test_missing_values_of_any_kind_are_missing() -> None:
    missing = [None, float("nan"), pd.NA, pd.NaT, np.nan]
    frame = pd.DataFrame({"text": pd.Series(["a", *missing], dtype=object)})
    assert read_texts(frame, Data()).faults == ("", *["empty"] * 5)
    labels = pd.DataFrame({"text": ["a", "b"], "label": [3.0, None]})
    assert read_texts(labels, Data()).labels == ("3", None)
    assert read_texts({"text": ["a"], "label": np.array([3.0], np.float32)}, Data()).labels == ("3",)
    assert read_texts({"text": ["a"], "label": torch.tensor([3])}, Data()).labels == ("3",)


def test_a_frame_may_hold_columns_that_nobody_reads() -> None:
    frame = pd.DataFrame(
        {"text": ["a"], "label": ["b"], "mixed": pd.Series([object()], dtype=object), "when": [pd.Timestamp(0)]}
    ).set_index("when")
    assert list(take_columns(frame, "frame")) == ["text", "label", "mixed"]
    assert read_texts(frame, Data()).texts == ("a",)


BIG = """
import sys
from pathlib import Path
import numpy as np, polars as pl, pyarrow as pa
from unisono.data.ingest.inputs import find_inputs
from unisono.data.share import Share
from unisono.data.ingest.staging import stage
from unisono.data.screening.rules import Examiner
from unisono.config.sections import Data, Screen

rows, size = 10_000, 10_000  # 100 MB
letters = np.random.default_rng(0).integers(97, 123, rows * size, dtype=np.uint8)
offsets = np.arange(rows + 1, dtype=np.int64) * size
column = pa.LargeStringArray.from_buffers(rows, pa.py_buffer(offsets), pa.py_buffer(letters))
table = pa.table({"text": column, "label": pa.array(["a", "b"] * (rows // 2))})
kind = sys.argv[1]
frame = table if kind == "arrow" else pl.from_arrow(table)
data = Data()
def memory(kind):
    return 1024 * int(Path("/proc/self/status").read_text().partition(kind + ":")[2].split()[0])
Path("/proc/self/clear_refs").write_text("5")  # the peak is forgotten
before, allocated = memory("VmRSS"), pa.total_allocated_bytes()
(found,) = find_inputs(data, {"train": frame}, Share(workers=1)).values()
for number, part in enumerate(found.parts):
    stage(Path(f"{kind}-{number}"), [part], "frame", data, Examiner(Screen(), ()), place=False, near=False)
print(len(found.parts), found.sha256, memory("VmHWM") - before, pa.total_allocated_bytes() - allocated)
"""


@pytest.mark.slow
def test_a_large_column_is_never_copied_whole(tmp_path: Path) -> None:
    """Hashing and examining 100 MB of texts takes the memory of a few sheets, whatever holds the column."""
    hashes = set()
    for kind in ("arrow", "polars"):
        done = run_python(["-c", BIG, kind], tmp_path)
        assert done.returncode == 0, done.stderr
        parts, sha256, peak, allocated = done.stdout.split()
        hashes.add(sha256)
        assert int(parts) == 100_000_000 // COLUMN_BATCH_BYTES + 1, kind
        assert int(peak) < 50e6 and int(allocated) < 1e6, (kind, peak, allocated)
    assert len(hashes) == 1


# --- training


class Line(unisono.Task):
    """Classifies `x` and an embedding into `label`."""

    def build(self) -> nn.Module:
        return nn.Linear(4, 3)

    def _score(self, module: nn.Module, microbatch: Mapping[str, Tensor]) -> Tensor:
        return module(torch.cat([microbatch["x"][:, None], microbatch["e"]], 1).float())

    def loss(self, module: nn.Module, microbatch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        scores = self._score(module, microbatch)
        return F.cross_entropy(scores, microbatch["label"], reduction="sum"), len(scores)

    def measure(self, module: nn.Module, microbatch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        scores, label = self._score(module, microbatch), microbatch["label"]
        return {"loss": F.cross_entropy(scores, label, reduction="none"), "predicted": scores.argmax(1), "label": label}


NUMBERS = {
    "x": np.sin(np.arange(48.0)),
    "e": np.cos(np.arange(144.0)).reshape(48, 3).astype(np.float32),
    "label": np.arange(48) % 3,
}


def as_frame(kind: Any) -> Any:
    if kind is pl.DataFrame:
        return pl.DataFrame(NUMBERS)
    if kind is pl.LazyFrame:
        return pl.LazyFrame(NUMBERS)
    return kind(NUMBERS | {"e": list(NUMBERS["e"])})


def train(folder: Path, data: object, workers: int, task: unisono.Task | None = None, **more: Any) -> unisono.Trained:
    return unisono.train(
        task or Line(), data, workers=workers, run=folder, quiet=True, samples_per_step=16, microbatches=4, **more
    )


def test_a_task_trains_on_any_frame_to_the_same_bits(tmp_path: Path) -> None:
    runs = [train(tmp_path / "columns", NUMBERS, 3)]
    for number, (kind, workers) in enumerate([(pd.DataFrame, 1), (pl.LazyFrame, 3), (pa.table, 1)]):
        test = as_frame(kind)
        runs.append(train(tmp_path / str(number), as_frame(kind), workers, test=test))
    assert len({run.weights_sha256 for run in runs}) == 1
    assert len({str(run.summary["test"]) for run in runs[1:]}) == 1


class Writes(Line):
    """Tells that the third step has begun, and waits for an answer; both are files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen = 0

    def loss(self, module: nn.Module, microbatch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        self.seen += 1
        if self.seen > 8:  # beyond the purity probe and the first step
            (self.folder / "asked").touch()
            while not (self.folder / "answered").exists():
                time.sleep(0.001)
        return super().loss(module, microbatch)


def write_meanwhile(folder: Path, act: Callable[[], None]) -> threading.Thread:
    def run() -> None:
        while not (folder / "asked").exists():
            time.sleep(0.001)
        act()
        (folder / "answered").touch()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_workers_do_not_see_what_is_written_into_a_frame(tmp_path: Path) -> None:
    mine = {name: column.copy() for name, column in NUMBERS.items()}
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(mine["e"].reshape(-1)), 3)
    frame = pa.table({"x": pa.array(mine["x"]), "e": fixed, "label": pa.array(mine["label"])})
    thread = write_meanwhile(tmp_path, lambda: mine["x"].fill(7))
    run = train(tmp_path / "run", frame, 2, Writes(tmp_path))
    thread.join()
    assert frame["x"].to_pylist() == [7] * 48
    assert run.weights_sha256 == train(tmp_path / "calm", NUMBERS, 1).weights_sha256


def test_what_is_written_into_shared_memory_is_noticed(tmp_path: Path) -> None:
    NUMBERS["x"].tofile(tmp_path / "x")
    shared = np.memmap(tmp_path / "x", np.float64, "r+")
    thread = write_meanwhile(tmp_path, lambda: shared.fill(7))
    with pytest.raises(DataError, match=r"written into while it was trained on.*Give a copy"):
        train(tmp_path / "run", NUMBERS | {"x": shared}, 2, Writes(tmp_path))
    thread.join()
    assert not (tmp_path / "run" / "model").exists()


def test_columns_tell_that_they_were_changed() -> None:
    numbers = np.arange(4.0)
    columns = Columns({"x": numbers})
    assert not columns.changed()
    numbers[2] = 5
    assert columns.changed()


ROWS = [line.rpartition(",") for line in make_records()]
TEXTS = {"text": [text for text, _, _ in ROWS], "label": [label for _, _, label in ROWS]}


@pytest.fixture(scope="module")
def run(warm: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy's run folder, trained from its file."""
    folder = tmp_path_factory.mktemp("file")
    return unisono.train(make_toy(folder), workers=2, run=folder / "run", quiet=True).folder


@pytest.mark.slow
def test_a_recipe_trains_on_any_frame_as_on_the_file(tmp_path: Path, run: Path) -> None:
    make_toy(tmp_path)
    recipe = tmp_path / "frames.toml"
    text = RECIPE.format(folder=tmp_path).replace('train = "toy.csv"\n', "")
    recipe.write_text(text, encoding="utf-8")
    datasets = {name: unisono.prepare(recipe, {"train": kind(TEXTS)}) for name, kind in TEXT_KINDS.items()}
    assert len({dataset.folder for dataset in datasets.values()}) == 1, "prepared once"
    expected = (run / "summary.json").read_text(encoding="utf-8")
    for number, (name, workers) in enumerate({"pandas": 1, "lazy": 3}.items()):
        trained = unisono.train(
            recipe, TEXT_KINDS[name](TEXTS), workers=workers, run=tmp_path / str(number), quiet=True
        )
        assert trained.weights_sha256 in expected, name


# --- prediction


NEW = {
    "text": ["goal match team", None, "chip code data", "", "soup bread salt"],
    "n": [1.5, 2.5, None, 4.5, 5.5],
    "id": [10, 20, 30, 40, 50],
}
ADDED = ["predicted", "probability of food", "probability of sport", "probability of tech", "unusable"]


def test_a_frame_comes_back_as_it_came(run: Path, tmp_path: Path) -> None:
    """With the columns that are written into a file; all kinds with the same bits."""
    pa_table = pa.table(NEW)
    pl_frame = pl.DataFrame(NEW)
    pd_frame = pd.DataFrame(NEW, index=[5, 4, 3, 3, 1]).rename_axis("key")
    unisono.predict(run, pd_frame, tmp_path / "new.parquet", workers=1)
    expected = pd.read_parquet(tmp_path / "new.parquet")
    assert list(expected.columns) == [*NEW, *ADDED]
    assert expected["predicted"].fillna("").tolist() == ["sport", "", "tech", "", "food"]
    assert expected["unusable"].fillna("").tolist() == ["", "empty", "", "empty", ""]
    for workers in (1, 3):
        found = unisono.predict(run, pd_frame, workers=workers)
        assert isinstance(found, pd.DataFrame) and found.index.equals(pd_frame.index) and found.index.name == "key"
        pd.testing.assert_frame_equal(found.reset_index(drop=True), expected)
    assert list(pd_frame.columns) == list(NEW)
    polars = unisono.predict(run, pl_frame, workers=2)
    assert isinstance(polars, pl.DataFrame)
    assert polars.drop(ADDED).equals(pl_frame)
    arrow = unisono.predict(run, pa_table, workers=2)
    assert isinstance(arrow, pa.Table) and arrow.select(list(NEW)).equals(pa_table)
    batch = unisono.predict(run, pa_table.to_batches()[0], workers=1)
    assert isinstance(batch, pa.RecordBatch)
    others: list[Any] = [pl.LazyFrame(NEW), pa_table.to_reader(), NEW]
    lazy, stream, lists = (unisono.predict(run, other, workers=1) for other in others)
    assert isinstance(lazy, pl.DataFrame) and lazy.equals(polars)
    for table in (polars.to_arrow(), arrow, pa.Table.from_batches([batch]), stream, lists):
        assert [table[name].to_pylist() for name in ADDED] == [arrow[name].to_pylist() for name in ADDED]
        assert table.column_names == [*NEW, *ADDED]
    for name in ADDED[1:4]:
        assert np.array_equal(expected[name], arrow[name].to_numpy(), equal_nan=True)


def test_columns_that_come_back_are_the_same_memory(run: Path) -> None:
    classifier = unisono.load(run)
    table = pa.table(NEW)
    found = classifier.predict(table)
    for name in NEW:
        for one, other in zip(table[name].chunk(0).buffers(), found[name].chunk(0).buffers(), strict=True):
            assert one is other is None or one.address == other.address
    polars = pl.DataFrame({"text": NEW["text"], "id": NEW["id"]})
    back = classifier.predict(polars)
    assert back["id"].to_numpy(allow_copy=False).ctypes.data == polars["id"].to_numpy(allow_copy=False).ctypes.data
    pandas = pd.DataFrame(NEW)
    assert classifier.predict(pandas)["id"].to_numpy().ctypes.data == pandas["id"].to_numpy().ctypes.data


def test_a_second_prediction_takes_the_place_of_the_first(run: Path) -> None:
    classifier = unisono.load(run)
    for kind in (pd.DataFrame, pl.DataFrame, pa.table):
        once = classifier.predict(kind({"predicted": ["mine"] * 3, "text": NEW["text"][2:]}))
        twice = classifier.predict(once)
        names = list(twice.column_names if isinstance(twice, pa.Table) else twice.columns)
        assert names == ["predicted", "text", *ADDED[1:]]
        assert next(iter(np.asarray(twice["predicted"]))) == "tech"


def test_texts_give_a_list_as_before(run: Path) -> None:
    classifier = unisono.load(run)
    texts = ["goal match team", "chip code data"]
    same: list[Any] = [texts, tuple(texts), np.array(texts), pd.Series(texts), pl.Series(texts), pa.array(texts)]
    for given_texts in same:
        assert classifier.predict(given_texts) == ["sport", "tech"]
    assert classifier.predict([]) == []
    with pytest.raises(DataError, match=r"1 of 2 are no texts, the first in row 1: None"):
        classifier.predict(pd.Series(["a", None]))  # type: ignore[call-overload]
    with pytest.raises(DataError, match="give a list of texts"):
        classifier.predict("goal")
    with pytest.raises(DataError, match="no column 'text'"):
        classifier.predict(pl.DataFrame({"texts": texts}))
    with pytest.raises(UserError, match="a file needs another one"):
        unisono.predict(run, "new.csv")


def test_frames_are_evaluated_as_files_are(run: Path, tmp_path: Path) -> None:
    make_toy(tmp_path)
    expected = unisono.evaluate(run, tmp_path / "toy.csv", workers=1, quiet=True)
    for kind, workers in ((pd.DataFrame, 1), (pl.DataFrame, 2), (pl.LazyFrame, 1), (as_arrow_chunks, 3)):
        assert unisono.evaluate(run, kind(TEXTS), workers=workers, quiet=True) == expected


def test_columns_are_added_to_frames_of_no_rows_and_odd_names() -> None:
    new = {"a": pa.array([], pa.string())}
    for kind in (pd.DataFrame, pl.DataFrame, pa.table):
        assert list(add_columns(kind({"x": []}), new).columns if kind is not pa.table else ["x", "a"]) == ["x", "a"]
    wide = pd.DataFrame([[1, 2]], columns=pd.MultiIndex.from_tuples([("u", "v"), ("u", "w")]))
    assert add_columns(wide, {"a": pa.array(["b"])})[("a", "")].tolist() == ["b"]
    assert add_columns(pd.DataFrame({0: [1]}), {"a": pa.array(["b"])}).columns.tolist() == [0, "a"]


@given(numbers_of, st.sampled_from([pd.DataFrame, pl.DataFrame, pa.table]))
def test_round_trips_between_kinds(columns: Table, kind: Any) -> None:
    """A column that is taken out of one frame and added to another is the same."""
    table = pa.table(columns)
    taken = {name: table[name].combine_chunks() for name in columns}
    first = next(iter(columns))
    frame = add_columns(kind({first: columns[first]}), taken)
    back = take_columns(frame, "frame")
    for name, values in columns.items():
        assert open_source({name: back[name]}).sha256 == open_source({name: np.array(values)}).sha256


# --- the guide


def test_the_guide_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its blocks run one after the other; a comment after `print` is what it prints."""
    guide = Path(__file__).parents[1] / "docs" / "frames.md"
    monkeypatch.chdir(tmp_path)
    make_toy(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    blocks = read_blocks(guide)
    assert len(blocks) == 4
    for block in blocks:
        capsys.readouterr()
        exec(compile(block, str(guide), "exec"), names)
        shown = [line.rpartition("# ")[2] for line in block.splitlines() if line.startswith("print(")]
        printed = capsys.readouterr().out.splitlines()
        assert [line for line in shown if line not in printed] == []
