"""What is said of the data by train, evaluate and predict: texts that are cut, and labels however they are held."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

import unisono
from unisono.config.recipe import check
from unisono.errors import DataError

TEXTS = [f"w{number % 2} " + "a " * (9 if number % 4 == 0 else 2) + str(number) for number in range(40)]
CUT = "warning: texts cut after 8 words: 10 of 40 train (25.0 %); the rest of them is not read."


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of whole numbers in a frame."""
    folder = tmp_path_factory.mktemp("remarks")
    data = {"store": str(folder / "store"), "test": str(folder / "test.csv")}
    (folder / "test.csv").write_text("text,label\n" + "".join(f"w{n % 2}{' b' * n},{n % 2}.0\n" for n in range(12)))
    frame = pd.DataFrame({"text": TEXTS, "label": [number % 2 for number in range(40)]})
    recipe = check({"data": data, "encode": {"max_tokens": 8}, "train": {"epochs": 20.0, "learning_rate": 0.1}})
    unisono.train(recipe, frame, workers=1, run=folder / "run", quiet=True)
    return folder / "run"


def test_train_says_how_many_are_cut_even_if_quiet_and_the_ledger_keeps_it(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = check({"data": {"store": str(tmp_path)}, "encode": {"max_tokens": 8}, "train": {"max_steps": 1}})
    for name in ("one", "two"):  # the second opens the dataset that the first has made
        frame = {"text": TEXTS, "label": ["x", "y"] * 20}
        unisono.train(recipe, frame, workers=1, run=tmp_path / name, quiet=True)
        assert capsys.readouterr().err.count(CUT) == 1
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        told = [line for line in lines if line["event"] == "Notice" and "texts cut" in line["message"]]
        assert [line["warning"] for line in told] == [True]


def test_evaluate_and_predict_say_how_many_are_cut(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = "of 12 texts (33.3 %) cut after 8 words, as the model was trained (encode.max_tokens)"
    frame = pd.DataFrame({"text": [f"w{n % 2}{' b' * n}" for n in range(12)], "label": [n % 2 for n in range(12)]})
    for data in (None, frame):
        found = unisono.evaluate(run, data, workers=1)
        assert found["remark"].startswith(f"4 {told}") and f"warning: 4 {told}" in capsys.readouterr().err
    unisono.predict(run, frame, workers=1)
    assert f"warning: 4 {told}" in capsys.readouterr().err
    assert "remark" not in unisono.evaluate(run, frame[:8], workers=1) and not capsys.readouterr().err


@pytest.mark.parametrize("labels", [["0.0", "1.0"], ["0", "1"], [0, 1], [0.0, 1.0]])
def test_a_model_of_numbers_is_scored_however_they_are_held(run: Path, tmp_path: Path, labels: list[object]) -> None:
    frame = pd.DataFrame({"text": ["w0 a", "w1 a"], "label": labels})
    frame.to_csv(tmp_path / "a.csv", index=False)
    for data in (frame, tmp_path / "a.csv"):
        found = unisono.evaluate(run, data, workers=1, quiet=True)
        assert (found["accuracy"], found["samples"], found["left_out"]) == (1.0, 2, {})


def test_rows_that_are_left_out_are_counted_with_their_cause(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame = {"text": ["w0 a", "w1 a", "w0", ""], "label": ["0", None, "7", "1"]}
    assert unisono.evaluate(run, frame, workers=1)["left_out"] == {"no label": 1, "unknown label": 1, "empty": 1}
    assert "left out: 1 row (no label)" in capsys.readouterr().out
    with pytest.raises(
        DataError, match=r"no row can be scored: 2 rows \(unknown label\).*'0', '1'.*first label is 'x'"
    ):
        unisono.evaluate(run, {"text": ["a", "b"], "label": ["x", "y"]}, workers=1)
