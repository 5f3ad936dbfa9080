"""Nothing of the data is lost quietly: what is cut, set aside, not read or missing in a split is said and kept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.config.recipe import Recipe, check
from unisono.data.prepare import prepare
from unisono.data.screening.screen import TEST, TRAIN, VALIDATION, Records, _cut_each_class
from unisono.data.store import Dataset, read_quarantine
from unisono.errors import DataError


def recipe(folder: Path, model: str = "bag", **tables: dict[str, object]) -> Recipe:
    data = {"store": str(folder / "store"), **tables.pop("data", {})}
    encode = {"vocabulary_size": 100, **tables.pop("encode", {})}
    return check({"data": data, "encode": encode, "model": {"kind": model}, **tables})


def make(asked: Recipe, **frames: object) -> tuple[Dataset, list[str]]:
    told: list[str] = []
    return prepare(asked, frames=frames, notify=told.append), told


def frame(*sizes: tuple[str, int], words: int = 4) -> dict[str, list[str]]:
    rows = [(f"{label} {number} " + "and " * words, label) for label, size in sizes for number in range(size)]
    return {"text": [text for text, _ in rows], "label": [label for _, label in rows]}


@pytest.mark.parametrize(
    ("model", "kind", "limit"), [("bag", "ngrams", "8 words"), ("transformer", "wordpiece", "8 tokens"),
                                 ("transformer", "bpe", "8 tokens")]
)  # fmt: skip
def test_texts_that_are_cut_are_counted_and_said(tmp_path: Path, model: str, kind: str, limit: str) -> None:
    """When the dataset is made, when it is opened again, in the manifest and on the page."""
    texts = [f"{n} " + "a " * (20 if n % 4 == 0 else 1) for n in range(40)]
    data = {"text": texts, "label": ["x", "y"] * 20}
    test = {"text": ["b a", "c a"], "label": ["x", "y"]}
    asked = recipe(tmp_path, model, encode={"max_tokens": 8, "kind": kind})
    dataset, told = make(asked, train=data, test=test)
    remark = f"warning: texts cut after {limit}: 10 of 40 train (25.0 %); the rest of them is not read. Raise encode."
    assert [line for line in told if line.startswith(remark)]
    assert dataset.cut == {"train": 10, "test": 0}
    again, told_again = make(asked, train=data, test=test)
    assert again.remarks == dataset.remarks and set(dataset.remarks) <= set(told_again)
    page = (dataset.folder / "report.html").read_text(encoding="utf-8")
    assert f"train: samples by tokens; 10 of 40 texts were cut after {limit} (encode.max_tokens)" in page
    assert f"test: samples by tokens; no text is longer than {limit}" in page
    assert f"Warning: texts cut after {limit}" in page


def test_texts_that_just_fit_are_not_cut(tmp_path: Path) -> None:
    """Eight words, and eight tokens with both special ones."""
    data = {"text": [f"{'a ' * 5}{letter}" for letter in "bcdefghi"], "label": ["x", "y"] * 4}
    for model, most in (("bag", 6), ("transformer", 8)):
        dataset, told = make(recipe(tmp_path, model, encode={"max_tokens": most}), train=data)
        assert dataset.cut == {"train": 0} and not [line for line in told if "cut after" in line]
        dataset, _ = make(recipe(tmp_path, model, encode={"max_tokens": most - 1}), train=data)
        assert dataset.cut == {"train": 8}


def test_columns_that_are_not_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text,label,when\n" + "".join(f"{n},word {n},{n % 2},x\n" for n in range(6)))
    rows = [json.dumps({"text": f"json {n}", "label": n % 2, "score": n}) for n in range(6)]
    (tmp_path / "b.jsonl").write_text("\n".join(rows))
    _, told = make(recipe(tmp_path, data={"train": str(tmp_path / "*.*")}))
    assert "columns that are not read: 'id', 'when', 'score'" in told
    for name in ("x", "y"):
        (tmp_path / "folder" / name).mkdir(parents=True)
        (tmp_path / "folder" / name / "1.txt").write_text(f"text of {name}")
    _, told = make(recipe(tmp_path, data={"train": str(tmp_path / "folder")}))
    assert not [line for line in told if "not read" in line]


def test_a_class_that_is_missing_or_rare_in_a_split_is_named(tmp_path: Path) -> None:
    train = frame(("fruit", 30), ("tool", 5), ("sea", 6))
    validation = {"text": ["v1", "v2", "v3", "v4"], "label": ["fruit", "fruit", "fruit", "tool"]}
    dataset, told = make(recipe(tmp_path), train=train, validation=validation)
    warnings = [line for line in told if line.startswith("warning: ")]
    assert warnings == [
        "warning: validation has no record of class 'sea': the scores say nothing about it. Give more records of them.",
        "warning: validation has fewer than 3 records of class 'tool'. Give more records of them.",
    ]
    assert all(warning in dataset.remarks for warning in warnings)


def test_a_share_of_each_class_keeps_a_rare_one_in_every_split(tmp_path: Path) -> None:
    """By default the cut is as it was, and the remedy is named."""
    train = frame(("fruit", 300), ("tool", 3))
    plain, told = make(recipe(tmp_path, data={"validation_fraction": 0.1, "test_fraction": 0.2}), train=train)
    assert [line for line in told if "no record of class 'tool'" in line and "data.stratify = true" in line]
    data = {"validation_fraction": 0.1, "test_fraction": 0.2, "stratify": True}
    dataset, told = make(recipe(tmp_path, data=data), train=train)
    counts = {split: np.bincount(dataset.split(split).labels).tolist() for split in ("train", "validation", "test")}  # type: ignore[union-attr]
    assert counts == {"train": [210, 1], "validation": [30, 1], "test": [60, 1]}
    assert not [line for line in told if "no record" in line or "stratify" in line]
    assert dataset.sha256 != plain.sha256


@given(
    st.lists(st.integers(0, 4), max_size=60), st.sampled_from([0.0, 0.1, 0.4]), st.sampled_from([0.0, 0.2, 0.5]),
    st.randoms(use_true_random=False),
)  # fmt: skip
def test_the_cut_of_each_class_is_that_of_a_loop(
    labels: list[int], validation: float, test: float, random: object
) -> None:
    places = np.random.default_rng(len(labels)).permutation(len(labels)).astype(np.uint64)

    def cut(order: list[int]) -> list[int]:
        count = len(order)
        records = Records(
            splits=np.zeros(count, np.int8), hashes=np.zeros((2, count), np.uint64), places=places[order],
            labels=np.array(labels, np.int32)[order], reasons=np.zeros(count, np.int16), bands=None, names=[""],
        )  # fmt: skip
        _cut_each_class(records, validation, test)
        found = [0] * count
        for place, number in enumerate(order):
            found[number] = int(records.splits[place])
        return found

    expected = [TRAIN] * len(labels)
    for label in set(labels):
        mine = sorted((number for number, one in enumerate(labels) if one == label), key=lambda one: places[one])
        wanted = [max(int(len(mine) * share + 0.5), 1) if share else 0 for share in (test, validation)]
        tests = min(wanted[0], len(mine) - 1)
        for place, number in enumerate(mine):
            if place < tests:
                expected[number] = TEST
            elif place < tests + min(wanted[1], len(mine) - 1 - tests):
                expected[number] = VALIDATION
    order = list(range(len(labels)))
    assert cut(order) == expected
    random.shuffle(order)  # type: ignore[attr-defined]
    assert cut(order) == expected


def test_a_measured_quantity_is_no_class(tmp_path: Path) -> None:
    values = [round(0.37 * number, 2) for number in range(40)]
    data = {"text": [f"text {number}" for number in range(40)], "label": values}
    with pytest.raises(DataError, match=r"'label' \(data\.label\) holds 40 different numbers in 40 records, such as 0\.37.*"
                                        r"regression.*docs/tasks\.md.*data\.labels"):  # fmt: skip
        make(recipe(tmp_path, data={"test_fraction": 0.2}), train=data)
    listed = tuple(str(value) for value in values)
    assert len(make(recipe(tmp_path, data={"labels": listed}), train=data)[0].labels) == 40


def test_many_classes_are_asked_about(tmp_path: Path) -> None:
    ratings = {"text": [f"text {n}" for n in range(300)], "label": [n % 25 / 2 for n in range(300)]}
    _, told = make(recipe(tmp_path), train=ratings)
    assert any("the 25 classes of 300 training records are numbers, as if a quantity" in line for line in told)
    names = {"text": [f"text {n}" for n in range(30)], "label": [f"name {n}" for n in range(30)]}
    _, told = make(recipe(tmp_path), train=names)
    assert any(
        "the 30 classes of 30 training records have one record each, most of them. Is 'label'" in one for one in told
    )
    for fine in ([n % 25 for n in range(300)], [n % 20 / 2 for n in range(60)]):
        _, told = make(recipe(tmp_path), train={"text": [f"text {n}" for n in range(len(fine))], "label": fine})
        assert not [line for line in told if "Is 'label'" in line]


LONG = "the quick brown fox jumps over the lazy dog and runs away from all the other animals of this large wood"


def test_a_record_that_repeats_or_resembles_another_names_it(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        f"text,label\nplain one,x\nother two,y\n{LONG},x\nplain one,x\nboth,x\nboth,y\n{LONG}s,x\n"
    )
    (tmp_path / "folder" / "y").mkdir(parents=True)
    for name, text in (("1.txt", "other two"), ("2.txt", f"{LONG} too"), ("3.txt", "fine"), ("4.txt", "fine")):
        (tmp_path / "folder" / "y" / name).write_text(text)
    data = {"train": str(tmp_path / "a.csv"), "test": str(tmp_path / "folder")}
    dataset, _ = make(recipe(tmp_path, data=data, screen={"near_duplicates": "refuse"}))
    found = [(one["file"], one["row"], one["reason"], one.get("like")) for one in read_quarantine(dataset.folder)]
    assert found == [
        ("a.csv", 4, "duplicate", {"file": "a.csv", "row": 1}),
        ("a.csv", 5, "same text, two labels", None),
        ("a.csv", 6, "same text, two labels", {"file": "a.csv", "row": 5}),
        ("a.csv", 7, "near-duplicate", {"file": "a.csv", "row": 3}),
        ("y/1.txt", 1, "also in train", {"file": "a.csv", "row": 2}),
        ("y/2.txt", 2, "near-duplicate of train", {"file": "a.csv", "row": 3}),
        ("y/4.txt", 4, "duplicate", {"file": "y/3.txt", "row": 3}),
    ]


@pytest.mark.parametrize(
    ("rows", "data", "message"),
    [
        (",x\n \ny,\n", {}, "no record can be used"),
        ("a,x\n,y\nb,\n", {}, "one class only"),
        ("a,x\n,y\nb,y\n", {"strict": True}, "data.strict"),
    ],
)
def test_where_nothing_can_be_made_the_records_are_kept_and_shown(
    tmp_path: Path, rows: str, data: dict[str, object], message: str
) -> None:
    (tmp_path / "a.csv").write_text(f"text,label\n{rows}")
    with pytest.raises(DataError, match=message) as caught:
        make(recipe(tmp_path, data={"train": str(tmp_path / "a.csv"), **data}))
    (kept,) = (tmp_path / "store").glob("*.jsonl")
    lines = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    assert lines and str(kept) in str(caught.value)
    for line in lines:
        assert line["reason"] in str(caught.value)
    if data:  # once the dataset is there, it has a list of its own
        make(recipe(tmp_path, data={"train": str(tmp_path / "a.csv")}))
        assert not list((tmp_path / "store").glob("*.jsonl"))
