"""From files to a dataset: the same bytes for any number of workers, and errors that name the remedy."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from unisono.config.recipe import Recipe, check
from unisono.config.sections import Data
from unisono.data import prepare as stages
from unisono.data.encoding import encode
from unisono.data.ingest import delimited as rows
from unisono.data.ingest import inputs
from unisono.data.ingest.input_splits import find_input_splits
from unisono.data.prepare import prepare
from unisono.data.store import read_quarantine
from unisono.errors import DamagedError, DataError, RecipeError
from unisono.storage.files import facts_sha256


def lines(count: int = 40, start: int = 0) -> list[str]:
    return [f"word{number} and word{number * 7 % 11},{'xy'[number % 2]}" for number in range(start, start + count)]


def write(path: Path, rows: list[str]) -> str:
    path.write_bytes("\n".join(["text,label", *rows, ""]).encode("utf-8", "surrogateescape"))
    return str(path)


def recipe(
    folder: Path,
    model: str = "bag",
    encode_: dict[str, object] | None = None,
    screen: dict[str, object] | None = None,
    **data: object,
) -> Recipe:
    encode_ = {"vocabulary_size": 100} | (encode_ or {})
    data = {"store": str(folder / "store"), **data}
    return check({"data": data, "encode": encode_, "model": {"kind": model}, "screen": screen or {}})


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def nothing_written(folder: Path) -> bool:
    return not (folder / "store").exists() or not list((folder / "store").iterdir())


@pytest.mark.parametrize("counts", [(1, 3), pytest.param((1, 2, 5, 8), marks=pytest.mark.slow)])
@pytest.mark.parametrize(("model", "kind"), [("bag", "ngrams"), ("transformer", "wordpiece"), ("transformer", "bpe")])
def test_bytes_do_not_depend_on_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, kind: str, counts: tuple[int, ...]
) -> None:
    monkeypatch.setattr(rows, "COLUMN_BATCH_ROWS", 8)
    monkeypatch.setattr(inputs, "find_input_splits", partial(find_input_splits, input_split_bytes=200))
    train, test = str(tmp_path / "train.jsonl"), write(tmp_path / "test.csv", lines(30, 1000))
    records = [dict(zip(("text", "label"), line.split(","), strict=True)) for line in [*lines(), *lines(5)]]
    Path(train).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    assert len(inputs.find_input_splits(train, Data())) > 8
    made = []
    for workers in counts:
        store = str(tmp_path / str(workers))
        data = {"train": train, "test": test, "validation_fraction": 0.2, "store": store}
        screen = {"near_duplicates": "refuse", "mail": "mask"}
        asked = recipe(tmp_path, model, {"kind": kind}, screen, **data)
        made.append(content(prepare(asked, workers=workers).folder))
    assert all(one == made[0] for one in made)
    assert {"report.html", "train.arrow", "validation.arrow", "test.arrow", "quarantine.jsonl"} <= made[0].keys()


def test_splits_labels_and_quarantine(tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", [*lines(10), lines(1)[0], "\udcff,x", ",y"])
    test = write(tmp_path / "test.csv", [*lines(4, 100), lines(1)[0]])
    told: list[str] = []
    dataset = prepare(recipe(tmp_path, train=train, test=test, encoding="utf-8"), notify=told.append)
    assert dataset.counts == {"train": 10, "test": 4}
    assert dataset.labels == ("x", "y")
    assert dataset.quarantined == {
        "train": {"duplicate": 1, "empty text": 1, "not UTF-8": 1},
        "test": {"also in train": 1},
    }
    quarantine = list(read_quarantine(dataset.folder))
    assert [(one["split"], one["row"]) for one in quarantine] == [
        ("train", 11),
        ("train", 12),
        ("train", 13),
        ("test", 5),
    ]
    assert quarantine[1] == {
        "split": "train",
        "file": "train.csv",
        "row": 12,
        "reason": "not UTF-8",
        "label": "x",
        "text": "\\xff",
    }
    assert any("quarantined 4 of 18" in line for line in told)
    assert str(tmp_path) not in json.dumps(dataset.manifest)
    assert dataset.split("validation") is None


def test_what_was_finished_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recipe(tmp_path, "transformer", train=write(tmp_path / "train.csv", lines()))

    def stop(*given: object, **settings: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stages.store, "write_dataset", stop)
        prepare(asked)
    assert not [path for path in (tmp_path / "store").iterdir() if not path.name.startswith(".")]
    with monkeypatch.context() as patch:
        for done in ("stage", "write_part"):
            patch.setattr(stages, done, None)
        patch.setattr(encode, "choose_encoder", None)
        folder = prepare(asked).folder
    assert content(folder) == content(prepare(asked.model_copy(update={"data": elsewhere(asked)})).folder)
    assert [path.name for path in (tmp_path / "store").iterdir()] == [folder.name]


def elsewhere(asked: Recipe) -> Data:
    return asked.data.model_copy(update={"store": f"{asked.data.store}-2"})


def test_a_name_that_decides_nothing_changes_no_byte(tmp_path: Path) -> None:
    asked = recipe(tmp_path, train=write(tmp_path / "train.csv", lines()))
    other = asked.model_copy(update={"name": "other", "data": elsewhere(asked)})
    assert content(prepare(asked).folder) == content(prepare(other).folder)


def test_the_same_input_is_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = write(tmp_path / "train.csv", lines())
    first = prepare(recipe(tmp_path, train=train))
    with monkeypatch.context() as patch:
        patch.setattr(encode, "choose_encoder", None)
        assert prepare(recipe(tmp_path, train=train)).folder == first.folder
    changed = [
        recipe(tmp_path, train=train, test_fraction=0.3),
        recipe(tmp_path, train=train, encode_={"ngrams": 1}),
        recipe(tmp_path, "transformer", train=train),
    ]
    assert len({prepare(one).folder for one in [recipe(tmp_path, train=train), *changed]}) == 4
    write(tmp_path / "train.csv", lines(41))
    assert prepare(recipe(tmp_path, train=train)).folder != first.folder


def test_order_of_the_input_moves_no_record_between_splits(tmp_path: Path) -> None:
    def samples(rows: list[str], name: str) -> list[list[int]]:
        asked = recipe(tmp_path, train=write(tmp_path / name, rows), test_fraction=0.4)
        split = prepare(asked).split("test")
        assert split is not None
        return [split.take(np.array([number]))["ids"].tolist() for number in range(len(split))]

    assert samples(lines(), "a.csv") == samples(lines()[::-1], "b.csv")[::-1]


def test_frames_and_files_make_the_same_samples(tmp_path: Path) -> None:
    rows = [line.split(",") for line in lines()]
    frame = pd.DataFrame({"text": [text for text, _ in rows], "label": [label for _, label in rows]})
    by_file = prepare(recipe(tmp_path, train=write(tmp_path / "train.csv", lines()), test_fraction=0.2))
    by_frame = prepare(recipe(tmp_path, test_fraction=0.2), frames={"train": frame})
    assert by_frame.sha256 == by_file.sha256
    assert prepare(recipe(tmp_path, test_fraction=0.2), frames={"train": frame}).folder == by_frame.folder
    test = prepare(recipe(tmp_path), frames={"train": frame, "test": (["new"], ["x"])})
    assert test.counts == {"train": 40, "test": 1}


def test_strict_refuses_at_once_and_from_the_store(tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", [*lines(), " ,x"])
    message = r"train: 1 empty text.*train.csv, row 41: empty text"
    with pytest.raises(DataError, match=message):
        prepare(recipe(tmp_path, train=train, strict=True))
    assert nothing_written(tmp_path)
    prepare(recipe(tmp_path, train=train))
    with pytest.raises(DataError, match=message):
        prepare(recipe(tmp_path, train=train, strict=True))


def test_damage_to_what_was_prepared_before_is_found(tmp_path: Path) -> None:
    asked = recipe(tmp_path, train=write(tmp_path / "train.csv", lines()))
    (prepare(asked).folder / "train.arrow").write_bytes(b"")
    with pytest.raises(DamagedError, match="truncated"):
        prepare(asked)


@pytest.mark.parametrize(
    ("train", "test", "data", "message"),
    [
        (None, None, {}, r"data.train is empty"),
        (lines(), None, {"text": "txt"}, r"no column 'txt'.*Did you mean 'text'"),
        ([",x", " ,y"], None, {}, r"train: no record can be used: train: 2 empty text"),
        (["a,x", "b,x"], None, {}, r"one class only, 'x'"),
        (lines(), ["new,z", "old,z"], {}, r"test has class 'z' \(2 records\).*data.labels"),
        (lines(), [",x"], {}, r"test: no record can be used"),
        (lines(), None, {"labels": ["x", "yy"]}, r"no record has label 'yy'"),
        (lines(), None, {"labels": ["x", "x"]}, r"named twice"),
        (
            lines(3),
            None,
            {"validation_fraction": 1e-9},
            r"validation: no record is left.*validation_fraction",
        ),
        (lines(), None, {"header_lines": 99}, r"header_lines"),
    ],
)
def test_what_cannot_be_prepared(
    tmp_path: Path, train: list[str] | None, test: list[str] | None, data: dict[str, object], message: str
) -> None:
    paths = {"train": train, "test": test}
    files = {split: write(tmp_path / f"{split}.csv", rows) for split, rows in paths.items() if rows is not None}
    with pytest.raises(DataError, match=message):
        prepare(recipe(tmp_path, **files, **data))
    assert nothing_written(tmp_path)


def test_labels_of_the_recipe_decide_numbers_and_admit_a_class_of_the_test_alone(tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", [*lines(), "strange,w"])
    test = write(tmp_path / "test.csv", ["new,z"])
    dataset = prepare(recipe(tmp_path, train=train, test=test, labels=["z", "y", "x"]))
    assert dataset.labels == ("z", "y", "x")
    assert dataset.quarantined == {"train": {"unknown label": 1}}


def test_splits_given_twice_or_too_large(tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", lines())
    with pytest.raises(RecipeError, match="as well"):
        prepare(recipe(tmp_path, train=train, test=train, test_fraction=0.1))
    with pytest.raises(RecipeError, match="below 1"):
        prepare(recipe(tmp_path, train=train, validation_fraction=0.5, test_fraction=0.5))
    with pytest.raises(DataError, match="allowed are train, validation, test"):
        prepare(recipe(tmp_path, train=train), frames={"tset": []})
    with pytest.raises(DataError, match="no such file"):
        prepare(recipe(tmp_path, train=str(tmp_path / "absent.csv")))


def test_a_key_that_changes_nothing_names_no_dataset() -> None:
    """Fails if screen.phone_region were part of what a dataset without phone rules is named after."""

    def name(**screen: str) -> str:
        return facts_sha256(inputs.make_key(check({"screen": screen}), {}))

    assert name() == name(phone_region="DE") != name(phone="mask") != name(phone="mask", phone_region="DE")
