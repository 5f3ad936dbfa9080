"""A trained text classifier at work: loaded, evaluated, predicting.

Owns what a finished model folder is read as, and the files and tables that come out. Work is shared out by
`evaluation.py`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np
import torch
from torch import nn

from unisono.config import recipe as recipes
from unisono.config.recipe import Recipe
from unisono.data.encoding.encode import load_encoder
from unisono.data.ingest.column_batch import list_values
from unisono.data.ingest.frames import add_columns, is_frame, settle, take_column, take_columns
from unisono.data.ingest.read import Texts, read_texts
from unisono.data.samples import EncodedSamples, encode_samples
from unisono.data.screening.rules import Examiner
from unisono.data.store import open_dataset
from unisono.engine.evaluation import measure_all
from unisono.errors import DataError, ModelError
from unisono.exchange.protocol import Exchange
from unisono.exchange.solo import Solo
from unisono.runtime.launchers.launcher import AUTO, Launcher, run_everywhere
from unisono.runtime.launchers.rank_assignment import RankAssignment
from unisono.runtime.worker import Act, Stop
from unisono.storage.files import load_tensors, whole_file
from unisono.storage.run_folder import model_folder
from unisono.tasks.metrics import confusion, per_class, summarise
from unisono.tasks.text.classification import TextClassification
from unisono.tracking.terminal import print_now

if TYPE_CHECKING:
    import pyarrow as pa

    from unisono.data.encoding.encoder import Encoder

WORKERS_AT_MOST = 65_536

Frame = TypeVar("Frame")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Classifier:
    """A trained text classifier. `predict(texts)`, or `predict(frame)`, is all that most will need."""

    module: nn.Module
    task: TextClassification
    encoder: Encoder
    labels: tuple[str, ...]
    recipe: Recipe
    dataset: str
    """SHA-256 of the dataset that it was trained on."""

    def probabilities(
        self, texts: Sequence[str], exchange: Exchange | None = None, device: torch.device | None = None
    ) -> np.ndarray:
        """float64 [texts, classes]: how likely each class is for each text, the same bits on any number of workers."""
        if not len(texts):
            return np.zeros((0, len(self.labels)))
        source = self.encode(texts)
        results = self._measure(
            source, lambda module, microbatch: {"p": self.task.probabilities(module, microbatch)}, exchange, device
        )
        return results["p"]

    def encode(self, texts: Sequence[str], labels: Sequence[int] | None = None) -> EncodedSamples:
        """Encode new texts, mended and masked as those were that the model learned from; `labels` are class numbers."""
        treat = Examiner(self.recipe.screen, self.labels).treat
        return encode_samples(self.encoder, [treat(text)[0] for text in texts], labels)

    @overload
    def predict(self, texts: Sequence[str]) -> list[str]: ...
    @overload
    def predict(self, texts: Frame) -> Frame: ...
    def predict(self, texts: Any) -> Any:
        """The most likely class of each text, in a list; of a frame, what `unisono.predict` gives, without workers.

        Raises:
            DataError: one is no text (in a frame such a row gets no prediction), or the frame lacks their column.
        """
        if is_frame(texts) or isinstance(texts, Mapping):
            frame = settle(texts)
            rows = self.read(frame)
            return _complete(frame, rows, _new_columns(self, rows, self.probabilities(rows.good_texts)))
        if isinstance(texts, str | Path):
            raise DataError(f"predict({str(texts)!r}): give a list of texts, or a frame. For a file: unisono.predict.")
        found = [
            value.decode(errors="backslashreplace") if isinstance(value, bytes) else value
            for value in list_values(take_column(texts))
        ]
        if wrong := [row for row, text in enumerate(found) if not isinstance(text, str)]:
            raise DataError(
                f"predict: {len(wrong):,} of {len(found):,} are no texts, the first in row {wrong[0]}: "
                f"{found[wrong[0]]!r}. Leave them out, or give a frame, where such a row gets no prediction."
            )
        return [self.labels[number] for number in self.probabilities(found).argmax(1)]  # type: ignore[arg-type]

    def read(self, source: object) -> Texts:
        """The rows of a file or a frame, in the columns that the model's recipe names."""
        return read_texts(source, self.recipe.data.model_copy(update={"format": "auto"}))

    def measure(self, source: EncodedSamples, exchange: Exchange, device: torch.device) -> dict[str, np.ndarray]:
        """Per-sample results on labelled samples."""
        return self._measure(source, self.task.measure, exchange, device)

    def _measure(
        self, source: Any, measure: Any, exchange: Exchange | None, device: torch.device | None
    ) -> dict[str, np.ndarray]:
        device = device or torch.device("cpu")
        return measure_all(
            self.module.to(device),
            measure,
            source,
            exchange or Solo(),
            device=device,
            precision=self.recipe.train.precision,
            samples_per_microbatch=self.recipe.evaluate.samples_per_microbatch,
            seed=self.recipe.train.seed,
        )


def load(run: str | Path) -> Classifier:
    """Load the text classifier of a finished run.

    Raises:
        RunFolderError: the run has no finished model.
        ModelError: the model is not one of a text recipe.
        DamagedError: a file is not readable.
    """
    folder = model_folder(run)
    path = folder / "unisono.json"
    if not path.is_file():
        raise ModelError(
            f"{str(folder)!r} holds no text classifier (no unisono.json). For a task of your own, see Trained.module()."
        )
    facts = json.loads(path.read_text(encoding="utf-8"))
    recipe = recipes.check(facts["recipe"])
    encoder = load_encoder(folder)
    if recipe.model.kind == "pretrained":  # its configuration lies beside the weights, wherever the original has gone
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"folder": str(folder)})})
    task = TextClassification(
        model=recipe.model,
        classes=len(facts["labels"]),
        vocabulary_size=encoder.vocabulary_size,
        padding=encoder.padding,
        max_tokens=recipe.encode.max_tokens,
    )
    module = task.build()
    try:
        module.load_state_dict(load_tensors(folder / "model.safetensors"))
    except RuntimeError as error:  # names or shapes that differ
        raise ModelError(
            f"{str(folder)!r}: weights and encoder do not belong together: {error}. "
            "Restore the folder as it was written."
        ) from None
    return Classifier(
        module=module.eval(),
        task=task,
        encoder=encoder,
        labels=tuple(facts["labels"]),
        recipe=recipe,
        dataset=facts["dataset"],
    )


def evaluate(
    run: str | Path, data: object = None, *, workers: str | int = AUTO, as_json: bool = False, quiet: bool = False,
    launcher: str | Launcher = AUTO,
) -> dict[str, Any]:  # fmt: skip
    """Score a run's model on labelled data (a file, or a pandas, Polars or Arrow frame), or on the run's own test
    samples; print and return the scores.

    Every sample is visited exactly once, whatever the number of workers, and the figures are the same bits. `launcher`
    starts them, as for `unisono.train`.

    Raises:
        DataError: the data cannot be used, or the run has no test samples of its own.
    """
    classifier = load(run)
    if is_frame(data):  # before workers are forked: see `settle`
        data = take_columns(data, "frame")

    with tempfile.TemporaryDirectory(prefix="unisono-") as scratch:
        report = Path(scratch) / "report.json"
        act = partial(_evaluate_part, classifier, Path(run), data, report)
        if not _run(act, classifier, workers, launcher):
            return {}
        found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    if not quiet:
        print_now(json.dumps(found) if as_json else "\n".join(_tables(found)))
    return found


@overload
def predict(
    run: str | Path, source: object, target: str | Path, *, workers: str | int = "auto", launcher: str | Launcher = AUTO
) -> int: ...
@overload
def predict(
    run: str | Path, source: Frame, target: None = None, *, workers: str | int = AUTO, launcher: str | Launcher = AUTO
) -> Frame: ...
def predict(
    run: str | Path, source: Any, target: str | Path | None = None, *, workers: str | int = AUTO,
    launcher: str | Launcher = AUTO,
) -> Any:  # fmt: skip
    """Return or write the columns of `source`, then `predicted`, one probability per class, and `unusable` (why a row
    has none).

    Rows stay in order and none is dropped. Columns of these names in `source` are replaced.

    Args:
        run: the run folder, or its model folder.
        source: a file, or whatever else can be read; or a pandas, Polars or Arrow frame.
        target: the file to write; the format goes by the name: .csv, .tsv, .jsonl or .parquet. In CSV and TSV a text
            that a spreadsheet would run has a single quote before it.
        workers: a number, or "auto": all GPUs, else all cores. The bits do not depend on it.
        launcher: what starts them, as for `unisono.train`.

    Returns:
        With a target the number of rows. Without one, a frame of the kind that was given, which shares its columns; a
        LazyFrame is collected first, lists give an Arrow table.

    Raises:
        DataError: the source cannot be read, the target's format is unknown, or a file is given without a target.
    """
    from unisono.data.write import check_target, write_table

    classifier = load(run)
    if target is None and isinstance(source, str | Path):
        raise DataError(
            f"predict({str(run)!r}, {str(source)!r}): a file needs another one to be written. Name it, or give a frame."
        )
    if target is not None:
        check_target(Path(target))
    frame = settle(source)
    texts = classifier.read(frame)
    found, speaks = _share_out(classifier, texts, workers, launcher)
    new = _new_columns(classifier, texts, found)
    if target is None:
        return _complete(frame, texts, new)
    if speaks:
        with whole_file(Path(target)) as part:
            write_table(add_columns(texts.table, new), part, Path(target).suffix)
        unusable = len(texts.texts) - len(texts.usable)
        print(
            f"{len(texts.texts):,} rows written to {target}"
            + (f", {unusable} of them without a prediction (see column unusable)" if unusable else "")
        )
    return len(texts.texts)


def _share_out(
    classifier: Classifier, texts: Texts, workers: str | int, launcher: str | Launcher
) -> tuple[np.ndarray, bool]:
    """Probabilities of the usable texts, computed by all workers; and whether this process speaks for them."""
    with tempfile.TemporaryDirectory(prefix="unisono-") as scratch:
        path = Path(scratch) / "probabilities.npy"
        act = partial(_predict_part, classifier, texts.good_texts, path, os.getpid())
        speaks = _run(act, classifier, workers, launcher)
        return np.load(path), speaks


def _predict_part(
    classifier: Classifier, texts: Sequence[str], path: Path, caller: int,
    assignment: RankAssignment, exchange: Exchange, device: torch.device, stop: Stop,
) -> None:  # fmt: skip
    """An `Act`: one worker's part of `predict`, which process `caller` has called."""
    found = classifier.probabilities(texts, exchange, device)
    if assignment.rank == 0 or os.getpid() == caller:  # one of torchrun's workers has the folder for itself
        np.save(path, found)


def _evaluate_part(
    classifier: Classifier, run: Path, data: object, report: Path,
    assignment: RankAssignment, exchange: Exchange, device: torch.device, stop: Stop,
) -> None:  # fmt: skip
    """An `Act`: one worker's part of `evaluate`. The first one writes the report."""
    source, left_out = _labelled(classifier, run, data)
    results = classifier.measure(source, exchange, device)
    if assignment.rank == 0:
        report.write_text(json.dumps(_report(classifier, results, left_out)), encoding="utf-8")


def _run(act: Act, classifier: Classifier, workers: str | int, launcher: str | Launcher) -> bool:
    """Run it in every worker; return whether this process speaks for them. (A partial function can be sent.)"""
    threads, device = classifier.recipe.train.threads, classifier.recipe.train.device
    return run_everywhere(
        act, workers=workers, microbatches=WORKERS_AT_MOST, threads=threads, device=device, launcher=launcher
    )


def _labelled(classifier: Classifier, run: Path, data: object) -> tuple[EncodedSamples, dict[str, int]]:
    """The samples to evaluate, and how many rows were left out for which reason."""
    if data is None:
        folder = Path(classifier.recipe.data.store)
        dataset = next(
            (
                open_dataset(path.parent)
                for path in folder.glob("*/manifest.json")
                if classifier.dataset in path.read_text()
            ),
            None,
        )
        source = dataset.split("test") if dataset else None
        if source is None:
            raise DataError(
                f"{str(run)!r} has no test samples of its own in {str(folder)!r}. Name a labelled file: unisono "
                "evaluate RUN DATA."
            )
        return source, {}
    texts = classifier.read(data)
    if texts.labels is None:
        raise DataError(
            f"the data has no column {classifier.recipe.data.label!r} of classes, without which it cannot be "
            "scored. Use predict, or name the column so."
        )
    numbers = {label: number for number, label in enumerate(classifier.labels)}
    left_out: dict[str, int] = {}
    kept: list[int] = []
    for row, (label, fault) in enumerate(zip(texts.labels, texts.faults, strict=True)):
        reason = fault or ("label missing" if label is None else "" if label in numbers else "unknown label")
        if reason:
            left_out[reason] = left_out.get(reason, 0) + 1
        else:
            kept.append(row)
    if not kept:
        raise DataError(f"no row can be scored: {left_out}. The model's classes are {', '.join(classifier.labels)}.")
    samples = classifier.encode([texts.texts[row] for row in kept], [numbers[str(texts.labels[row])] for row in kept])
    return samples, left_out


def _report(classifier: Classifier, results: Mapping[str, np.ndarray], left_out: Mapping[str, int]) -> dict[str, Any]:
    table = confusion(results["label"], results["predicted"], len(classifier.labels))
    classes = [dataclasses.asdict(scores) for scores in per_class(table, classifier.labels)]
    return {**summarise(results), "left_out": dict(left_out), "classes": classes, "confusion": table.tolist()}


def _tables(found: Mapping[str, Any]) -> list[str]:
    """The scores as text: a summary, a line per class, the confusion matrix."""
    lines = [
        f"samples {found['samples']:,}  loss {found['loss']:.4f}  accuracy {found['accuracy']:.2%}  macro-F1 "
        f"{found['macro_f1']:.4f}"
    ]
    lines += [f"left out: {number} rows, {reason}" for reason, number in found["left_out"].items()]
    width = max(len(scores["label"]) for scores in found["classes"])
    lines += ["", f"{'class':<{width + 4}}  precision  recall      F1  samples"]
    for number, scores in enumerate(found["classes"]):
        lines.append(
            f"{number:>2}  {scores['label']:<{width}}  {scores['precision']:>9.4f}  {scores['recall']:.4f}  "
            f"{scores['f1']:.4f}  {scores['samples']:>7,}"
        )
    digits = max(3, *(len(str(cell)) for row in found["confusion"] for cell in row))
    lines += [
        "",
        "confusion: rows are the true classes, columns the predicted ones",
        "    " + "".join(f"{n:>{digits + 1}}" for n in range(len(found["classes"]))),
    ]
    lines += [
        f"{number:>2}  " + "".join(f"{cell:>{digits + 1}}" for cell in row)
        for number, row in enumerate(found["confusion"])
    ]
    return lines


def _complete(source: Any, texts: Texts, new: Mapping[str, pa.Array]) -> Any:
    """What was given, with new columns: a frame of its kind, else an Arrow table."""
    return add_columns(source if is_frame(source) else texts.table, new)


def _new_columns(classifier: Classifier, texts: Texts, found: np.ndarray) -> dict[str, pa.Array]:
    """What prediction adds to a table, from the probabilities of its usable rows."""
    import pyarrow as pa

    rows = len(texts.texts)
    predicted: list[str | None] = [None] * rows
    probabilities = np.full((rows, len(classifier.labels)), np.nan)
    for row, values in zip(texts.usable, found, strict=True):
        predicted[row], probabilities[row] = classifier.labels[int(values.argmax())], values
    new = {"predicted": pa.array(predicted, pa.string())}
    for number, label in enumerate(classifier.labels):
        new[f"probability of {label}"] = pa.array(probabilities[:, number], from_pandas=True)
    new["unusable"] = pa.array([fault or None for fault in texts.faults], pa.string())
    return new
