"""The recipe: strict, typed, documented, and its faults explained."""

from __future__ import annotations

import math
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from unisono.config import recipe as recipes
from unisono.config.aliases import ALIASES
from unisono.config.recipe import MODELS, Recipe, check, document, load, to_toml
from unisono.config.sections import Bag, Section
from unisono.errors import RecipeError


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def explain(**table: Any) -> str:
    with pytest.raises(RecipeError) as found:
        check(table)
    return str(found.value)


def test_empty_recipe_has_the_defaults(tmp_path: Path) -> None:
    recipe = load(write(tmp_path, ""))
    assert recipe == Recipe(name="mine")
    assert isinstance(recipe.model, Bag)


def test_recipe_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Recipe().train.epochs = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("section", "key", "value", "allowed"),
    [
        ("train", "epochs", "3", "number"),
        ("train", "seed", 1.5, "integer"),
        ("train", "seed", -1, "greater than or equal to 0"),
        ("train", "microbatches", 0, "greater than or equal to 1"),
        ("train", "learning_rate", 0.0, "greater than 0"),
        ("train", "nesterov", 1, "boolean"),
        ("train", "optimizer", "lamb", "'sgd', 'adam', 'adamw' or 'lion'"),
        ("train", "precision", "fp16", "'float32' or 'bf16'"),
        ("data", "test_fraction", 1.0, "less than 1"),
        ("encode", "ngrams", 6, "less than or equal to 5"),
        ("evaluate", "patience", True, "integer"),
        ("checkpoint", "keep", 0, "greater than or equal to 1"),
    ],
)
def test_wrong_value_is_explained(section: str, key: str, value: object, allowed: str) -> None:
    told = explain(**{section: {key: value}})
    assert told.startswith(f"'{section}.{key}' = {value!r}: ")
    assert "allowed" in told or "valid" in told
    assert allowed in told
    assert "--show-defaults" in told


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"train": {"learning_rat": 1.0}}, "'train.learning_rat': no such key. Did you mean 'train.learning_rate'?"),
        ({"data": {"epochs": 1.0}}, "'data.epochs': no such key. Did you mean 'train.epochs'?"),
        ({"trian": {}}, "'trian': no such key. Did you mean 'train'?"),
        (
            {"model": {"kind": "bagg"}},
            "'model.kind' = 'bagg': allowed are bag, transformer, pretrained. Did you mean 'bag'?",
        ),
        (
            {"model": {"kind": "bag", "layers": 2}},
            "'model.layers': no such key. Allowed: kind, width, hidden, dropout.",
        ),
        ({"model": {"kind": "transformer", "width": 10, "heads": 4}}, "width 10 is no multiple of heads 4"),
        ({"checkpoint": {"zzz": 1}}, "'checkpoint.zzz': no such key. Allowed: every_steps, keep."),
        ({"name": "../up"}, "'name' = '../up'"),
        ({"train": 5}, "'train' = 5"),
    ],
)
def test_wrong_key_is_explained(table: dict[str, Any], told: str) -> None:
    assert told in explain(**table)


@pytest.mark.parametrize(
    ("table", "told"),
    [
        (
            {"train": {"batch_size": 8}},
            "'train.batch_size': no such key. It is 'train.samples_per_step' here: global batch",
        ),
        ({"train": {"lr": 0.1}}, "'train.lr': no such key. It is 'train.learning_rate' here: peak rate"),
        ({"train": {"num_epochs": 1}}, "'train.epochs' here: passes over"),
        ({"train": {"warmup_steps": 1}}, "'train.warmup' here: below 1: share of all steps"),
        ({"model": {"kind": "bag", "weight_decay": 1.0}}, "'train.weight_decay'"),
        ({"encode": {"max_length": 1}}, "'encode.max_tokens' here: longer texts are cut"),
        ({"train": {"max_grad_norm": 1.0}}, "'train.clip_norm' here"),
        ({"train": {"fp16": True}}, "'train.precision' here"),
        ({"train": {"bf16": True}}, "'train.precision' here"),
        ({"train": {"num_workers": 2}}, "'train.loader_workers' here"),
        ({"model": {"kind": "bag", "num_layers": 2}}, "'model.layers' here"),
        ({"batch_size": 8}, "'batch_size': no such key. It is 'train.samples_per_step' here"),
        ({"checkpoint": {"save_steps": 8}}, "'checkpoint.every_steps' here"),
    ],
)
def test_names_of_other_trainers_are_known(table: dict[str, Any], told: str) -> None:
    assert told in explain(**table)


def test_every_hint_names_a_key_that_exists_and_none_is_a_key_itself() -> None:
    keys = set(recipes._all_keys())
    assert set(ALIASES.values()) <= keys
    assert not set(ALIASES) & {key.partition(".")[2] for key in keys}


def test_every_fault_is_named_at_once() -> None:
    told = explain(train={"epochs": -1.0, "sed": 1}, data={"format": "xls"})
    assert len(told.splitlines()) == 3
    assert all(key in told for key in ("train.epochs", "train.sed", "data.format"))


def test_overrides_win_and_are_typed(tmp_path: Path) -> None:
    path = write(tmp_path, '[train]\nepochs = 2\nseed = 1\n[model]\nkind = "bag"\nwidth = 4\n')
    overrides = (
        "train.epochs=0.5",
        "data.text=body",
        "model.width=9",
        'data.labels=["a", "b"]',
        "train={seed=3, threads=2}",
        "name=other",
    )
    recipe = load(path, overrides)
    assert (recipe.train.epochs, recipe.train.seed, recipe.train.threads) == (0.5, 3, 2)
    assert (recipe.data.text, recipe.data.labels, recipe.model.kind, recipe.name) == (
        "body",
        ("a", "b"),
        "bag",
        "other",
    )
    assert isinstance(recipe.model, Bag) and recipe.model.width == 9


@pytest.mark.parametrize("override", ["train.epochs", "=3", "train.=3", ".epochs=3", ""])
def test_wrong_override_is_explained(tmp_path: Path, override: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(f"--set {override!r}: allowed is section.key=value")):
        load(write(tmp_path, ""), (override,))


def test_later_override_wins(tmp_path: Path) -> None:
    assert load(write(tmp_path, ""), ("train.seed=1", "train.seed=2")).train.seed == 2


def test_paths_are_relative_to_the_recipe_or_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    path = write(tmp_path / "there", '[data]\ntrain = "a.csv"\ntest = "../b.csv"\n')
    recipe = load(path, ("data.validation=c.csv",))
    assert recipe.data.train == str(tmp_path / "there" / "a.csv")
    assert recipe.data.test == str(tmp_path / "b.csv")
    assert recipe.data.validation == str(tmp_path / "here" / "c.csv")
    assert recipe.encode.tokenizer == ""


def test_patterns_have_a_folder_and_urls_have_none(tmp_path: Path) -> None:
    places = ["s3://bucket/part-*.csv", "https://host/a.csv?x=/y", "hf://owner/name:train", "hf:///saved:test"]
    for place in places:
        assert load(write(tmp_path, f'[data]\ntrain = "{place}"\n')).data.train == place
        assert load(write(tmp_path, ""), (f"data.test={place}",)).data.test == place
    recipe = load(write(tmp_path, '[data]\ntrain = "reviews/**/*.jsonl.gz"\n'))
    assert recipe.data.train == str(tmp_path / "reviews" / "**" / "*.jsonl.gz")


@pytest.mark.parametrize("text", ["[data", "a = ", "[train]\nseed = 1\nseed = 2\n", "\x00"])
def test_no_toml_is_explained(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError, match="not readable as TOML"):
        load(write(tmp_path, text))


def test_missing_recipe_is_explained(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such file"):
        load(tmp_path / "none.toml")
    with pytest.raises(RecipeError, match="not readable"):
        load(tmp_path)


SECTIONS = [
    type(table) for table in dict(Recipe()).values() if isinstance(table, Section) and not isinstance(table, Bag)
]


@pytest.mark.parametrize("section", [*MODELS.values(), *SECTIONS])
def test_documentation_is_toml_with_the_defaults(section: type[Section]) -> None:
    """What `recipe --show-defaults` prints for a section can be pasted into a recipe, and changes nothing."""
    table = tomllib.loads(document(section))
    assert section(**table) == section()
    assert table.keys() == section.model_fields.keys()


@pytest.mark.parametrize("kind", MODELS)
def test_documentation_is_a_recipe(tmp_path: Path, kind: str) -> None:
    """Of every kind of model. Fails if two [model] tables are printed, or a default that the recipe does not have."""
    text = document(model=kind)
    assert load(write(tmp_path, text)) == Recipe(model=MODELS[kind]())  # type: ignore[arg-type]
    assert all(other in text for other in MODELS)


def test_documentation_of_an_unknown_model_is_refused() -> None:
    with pytest.raises(RecipeError, match="--model 'bagg': allowed are bag, transformer, pretrained"):
        document(model="bagg")


def test_every_key_is_described() -> None:
    for line in "".join(document(model=kind) for kind in MODELS).splitlines():
        if " = " in line and not line.startswith("#"):
            assert len(line.partition("# ")[2].split()) > 2 or line.startswith(("name", "kind", "optimizer")), line


def settings(section: type[Section]) -> st.SearchStrategy[Any]:
    """Any values that a section allows."""
    texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
    names = st.lists(texts, max_size=3).map(tuple)
    by_section: dict[type[Section], dict[str, st.SearchStrategy[Any]]] = {
        recipes.Data: {
            "text": texts,
            "label": texts,
            "labels": names,
            "columns": names,
            "header_lines": st.integers(0, 100),
            "test_fraction": st.floats(0, 0.999),
            "strict": st.booleans(),
            "format": st.sampled_from(["auto", "csv", "folder"]),
        },
        recipes.Train: {
            "epochs": st.floats(0, 1e9, exclude_min=True),
            "seed": st.integers(0, 2**63 - 1),
            "learning_rate": st.floats(1e-300, 1e300),
            "class_weights": st.sampled_from(["none", "balanced"])
            | st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=4).map(tuple),
            "beta2": st.floats(0, 1, exclude_max=True),
            "nesterov": st.booleans(),
            "device": st.sampled_from(["auto", "cpu"]),
        },
        recipes.Evaluate: {"metric": texts, "patience": st.integers(0, 99), "keep_best": st.booleans()},
    }
    return st.fixed_dictionaries({}, optional=by_section[section]).map(lambda table: section(**table))


@given(
    data=settings(recipes.Data),
    train=settings(recipes.Train),
    evaluate=settings(recipes.Evaluate),
    model=st.sampled_from(
        [Bag(width=3), recipes.Transformer(layers=1, width=6, heads=3), recipes.Pretrained(freeze=True)]
    ),
)
def test_toml_round_trip(data: Any, train: Any, evaluate: Any, model: Any) -> None:
    recipe = Recipe(name="x", data=data, train=train, evaluate=evaluate, model=model)
    again = check(tomllib.loads(to_toml(recipe)))
    assert again == recipe
    assert math.copysign(1, again.train.epochs) == 1
