"""Messages, screens and kept recipes hold no credentials, and nothing that a terminal would obey."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.config import recipe as recipes
from unisono.config.wording import MASK, count, hide_all_secrets, hide_secrets, name_some, readable
from unisono.data.ingest.locations import explain, find_files
from unisono.errors import DataError, RecipeError
from unisono.runtime.setup import decisive
from unisono.tracking import events
from unisono.tracking.ledger import Ledger
from unisono.tracking.terminal import Lines, Quiet, print_now

SECRET = "hunter2"
HIDDEN = {
    f"https://user:{SECRET}@host/a.csv?sig={SECRET}": "https://host/a.csv",
    f"https://{SECRET}@host:80/a.csv": "https://host:80/a.csv",
    f"https://user:p@{SECRET}@host/a.csv": "https://host/a.csv",
    f"s3://key:{SECRET}/with/slash@bucket/a.csv": "s3://bucket/a.csv",
    f"s3://bucket/a.csv?X-Amz-Signature={SECRET}&X-Amz-Date=1": "s3://bucket/a.csv",
    f"abfs://box@account/a.csv?sv=1&sig={SECRET}": "abfs://account/a.csv",
    f"simplecache::https://user:{SECRET}@host/a.csv?token={SECRET}": "simplecache::https://host/a.csv",
    f"zip://a.csv::https://host/a.zip?token={SECRET}": "zip://a.csv::https://host/a.zip",
    f"http://u:{SECRET}@[::1]:80/a.csv?x={SECRET}": "http://[::1]:80/a.csv",
}
KEPT = [
    "s3://bucket/a?.csv",
    "s3://bucket/dir@2/*.csv",
    "https://host:8080/at@home/a.csv",
    "hf://owner/name@main:train",
    "hf://name@v1:train",
    "folder/a?b=c@d.csv",
    "C:/a@b.csv",
    "",
]


@pytest.mark.parametrize("location", HIDDEN)
def test_a_location_is_shown_without_credentials(location: str) -> None:
    assert hide_secrets(location) == HIDDEN[location]
    assert SECRET not in hide_secrets(location, MASK) and MASK in hide_secrets(location, MASK)
    within = f"403, url='{location}' and ({location})"
    assert SECRET not in hide_all_secrets(within) and HIDDEN[location] in hide_all_secrets(within)


@pytest.mark.parametrize("location", KEPT)
def test_a_location_without_credentials_is_shown_as_it_is(location: str) -> None:
    assert hide_secrets(location) == hide_secrets(location, MASK) == location


@pytest.mark.parametrize("error", [ValueError, PermissionError, OSError, ImportError])
@pytest.mark.parametrize("location", HIDDEN)
def test_errors_of_libraries_hold_no_credentials(location: str, error: type[Exception]) -> None:
    with pytest.raises(DataError) as caught, explain(location):
        raise error(f"GET {location} failed, url={location!r}")
    assert SECRET not in str(caught.value)


def test_a_kept_recipe_holds_no_credentials_and_a_run_goes_on_with_others(tmp_path: Path) -> None:
    one, other = (
        recipes.check(
            {
                "data": {"train": f"https://user:{word}@host/a.csv?sig={word}", "test": "s3://bucket/a.csv"},
                "task": {"kind": "tasks:Own", "source": [f"https://host/b?token={word}"]},
            }
        )
        for word in (SECRET, "another")
    )
    kept = recipes.to_toml(one)
    assert SECRET not in kept and SECRET not in json.dumps(decisive(one))
    assert decisive(one) == decisive(other)
    (tmp_path / "recipe.toml").write_text(kept, encoding="utf-8")
    again = recipes.load(tmp_path / "recipe.toml")
    assert again.data.train == f"https://{MASK}@host/a.csv?{MASK}" and again.data.test == "s3://bucket/a.csv"
    with pytest.raises(DataError, match=r"credentials were left out.*--set data\.train"):
        find_files(again.data.train)


@pytest.mark.parametrize(
    "given",
    [{"data": {"train": [f"https://u:{SECRET}@h/a"]}}, {"data": {"format": f"https://u:{SECRET}@h/a?k={SECRET}"}}],
)
def test_a_recipe_that_is_refused_is_quoted_without_credentials(given: dict[str, object]) -> None:
    with pytest.raises(RecipeError) as caught:
        recipes.check(given)
    assert SECRET not in str(caught.value) and "https://h/a" in str(caught.value)


def test_an_override_that_is_refused_is_quoted_without_credentials(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("")
    with pytest.raises(RecipeError) as caught:
        recipes.load(tmp_path / "a.toml", (f"https://user:{SECRET}@host/a.csv",))
    assert SECRET not in str(caught.value)


EVIL = "a\x1b[2Jb\rc\x00\x07\x9b31m\u202etxt\u2028\udcff\U000e0041"


def test_what_a_terminal_would_obey_is_spelled_out() -> None:
    assert readable(EVIL) == "a\\u001b[2Jb\\u000dc\\u0000\\u0007\\u009b31m\\u202etxt\\u2028\\udcff\\ue0041"
    assert readable("Ünï 中文 नमस्ते \u200d😀\tb\nc") == "Ünï 中文 नमस्ते \u200d😀\tb\nc"


@given(st.text(st.characters() | st.characters(categories=["Cs", "Cc", "Cf"])))
def test_no_text_controls_a_terminal(text: str) -> None:
    shown = readable(text)
    shown.encode()
    assert not any(ord(letter) < 32 or 127 <= ord(letter) < 160 for letter in shown if letter not in "\t\n")
    assert readable(shown) == shown


def test_every_screen_and_the_ledger_without_a_run_show_it_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    event = events.Notice(message=f"class {EVIL}", warning=True)
    print_now(EVIL)
    for screen in (Lines(), Quiet()):
        screen.observe(event)
    ledger = Ledger(tmp_path / "run")
    ledger._warn(EVIL)
    written = capsys.readouterr()
    assert written.out == f"{readable(EVIL)}\nwarning: class {readable(EVIL)}\n"
    assert written.err == f"warning: class {readable(EVIL)}\nwarning: {readable(EVIL)}\n"


def test_numbers_and_names() -> None:
    assert [count(number, "row") for number in (0, 1, 2, 1234)] == ["0 rows", "1 row", "2 rows", "1,234 rows"]
    assert count(2, "class", "classes") == "2 classes"
    assert name_some(["a", "b"]) == "'a', 'b'" and name_some("abcd", 2) == "'a', 'b' and 2 more"
