"""What users get wrong: exit code 2, a message that says what to do, and nothing half-written."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import unisono
from toy import DAMAGES, RECIPE, Command, launch_command, make_records, make_toy, run_python
from unisono.errors import DivergedError
from unisono.storage.files import seal


def bad_only() -> list[str]:
    return [",sport", "   ,tech", "goal match,"]


CASES: dict[str, tuple[Callable[[Path], object], tuple[object, ...], tuple[str, ...]]] = {
    # what is wrong: what is done to the toy, further options, what the message must say
    "no recipe": (lambda folder: (folder / "toy.toml").unlink(), (), ("'toy.toml'", "no such file")),
    "recipe no TOML": (lambda folder: (folder / "toy.toml").write_text("[data\n"), (), ("toy.toml", "TOML", "line 1")),
    "misspelt key": (
        lambda folder: None,
        ("--set", "train.learning_rat=1"),
        ("train.learning_rat", "train.learning_rate"),
    ),
    "key of another model": (
        lambda folder: None,
        ("--set", "model.layers=2"),
        ("'model.layers'", "no such key", "Allowed: kind, width"),
    ),
    "misspelt section": (lambda folder: None, ("--set", "trian.seed=1"), ("'trian'", "'train'")),
    "wrong type": (lambda folder: None, ("--set", "train.epochs='many'"), ("train.epochs", "'many'", "number")),
    "value out of range": (lambda folder: None, ("--set", "train.epochs=0"), ("train.epochs", "0", "greater than 0")),
    "unknown model": (
        lambda folder: None,
        ("--set", "model.kind=transformr"),
        ("transformr", "Did you mean 'transformer'?"),
    ),
    "no data file": (lambda folder: (folder / "toy.csv").unlink(), (), ("toy.csv", "no such file")),
    "no such column": (lambda folder: None, ("--set", "data.text=txt"), ("'txt'", "'text'")),
    "no such label column": (lambda folder: None, ("--set", "data.label=lable"), ("'lable'", "'label'")),
    "no such label": (lambda folder: None, ("--set", 'data.labels=["sport", "tech", "fod"]'), ("'fod'", "'food'")),
    "empty file": (lambda folder: (folder / "toy.csv").write_text(""), (), ("toy.csv", "empty")),
    "header only": (lambda folder: make_toy(folder, []), (), ("toy.csv", "no record")),
    "bad records only": (lambda folder: make_toy(folder, bad_only()), (), ("no record can be used", "empty")),
    "one class": (
        lambda folder: make_toy(folder, [line for line in make_records() if "tech" in line]),
        (),
        ("one class", "'tech'"),
    ),
    "strict": (
        lambda folder: make_toy(folder, [*make_records(), ",sport"]),
        ("--strict",),
        ("strict", "toy.csv, row 121"),
    ),
    "too many workers": (
        lambda folder: None,
        ("--workers", 5),
        ("`--workers 5`", "4 microbatches", "train.microbatches = 5"),
    ),
    "workers no number": (lambda folder: None, ("--workers", "many"), ("many", "whole number")),
    "no validation to choose by": (
        lambda folder: None,
        ("--set", "evaluate.patience=2"),
        ("evaluate.patience", "validation"),
    ),
    "nothing to resume": (lambda folder: None, ("--resume",), ("--resume", "no checkpoints")),
    "GPUs that are not there": (lambda folder: None, ("--set", "train.device=cuda"), ("'cuda'", '"cpu"')),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_with_a_message(command: Command, tmp_path: Path, case: str) -> None:
    if case == "GPUs that are not there" and torch.cuda.is_available():
        pytest.skip("this machine has GPUs")
    spoil, options, words = CASES[case]
    make_toy(tmp_path)
    spoil(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    code, _, err = command("train", "toy.toml", "-w", 2, "--run-folder", "run", *options)
    assert code == 2, err
    for word in words:
        assert word in err, err
    assert "Traceback" not in err
    assert {path.name for path in tmp_path.iterdir()} - before <= {"datasets"}
    assert not [path for path in (tmp_path / "datasets").glob(".*") if not path.name.endswith(".lock")]


def test_class_in_test_only(command: Command, tmp_path: Path) -> None:
    make_toy(tmp_path, recipe=RECIPE.replace("test_fraction = 0.2", 'test = "test.csv"'))
    (tmp_path / "test.csv").write_text("text,label\ngoal and chip,opera\nsoup,food\n")
    code, _, err = command("train", "toy.toml", "-w", 2, "--run-folder", "run")
    assert code == 2
    assert "test has class 'opera' (1 record), training has not" in err
    assert not (tmp_path / "run").exists()


def test_metric_that_is_not_measured(command: Command, tmp_path: Path) -> None:
    """Refused before the run folder is made."""
    make_toy(tmp_path)
    options = ("--set", "evaluate.metric=acuracy", "--set", "data.validation_fraction=0.2")
    code, _, err = command("train", "toy.toml", "-w", 1, "--run-folder", "run", *options)
    assert code == 2
    assert "'evaluate.metric' = 'acuracy': allowed are loss, accuracy, macro_f1" in err
    assert not (tmp_path / "run").exists()


def test_run_folder_exists(command: Command, tmp_path: Path) -> None:
    make_toy(tmp_path)
    (tmp_path / "run").mkdir()
    code, _, err = command("train", "toy.toml", "--run-folder", "run")
    assert code == 2
    assert all(word in err for word in ("'run' exists", "--resume", "rm -r"))
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize(
    ("part", "harm"),
    [
        pytest.param(part, harm, marks=[] if row == column else [pytest.mark.slow])
        for row, part in enumerate(("train.arrow", "encoder.json", "manifest.json"))
        for column, harm in enumerate(("truncated", "altered", "missing"))
    ],
)
def test_damaged_dataset(command: Command, tmp_path: Path, part: str, harm: str) -> None:
    make_toy(tmp_path)
    assert command("prepare", "toy.toml")[0] == 0
    (path,) = (tmp_path / "datasets").glob(f"*/{part}")
    spoil_file(path, harm)
    code, _, err = command("train", "toy.toml", "-w", 2, "--run-folder", "run")
    assert code == 2, err
    assert part in err
    assert "Delete the folder" in err
    assert not (tmp_path / "run").exists()


def spoil_file(path: Path, harm: str) -> None:
    content = path.read_bytes()
    if harm == "missing":
        path.unlink()
    elif harm == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


@pytest.fixture
def unfinished(trained: dict[int, Path], tmp_path: Path) -> Path:
    """A run as an interrupt leaves it: recipe, checkpoint, no model."""
    make_toy(tmp_path)
    shutil.copytree(trained[2], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    (tmp_path / "run" / "summary.json").unlink()
    return next((tmp_path / "run" / "checkpoints").iterdir())


TOKENIZER = (
    '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"[PAD]": 0, "[UNK]": 1}, "unk_token": "[UNK]"}}'
)
BERT = {
    "model_type": "bert",
    "vocab_size": 2,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
}
RESUME = ("train", "toy.toml", "-w", 1, "--run-folder", "run", "--resume", "--quiet")


@pytest.mark.parametrize(("part", "harm"), DAMAGES)
def test_damaged_only_checkpoint(command: Command, unfinished: Path, part: str, harm: str) -> None:
    spoil_file(unfinished / part, harm)
    run = unfinished.parents[1]
    before = read_all(run)
    code, _, err = command(*RESUME)
    assert code == 2, err
    assert part in err
    assert "Traceback" not in err
    assert read_all(run) == before


@pytest.mark.parametrize(
    ("part", "harm"),
    [
        ("parameters.safetensors", "truncated"),
        pytest.param("optimizer.safetensors", "altered", marks=pytest.mark.slow),
        pytest.param("state.json", "missing", marks=pytest.mark.slow),
    ],
)
def test_damaged_newest_checkpoint(
    command: Command, unfinished: Path, trained: dict[int, Path], part: str, harm: str
) -> None:
    """It is set aside with a warning, the one before is used, and the run ends as if nothing had happened."""
    run, often = unfinished.parents[1], ("--set", "checkpoint.every_steps=10", "--set", "checkpoint.keep=2")
    shutil.rmtree(run)
    assert command("train", "toy.toml", "-w", 2, "--run-folder", "run", *often)[0] == 0
    shutil.rmtree(run / "model")
    (run / "summary.json").unlink()
    older, newest = sorted((run / "checkpoints").iterdir())
    assert newest.name == unfinished.name
    spoil_file(newest / part, harm)
    damaged = read_all(newest)
    code, out, err = command(*RESUME, *often)
    assert (code, out) == (0, ""), err
    (warning,) = err.splitlines()
    assert warning.startswith("warning: ") and part in warning and f"going on from {older.name}" in warning
    aside = newest.with_name(f"{newest.name}.damaged")
    assert read_all(aside) == damaged
    assert {path.name for path in (run / "checkpoints").iterdir()} == {older.name, newest.name, aside.name}
    for file in ("parameters.safetensors", "optimizer.safetensors"):
        assert (newest / file).read_bytes() == (trained[1] / "checkpoints" / newest.name / file).read_bytes()
    mine, expected = (json.loads((path / "summary.json").read_text()) for path in (run, trained[1]))
    for name in ("weights_sha256", "optimizer_sha256", "test"):
        assert mine[name] == expected[name], name


def read_all(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rewrite_facts(checkpoint: Path, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    """As another machine would have written them: the seal is whole."""
    path = checkpoint / "state.json"
    facts = json.loads(path.read_text())
    del facts["sha256"], facts["files"]
    change(facts)
    path.unlink()
    seal(checkpoint, path.name, facts)


def test_checkpoint_of_other_numerics(command: Command, unfinished: Path, trained: dict[int, Path]) -> None:
    rewrite_facts(unfinished, lambda facts: facts["fingerprint"].update(battery="0" * 64, torch="1.0"))
    code, _, err = command(*RESUME)
    assert code == 2, err
    assert all(word in err for word in ("torch: '1.0' in the checkpoint", "battery", "--accept-new-numerics"))
    code, _, err = command(*RESUME, "--accept-new-numerics")
    assert code == 0, err
    assert "warning: going on under new numerics (battery, torch differ)" in err
    mine, expected = (json.loads((run / "summary.json").read_text()) for run in (unfinished.parents[1], trained[1]))
    assert mine["weights_sha256"] == expected["weights_sha256"]


def test_checkpoint_from_another_processor_is_a_warning(command: Command, unfinished: Path) -> None:
    rewrite_facts(unfinished, lambda facts: facts["fingerprint"].update(processor="Abacus"))
    code, _, err = command(*RESUME)
    assert code == 0, err
    assert "warning: numerics: processor: 'Abacus' in the checkpoint" in err


def test_resume_with_another_recipe(command: Command, unfinished: Path) -> None:
    code, _, err = command(*RESUME, "--set", "train.learning_rate=0.1")
    assert code == 2
    assert "train.learning_rate = 0.1 (was 0.05)" in err


@pytest.mark.parametrize("asked", [("evaluate", "run"), ("predict", "run", "toy.csv", "out.csv")])
def test_model_without_weights(
    command: Command, unfinished: Path, trained: dict[int, Path], asked: tuple[str, ...]
) -> None:
    code, _, err = command(*asked)
    assert (code, "no finished model" in err) == (2, True)
    model = shutil.copytree(trained[1] / "model", unfinished.parents[1] / "model")
    weights = (model / "model.safetensors").rename(model / "away")
    code, _, err = command(*asked)
    assert (code, "model.safetensors" in err, "Traceback" in err) == (2, True, False)
    shutil.copy(weights, model / "model.safetensors")
    (model / "unisono.json").unlink()
    code, _, err = command(*asked)
    assert (code, "unisono.json" in err, "Traceback" in err) == (2, True, False)
    assert not (unfinished.parents[2] / "out.csv").exists()


def test_pickled_weights_are_not_read(command: Command, unfinished: Path, trained: dict[int, Path]) -> None:
    """Neither instead of the weights nor under their name; what a pickle would execute is not executed."""

    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.mkdir, (str(unfinished.parents[1] / "trapped"),))

    model = shutil.copytree(trained[1] / "model", unfinished.parents[1] / "model")
    (model / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.safetensors"):
        torch.save(Trap(), model / name)
        code, _, err = command("predict", "run", "toy.csv", "out.csv")
        assert (code, "Traceback" in err) == (2, False)
        assert "model.safetensors" in err
    assert not (unfinished.parents[1] / "trapped").exists()


@pytest.mark.parametrize("what", ["another run's", "no numbers", "pickled"])
def test_features_that_are_not_the_models_own(
    command: Command, unfinished: Path, trained: tuple[Path, Path], what: str
) -> None:
    model = shutil.copytree(trained[1] / "model", unfinished.parents[1] / "model")
    known = np.load(model / "features.npy")
    match what:
        case "another run's":
            np.save(model / "features.npy", known[:3])
        case "no numbers":
            (model / "features.npy").write_bytes(b"\x93NUMPY")
        case "pickled":
            np.save(model / "features.npy", np.array([{}]), allow_pickle=True)
    code, _, err = command("predict", "run", "toy.csv", "out.csv")
    assert (code, "Traceback" in err, "allow_pickle" in err) == (2, False, False), err
    assert "features.npy" in err
    assert not (unfinished.parents[2] / "out.csv").exists()


def test_pretrained_folder_with_pickled_weights_only(command: Command, tmp_path: Path) -> None:
    make_toy(
        tmp_path,
        recipe=RECIPE.replace('"bag"\nwidth = 8', '"pretrained"\nfolder = "encoder"').replace("features = 512", ""),
    )
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "config.json").write_text(json.dumps(BERT))
    (encoder / "tokenizer.json").write_text(TOKENIZER)
    (encoder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    code, _, err = command("train", "toy.toml", "-w", 1, "--run-folder", "run")
    assert code == 2, err
    assert "model.safetensors" in err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 96 KiB, where this user may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_full_disk(command: Command, tmp_path: Path, small_disk: Path) -> None:
    """Checkpoints and the picture do not fit, the model does: training goes on to the same bits, and the newest
    checkpoint is elsewhere."""
    make_toy(tmp_path)
    options = ("-w", 2, "--quiet", "--set", "checkpoint.every_steps=5", "--set", "model.width=32")
    assert command("train", "toy.toml", "--run-folder", "run", *options) == (0, "", "")
    code, out, err = command("train", "toy.toml", "--run-folder", small_disk / "run", *options)
    assert (code, out) == (0, ""), err
    # a checkpoint that fills the disk may keep the ledger waiting meanwhile; the lines are counted below
    warnings = [line for line in err.splitlines() if "metrics.jsonl' " not in line]
    assert "a checkpoint with the model needs" in warnings.pop(0)
    assert all(line.startswith("warning: ") and "the disk is full" in line for line in warnings)
    for step in (5, 10, 15, 18):
        (warning,) = (line for line in warnings if f"step-{step:08d}" in line)
        assert f"The checkpoint is in '{tmp_path}/run-rescued-" in warning
    (place,) = tmp_path.glob("run-rescued-*")
    assert [path.name for path in (place / "checkpoints").iterdir()] == ["step-00000018"]
    assert len(warnings) == 4 + (not (small_disk / "run" / "curves.svg").exists())
    assert list((small_disk / "run" / "checkpoints").iterdir()) == []
    assert read_all(small_disk / "run" / "model") == read_all(tmp_path / "run" / "model")
    mine, expected = (json.loads((path / "run" / "summary.json").read_text()) for path in (small_disk, tmp_path))
    for name in ("weights_sha256", "optimizer_sha256", "test", "steps"):
        assert mine[name] == expected[name], name
    lines = [json.loads(line) for line in (small_disk / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "StepDone"] == list(range(1, 19))


def test_full_disk_for_the_model(command: Command, tmp_path: Path, small_disk: Path) -> None:
    make_toy(tmp_path)
    options = ("--run-folder", small_disk / "run", "--set", "checkpoint.every_steps=5", "--set", "model.width=128")
    code, _, err = command("train", "toy.toml", "-w", 2, *options)
    assert code == 2, err
    assert "MB are free, and the model needs" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not list(small_disk.glob("run/checkpoints")) and not list(tmp_path.glob("run-rescued-*"))


def test_full_disk_while_preparing(command: Command, tmp_path: Path, small_disk: Path) -> None:
    make_toy(tmp_path, make_records(6000))
    code, _, err = command("train", "toy.toml", "-w", 2, "--run-folder", "run", "--set", f"data.store={small_disk}")
    assert code == 2, err
    assert "the disk is full" in err
    assert not (tmp_path / "run").exists()
    assert [path for path in small_disk.iterdir() if not path.name.endswith(".lock")] == []


def test_file_too_large(tmp_path: Path, warm: None, capfd: pytest.CaptureFixture[str]) -> None:
    """Where nobody may mount: a limit on the size of files stops the checkpoint half-way, and then the model."""
    make_toy(tmp_path, recipe=RECIPE.replace("width = 8", "width = 16"))
    unisono.prepare(tmp_path / "toy.toml", workers=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, before[1]))
    try:
        with pytest.raises(unisono.UserError, match="/run/model' cannot be written"):
            unisono.train(
                tmp_path / "toy.toml", workers=2, run=tmp_path / "run", quiet=True, checkpoint={"every_steps": 5}
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    warnings = capfd.readouterr().err.splitlines()  # of the last one only if it has failed before the model
    for step, warning in zip((5, 10, 15), warnings, strict=False):
        assert warning.startswith("warning: no checkpoint, and training goes on: ")
        assert f"step-{step:08d}' cannot be written" in warning
    assert 3 <= len(warnings) <= 4
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.slow
def test_port_in_use(warm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that a cluster's script has started names address and remedy; torchrun itself names the port."""
    make_toy(tmp_path)
    asked = ("train", "toy.toml", "--run-folder", "run")
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        options = ("--master-port", port, "--nproc-per-node", 2, "-m", "unisono")
        torchrun = run_python(["-m", "torch.distributed.run", *options, *asked], tmp_path)
        assignment = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
        for name, value in {**assignment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        alone = launch_command(asked, tmp_path)
        assert alone.end() == 1, alone.err
    assert f"cannot meet the other workers at 127.0.0.1:{port}" in alone.err
    assert "--master-port" in alone.err
    assert torchrun.returncode != 0
    assert re.search(f"EADDRINUSE|address already in use|port: {port}", torchrun.stderr)
    assert not (tmp_path / "run").exists()


class Counting(nn.Linear):
    """A layer that counts training's steps."""

    def __init__(self) -> None:
        super().__init__(3, 1)
        self.step: Tensor
        self.register_buffer("step", torch.tensor(0))

    def forward(self, input: Tensor) -> Tensor:
        self.step += self.training
        return super().forward(input)


class Overflows(unisono.Task):
    """A task whose loss is no number for sample 11 after the fifth step."""

    def build(self) -> nn.Module:
        return Counting()

    def loss(self, module: nn.Module, microbatch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        losses = module(microbatch["x"]).square().sum(1)
        bad = (microbatch["number"] == 11) & (module.step > 5)  # type: ignore[operator]
        return torch.where(bad, torch.nan, losses).sum(), len(losses)

    def measure(self, module: nn.Module, microbatch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": module(microbatch["x"]).square().sum(1)}


@pytest.mark.parametrize("workers", [1, 3])
def test_diverged_run_keeps_its_last_checkpoint(tmp_path: Path, workers: int) -> None:
    data = {"x": torch.arange(96.0).view(32, 3).sin(), "number": torch.arange(32)}
    with pytest.raises(DivergedError) as found:
        unisono.train(
            Overflows(),
            data,
            workers=workers,
            run=tmp_path / "run",
            quiet=True,
            epochs=6,
            samples_per_step=8,
            microbatches=4,
            checkpoint={"every_steps": 1},
        )
    assert found.value.exit_code == 3
    step, microbatch = map(int, re.search(r"step (\d+), microbatch (\d)", str(found.value)).groups())  # type: ignore[union-attr]
    assert step > 5
    assert "11" in str(found.value)
    kept = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert kept[-1].name == f"step-{step - 1:08d}"
    facts = json.loads((kept[-1] / "state.json").read_text())
    for name, entry in facts["files"].items():
        assert hashlib.sha256((kept[-1] / name).read_bytes()).hexdigest() == entry["sha256"]
    assert 0 <= microbatch < 4
