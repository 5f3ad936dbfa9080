"""What to train: a frozen, validated description, read from TOML and `--set section.key=value`.

Owns reading, overrides, checks and their messages; the keys are in `sections.py`. Does not read data or build models.
"""

from __future__ import annotations

import codecs
import difflib
import re
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, Field, ValidationError, model_validator

from unisono.config.aliases import ALIASES
from unisono.config.run_sections import Checkpoint, Recovery, Tracking
from unisono.config.sections import (
    Bag,
    Data,
    Encode,
    Evaluate,
    Model,
    Pretrained,
    Screen,
    Section,
    TaskTable,
    Train,
    Transformer,
)
from unisono.config.small_files import read_small_bytes
from unisono.config.wording import hide_all_secrets, mask_secrets
from unisono.errors import RecipeError


class Recipe(Section):
    """Everything that decides a run's result, except the data's bytes and the numerics."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the run folder")
    task: TaskTable = TaskTable()
    data: Data = Data()
    screen: Screen = Screen()
    encode: Encode = Encode()
    model: Model = Bag()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    recovery: Recovery = Recovery()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _encoding_fits_model(self) -> Recipe:
        kind, model = self.encode.kind, self.model.kind
        if kind != "auto" and (kind == "ngrams") != (model == "bag"):
            allowed = "ngrams" if model == "bag" else "wordpiece, bpe or tokenizer"
            raise ValueError(
                f"encode.kind = {kind!r} does not fit model.kind = {model!r}, which reads {allowed}; or leave it "
                "on auto"
            )
        return self


PATHS = (
    ("data", "train"),
    ("data", "validation"),
    ("data", "test"),
    ("encode", "tokenizer"),
    ("model", "folder"),
    ("train", "start_from"),
    ("tracking", "folder"),
)
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:(//|:)")
MODELS: dict[str, type[Section]] = {"bag": Bag, "transformer": Transformer, "pretrained": Pretrained}


OPTIONAL: dict[str, Any] = {
    "model": None,
    "encode": None,
    "screen": None,
    "train.label_smoothing": 0.0,
    "train.class_weights": "none",
    "train.gradient_checkpointing": False,
}
"""Tables (None) and keys of a recipe that only some tasks use, with the value at which a key has no effect."""


def load(path: str | Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a TOML recipe; apply `section.key=value` overrides; check everything.

    Paths in the file are relative to its folder, paths in overrides to the current one; the result has absolute ones.

    Raises:
        RecipeError: the file is missing or no TOML, a key is unknown, a value is not allowed.
    """
    path = Path(path)
    try:
        table = tomllib.loads(_read(path))
    except FileNotFoundError:
        raise RecipeError(
            f"recipe {str(path)!r}: no such file. Give the path of a TOML recipe; examples/text has some."
        ) from None
    except RecursionError:
        raise RecipeError(f"recipe {str(path)!r}: not readable as TOML: nested too deep.") from None
    except (OSError, ValueError) as error:  # a zero character in the path is a ValueError, and so is TOMLDecodeError
        raise RecipeError(f"recipe {str(path)!r}: not readable as TOML: {error}") from None
    _anchor(table, path.resolve().parent)
    table.setdefault("name", path.stem)
    for override in overrides:
        _override(table, override)
    return check(table)


def check(table: dict[str, Any]) -> Recipe:
    """Turn plain tables into a Recipe, or raise a RecipeError that names every fault."""
    try:
        return Recipe.model_validate(table)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(fault) for fault in error.errors())) from None


def to_toml(recipe: Recipe, without: Collection[str] = ()) -> str:
    """The full recipe, defaults filled in, as TOML that `load` reads back to an equal recipe, except credentials in
    URLs. `without`: tables to leave out, because the task does not use them."""
    return tomli_w.dumps(to_table(recipe, without))


def to_table(recipe: Recipe, without: Collection[str] = ()) -> dict[str, Any]:
    """The full recipe as plain values, to be kept or shown: MASK stands in the place of credentials in URLs."""
    table: dict[str, Any] = mask_secrets(recipe.model_dump(mode="json", exclude=set(without)))
    return table


def check_uses(recipe: Recipe, uses: frozenset[str], kind: str) -> None:
    """Refuse tables and keys that the task does not use: they would have no effect.

    Raises:
        RecipeError: names the first one.
    """
    for name, idle in OPTIONAL.items():
        table, _, key = name.partition(".")
        if name in uses:
            continue
        if (key and getattr(getattr(recipe, table), key) != idle) or (not key and table in recipe.model_fields_set):
            raise RecipeError(
                f"'{name}' is for text recipes; the task {kind} does not use it. In a task of your own it is a matter "
                "of your loss or module. Leave it out."
            )


def unused_tables(uses: frozenset[str]) -> list[str]:
    """Tables of a recipe that have no effect on a task that uses these."""
    return [name for name in OPTIONAL if "." not in name and name not in uses]


def document(section: type[BaseModel] = Recipe, prefix: str = "", *, model: str = "bag") -> str:
    """Every key with its default, allowed values and meaning: a commented TOML file that `load` reads as the default
    recipe for this kind of model.

    Raises:
        RecipeError: there is no such kind.
    """
    if model not in MODELS:
        raise RecipeError(f"--model {model!r}: allowed are {', '.join(MODELS)}.")
    lines: list[str] = []
    tables: list[str] = []
    for name, field in section.model_fields.items():
        if name == "model":
            others = " or ".join(kind for kind in MODELS if kind != model)
            told = f"# {MODELS[model].__doc__}\n# Other kinds: {others}; --show-defaults --model KIND shows their keys."
            tables.append(f"{told}\n[model]\n" + document(MODELS[model], "model."))
        elif isinstance(field.default, Section):
            section_type: type[BaseModel] = type(field.default)
            tables.append(f"# {section_type.__doc__}\n[{name}]\n" + document(section_type, name + "."))
        else:
            value = tomli_w.dumps({name: field.default}).strip()
            lines.append(f"{value}  # {_allowed(section, name)}{field.description or 'which model'}")
    return "\n".join(lines) + "\n" + ("\n" + "\n".join(tables) if tables else "")


def _allowed(section: type[BaseModel], name: str) -> str:
    schema = section.model_json_schema()["properties"][name]
    if "enum" in schema:
        return "|".join(schema["enum"]) + ": "
    words = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [
        f"{sign} {schema[key]:g}" if schema[key] < 1e6 else f"{sign} {schema[key]}"
        for key, sign in words.items()
        if key in schema
    ]
    return ", ".join(limits) + ": " if limits else ""


def is_url(location: str) -> bool:
    """Whether a location is a URL (s3://…, https://…, hf://…), and so relative to no folder."""
    return URL.match(location) is not None


def _read(path: Path) -> str:
    """The text of a recipe, without a byte-order mark."""
    content = read_small_bytes(path)
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise RecipeError(f"recipe {str(path)!r} is UTF-16. Save it as UTF-8.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        told = f"byte 0x{content[error.start]:02X} in line {line} is no UTF-8"
        raise RecipeError(f"recipe {str(path)!r}: {told}. Save it as UTF-8.") from None


def _anchor(table: dict[str, Any], folder: Path) -> None:
    for section, key in PATHS:
        value = table.get(section)
        if isinstance(value, dict) and isinstance(value.get(key), str) and value[key] and not is_url(value[key]):
            try:
                value[key] = str((folder / Path(value[key]).expanduser()).resolve())
            except (OSError, RuntimeError, ValueError) as error:  # a link to itself, a zero character, no such user
                raise RecipeError(f"'{section}.{key}' = {value[key]!r}: no path: {error}. Give another one.") from None


def _override(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise RecipeError(
            f"--set {hide_all_secrets(override)!r}: allowed is section.key=value, for instance "
            "--set train.learning_rate=3e-4."
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    except RecursionError:
        raise RecipeError(f"--set {key}: the value is nested too deep.") from None
    one: dict[str, Any] = {names[-1]: value}
    for name in reversed(names[:-1]):
        one = {name: one}
    _anchor(one, Path.cwd())
    _merge(table, one)


def _merge(table: dict[str, Any], other: dict[str, Any]) -> None:
    for name, value in other.items():
        if isinstance(value, dict) and isinstance(table.get(name), dict):
            _merge(table[name], value)
        else:
            table[name] = value


def _explain(fault: Any) -> str:
    """One line about one fault: the key, what was given, what is allowed, what to do."""
    location = [str(part) for part in fault["loc"] if not (part in MODELS and fault["loc"][0] == "model")]
    key = ".".join(location)
    if fault["type"] == "extra_forbidden":
        known = _known_keys(fault["loc"])
        if alias := ALIASES.get(location[-1].lower()):
            return f"{key!r}: no such key. It is {alias!r} here: {_describe(alias)}."
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        elsewhere = [full for full in _all_keys() if full.split(".")[-1] == location[-1] and full != key]
        where = f"Did you mean {'.'.join([*location[:-1], near[0]])!r}?" if near else ""
        if elsewhere and not near:
            where = f"Did you mean {elsewhere[0]!r}?"
        return f"{key!r}: no such key. {where or 'Allowed: ' + ', '.join(known) + '.'}"
    given = fault.get("input")
    if fault["type"].startswith("union_tag"):
        allowed = ", ".join(MODELS)
        kind = given.get("kind") if isinstance(given, dict) else given
        near = difflib.get_close_matches(str(kind), list(MODELS), n=1, cutoff=0.3)
        return f"'model.kind' = {kind!r}: allowed are {allowed}." + (f" Did you mean {near[0]!r}?" if near else "")
    message = fault["msg"].removeprefix("Value error, ")
    message = message.replace("Input should be ", "allowed is ")
    if not key:  # a fault of the whole recipe already names its keys
        return f"{message}."
    shown = hide_all_secrets(repr(given))
    told = f"{key!r}" if isinstance(given, dict) else f"{key!r} = {shown}"  # a whole table would hide the fault
    return f"{told}: {message}. `unisono recipe --show-defaults` describes every key."


def _describe(key: str) -> str:
    """What a key means."""
    section, _, name = key.partition(".")
    sections = MODELS.values() if section == "model" else (type(Recipe.model_fields[section].default),)
    return next(str(kind.model_fields[name].description) for kind in sections if name in kind.model_fields)


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    section: type[BaseModel] = Recipe
    for part in location[:-1]:
        if part in MODELS:
            section = MODELS[str(part)]
        elif part != "model":
            section = type(Recipe.model_fields[str(part)].default)
    return list(section.model_fields)


def _all_keys() -> list[str]:
    keys = [
        f"{name}.{key}"
        for name, field in Recipe.model_fields.items()
        if isinstance(field.default, Section) and name != "model"
        for key in type(field.default).model_fields
    ]
    return keys + [f"model.{key}" for kind in MODELS.values() for key in kind.model_fields]
