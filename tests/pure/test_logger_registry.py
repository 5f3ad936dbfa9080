"""Loggers by name: what is refused before anything begins, and how a package offers its own."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from unisono.config import recipe as recipes
from unisono.errors import RecipeError
from unisono.tracking import events, logger
from unisono.tracking.dispatcher import check_observers


def test_unknown_name_is_refused_with_the_allowed_ones_and_a_close_match() -> None:
    with pytest.raises(
        RecipeError, match=r"'tensorbord': allowed are mlflow, tensorboard, wandb\. Did you mean 'tensorboard'\?"
    ):
        logger.check(["tensorbord"])


def test_name_that_is_like_no_other_gets_no_guess() -> None:
    with pytest.raises(RecipeError, match=r"'xyz': allowed are .*Name one of them"):
        logger.check(["xyz"])


def test_a_logger_given_twice_is_refused() -> None:
    with pytest.raises(RecipeError, match="'tensorboard' twice"):
        logger.check(["tensorboard", "tensorboard"])


@pytest.mark.parametrize(
    ("name", "package"),
    [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow"), ("mlflow", "alembic")],
)
def test_missing_package_is_refused_with_the_command_that_installs_it(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "find_spec", lambda asked: None if asked == package else object())
    with pytest.raises(RecipeError, match=rf"{name!r}, which needs {package}: .*pip install 'unisono\[{name}\]'"):
        logger.check([name])


def test_checking_imports_no_framework() -> None:
    before = set(sys.modules)
    logger.check(["tensorboard", "wandb", "mlflow"])
    assert not {name.partition(".")[0] for name in set(sys.modules) - before} & {"tensorboard", "wandb", "mlflow"}


def test_an_installed_package_offers_a_logger_by_entry_point(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "their_logger.py").write_text("def open_logger(context):\n    return ('theirs', context)\n")
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("theirs", "their_logger:open_logger", logger.GROUP)
    monkeypatch.setattr(
        logger,
        "entry_points",
        lambda group: [point] if group == logger.GROUP else [],
    )
    logger.check(["theirs"])
    assert "theirs" in logger.allowed_names()
    assert logger.find("theirs")(None) == ("theirs", None)  # type: ignore[arg-type,comparison-overlap]


def test_entry_point_whose_package_is_gone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("theirs", "package_that_is_gone.logs:open_logger", logger.GROUP)
    monkeypatch.setattr(logger, "entry_points", lambda group: [point])
    with pytest.raises(
        RecipeError, match=r"logger 'theirs': .*\(package_that_is_gone.logs:open_logger\).*ModuleNotFound"
    ):
        logger.check(["theirs"])


def test_an_entry_point_that_is_no_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logger, "entry_points", lambda group: [EntryPoint("theirs", "sys:path", logger.GROUP)])
    with pytest.raises(RecipeError, match=r"offers list .*allowed is a function that opens a logger"):
        logger.check(["theirs"])


def test_recipe_has_the_section_and_anchors_its_folder(tmp_path: Path) -> None:
    (tmp_path / "some.toml").write_text('[tracking]\nloggers = ["wandb"]\nfolder = "logs"\n')
    tracking = recipes.load(tmp_path / "some.toml").tracking
    assert (tracking.loggers, tracking.folder, tracking.project, tracking.every_steps) == (
        ("wandb",),
        str(tmp_path / "logs"),
        "unisono",
        1,
    )


@pytest.mark.parametrize(
    ("given", "fault"), [(object(), "no method observe and close"), (logger.Cursor, "has no method")]
)
def test_what_is_no_observer_is_refused(given: object, fault: str) -> None:
    with pytest.raises(RecipeError, match=fault):
        check_observers([given])


def test_rates_are_left_out_of_a_step_of_unknown_length() -> None:
    step = events.StepDone(
        step=1, epoch=0.1, loss=1.0, gradient_norm=2.0, learning_rate=0.1, samples=8, tokens=16, seconds=2.0
    )
    assert logger.measure(step)["train/samples_per_second"] == 4.0
    again = events.StepDone(
        step=1, epoch=0.1, loss=1.0, gradient_norm=2.0, learning_rate=0.1, samples=8, tokens=16, seconds=0.0
    )
    assert logger.measure(step).keys() - logger.measure(again).keys() == {
        "train/samples_per_second",
        "train/tokens_per_second",
    }
