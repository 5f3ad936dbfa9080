"""What is hashed and verified: once a host in each run, and again whenever a file is not as it was."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import unisono
from toy import make_toy
from unisono.config import recipe as recipes
from unisono.data import prepare, store
from unisono.data.ingest import inputs
from unisono.errors import DamagedError
from unisono.storage import known_hashes

pytestmark = pytest.mark.usefixtures("warm")
Count = Callable[[], Counter[str]]


@pytest.fixture
def count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Count:
    """What has been hashed since the last call, in all processes: names of files, and "input" for a part of one."""
    log = tmp_path / "log.txt"

    def note(name: str) -> None:
        with log.open("a") as file:
            file.write(f"{name}\n")

    check, hash_split = store.check_file, inputs.hash_input_split

    def check_file(path: Path, *rest: object) -> None:
        note(path.name)
        check(path, *rest)  # type: ignore[arg-type]

    def hash_input_split(part: object) -> str:
        note("input")
        return hash_split(part)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "check_file", check_file)
    monkeypatch.setattr(inputs, "hash_input_split", hash_input_split)

    def read() -> Counter[str]:
        found = Counter(log.read_text().split()) if log.exists() else Counter()
        log.unlink(missing_ok=True)
        return found

    return read


def age(paths: Sequence[Path]) -> None:
    """Make files older than the steps of a file system's clock."""
    for path in paths:
        os.utime(path, ns=(10**18, 10**18))


@pytest.mark.parametrize("faults", [(), ("kill(worker=1, step=3, phase=update)",)], ids=["undisturbed", "one lost"])
def test_three_workers_and_a_replacement_verify_once(tmp_path: Path, count: Count, faults: tuple[str, ...]) -> None:
    """Fails if a worker that does not prepare, or one that comes later, hashes the input or the dataset itself."""
    recipe = make_toy(tmp_path)
    folder = prepare.prepare(recipes.load(recipe)).folder
    age([tmp_path / "toy.csv", *folder.iterdir()])
    count()
    done = unisono.train(recipe, workers=3, run=tmp_path / "run", quiet=True, faults=faults)
    assert count() == {"input": 1, **dict.fromkeys(store._read_manifest(folder / store.MANIFEST)["files"], 1)}
    known_hashes.forget()
    alone = unisono.train(recipe, workers=1, run=tmp_path / "alone", quiet=True)
    assert count()["train.arrow"] == 1  # each run verifies
    assert done.weights_sha256 == alone.weights_sha256


def test_each_run_of_one_process_verifies_again(tmp_path: Path, count: Count) -> None:
    recipe = make_toy(tmp_path)
    folder = prepare.prepare(recipes.load(recipe)).folder
    age([tmp_path / "toy.csv", *folder.iterdir()])
    count()
    for number in range(2):
        unisono.train(recipe, workers=1, run=tmp_path / str(number), quiet=True)
        assert (found := count())["train.arrow"] == found["input"] == 1
        for workers in (1, 3):
            unisono.evaluate(tmp_path / str(number), workers=workers, quiet=True)
            assert (found := count())["test.arrow"] == 1
            assert not found["input"]


@pytest.mark.parametrize("harm", ["in place", "replaced"])
def test_what_another_worker_has_verified_is_verified_again_if_it_changes(
    tmp_path: Path, count: Count, harm: str
) -> None:
    """Of the same size, and with its old time of change. Fails if the inode's own number and time are not looked at."""
    recipe = recipes.load(make_toy(tmp_path))
    folder = prepare.prepare(recipe).folder
    victim = folder / "train.arrow"
    age([tmp_path / "toy.csv", *folder.iterdir()])
    known_hashes.forget()
    prepare.prepare(recipe)
    known_hashes.pass_on(tmp_path / "hashes.json")
    count()
    known_hashes.take_over(tmp_path / "hashes.json")
    prepare.prepare(recipe)
    assert not count()
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    if harm == "replaced":
        victim.rename(folder / "train.old")
    victim.write_bytes(content)
    age([victim])
    with pytest.raises(DamagedError, match=r"train\.arrow"):
        prepare.prepare(recipe)
    known_hashes.take_over(tmp_path / "nothing.json")
    assert not known_hashes._known


def test_a_file_that_has_just_changed_is_not_known(tmp_path: Path) -> None:
    """Its next change might have the same time. Fails if only size and times are compared."""
    path = tmp_path / "file"
    path.write_text("now")
    os.utime(path, ns=(2**62, 2**62))  # later than any clock shows
    assert known_hashes.identify("file", [path]) == ""
    age([path])
    assert known_hashes.identify("file", [path])
    assert known_hashes.identify("file", [path, tmp_path / "absent"]) == ""
