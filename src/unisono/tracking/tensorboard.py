"""TensorBoard: event files, written with the `tensorboard` package's own record writer.

That writer is chosen over torch.utils.tensorboard, which wraps the same package, imports more, and writes from a thread
that hides a full disk. Owns the form of a run in TensorBoard: scalars, texts, hyperparameters.
"""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING, Any

from unisono.tracking import events
from unisono.tracking.logger import LoggerContext, describe, flatten, measure

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary


class TensorBoardLogger:
    """Writes one event file per process that trains the run. Each file first cancels what earlier files have after the
    last step known to be on disk, so that no step appears twice."""

    def __init__(self, context: LoggerContext) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._recipe = context.recipe
        folder = context.folder / context.run_folder.name if context.is_shared else context.folder
        folder.mkdir(parents=True, exist_ok=True)
        begun = any(folder.iterdir())
        name = f"events.out.tfevents.{time.time_ns() // 10**9:010d}.{socket.gethostname()}.{os.getpid()}.0"
        self._writer = RecordWriter((folder / name).open("ab"))
        self._write(0, file_version="brain.Event:2")
        if begun:
            self._write(context.cursor.step + 1, session_log=SessionLog(status=SessionLog.START))

    def observe(self, event: events.Event) -> None:
        if isinstance(event, events.RunStarted):
            self._start(event)
        elif isinstance(event, events.RunEnded):
            from tensorboard.compat.proto.event_pb2 import SessionLog

            for name, value in flatten(event.summary).items():
                self._write_text(f"summary/{name}", str(value), event.summary["steps"])
            self._write(event.summary["steps"], session_log=SessionLog(status=SessionLog.STOP))
        elif told := describe(event):
            kind, sentence, step = told
            self._write_text(kind, sentence, step)
        elif numbers := measure(event):
            self._write_scalars(numbers, event.step)  # type: ignore[union-attr]

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _start(self, started: events.RunStarted) -> None:
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        values = flatten(self._recipe)
        step = started.start_step
        self._write(step, summary=hparams_pb(values, trial_id=started.folder))
        rows = "\n".join(f"| {name} | {value} |" for name, value in values.items())
        self._write_text("recipe", f"| key | value |\n|---|---|\n{rows}", step)

    def _write_scalars(self, numbers: dict[str, float], step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._write(step, summary=Summary(value=values))

    def _write_text(self, tag: str, text: str, step: int) -> None:
        self._write(step, summary=_text(tag, text))

    def _write(self, step: int, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.write(Event(wall_time=time.time(), step=step, **content).SerializeToString())


def _text(tag: str, text: str) -> Summary:
    """A summary that TensorBoard's text page shows as Markdown."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.plugins.text.metadata import create_summary_metadata

    tensor = TensorProto(
        dtype="DT_STRING",
        string_val=[text.encode()],
        tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
    )
    metadata = create_summary_metadata(display_name=tag, description="")
    return Summary(value=[Summary.Value(tag=tag, tensor=tensor, metadata=metadata)])


def open_logger(context: LoggerContext) -> TensorBoardLogger:
    """Begin or continue the run's log."""
    return TensorBoardLogger(context)
