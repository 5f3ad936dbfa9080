"""From what a recipe names to a dataset: read and examine, decide, learn the encoder, encode, store.

Owns the order of the stages, the classes, and when an earlier result is used again. Each stage has its own module.

1. *Staging*: every part of the input is read, its records examined (`rules.py`) and written to a file (`staging.py`).
2. *Decide*: the rules on all records together need only a few numbers of each (`screen.py`); texts are not read.
3. *Learn*: the encoder, where it is learned, from the staged training texts (`encode.py`).
4. *Encode*: the kept records are encoded, one staged record batch at a time (`parts.py`).
5. *Store*: the parts are put one after the other (`store.py`).

1, 4 and much of 3 run in several processes. Parts are cut by the input's bytes, and taken in its order, so the dataset
does not depend on the number of processes. What 1, 3 and 4 have finished lies in a hidden folder beside the dataset's,
and a preparation that was killed continues from it, unless the machine itself was restarted.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from unisono.config.recipe import Recipe
from unisono.config.sections import Screen
from unisono.data import store
from unisono.data.encoding import encode
from unisono.data.encoding.encoder import Encoder
from unisono.data.encoding.parts import Parts, add_reviews, read_quarantine_lines, write_part
from unisono.data.ingest.column_batch import ColumnBatch, FieldFault
from unisono.data.ingest.input_splits import read_input_split
from unisono.data.ingest.inputs import Input, find_inputs, make_key
from unisono.data.ingest.read import LABEL_LIST, find_column
from unisono.data.ingest.staging import StagedRecords, stage
from unisono.data.screening.decisions import Decisions, load_records, refuse, refuse_absent_labels, show, tell_counts
from unisono.data.screening.report_page import render
from unisono.data.screening.rules import Examiner, describe_treatments
from unisono.data.screening.screen import SPLITS, screen
from unisono.data.share import Share
from unisono.errors import DataError, RunFolderError, UnisonoError
from unisono.storage.file_lock import hold
from unisono.storage.files import boot_id, facts_sha256, remove_leftovers, whole_folder, write_text

REPORT = "report.html"
LARGE_BYTES = 2**25  # of samples; above it, processes for storing them are worth their start
_DEFAULTS = Screen().model_dump()


def ignore(message: str) -> None:
    """Ignore all messages."""


def prepare(
    recipe: Recipe,
    *,
    workers: int = 1,
    frames: Mapping[str, object] | None = None,
    notify: Callable[[str], None] = ignore,
    progress: bool | None = False,
) -> store.Dataset:
    """Make the dataset that a recipe describes, or open it if it was made before.

    Args:
        recipe: with absolute paths, or relative to the current folder.
        workers: processes; the dataset's bytes do not depend on it.
        frames: frames or lists by split (train, validation, test), instead of the recipe's files.
        notify: called with one line about each thing that is done.
        progress: None: a bar for each stage, if stderr is a terminal.

    Raises:
        DataError: a file, column or label is missing, no record is left, data.strict and one is quarantined, or the
        disk is full. RecipeError: splits are given twice, or take all records. DamagedError: the dataset made before is
        damaged.
    """
    share = Share(workers=workers, progress=progress)
    inputs = find_inputs(recipe.data, frames or {}, share)
    key = make_key(recipe, inputs)
    folder = Path(recipe.data.store) / facts_sha256(key)[:24]
    if not folder.exists():
        _make_store(folder.parent)
        with hold(folder.with_name(f".{folder.name}.work.lock")):
            if not folder.exists():
                made = _make(recipe, inputs, key, folder, share, notify)
                return made if workers == 1 else store.open_dataset(folder)  # verified here, once for all workers
    notify(f"dataset {folder}: prepared before")
    dataset = store.open_dataset(folder)
    if recipe.data.strict and dataset.quarantined:
        refuse(dataset.quarantined, next(store.read_quarantine(folder)))
    return dataset


def _make(
    recipe: Recipe,
    inputs: Mapping[str, Input],
    key: Mapping[str, object],
    folder: Path,
    share: Share,
    notify: Callable[[str], None],
) -> store.Dataset:
    work = folder.with_name(f".{folder.name}.work")
    try:
        _enter(work, notify)
        dataset = _Stages(recipe, inputs, work, share, notify).make(folder, key)
    except RunFolderError as error:
        shutil.rmtree(work, ignore_errors=True)
        raise DataError(f"{error} Set data.store to a folder with room for about three times the input.") from None
    except UnisonoError:
        shutil.rmtree(work, ignore_errors=True)  # a second try could not use it
        raise
    shutil.rmtree(work, ignore_errors=True)
    notify(f"dataset {folder}: written")
    return dataset


def _enter(work: Path, notify: Callable[[str], None]) -> None:
    """Make the work folder of a preparation, or continue with it. Its files are not forced to the disk, so files from
    before the machine's start are not trusted."""
    mark = work / "boot"
    if mark.is_file() and mark.read_text(encoding="utf-8") == boot_id():
        notify(f"going on with what {work} holds")
        remove_leftovers(work)
        return
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_text(mark, boot_id())


class _Stages:
    """A preparation at work, stage by stage."""

    def __init__(
        self,
        recipe: Recipe,
        inputs: Mapping[str, Input],
        work: Path,
        share: Share,
        notify: Callable[[str], None],
    ) -> None:
        self._recipe = recipe
        self._inputs = inputs
        self._work = work
        self._share = share
        self._notify = notify
        self._parts = [(split, part) for split, one in inputs.items() for part in one.parts]
        data, screening = recipe.data, recipe.screen
        self._cut = bool(data.validation_fraction or data.test_fraction)
        self._near = "refuse" in (screening.near_duplicates, screening.contradicted)

    def make(self, folder: Path, key: Mapping[str, object]) -> store.Dataset:
        """Run all stages; return the dataset."""
        data = self._recipe.data
        staged = self._stage()
        given = [split for split, _ in self._parts]
        records, classes = load_records(staged, given, cut=self._cut, near_ones=self._near)
        refuse_absent_labels(classes, data.labels)
        shares = {"validation": data.validation_fraction, "test": data.test_fraction}
        screen(records, self._recipe.screen, tuple(self._inputs), **shares)
        decided = Decisions(staged, given, records, classes)
        if decided.counts:
            gone, reasons = int(np.count_nonzero(~records.kept)), tell_counts(decided.counts)
            self._notify(f"quarantined {gone} of {len(records.reasons)} records: {reasons}")
            if data.strict:
                refuse(decided.counts, next(decided.list_quarantined()))
        splits = [split for split in SPLITS if split in self._inputs or shares.get(split)]
        _refuse_empty_splits(decided, splits)
        labels = decided.choose_labels(data.labels)
        encoder = self._learn(decided)
        told = ", ".join(f"{decided.count_kept(split)} {split}" for split in splits)
        self._notify(f"encoding {told} records")
        parts = self._encode(decided, encoder)
        size = sum(path.stat().st_size for path in parts)
        return store.write_dataset(
            folder,
            splits={split: Parts(paths=parts, split=split) for split in splits},
            labels=labels,
            encoder=encoder,
            quarantine=read_quarantine_lines(parts),
            notes={"quarantined": decided.counts, "made_from": dict(key)},
            pages={REPORT: self._draw(parts)},
            do=self._share.call if size > LARGE_BYTES else store.one_by_one,
        )

    def _stage(self) -> list[StagedRecords]:
        """Read and examine every part of the input; return the staged records of each."""
        for one in self._inputs.values():
            self._notify(f"reading {one.name}")
            for note in one.notes:
                self._notify(note)
        data = self._recipe.data
        examiner = Examiner(self._recipe.screen, data.labels)
        paths = [self._work / f"staged-{number:06}" for number in range(len(self._parts))]

        def read(number: int) -> None:
            split, part = self._parts[number]
            place = self._cut and split == "train"
            if isinstance(part, ColumnBatch):
                stage(paths[number], [part], part.name, data, examiner, place=place, near=self._near)
                return
            read = read_input_split(part, data, (*data.texts, data.label))
            name, columns = part.source, part.columns
            stage(paths[number], read, name, data, examiner, place=place, near=self._near, columns=columns)

        self._share.do(read, [number for number, path in enumerate(paths) if not path.exists()])
        staged = [StagedRecords(path) for path in paths]
        for split, one in self._inputs.items():
            mine = [file for file, (of, _) in zip(staged, self._parts, strict=True) if of == split]
            if not any(file.facts.rows for file in mine):
                raise DataError(f"{one.name!r}: there is no record in it. Give a file with at least one.")
            _refuse_absent_columns(mine, [*(("text", name) for name in data.texts), ("label", data.label)])
        return staged

    def _learn(self, decided: Decisions) -> Encoder:
        """Return the encoder; a learned one is kept, so that a preparation that is continued can use it."""
        folder = self._work / "encoder"
        if folder.exists():
            return encode.load_encoder(folder)
        encoder = encode.choose_encoder(self._recipe, decided.training_texts(), workers=self._share.workers)
        with whole_folder(folder) as part:
            encoder.save(part)
        return encoder

    def _encode(self, decided: Decisions, encoder: Encoder) -> list[Path]:
        """Encode the kept records; return the files of the parts, in order."""
        limit = self._recipe.encode.max_tokens
        paths = [self._work / f"part-{batch.staged:06}-{batch.number:06}" for batch in decided.batches]

        def write(number: int) -> None:
            batch = decided.batches[number]
            write_part(paths[number], decided.staged[batch.staged], batch.number, decided.fates(batch), encoder, limit)

        self._share.do(write, [number for number, path in enumerate(paths) if not path.exists()])
        return paths

    def _draw(self, parts: Sequence[Path]) -> str:
        """Return the report page."""
        counts_words = encode.find_settings(self._recipe)["kind"] == "ngrams"
        facts = [
            (f"{split} from", f"{one.name} ({one.kind}), sha256 {one.sha256}") for split, one in self._inputs.items()
        ]
        changed = {key: value for key, value in self._recipe.screen.model_dump().items() if value != _DEFAULTS[key]}
        facts += [(f"screen.{key}", str(value)) for key, value in changed.items()]
        return render(
            add_reviews(parts),
            title=f"Data from {self._inputs['train'].name}",  # names only what decides the dataset
            max_tokens=0 if counts_words else self._recipe.encode.max_tokens,
            facts=facts,
            mended=describe_treatments(self._recipe.screen),
        )


def _make_store(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        told = f"cannot be written: {error.strerror or error}. Set data.store to a folder that can"
        raise DataError(f"{str(folder)!r}: {told}.") from None


def _refuse_absent_columns(files: Sequence[StagedRecords], wanted: Sequence[tuple[str, str]]) -> None:
    """Raise DataError if no column batch of a file has a column that is needed: pairs of key and name."""
    names: dict[str, dict[str, list[object]]] = {}
    first: dict[str, StagedRecords] = {}
    for file in files:
        names.setdefault(file.facts.name, {}).update({name: [] for name in file.facts.names})
        if file.facts.rows:
            first.setdefault(file.facts.name, file)
    for name, columns in names.items():
        faults = {}
        if not columns and name in first:
            row = first[name].batch(0).slice(0, 1).to_pylist()[0]
            faults = {0: FieldFault(reason=row["reason"], raw=row["text"])}
        for key, column in wanted:
            find_column(ColumnBatch(name=name, rows=0, columns=columns, faults=faults), column, key)


def _refuse_empty_splits(decided: Decisions, splits: Sequence[str]) -> None:
    """Raise DataError if no record is left for a split."""
    for split in splits:
        if decided.count_kept(split):
            continue
        if decided.counts.get(split):
            first = show(next(line for line in decided.list_quarantined() if line["split"] == split))
            reasons = tell_counts(decided.counts)
            lists = any(LABEL_LIST in counted for counted in decided.counts.get(split, ()))
            remedy = " Set data.label to a column of classes; to learn lists, see docs/tasks.md." if lists else ""
            raise DataError(f"{split}: no record can be used: {reasons}. First: {first}.{remedy}")
        raise DataError(f"{split}: no record is left for it. Raise data.{split}_fraction, or give more records.")
