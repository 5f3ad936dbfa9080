"""A trained text classifier: how it is loaded, evaluated and used for prediction.

Owns the form in which a text recipe's model folder is read, and the columns and tables of its results.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np
from torch import nn

from unisono.config.recipe import Recipe
from unisono.config.wording import count, name_some, readable
from unisono.data.encoding.encode import load_encoder
from unisono.data.ingest.column_batch import list_values
from unisono.data.ingest.frames import add_columns, is_frame, settle, take_column
from unisono.data.ingest.labels import find_class, number_classes
from unisono.data.ingest.read import Texts, read_texts
from unisono.data.samples import EncodedSamples, join_shares, pack_share
from unisono.data.screening.rules import Examiner
from unisono.data.source import Source
from unisono.data.store import open_dataset
from unisono.errors import DataError, ModelError
from unisono.exchange.protocol import Exchange
from unisono.exchange.solo import Solo
from unisono.storage import known_hashes
from unisono.storage.model_files import REMEDY, load_weights
from unisono.storage.run_folder import FACTS
from unisono.tasks.metrics import Results, confusion, per_class, summarise
from unisono.tasks.text.classification import TextClassification
from unisono.tasks.trained_model import MeasureModel

if TYPE_CHECKING:
    import pyarrow as pa

    from unisono.data.encoding.encoder import Encoder

Frame = TypeVar("Frame")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Classifier:
    """A trained text classifier. `predict(texts)`, or `predict(frame)`, is enough for most uses."""

    module: nn.Module
    task: TextClassification
    encoder: Encoder
    labels: tuple[str, ...]
    recipe: Recipe
    dataset: str
    """SHA-256 of the dataset that it was trained on."""
    measure_model: MeasureModel

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """float64 [texts, classes]: the probability of each class for each text."""
        if not len(texts):
            return np.zeros((0, len(self.labels)))
        results = self.measure_model(self, self.task.predict, self.encode(texts))
        return results["probabilities"]

    def encode(
        self, texts: Sequence[str], labels: Sequence[int] | None = None, exchange: Exchange | None = None
    ) -> EncodedSamples:
        """Encode new texts, repaired and masked like those the model learned from; `labels` are class numbers. Workers
        that share an exchange encode a part each, and have all."""
        exchange = exchange or Solo()
        treat = Examiner(self.recipe.screen, self.labels).treat
        mine = pack_share(self.encoder, [treat(text)[0] for text in texts[exchange.rank :: exchange.workers]])
        return join_shares(exchange.gather_bytes(mine), labels)

    @overload
    def predict(self, texts: Sequence[str]) -> list[str]: ...
    @overload
    def predict(self, texts: Frame) -> Frame: ...
    def predict(self, texts: Any) -> Any:
        """The most likely class of each text, in a list; for a frame, the result of `unisono.predict`, without workers.

        Raises:
            DataError: a value is no text (in a frame such a row gets no prediction), or the frame lacks their column.
        """
        if is_frame(texts) or isinstance(texts, Mapping):
            frame = settle(texts)
            rows = self.read(frame)
            new = self.new_columns(rows, {"probabilities": self.probabilities(rows.good_texts)})
            return add_columns(frame if is_frame(frame) else rows.table, new)
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
        probabilities = self.probabilities(found)  # type: ignore[arg-type]
        if (lost := np.isnan(probabilities).any(1)).any():
            raise DataError(
                f"predict: the model gives NaN for {int(lost.sum()):,} of {len(found):,} texts, the first in row "
                f"{int(lost.argmax())}. Leave them out, or give a frame, where such a row gets no prediction."
            )
        return [self.labels[number] for number in probabilities.argmax(1)]

    def read(self, source: object) -> Texts:
        """The rows of a file or a frame, in the columns that the model's recipe names."""
        return read_texts(source, self.recipe.data.model_copy(update={"format": "auto"}))

    def samples(self, rows: Texts, exchange: Exchange | None = None) -> Source:
        """The usable texts as samples."""
        return self.encode(rows.good_texts, exchange=exchange)

    def labelled(self, rows: Texts, exchange: Exchange | None = None) -> tuple[Source, dict[str, int]]:
        """The rows as samples to be scored; and the number of rows left out, by reason."""
        if rows.labels is None:
            raise DataError(
                f"the data has no column {self.recipe.data.label!r} of classes, without which it cannot be "
                "scored. Use predict, or name the column so."
            )
        known = number_classes(self.labels)
        left_out: dict[str, int] = {}
        kept: dict[int, int] = {}
        for row, (label, fault) in enumerate(zip(rows.labels, rows.faults, strict=True)):
            number = None if label is None else find_class(known, label)
            reason = fault or ("no label" if label is None else "unknown label" if number is None else "")
            if reason or number is None:
                left_out[reason] = left_out.get(reason, 0) + 1
            else:
                kept[row] = number
        if not kept:
            told = ", ".join(f"{count(n, 'row')} ({reason})" for reason, n in left_out.items())
            found = next((f" The first label is {label!r}." for label in rows.labels if label is not None), "")
            raise DataError(
                f"no row can be scored: {told}. The model's classes are {name_some(self.labels)}.{found} Name the "
                f"column of classes {self.recipe.data.label!r}, and spell its values so."
            )
        return self.encode([rows.texts[row] for row in kept], list(kept.values()), exchange), left_out

    def remark(self, samples: Source, usable: Sequence[int] | None = None) -> str:
        """How many of the texts were cut."""
        cut = samples.cut if isinstance(samples, EncodedSamples) else 0
        if not cut:
            return ""
        share, limit = f"{100 * cut / len(samples):.1f} %", self.recipe.encode.max_tokens
        unit = count(limit, "word" if self.recipe.model.kind == "bag" else "token")
        return (
            f"{cut:,} of {count(len(samples), 'text')} ({share}) cut after {unit}, as the model was trained "
            "(encode.max_tokens): the rest of them is not read"
        )

    def own_test(self, run: Path) -> Source:
        """The test samples of the run's own dataset."""
        folder = Path(self.recipe.data.store)
        known_hashes.forget()  # each evaluation verifies what it reads
        dataset = next(
            (open_dataset(path.parent) for path in folder.glob("*/manifest.json") if self.dataset in path.read_text()),
            None,
        )
        source = dataset.split("test") if dataset else None
        if source is None:
            raise DataError(
                f"{str(run)!r} has no test samples of its own in {str(folder)!r}. Name a labelled file: unisono "
                "evaluate RUN DATA."
            )
        return source

    def new_columns(self, rows: Texts, results: Results) -> dict[str, pa.Array]:
        """`predicted`, one probability per class, and `unusable`: why a row has none."""
        import pyarrow as pa

        count, faults = len(rows.texts), list(rows.faults)
        predicted: list[str | None] = [None] * count
        probabilities = np.full((count, len(self.labels)), np.nan)
        for row, values in zip(rows.usable, results.get("probabilities", ()), strict=True):
            if np.isnan(values).any():
                faults[row] = "the model gives NaN"
            else:
                predicted[row], probabilities[row] = self.labels[int(values.argmax())], values
        new = {"predicted": pa.array(predicted, pa.string())}
        for number, label in enumerate(self.labels):
            new[f"probability of {label}"] = pa.array(probabilities[:, number], from_pandas=True)
        new["unusable"] = pa.array([fault or None for fault in faults], pa.string())
        return new

    def report(self, results: Results) -> dict[str, Any]:
        """The scores, a table of the classes and the confusion matrix."""
        table = confusion(results["label"], results["predicted"], len(self.labels))
        classes = [dataclasses.asdict(scores) for scores in per_class(table, self.labels)]
        return {**summarise(results, self.task.metrics()), "classes": classes, "confusion": table.tolist()}

    def describe(self, report: Mapping[str, Any]) -> list[str]:
        """The scores as text: a summary, a line per class, the confusion matrix."""
        lines = [
            f"samples {report['samples']:,}  loss {report['loss']:.4f}  accuracy {report['accuracy']:.2%}  macro-F1 "
            f"{report['macro_f1']:.4f}"
        ]
        names = [readable(scores["label"]).replace("\n", "\\n") for scores in report["classes"]]  # one line each
        width = max(map(len, names))
        lines += ["", f"{'class':<{width + 4}}  precision  recall      F1  samples"]
        for number, scores in enumerate(report["classes"]):
            lines.append(
                f"{number:>2}  {names[number]:<{width}}  {scores['precision']:>9.4f}  {scores['recall']:.4f}  "
                f"{scores['f1']:.4f}  {scores['samples']:>7,}"
            )
        digits = max(3, *(len(str(cell)) for row in report["confusion"] for cell in row))
        lines += [
            "",
            "confusion: rows are the true classes, columns the predicted ones",
            "    " + "".join(f"{n:>{digits + 1}}" for n in range(len(report["classes"]))),
        ]
        lines += [
            f"{number:>2}  " + "".join(f"{cell:>{digits + 1}}" for cell in row)
            for number, row in enumerate(report["confusion"])
        ]
        return lines


def load_classifier(folder: Path, recipe: Recipe, facts: Mapping[str, Any], measure_model: MeasureModel) -> Classifier:
    """Load the text classifier of a model folder.

    Raises:
        ModelError: weights and encoder do not belong together.
        DamagedError: a file is not readable, or the weights are no numbers.
    """
    labels, dataset = facts.get("labels"), facts.get("dataset")
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
        raise ModelError(f"{str(folder)!r}: 'labels' = {labels!r:.99}; allowed are the names of the classes. {REMEDY}")
    if twice := [label for number, label in enumerate(labels) if label in labels[:number]]:
        raise ModelError(f"{str(folder)!r}: the class {twice[0]!r} is in 'labels' twice. {REMEDY}")
    if not isinstance(dataset, str):
        raise ModelError(f"{str(folder)!r}: 'dataset' = {dataset!r:.99}; allowed is a SHA-256. {REMEDY}")
    encoder = load_encoder(folder)
    if recipe.model.kind == "pretrained":  # its configuration lies beside the weights; the original is not needed
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"folder": str(folder)})})
    task = TextClassification(
        model=recipe.model,
        classes=len(labels),
        vocabulary_size=encoder.vocabulary_size,
        padding=encoder.padding,
        max_tokens=recipe.encode.max_tokens,
    )
    try:
        module = task.build()
    except (RuntimeError, MemoryError, OverflowError) as error:  # of sizes that no memory holds
        raise ModelError(f"{str(folder)!r}: its model cannot be built: {error}. {REMEDY}") from None
    asked_by = f"the recipe, the encoder and the {len(labels)} classes in {FACTS}"
    load_weights(module, folder / "model.safetensors", asked_by)
    return Classifier(
        module=module.eval(),
        task=task,
        encoder=encoder,
        labels=tuple(labels),
        recipe=recipe,
        dataset=dataset,
        measure_model=measure_model,
    )
