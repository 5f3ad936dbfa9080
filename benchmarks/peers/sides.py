"""The sides of the comparison: how each is started, watched and ended; what one run of it gave.

Owns the sides' names, command lines and environment variables. Every side is a command, started as a user would start
it, in a process of its own; all that a run started is ended with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import environments
import journal
from footprint import MARK, Watch, end_marked
from journal import Step
from prepared import LEARNING_RATE, SEED, WEIGHT_DECAY, Prepared
from task import Task

HERE = Path(__file__).resolve().parent
LIMIT_SECONDS = 900.0
EXIT_SECONDS = 15.0
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
}
"""glibc keeps what is freed: the settings that unisono makes for its own workers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One way to train. environment: "" is the project's own; script: "" is unisono's command line."""

    title: str
    environment: str = ""
    script: str = ""
    variant: str = ""
    microbatches: int = 0
    by_torchrun: bool = True
    variables: dict[str, str] = field(default_factory=dict)


UNISONO = {
    "unisono": Side(title="unisono, 8 microbatches", microbatches=8),
    "unisono-2": Side(title="unisono, 2 microbatches", microbatches=2),
}
PEERS = {
    "ddp": Side(title="DDP, as most write it", environment="transformers", script="train_ddp.py"),
    "ddp-tuned": Side(
        title="DDP, tuned", environment="transformers", script="train_ddp.py", variant="tuned", variables=KEEP_MEMORY
    ),
    "hf": Side(title="transformers' Trainer", environment="transformers", script="train_hf.py"),
    "hf-grouped": Side(
        title="transformers' Trainer, by length", environment="transformers", script="train_hf.py", variant="grouped"
    ),
    "lightning": Side(title="Lightning, DDPStrategy", environment="lightning", script="train_lightning.py"),
    "deepspeed": Side(
        title="DeepSpeed, ZeRO-1",
        environment="deepspeed",
        script="train_deepspeed.py",
        variables={"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(environments.folder("deepspeed") / "compiled")},
    ),
    "ray": Side(
        title="Ray Train, TorchTrainer",
        environment="ray",
        script="train_ray.py",
        by_torchrun=False,
        variables={"RAY_USAGE_STATS_ENABLED": "0"},
    ),
}
AS_IT_COMES = Side(
    title="transformers' Trainer, average_tokens_across_devices left on",
    environment="transformers",
    script="train_hf.py",
    variant="as it comes",
)
"""Only its reported loss is of interest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a workload is trained in one run."""

    workers: int
    steps: int
    precision: str
    attention_dropout: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one run gave. Memory in bytes, up to the end of the last step, as `footprint.Look` says."""

    steps: list[Step]
    first_step_seconds: float
    largest_process: int
    all_processes: int
    loss: float
    weights_sha256: str


class FailedRunError(Exception):
    """A run ended before its last step, or with an error; the message is what it said last."""


def train(side: Side, prepared: Prepared, settings: Settings) -> Run:
    """Run one side to its end. Leaves no process behind.

    Raises:
        FailedRunError: it failed, or took longer than the limit.
    """
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        command = _command(side, prepared, settings, scratch)
        variables = {**os.environ, **side.variables, MARK: mark, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        variables["PATH"] = f"{Path(command[0]).parent}:{variables['PATH']}"  # DeepSpeed asks for ninja there
        watch = Watch(mark)
        watch.start()
        with (scratch / "output").open("wb") as output:
            started = time.time()
            process = subprocess.Popen(
                command, env=variables, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=scratch
            )
            try:
                code = _wait(process, scratch / "result.json")
            finally:
                watch.stop()
                end_marked(mark)
                process.wait()
        if code:
            raise FailedRunError(journal.explain((scratch / "output").read_text("utf-8", "replace"), code))
        return _read(side, scratch, started, watch)


def _wait(process: subprocess.Popen, result: Path) -> int | str:
    """Return the exit code. A peer that has written its result, but hangs on its way out, is done."""
    deadline, written = time.monotonic() + LIMIT_SECONDS, 0.0
    while process.poll() is None:
        time.sleep(0.1)
        if result.exists():
            written = written or time.monotonic()
            if time.monotonic() - written > EXIT_SECONDS:
                print(f"hangs on exit: {' '.join(map(str, process.args))}", file=sys.stderr, flush=True)
                return 0
        if time.monotonic() > deadline:
            return f"not over after {LIMIT_SECONDS:.0f} seconds"
    return process.returncode


def _command(side: Side, prepared: Prepared, settings: Settings, scratch: Path) -> list[str]:
    if not side.script:
        changes = {
            "train.microbatches": side.microbatches,
            "train.max_steps": settings.steps,
            "train.precision": settings.precision,
            "model.attention_dropout": settings.attention_dropout,
        }
        options = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
        train = [str(Path(sys.executable).with_name("unisono")), "train", str(prepared.recipe), "--quiet"]
        return [*train, "--workers", str(settings.workers), "--run-folder", str(scratch / "run"), *options]
    task = Task(
        start=str(prepared.start),
        tokens=str(prepared.tokens),
        journal=str(scratch / "journal"),
        result=str(scratch / "result.json"),
        scratch=str(scratch),
        workers=settings.workers,
        steps=settings.steps,
        samples_per_step=prepared.workload.samples_per_step,
        precision=settings.precision,
        attention_dropout=settings.attention_dropout,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        seed=SEED,
        variant=side.variant,
    )
    task.write(scratch / "task.json")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(settings.workers)]
    python = environments.folder(side.environment) / "bin" / "python"
    return [str(python), *(launch if side.by_torchrun else []), str(HERE / side.script), str(scratch / "task.json")]


def _read(side: Side, scratch: Path, started: float, watch: Watch) -> Run:
    if side.script:
        steps = journal.read_peer((scratch / "journal").read_text(encoding="utf-8"))
        result = json.loads((scratch / "result.json").read_text(encoding="utf-8"))
        loss = result["loss"]
    else:
        ledger = (scratch / "run" / "metrics.jsonl").read_text(encoding="utf-8")
        steps, loss = journal.read_unisono(ledger), journal.mean_loss(ledger)
        result = json.loads((scratch / "run" / "summary.json").read_text(encoding="utf-8"))
    return Run(
        steps=steps,
        first_step_seconds=steps[0].time - started,
        largest_process=watch.peak(lambda look: look.largest, steps[-1].time),
        all_processes=watch.peak(lambda look: look.shared_out, steps[-1].time),
        loss=loss,
        weights_sha256=result["weights_sha256"],
    )
