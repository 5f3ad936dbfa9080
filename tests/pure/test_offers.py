"""Packages that offer something under a name, and are broken: one clear error that names the package."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest

from unisono.backends import backend_registry
from unisono.config.offers import load_offer
from unisono.errors import RecipeError, UserError
from unisono.kernels import kernel as kernels
from unisono.runtime.launchers import launcher as launchers
from unisono.tasks import kinds
from unisono.tracking import logger

ASKED: dict[str, Callable[[], object]] = {
    "unisono.kernels": kernels.declared_kernels,
    "unisono.loggers": lambda: logger.check(["offered"]),
    "unisono.tasks": lambda: kinds.find_kind("offered"),
    "unisono.launchers": lambda: launchers.find_launcher("offered"),
    "unisono.backends": lambda: backend_registry.find_backend("offered"),
}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`install(package, group, code)` installs a package whose module `offered_NAME` has this code."""

    def install(package: str, group: str, code: str) -> None:
        folder = tmp_path / package
        facts = folder / f"{package}-1.0.dist-info"
        facts.mkdir(parents=True)
        (folder / f"offered_{package}.py").write_text(code, encoding="utf-8")
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n", encoding="utf-8")
        (facts / "entry_points.txt").write_text(f"[{group}]\noffered = offered_{package}:made\n", encoding="utf-8")
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, f"offered_{package}", raising=False)

    kernels.declared_kernels()  # those of this package, which stay
    kernels._import_all.cache_clear()
    monkeypatch.setattr(kernels, "_DECLARED", dict(kernels._DECLARED))
    yield install
    kernels._import_all.cache_clear()


@pytest.mark.parametrize("group", ASKED)
def test_a_package_that_raises_at_import_is_named(group: str, install: Callable[..., None]) -> None:
    install("broken", group, "1 / 0")
    with pytest.raises(
        UserError, match=r"'offered': the installed package 'broken' \(offered_broken:made\).*ZeroDivision"
    ):
        ASKED[group]()


@pytest.mark.parametrize("group", ASKED)
def test_two_packages_with_one_name_are_named(group: str, install: Callable[..., None]) -> None:
    for package in ("one", "two"):
        install(package, group, "made = print")
    with pytest.raises(UserError, match=r"'offered': offered by .*'(one|two)'.* and .*'(one|two)'.*allowed is one"):
        ASKED[group]()


@pytest.mark.parametrize("group", [group for group in ASKED if group != "unisono.backends"])
def test_what_is_of_a_wrong_kind_is_named(group: str, install: Callable[..., None]) -> None:
    install("odd", group, "made = 5")
    with pytest.raises(UserError, match=r"offered.*(allowed|cannot be used)"):
        ASKED[group]()


def test_two_kernels_of_one_name_are_named(install: Callable[..., None]) -> None:
    code = "from unisono.kernels.kernel import Kernel\nmade = Kernel(name='gelu', reference=abs, compiled=None, same_bits=True)"
    install("twin", "unisono.kernels", code)
    with pytest.raises(UserError, match="'offered': kernel 'gelu' is declared already"):
        kernels.declared_kernels()


def test_a_package_that_is_found_in_two_places_is_one() -> None:
    point = metadata.EntryPoint("offered", "math:sqrt", "unisono.tasks")
    assert load_offer([point, point], "offered", "task", RecipeError)(4.0) == 2.0  # type: ignore[operator]
