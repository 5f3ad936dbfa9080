"""A trained model used on new data: load, evaluate and predict, for any task.

Owns reading and writing, and the division of work among workers. A task's `TrainedModel` turns rows into samples, and
results into columns and scores.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch

from unisono.api.arguments import as_path, count_or_auto
from unisono.backends.torch_backend import TorchBackend
from unisono.config import recipe as recipes
from unisono.config.small_files import read_small
from unisono.config.wording import count, hide_secrets
from unisono.data.ingest.frames import add_columns, is_frame, settle, take_columns
from unisono.data.source import Source
from unisono.determinism import instruction_sets
from unisono.engine.evaluation import measure_all
from unisono.engine.replica import tensors_sha256
from unisono.errors import DamagedError, DataError
from unisono.exchange.protocol import Exchange
from unisono.exchange.solo import Solo
from unisono.runtime.launchers.launcher import AUTO, Launcher, run_everywhere
from unisono.runtime.launchers.rank_assignment import RankAssignment
from unisono.runtime.worker import Act, Stop
from unisono.storage.files import to_json, whole_file
from unisono.storage.model_files import REMEDY, check_files, read_model_facts
from unisono.storage.run_folder import FACTS, model_folder, read_recipe
from unisono.tasks.kinds import find_kind, named_kind
from unisono.tasks.task import Task
from unisono.tasks.trained_model import TrainedModel
from unisono.tracking.terminal import print_now, warn_now

WORKERS_AT_MOST = 65_536

Frame = TypeVar("Frame")
TaskName = type[Task] | str | None


def load(run: str | Path, *, task: TaskName = None) -> Any:
    """Load the model of a finished run: a `Classifier` for texts, a `TableModel` for a task of your own.

    Args:
        run: the run folder, or its model folder.
        task: the class of the task, or "module:Class". Needed where the run's task is neither a preset nor of an
            installed package: a run folder does not decide which code is imported.

    Raises:
        RunFolderError: the run has no finished model.
        ModelError: the model cannot be used, or its task has to be named.
        DamagedError: a file is not readable.
    """
    folder = model_folder(as_path("run", run))
    facts = read_model_facts(folder / FACTS)
    recipe = recipes.check(facts["recipe"])
    check_files(folder, facts)
    kind = find_kind(recipe.task.kind, trusted=False) if task is None else named_kind(task)
    model = kind.load(folder, recipe, facts, measure_model)
    _compare_with_summary(folder.parent / "summary.json", model)
    return model


def _compare_with_summary(path: Path, model: TrainedModel) -> None:
    """Refuse a model whose weights are not those that its run reported. A folder without a run has no such report."""
    if not path.exists():
        return
    try:
        reported = json.loads(read_small(path)).get("weights_sha256")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{str(path)!r} is damaged ({error}). {REMEDY}") from None
    if reported is not None and tensors_sha256(model.module.state_dict()) != reported:
        raise DamagedError(
            f"{str(path.parent)!r}: the weights in the folder model are not those in summary.json: their "
            f"weights_sha256 is not {reported}. {REMEDY}"
        )


def _load_to_compute(run: str | Path, task: TaskName, workers: object) -> Any:
    """As `load`, in the instruction sets that the run was trained with: they are limited before anything computes."""
    count_or_auto(workers)
    recipe = read_recipe(as_path("run", run))
    if recipe is not None:
        instruction_sets.limit(recipe.train.numerics)
    return load(run, task=task)


def evaluate(
    run: str | Path,
    data: object = None,
    *,
    workers: str | int = "auto",
    task: TaskName = None,
    launcher: str | Launcher = AUTO,
    as_json: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Score a run's model on labelled data (a file, or a pandas, Polars or Arrow frame), or on the run's own test
    samples; print and return the scores.

    Every sample is visited exactly once, whatever the number of workers, and the figures are the same bits.

    Args:
        task: as for `load`.
        launcher: what starts the workers, as for `unisono.train`.

    Raises:
        DataError: the data cannot be used, or the run has no test samples of its own.
        NumericsError: the run's numerics are portable, and this process is not limited to them.
    """
    model = _load_to_compute(run, task, workers)
    if is_frame(data):  # before workers are forked: see `settle`
        data = take_columns(data, "frame")
    own = model.own_test(Path(run)) if data is None else None  # once, for all workers
    rows = None if data is None else model.read(data)

    with tempfile.TemporaryDirectory(prefix="unisono-") as scratch:
        report = Path(scratch) / "report.json"
        act = partial(_evaluate_part, model, own, rows, report)
        if not _run(model, act, workers, launcher):
            return {}
        found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    if "remark" in found:
        warn_now(found["remark"])
    if not quiet:
        print_now(to_json(found) if as_json else "\n".join(_describe(model, found)))
    return found


@overload
def predict(
    run: str | Path,
    source: object,
    target: str | Path,
    *,
    workers: str | int = "auto",
    task: TaskName = None,
    launcher: str | Launcher = AUTO,
) -> int: ...
@overload
def predict(
    run: str | Path,
    source: Frame,
    target: None = None,
    *,
    workers: str | int = "auto",
    task: TaskName = None,
    launcher: str | Launcher = AUTO,
) -> Frame: ...
def predict(
    run: str | Path,
    source: Any,
    target: str | Path | None = None,
    *,
    workers: str | int = "auto",
    task: TaskName = None,
    launcher: str | Launcher = AUTO,
) -> Any:
    """Return or write the columns of `source`, then the model's predictions, and `unusable` (why a row has none).

    A text classifier gives `predicted` and one probability per class; your own task gives what its `predict` returns.
    Rows stay in order and none is dropped. Columns of these names in `source` are replaced.

    Args:
        run: the run folder, or its model folder.
        source: a file, or any other location that can be read; or a pandas, Polars or Arrow frame.
        target: the file to write; its name decides the format: .csv, .tsv, .jsonl or .parquet. In CSV and TSV a text
            that a spreadsheet would run has a single quote before it.
        workers: a number, or "auto": all GPUs, else all cores. The bits do not depend on it.
        task: as for `load`.
        launcher: what starts the workers, as for `unisono.train`.

    Returns:
        With a target, the number of rows. Without one, a frame of the same kind, which shares the frame's columns;
        a LazyFrame is collected first, lists give an Arrow table.

    Raises:
        DataError: the source cannot be read, the target's format is unknown, or a file is given without a target.
        ContractError: the task does not define `predict`.
        NumericsError: as for `evaluate`.
    """
    from unisono.data.write import check_target, write_table

    target = None if target is None else as_path("target", target)
    model = _load_to_compute(run, task, workers)
    if target is None and isinstance(source, str | Path):
        raise DataError(
            f"predict({str(run)!r}, {hide_secrets(str(source))!r}): a file needs another one to be written. Name it, "
            "or give a frame."
        )
    if target is not None:
        check_target(Path(target))
        given = isinstance(source, str | Path) and Path(source).exists()
        if given and Path(target).exists() and Path(source).samefile(target):
            raise DataError(f"predict: {str(target)!r} is the input as well, and would be lost. Name another output.")
    frame = settle(source)
    rows = model.read(frame)
    results, speaks = _share_out(model, rows, workers, launcher, target is None) if len(rows.usable) else ({}, True)
    if target is None:
        return add_columns(frame if is_frame(frame) else rows.table, model.new_columns(rows, results))
    if speaks:
        with whole_file(Path(target)) as part:
            new = model.new_columns(rows, results)
            write_table(add_columns(rows.table, new), part, Path(target).suffix)
        _tell_written(len(rows.faults), len(rows.faults) - new["unusable"].null_count, target)
    return len(rows.faults)


def _tell_written(rows: int, unusable: int, target: str | Path) -> None:
    without = f", {unusable:,} of them without a prediction (see column unusable)" if unusable else ""
    print_now(f"{count(rows, 'row')} written to {target}{without}")


def _share_out(
    model: TrainedModel, rows: Any, workers: str | int, launcher: str | Launcher, everywhere: bool
) -> tuple[dict[str, np.ndarray], bool]:
    """The model's predictions for the usable rows, computed by all workers; and whether this process has to return the
    result. everywhere: each process that has called `predict` gets them; false: only one that writes them."""
    with tempfile.TemporaryDirectory(prefix="unisono-") as scratch:
        path = Path(scratch) / "results.npz"
        act = partial(_predict_part, model, rows, path, os.getpid(), everywhere)
        speaks = _run(model, act, workers, launcher)
        if not path.exists():
            return {}, speaks
        with np.load(path) as found:
            keys = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            return {name: found[f"arr_{place}"] for place, name in enumerate(keys)}, speaks


def _predict_part(
    model: TrainedModel, rows: Any, path: Path, caller: int, everywhere: bool,
    assignment: RankAssignment, exchange: Exchange, device: torch.device, stop: Stop,
) -> None:  # fmt: skip
    """An `Act`: one worker's part of `predict`, which process `caller` has called."""
    mine = everywhere and os.getpid() == caller  # under torchrun, where each worker has a folder of its own
    everywhere = exchange.gather_bytes(bytes([mine])) == [b"\1"] * exchange.workers
    source = model.samples(rows, exchange)
    found = measure_model(model, model.task.predict, source, exchange, device, everywhere=everywhere)
    if assignment.rank == 0 and (remark := model.remark(source, rows.usable)):
        warn_now(remark)
    if assignment.rank == 0 or everywhere:
        path.with_suffix(".json").write_text(json.dumps(list(found)), encoding="utf-8")
        np.savez(path, *found.values())


def _evaluate_part(
    model: TrainedModel, own: Source | None, rows: Any, report: Path,
    assignment: RankAssignment, exchange: Exchange, device: torch.device, stop: Stop,
) -> None:  # fmt: skip
    """An `Act`: one worker's part of `evaluate`, on the run's own samples or on rows. Worker 0 writes the report."""
    source, left_out = model.labelled(rows, exchange) if own is None else (own, {})
    results = measure_model(model, model.task.measure, source, exchange, device, everywhere=False)
    if assignment.rank == 0:
        facts = {**model.report(results), "left_out": left_out}
        if remark := model.remark(source):
            facts["remark"] = remark
        report.write_text(json.dumps(facts), encoding="utf-8")


def _run(model: TrainedModel, act: Act, workers: str | int, launcher: str | Launcher) -> bool:
    """Run it in every worker; return whether this process has the result. (A partial function can be sent.)"""
    threads, device = model.recipe.train.threads, model.recipe.train.device
    return run_everywhere(
        act, workers=workers, microbatches=WORKERS_AT_MOST, threads=threads, device=device, launcher=launcher
    )


def measure_model(
    model: TrainedModel,
    measure: Any,
    source: Source,
    exchange: Exchange | None = None,
    device: torch.device = torch.device("cpu"),  # noqa: B008 - immutable
    everywhere: bool = True,
) -> dict[str, np.ndarray]:
    """Results of `measure`, a method of the model's task, for every sample, in sample order; `everywhere`: see
    `measure_all`."""
    recipe = model.recipe
    return measure_all(
        TorchBackend(model.task, model.module.to(device), precision=recipe.train.precision),
        measure,
        source,
        exchange or Solo(device),
        device=device,
        samples_per_microbatch=recipe.evaluate.samples_per_microbatch,
        seed=recipe.train.seed,
        everywhere=everywhere,
    )


def _describe(model: TrainedModel, found: Mapping[str, Any]) -> list[str]:
    first, *rest = model.describe(found)
    return [
        first,
        *(f"left out: {count(number, 'row')} ({reason})" for reason, number in found["left_out"].items()),
        *rest,
    ]
