"""The command line as a user meets it: what it prints and leaves behind, the same bits from any number of workers."""

from __future__ import annotations

import ast
import hashlib
import json
import socket
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest

from toy import Command, launch_command, make_toy, run_command, run_python, wait_until_gone
from unisono.config import recipe as recipes
from unisono.errors import RunFolderError
from unisono.storage.run_lock import RunLock

FILES = {"recipe.toml", "fingerprint.json", "metrics.jsonl", "curves.svg", "summary.json", "checkpoints", "model"}
WORKERS = (1, 2, 3)
HASHES = ("weights_sha256", "optimizer_sha256")


def read_summary(run: Path) -> dict[str, object]:
    return json.loads((run / "summary.json").read_text())  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    returncode: int
    stdout: str
    stderr: str


Runs = dict[int, tuple[Path, Done]]


@pytest.fixture(scope="module")
def runs(warm: None, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Number of workers → its run folder, and what its command has printed; with 1 worker in a fresh interpreter."""
    folder = tmp_path_factory.mktemp("runs")
    make_toy(folder)
    fresh = run_command(["train", "toy.toml", "--workers", 1, "--run-folder", 1], folder)
    found = {1: (folder / "1", Done(fresh.returncode, fresh.stdout, fresh.stderr))}
    for workers, way in ((2, "--quiet"), (3, "--json")):
        launched = launch_command(["train", "toy.toml", "--workers", workers, "--run-folder", workers, way], folder)
        found[workers] = (folder / f"{workers}", Done(launched.end(), launched.out, launched.err))
    return found


def test_any_number_of_workers_gives_the_same_bits(
    runs: Runs,
) -> None:
    summaries = [read_summary(run) for run, _ in runs.values()]
    for name in (*HASHES, "test", "train", "steps", "fingerprint"):
        assert len({json.dumps(summary[name]) for summary in summaries}) == 1, name
    models = [{path.name: path.read_bytes() for path in (run / "model").iterdir()} for run, _ in runs.values()]
    assert models[0] == models[1] == models[2]
    checkpoints = [sorted((run / "checkpoints").rglob("*.safetensors")) for run, _ in runs.values()]
    assert len({tuple(path.read_bytes() for path in paths) for paths in checkpoints}) == 1


@pytest.mark.parametrize("workers", WORKERS)
def test_run_folder_is_complete(runs: Runs, workers: int) -> None:
    run, process = runs[workers]
    assert process.returncode == 0, process.stderr
    assert {path.name for path in run.iterdir()} == FILES
    summary = read_summary(run)
    assert {"steps", "seconds", "samples_per_second", "workers", "train", "test", *HASHES} <= summary.keys()
    assert summary["workers"] == workers
    assert set(summary["train"]) >= {"loss"}  # type: ignore[call-overload]
    assert set(summary["test"]) == {"loss", "accuracy", "macro_f1", "samples"}  # type: ignore[call-overload]
    assert summary["test"]["accuracy"] > 0.9  # type: ignore[index]
    assert recipes.load(run / "recipe.toml").train.microbatches == 4
    assert json.loads((run / "fingerprint.json").read_text())["battery"]
    assert ElementTree.parse(run / "curves.svg").getroot().tag.endswith("svg")
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{summary['steps']:08d}"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["event"] == "StepDone"]
    assert steps == list(range(1, int(str(summary["steps"])) + 1))


def test_weights_sha256_is_what_the_documentation_says(trained: dict[int, Path]) -> None:
    """Ten lines of plain Python, without unisono, torch or safetensors, give the same hash."""
    content = (trained[2] / "model" / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    found = hashlib.sha256()
    for name in sorted(header.keys() - {"__metadata__"}):
        start, end = header[name]["data_offsets"]
        dtype = {"F32": "float32", "F64": "float64", "I64": "int64"}[header[name]["dtype"]]
        found.update(f"{name} {dtype} {','.join(map(str, header[name]['shape']))}\n".encode())
        found.update(content[8 + size + start : 8 + size + end])
    assert found.hexdigest() == read_summary(trained[2])["weights_sha256"]


def test_plain_lines_say_what_a_person_needs(runs: Runs) -> None:
    run, process = runs[1]
    summary = read_summary(run)
    for word in ("1 worker on cpu", "4 microbatches", "run folder 1", "loss", "accuracy", "samples/s", "s left"):
        assert word in process.stdout, word
    assert f"weights   sha256 {summary['weights_sha256']}" in process.stdout
    assert f"optimizer sha256 {summary['optimizer_sha256']}" in process.stdout
    assert "\x1b" not in process.stdout
    assert process.stderr == ""


def test_quiet_says_nothing(runs: Runs) -> None:
    assert (runs[2][1].stdout, runs[2][1].stderr) == ("", "")


@pytest.mark.slow
def test_the_curves_leave_the_callers_pyplot_alone(tmp_path: Path) -> None:
    """A notebook's own figures and backend. Fails if curves are drawn by pyplot, or a backend is chosen for the process."""
    make_toy(tmp_path)
    code = """if True:
        import matplotlib, sys, unisono
        matplotlib.use("pdf")
        folder = unisono.train("toy.toml", workers=1, overrides=("train.max_steps=1",), quiet=True).folder
        print((folder / "curves.svg").exists(), "matplotlib.pyplot" in sys.modules, matplotlib.get_backend())
    """
    process = run_python(["-c", code], tmp_path)
    assert process.stdout == "True False pdf\n", process.stderr


def test_json_is_one_object_per_line(runs: Runs) -> None:
    run, process = runs[3]
    lines = [json.loads(line) for line in process.stdout.splitlines()]
    assert lines[-1] == {"event": "RunEnded", "folder": run.name, "summary": read_summary(run)}
    assert {"Notice", "RunStarted", "StepDone", "Evaluated", "CheckpointWritten"} <= {line["event"] for line in lines}


def run_torchrun(folder: Path, *options: object, workers: int, more: Sequence[str] = ()) -> list[subprocess.Popen[str]]:
    """One agent; or `--nnodes` of them, as on so many hosts, meeting at one port. Returns them at work."""
    nodes = 2 if "--nnodes" in options else 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begun = []
    for node in range(nodes):
        place = ["--node-rank", str(node)] if nodes > 1 else []
        meeting = ["--master-addr", "127.0.0.1", "--master-port", str(port), "--nproc-per-node", str(workers), *place]
        command = [sys.executable, "-m", "torch.distributed.run", *meeting, *map(str, options)]
        command += ["-m", "unisono", "train", "toy.toml", "--run-folder", "run", *more]
        begun.append(subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return begun


@pytest.mark.parametrize(
    ("options", "workers"),
    [
        pytest.param((), 2, id="one agent"),
        pytest.param(("--nnodes", 2), 1, id="two agents", marks=pytest.mark.slow),
    ],
)
def test_torchrun_gives_the_same_bits(
    trained: dict[int, Path], tmp_path: Path, options: tuple[object, ...], workers: int
) -> None:
    make_toy(tmp_path)
    agents = run_torchrun(tmp_path, *options, workers=workers)
    with ThreadPoolExecutor() as pool:  # side by side: an agent that fails says why, though another waits for it
        told = list(pool.map(lambda agent: agent.communicate(timeout=400), agents))
    assert [agent.returncode for agent in agents] == [0] * len(agents), told
    summary, expected = read_summary(tmp_path / "run"), read_summary(trained[1])
    assert summary["workers"] == workers * len(agents)
    assert [summary[name] for name in HASHES] == [expected[name] for name in HASHES]
    assert "".join(out for out, _ in told).count("weights   sha256") == 1


@pytest.mark.slow
def test_workers_end_with_a_killed_agent_and_their_folder_is_free(trained: dict[int, Path], tmp_path: Path) -> None:
    """The agent itself cannot end them then; another one goes on at once."""
    make_toy(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "toy.toml").write_text((tmp_path / "toy.toml").read_text().replace("epochs = ", "epochs = 1000"))
    (agent,) = run_torchrun(tmp_path, workers=2, more=["--resume", "auto"])
    while not (tmp_path / "run" / ".running").exists() or len(read_children(agent.pid)) < 2:
        assert agent.poll() is None, agent.communicate()
        time.sleep(0.02)
    workers = read_children(agent.pid)
    with pytest.raises(RunFolderError, match=r"is being trained by process \d+"):
        RunLock(tmp_path / "run")
    agent.kill()
    agent.communicate()
    assert workers and wait_until_gone(workers) == []
    RunLock(tmp_path / "run").release()


def read_children(pid: int) -> list[int]:
    """The processes that a process has started, from any of its threads."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def test_folders_are_numbered_and_overrides_count(command: Command, tmp_path: Path) -> None:
    make_toy(tmp_path)
    for number in (1, 2):
        code, out, _ = command("train", "toy.toml", "-w", 1, "--set", "train.max_steps=2", "--set", "name=other")
        assert code == 0
        assert f"run folder runs/other-00{number}" in out
        assert read_summary(tmp_path / "runs" / f"other-00{number}")["steps"] == 2


def test_verify_compares_and_says_so(command: Command, tmp_path: Path) -> None:
    make_toy(tmp_path)
    code, out, err = command("verify", "toy.toml", "--workers", "1,3", "--steps", 3)
    assert (code, err) == (0, "")
    assert "equal, bit for bit" in out
    assert not (tmp_path / "runs").exists()


def test_verify_ends_with_1_where_bits_differ(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, my_rank: Callable[[], int]
) -> None:
    """A model whose gradient depends on who computes it: the table names the first step, microbatch and parameter."""
    import torch

    from unisono.tasks.text.classification import TextClassification

    honest = TextClassification.loss

    def loss(self: TextClassification, module: torch.nn.Module, microbatch: object) -> tuple[torch.Tensor, int]:
        total, weight = honest(self, module, microbatch)  # type: ignore[arg-type]
        return total * (1 + my_rank() * 2**-20), weight

    monkeypatch.setattr(TextClassification, "loss", loss)
    make_toy(tmp_path)
    code, out, _ = command("verify", "toy.toml", "--workers", "1,2", "--steps", 2)
    assert code == 1
    assert "NOT EQUAL: 1 and 2 workers first differ at step 1, microbatch 2" in out


def test_prepare_evaluate_predict(command: Command, tmp_path: Path) -> None:
    make_toy(tmp_path)
    code, out, _ = command("prepare", "toy.toml")
    assert (code, "written" in out, "3 classes" in out) == (0, True, True)
    code, out, _ = command("train", "toy.toml", "-w", 2, "--run-folder", "run")
    assert (code, "prepared before" in out) == (0, True)
    expected = read_summary(tmp_path / "run")["test"]
    for workers in (1, 3):
        code, out, _ = command("evaluate", "run", "-w", workers, "--json")
        found = json.loads(out)
        assert (code, {name: found[name] for name in expected}) == (0, expected)  # type: ignore[attr-defined]
    (tmp_path / "new.csv").write_text('text,id\n"goal match, team",7\n,8\nsoup bread,9\n')
    written = []
    for workers in (1, 2):
        code, _, _ = command("predict", "run", "new.csv", f"{workers}.jsonl", "-w", workers)
        assert code == 0
        written.append((tmp_path / f"{workers}.jsonl").read_bytes())
    rows = [json.loads(line) for line in written[0].splitlines()]
    assert [(row["id"], row["predicted"]) for row in rows] == [("7", "sport"), ("8", None), ("9", "food")]
    assert rows[1]["unusable"]
    assert written[0] == written[1]


def test_recipe_shows_every_key(command: Command, tmp_path: Path) -> None:
    make_toy(tmp_path)
    code, out, _ = command("recipe", "toy.toml", "--set", "train.seed=5")
    assert (code, "seed = 5" in out, "samples_per_step = 16" in out) == (0, True, True)
    for kind in ("bag", "transformer", "pretrained"):
        code, out, _ = command("recipe", "--show-defaults", "--model", kind)
        (tmp_path / "run.toml").write_text(out)
        assert (code, recipes.load(tmp_path / "run.toml").model.kind) == (0, kind)
    assert command("recipe", "--show-defaults")[1] == recipes.document(model="bag")
    code, _, err = command("recipe", "toy.toml", "--model", "bag")
    assert (code, "Give both" in err) == (2, True)


@pytest.mark.parametrize(
    "name", ["train", "prepare", "evaluate", "predict", "verify", "resize", "checkpoints", "recipe"]
)
def test_every_command_has_help(command: Command, name: str) -> None:
    helped = [command(name, option) for option in ("--help", "-h")]
    assert helped[0] == helped[1]
    assert (helped[0][0], f"Usage: unisono {name} " in helped[0][1]) == (0, True)


def test_version(command: Command) -> None:
    import unisono

    assert unisono.__version__ == metadata.version("unisono")
    assert command("--version") == (0, f"unisono {unisono.__version__}\n", "")


def test_shells_complete(tmp_path: Path) -> None:
    """What the script of --show-completion calls. Fails if it could not find the commands and their options."""
    shown = run_command(["--show-completion", "bash"], tmp_path, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert "_UNISONO_COMPLETE=complete_bash" in shown.stdout
    for line, expected in (("unisono ver", "verify"), ("unisono train --on", "--on-loss")):
        words = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
        completed = run_command([], tmp_path, _UNISONO_COMPLETE="complete_bash", **words)
        assert completed.stdout.split() == [expected], completed.stderr


def test_help_imports_little(tmp_path: Path) -> None:
    """It should answer at once. Fails if the command line, or typer for it, imported a library such as rich or pydantic."""
    code = """if True:
        import sys
        before = set(sys.modules)
        sys.argv = ["unisono", "--help"]
        from unisono.cli import main
        try:
            main()
        finally:
            loaded = {name.split(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
            print(sorted(loaded), file=sys.stderr)
    """
    process = run_python(["-c", code], tmp_path)
    assert set(ast.literal_eval(process.stderr)) <= {"typer", "unisono", "annotated_doc", "shellingham", "click"}
    assert "Usage: unisono" in process.stdout
