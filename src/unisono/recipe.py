"""What to train: a frozen, validated description, read from TOML and `--set section.key=value`.

Owns the names, types, limits, defaults and documentation of every key. Does not read data or build models.
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from unisono.errors import RecipeError

Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
Names = Annotated[tuple[str, ...], Field(strict=False)]


class Section(BaseModel):
    """One table of the recipe: unknown keys, wrong types and later changes are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class Data(Section):
    """Where the records are, and what is taken from each."""

    train: str = Field(
        "", description="file (or folder with one sub-folder per class) to train on; relative to the recipe"
    )
    validation: str = Field("", description="file for evaluation while training; empty: see validation_fraction")
    test: str = Field("", description="file for the test after training; empty: see test_fraction")
    format: Literal["auto", "csv", "tsv", "jsonl", "parquet", "folder"] = Field(
        "auto", description="auto goes by the file's name"
    )
    text: str = Field("text", description="name of the column with the text")
    label: str = Field("label", description="name of the column with the class")
    header_lines: int = Field(
        1, ge=0, le=100, description="CSV, TSV: lines before the first record; the first of them names the columns"
    )
    columns: Names = Field((), description="CSV, TSV: the columns' names, instead of those in the header")
    labels: Names = Field((), description="the classes, in order; empty: those of the training records, sorted")
    validation_fraction: Rate = Field(
        0.0, description="share of the training records kept for validation, cut by a hash of their content"
    )
    test_fraction: Rate = Field(
        0.0, description="share of the training records kept for the test, cut by a hash of their content"
    )
    strict: bool = Field(False, description="true: a quarantined record is an error")
    store: str = Field(
        "runs/datasets",
        description="folder where encoded datasets are kept, each under the hash of what it was made from",
    )


class Encode(Section):
    """How a text becomes numbers."""

    kind: Literal["auto", "ngrams", "wordpiece", "bpe", "tokenizer"] = Field(
        "auto",
        description="auto: ngrams for bag, wordpiece for transformer, the folder's tokenizer.json for pretrained",
    )
    tokenizer: str = Field("", description="kind tokenizer: path of a tokenizer.json")
    vocabulary_size: int = Field(
        16_000, ge=64, description="wordpiece, bpe: entries of the vocabulary trained on the training texts"
    )
    max_tokens: int = Field(256, ge=2, description="longer texts are cut; for ngrams the limit is on words")
    lowercase: bool = Field(True, description="ngrams, wordpiece, bpe: fold case (and accents, for wordpiece)")
    ngrams: int = Field(2, ge=1, le=5, description="ngrams: longest run of words that is one feature")
    prefix: int = Field(
        0, ge=0, le=32, description="ngrams: first letters of a word that are a feature as well; 0: none"
    )
    features: int = Field(
        131_072, ge=16, description="ngrams: how many are told apart, those in most training texts; others are left out"
    )


class Bag(Section):
    """A bag of word n-grams, weighted by rarity: an embedding for each, added up; then a linear or a hidden layer."""

    kind: Literal["bag"] = "bag"
    width: int = Field(32, ge=1, description="numbers per embedding")
    hidden: int = Field(0, ge=0, description="width of a hidden layer; 0: none")
    dropout: Rate = Field(0.0, description="dropout on the summed embedding and the hidden layer")


class Transformer(Section):
    """A transformer encoder, trained from scratch."""

    kind: Literal["transformer"] = "transformer"
    layers: int = Field(4, ge=1, description="encoder blocks")
    width: int = Field(256, ge=1, description="size of the hidden states")
    heads: int = Field(4, ge=1, description="attention heads; divides width")
    feedforward: int = Field(1024, ge=1, description="inner size of the feed-forward layers")
    dropout: Rate = Field(0.1, description="dropout everywhere in the encoder")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Transformer:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}")
        return self


class Pretrained(Section):
    """A BERT-family encoder read from a folder, with a new classification head."""

    kind: Literal["pretrained"] = "pretrained"
    folder: str = Field("", description="folder with config.json, model.safetensors and tokenizer.json")
    dropout: Rate = Field(0.1, description="dropout in the encoder and before the head")
    attention_dropout: Rate = Field(0.0, description="dropout on attention weights")
    pooling: Literal["mean", "cls", "pooler"] = Field(
        "mean",
        description="what the head sees: the mean of the tokens, the first one, or that through the encoder's own "
        "pooler, as in transformers",
    )
    freeze: bool = Field(False, description="true: only the head is trained")


Model = Annotated[Bag | Transformer | Pretrained, Field(discriminator="kind")]


class Train(Section):
    """How the weights are found. Every key but `device` and `audit_every` decides bits."""

    epochs: float = Field(1.0, gt=0, description="passes over the training samples; a fraction is allowed")
    max_steps: int = Field(0, ge=0, description="stop after so many steps; 0: no limit")
    samples_per_step: int = Field(64, ge=1, description="samples in one step's global batch")
    microbatches: int = Field(8, ge=1, le=65_536, description="pieces that a step is cut into; at most so many workers")
    optimizer: Literal["sgd", "adam", "adamw", "lion"] = Field("adamw", description="update rule")
    learning_rate: float = Field(1e-3, gt=0, description="peak rate")
    pretrained_rate: float = Field(1.0, ge=0, description="factor on the rate of the pretrained part")
    weight_decay: float = Field(0.01, ge=0, description="decay of weights; biases and norms are spared")
    momentum: Rate = Field(0.9, description="sgd: share of the last direction that is kept")
    nesterov: bool = Field(False, description="sgd: look ahead along the momentum")
    beta1: Rate = Field(0.9, description="adam, adamw, lion: memory of the gradient")
    beta2: Rate = Field(0.999, description="adam, adamw: memory of its square; lion: of the gradient")
    epsilon: float = Field(1e-8, gt=0, description="adam, adamw: added to the denominator")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="what the rate does after the warm-up"
    )
    warmup: float = Field(0.1, ge=0, description="below 1: share of all steps; from 1: number of steps")
    clip_norm: float = Field(0.0, ge=0, description="limit of the gradient's norm; 0: none")
    label_smoothing: Rate = Field(0.0, description="share of the target spread over all classes")
    class_weights: Literal["none", "balanced"] | Annotated[tuple[float, ...], Field(strict=False)] = Field(
        "none", description="none, balanced (inverse frequency), or one number per class"
    )
    precision: Literal["float32", "bf16"] = Field(
        "float32", description="bf16: autocast; weights and sums stay float32"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in backward, to save memory")
    ema_decay: Rate = Field(0.0, description="keep an averaged copy of the weights, and test and export that; 0: none")
    lazy_rows: bool = Field(
        False,
        description="sparse embeddings: update and decay only the rows that a step touched, as torch.optim.SparseAdam "
        "does; false: all of them",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of weights, order and dropout")
    threads: int = Field(1, ge=1, le=1024, description="CPU threads per worker; other counts give other bits")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: GPUs where there are any")
    audit_every: int = Field(
        0,
        ge=0,
        description="steps between audits: another worker recomputes a microbatch, and bits are compared; 0: off",
    )

    @model_validator(mode="after")
    def _lazy_rows_have_no_average(self) -> Train:
        if self.lazy_rows and self.ema_decay:
            raise ValueError(
                "lazy_rows and ema_decay: an average follows all rows at every step; allowed is one of both"
            )
        return self


class Evaluate(Section):
    """When to look at the validation samples (or the test samples, where there are none), and what follows."""

    every_epochs: float = Field(1.0, ge=0, description="0: only at the end")
    every_steps: int = Field(0, ge=0, description="instead of every_epochs; 0: off")
    samples_per_microbatch: int = Field(64, ge=1, description="samples evaluated at once")
    metric: str = Field("loss", description="what `patience` and `keep_best` compare; loss falls, all others rise")
    patience: int = Field(0, ge=0, description="stop after so many evaluations without a better one; 0: off")
    keep_best: bool = Field(
        False, description="true: test and export the weights of the best evaluation, not the last ones"
    )


class Checkpoint(Section):
    """When the whole state is written to disk."""

    every_steps: int = Field(0, ge=0, description="0: only at the end and on an interrupt")
    keep: int = Field(2, ge=1, description="newest checkpoints to keep")


class Recovery(Section):
    """What happens when workers are lost or hang, or the machine is wanted back. No key decides a bit."""

    on_loss: Literal["replace", "shrink"] = Field(
        "replace", description="replace: start another worker; shrink: the others take its share"
    )
    restarts: int = Field(100, ge=0, description="losses that a run recovers from; 0: the first one ends it")
    attempts: int = Field(
        3,
        ge=1,
        description="losses in a row, no step finished in between, at which the run ends: the fault repeats",
    )
    backoff_seconds: float = Field(
        1.0, ge=0, description="wait before the second attempt at a step; doubled for each further one, up to a minute"
    )
    hang_factor: float = Field(
        20.0,
        ge=0,
        description="a worker that makes no progress for so many times the longest step (one second at least) is lost; "
        "0: never",
    )
    grace_seconds: float = Field(
        30.0, gt=0, description="after SIGTERM, SIGUSR1 or Ctrl-C: time to finish the step and write a checkpoint"
    )


class Recipe(Section):
    """Everything that decides a run's result, but the data's bytes and the numerics."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the run folder")
    data: Data = Data()
    encode: Encode = Encode()
    model: Model = Bag()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    recovery: Recovery = Recovery()

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


PATHS = (("data", "train"), ("data", "validation"), ("data", "test"), ("encode", "tokenizer"), ("model", "folder"))
MODELS: dict[str, type[Section]] = {"bag": Bag, "transformer": Transformer, "pretrained": Pretrained}


def load(path: str | Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a TOML recipe; apply `section.key=value` overrides; check everything.

    Paths in the file are relative to its folder, paths in overrides to the current one; the result has absolute ones.

    Raises:
        RecipeError: the file is missing or no TOML, a key is unknown, a value is not allowed.
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(
            f"recipe {str(path)!r}: no such file. Give the path of a TOML recipe; examples/text has some."
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
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


def to_toml(recipe: Recipe) -> str:
    """The full recipe, defaults filled in, as TOML that `load` reads back to an equal recipe."""
    return tomli_w.dumps(recipe.model_dump(mode="json"))


def document(section: type[BaseModel] = Recipe, prefix: str = "") -> str:
    """Every key with its default, allowed values and meaning, as a commented TOML file."""
    lines: list[str] = []
    tables: list[str] = []
    for name, field in section.model_fields.items():
        if name == "model":
            for kind in MODELS.values():
                tables.append(f"# One of the [model] tables. {kind.__doc__}\n[model]\n" + document(kind, "model."))
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


def _anchor(table: dict[str, Any], folder: Path) -> None:
    for section, key in PATHS:
        value = table.get(section)
        if isinstance(value, dict) and isinstance(value.get(key), str) and value[key]:
            value[key] = str((folder / Path(value[key]).expanduser()).resolve())


def _override(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise RecipeError(
            f"--set {override!r}: allowed is section.key=value, for instance --set train.learning_rate=3e-4."
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
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
    """One line on one fault: the key, what was given, what is allowed, what to do."""
    location = [str(part) for part in fault["loc"] if not (part in MODELS and fault["loc"][0] == "model")]
    key = ".".join(location)
    if fault["type"] == "extra_forbidden":
        known = _known_keys(fault["loc"])
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
    if not key:  # a fault of the whole recipe names its keys itself
        return f"{message}."
    told = f"{key!r}" if isinstance(given, dict) else f"{key!r} = {given!r}"  # a whole table would drown the fault
    return f"{told}: {message}. `unisono recipe --show-defaults` describes every key."


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
