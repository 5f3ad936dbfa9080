"""TensorBoard, W&B and MLflow: what they have of a run that lost a worker, was ended and was resumed, read back.

The run goes on from an older checkpoint than the last step that was logged, so some steps are trained a second time.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from histories import read_ledger, read_warnings

import unisono
from toy import make_toy

STEPS = list(range(1, 19))
OVERRIDES = (
    "checkpoint.every_steps=4",
    "data.validation_fraction=0.2",
    "evaluate.every_steps=6",
    "train.max_steps=18",
    "train.epochs=9",
)
FAULTS = ("kill(worker=1, step=3, phase=update)", "kill(worker=1, step=11, phase=update)")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of whoever runs the tests decides where they log to."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def log(name: str, folder: Path) -> Path:
    """Train with a logger as the docstring above says; return the run folder."""
    recipe, run = make_toy(folder), folder / "run"
    overrides = (*OVERRIDES, f'tracking.loggers=["{name}"]', 'tracking.project="mine"')
    given: dict[str, Any] = {"workers": 2, "run": run, "quiet": True, "overrides": overrides}
    with pytest.raises(unisono.WorkerError):
        unisono.train(recipe, **given, recovery={"restarts": 1}, faults=FAULTS)
    for newer in sorted((run / "checkpoints").iterdir())[1:]:
        shutil.rmtree(newer)
    unisono.train(recipe, **given, resume=True)
    assert [warning for warning in read_warnings(run) if "logger" in warning] == []
    return run


def expect(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Numbers by name, as the ledger has them: (step, value)."""
    done = read_ledger(run, "StepDone")
    scored = [line for line in read_ledger(run, "Evaluated") if line["split"] == "validation"]
    assert [line["step"] for line in done] == STEPS
    return {
        "train/loss": [(line["step"], line["loss"]) for line in done],
        "train/gradient_norm": [(line["step"], line["gradient_norm"]) for line in done],
        "train/learning_rate": [(line["step"], line["learning_rate"]) for line in done],
        "validation/loss": [(line["step"], line["scores"]["loss"]) for line in scored],
    }


def test_tensorboard_has_each_step_once(warm: None, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = log("tensorboard", tmp_path)
    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0})
    found.Reload()
    for name, values in expect(run).items():
        events = found.Scalars(name)
        assert [event.step for event in events] == [step for step, _ in values], name
        assert [event.value for event in events] == pytest.approx([value for _, value in values], rel=1e-6)
    assert len(found.Scalars("train/samples_per_second")) >= len(STEPS) - 2  # unknown where a worker was lost
    assert {"recovery", "checkpoint", "recipe", "summary/weights_sha256"} <= set(found.Tags()["tensors"])
    said = found.Tensors("recovery")[0].tensor_proto.string_val[0].decode()
    assert "worker 1 was killed by SIGKILL" in said
    assert b"train.samples_per_step | 16" in found.Tensors("recipe")[0].tensor_proto.string_val[0]


def read_offline(path: Path) -> list[Any]:
    """All records of a .wandb file."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    store, records = DataStore(), []
    store.open_for_scan(str(path))
    while (content := store.scan_data()) is not None:
        record = Record()
        record.ParseFromString(content)
        records.append(record)
    return records


@pytest.mark.slow
def test_wandb_has_each_step_once_in_two_offline_folders_of_one_run(warm: None, tmp_path: Path) -> None:
    run = log("wandb", tmp_path)
    files = sorted((run / "wandb").rglob("*.wandb"))
    identity = json.loads((run / "loggers" / "wandb.json").read_text())["memory"]["run_id"]
    assert [path.name for path in files] == [f"run-{identity}.wandb"] * 2  # so that `wandb sync` joins them
    records = [record for path in files for record in read_offline(path)]
    history: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for name in items.keys() - {"_step"}:
                history.setdefault(name, []).append((items["_step"], items[name]))
    for name, values in expect(run).items():
        assert history[name] == values, name
    begun = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert {one.project for one in begun} == {"mine"}
    config = {item.key: json.loads(item.value_json) for item in begun[0].config.update}
    assert config["train"]["samples_per_step"] == 16
    summary = {item.key: item.value_json for record in records for item in record.summary.update}
    assert "worker 1 was killed by SIGKILL" in summary["recovery at step 2"]
    assert json.loads(summary["weights_sha256"]) == json.loads((run / "summary.json").read_text())["weights_sha256"]
    ends = [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"]
    assert ends == [1, 0]


@pytest.mark.slow
def test_mlflow_has_each_step_once_in_one_run(warm: None, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    run = log("mlflow", tmp_path)
    store = f"sqlite:///{run / 'mlflow' / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=store, registry_uri=store)
    experiment = client.get_experiment_by_name("mine")
    (found,) = client.search_runs([experiment.experiment_id])
    for name, values in expect(run).items():
        history = sorted(client.get_metric_history(found.info.run_id, name), key=lambda metric: metric.step)
        assert [(metric.step, metric.value) for metric in history] == values, name
    assert found.info.status == "FINISHED"
    assert found.data.params["train.samples_per_step"] == "16"
    assert any(
        "worker 1 was killed by SIGKILL" in text for tag, text in found.data.tags.items() if tag.startswith("recovery.")
    )
    assert found.data.tags["summary.weights_sha256"] == json.loads((run / "summary.json").read_text())["weights_sha256"]


@pytest.mark.slow
def test_mlflow_finds_out_what_its_store_has_where_nothing_was_noted(tmp_path: Path) -> None:
    """A process that was killed between sending and noting: what was sent is not sent again."""
    from unisono.config import recipe as recipes
    from unisono.tracking.events import StepDone
    from unisono.tracking.logger import Cursor, LoggerContext
    from unisono.tracking.mlflow import MlflowLogger

    def open_again(memory: dict[str, str]) -> tuple[MlflowLogger, Cursor]:
        cursor = Cursor()
        context = LoggerContext(
            recipe=recipes.check({}).model_dump(mode="json"), run_folder=tmp_path, folder=tmp_path / "mlflow",
            is_shared=False, project="mine", cursor=cursor, memory=memory,
        )  # fmt: skip
        return MlflowLogger(context), cursor

    memory: dict[str, str] = {}
    logger, _ = open_again(memory)
    for step in (1, 2, 3):
        logger.observe(
            StepDone(
                step=step, epoch=0.1, loss=1.0, gradient_norm=1.0, learning_rate=0.1, samples=8, tokens=8, seconds=0.1
            )
        )
    logger.flush()
    _, cursor = open_again(memory)
    assert cursor.passed == {"train": 3}
