"""MLflow: one run of theirs per run folder, on a tracking server or in an SQLite file.

MLFLOW_TRACKING_URI names the place; if it is not set, it is `mlflow.db` in the logger's folder. MLflow's own default is
SQLite since 3.7, and MLflow no longer develops its folder of files. The small package `mlflow-skinny` is enough. Owns
the form of a run in MLflow.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Any

from unisono.tracking import events
from unisono.tracking.logger import LoggerContext, describe, flatten, measure

ID = "run_id"
MOST_METRICS = 1000  # in one request, the limit of MLflow's API
MOST_PARAMETERS = 100
MOST_CHARACTERS = 5000  # of a tag; of a parameter 6,000


class MlflowLogger:
    """A run in MLflow. Numbers are collected, and sent about once a second."""

    def __init__(self, context: LoggerContext) -> None:
        for name in ("mlflow", "alembic"):  # they write to standard error about each table that they make
            logging.getLogger(name).setLevel(logging.WARNING)
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._new_metric, self._new_parameter = Metric, Param
        self._collected: list[Any] = []
        self._status = "KILLED"
        location = os.environ.get("MLFLOW_TRACKING_URI")
        artifacts = None
        if not location:
            context.folder.mkdir(parents=True, exist_ok=True)
            location = f"sqlite:///{(context.folder / 'mlflow.db').resolve()}"
            artifacts = (context.folder / "artifacts").resolve().as_uri()
        self._client: Any = MlflowClient(tracking_uri=location, registry_uri=location)
        if ID in context.memory:
            self._go_on(context)
        else:
            self._begin(context, artifacts)

    def _begin(self, context: LoggerContext, artifacts: str | None) -> None:
        experiment = self._client.get_experiment_by_name(context.project)
        number = experiment.experiment_id if experiment else self._client.create_experiment(context.project, artifacts)
        run = self._client.create_run(number, run_name=context.run_folder.name)
        self._id = context.memory[ID] = run.info.run_id
        parameters = [
            self._new_parameter(name, str(value)[:MOST_CHARACTERS]) for name, value in flatten(context.recipe).items()
        ]
        for first in range(0, len(parameters), MOST_PARAMETERS):
            self._client.log_batch(self._id, params=parameters[first : first + MOST_PARAMETERS])

    def _go_on(self, context: LoggerContext) -> None:
        """Read what the store has: an earlier process may have been killed between sending and noting it."""
        self._id = context.memory[ID]
        self._client.update_run(self._id, status="RUNNING")
        for name in self._client.get_run(self._id).data.metrics:
            history = self._client.get_metric_history(self._id, name)
            context.cursor.reach(name.partition("/")[0], max(metric.step for metric in history))

    def observe(self, event: events.Event) -> None:
        if isinstance(event, events.RunEnded):
            self._status = "FINISHED"
            for name, value in flatten(event.summary).items():
                self._client.set_tag(self._id, f"summary.{name}", str(value)[:MOST_CHARACTERS])
        elif told := describe(event):
            kind, sentence, step = told
            self._client.set_tag(self._id, f"{kind}.step-{step:08d}", sentence[:MOST_CHARACTERS])
        elif numbers := measure(event):
            now, step = int(time.time() * 1000), event.step  # type: ignore[union-attr]
            self._collected += [self._new_metric(name, value, now, step) for name, value in numbers.items()]

    def flush(self) -> None:
        while self._collected:
            self._client.log_batch(self._id, metrics=self._collected[:MOST_METRICS])
            del self._collected[:MOST_METRICS]

    def close(self) -> None:
        self.flush()
        self._client.set_terminated(self._id, self._status)


def open_logger(context: LoggerContext) -> MlflowLogger:
    """Begin or continue the run's log."""
    return MlflowLogger(context)
