"""The tables of a recipe: every key with its type, limits, default and meaning.

Owns the keys. `recipe.py` reads, changes and explains a recipe.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from unisono.config.dialect_types import ColumnNames, Comment, Delimiter, Encoding, Escape, Quote

Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
Names = Annotated[tuple[str, ...], Field(strict=False)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Personal = Literal["keep", "mask", "refuse"]


def _find_script(name: str) -> str:
    """Return the name of a script, if the regex package has its letters."""
    import regex

    try:
        regex.compile(rf"\p{{Script={name}}}")
    except regex.error:
        raise ValueError(
            "Unicode has no script of this name; allowed are for instance Latin, Greek, Cyrillic, Han, Hiragana, Arabic"
        ) from None
    return name


Script = Annotated[str, Field(pattern="^[A-Za-z][A-Za-z _-]*$"), AfterValidator(_find_script)]


TEXT = "text_classification"
"""The task of a recipe that names none."""


class Section(BaseModel):
    """One table of the recipe: unknown keys, wrong types and later changes are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _can_be_used(cls, value: Any) -> Any:
        if isinstance(value, str) and "\0" in value:
            raise ValueError("allowed is a text without the character NUL")
        if isinstance(value, int) and value >= 2**63:
            raise ValueError("allowed is a number below 2^63")
        return value


class TaskTable(Section):
    """What is learned. The other keys are the task's own: the arguments of its constructor."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, protected_namespaces=())

    kind: str = Field(
        TEXT,
        min_length=1,
        description="a preset, a task of an installed package, or module:Class, a task of your own",
    )

    @property
    def settings(self) -> dict[str, Any]:
        """The task's own keys."""
        return dict(self.model_extra or {})


class Data(Section):
    """Where the records are, and what is read from each."""

    train: str = Field(
        "",
        description="what to train on: a file, a folder with one sub-folder per class, a pattern (reviews/*.jsonl.gz), "
        "a URL (s3://…, https://…) or a dataset (hf://name:split); paths are relative to the recipe; docs/sources.md",
    )
    validation: str = Field("", description="the same for evaluation while training; empty: see validation_fraction")
    test: str = Field("", description="the same for the test after training; empty: see test_fraction")
    format: Literal["auto", "csv", "tsv", "jsonl", "json", "parquet", "folder"] = Field(
        "auto", description="auto goes by the file's name"
    )
    text: ColumnNames = Field(
        "text",
        description='name of the column with the text, or a list of names (["subject", "body"]): their texts are '
        "joined by a blank line; a.b is field b of column a",
    )
    label: str = Field("label", description="name of the column with the class")
    header_lines: int = Field(
        1, ge=0, le=100, description="CSV, TSV: lines before the first record; the first of them names the columns"
    )
    columns: Names = Field((), description="CSV, TSV: the columns' names, instead of those in the header")
    delimiter: Delimiter = Field(
        "auto",
        description="CSV, TSV: what stands between two fields: a character, or tab; auto: comma or tab, or the one of "
        ", ; | and tab by which the header has the columns",
    )
    quote: Quote = Field(
        "auto", description='CSV, TSV: what encloses a field: a character, or none; auto: "; for TSV only where certain'
    )
    escape: Escape = Field("", description="CSV, TSV: a character that makes the next one text: \\; empty: none")
    comment: Comment = Field("", description="CSV, TSV: lines that begin with it are left out; empty: none")
    encoding: Encoding = Field(
        "auto",
        description="of text files: utf-8, cp1252, utf-16 …; auto: by a byte-order mark, else UTF-8, and nothing else",
    )
    max_lines: int = Field(
        1_000, ge=1, description="CSV, TSV: a record of more lines is an error: often a quote that is not closed"
    )
    labels: Names = Field(
        (), description="the classes, in order; empty: those of the training records, sorted, numbers by their value"
    )
    validation_fraction: Rate = Field(
        0.0, description="share of the training records kept for validation, cut by a hash of their content"
    )
    test_fraction: Rate = Field(
        0.0, description="share of the training records kept for the test, cut by a hash of their content"
    )
    stratify: bool = Field(
        False,
        description="true: validation_fraction and test_fraction are shares of each class, at least one record of it; "
        "false: of all records, so a rare class may be missing in a split",
    )
    follow_links: bool = Field(
        False, description="folder per class: true: links that lead out of the folder are followed, wherever they lead"
    )
    max_record_bytes: int = Field(
        16 * 2**20, ge=1024, le=2**30, description="a larger record is quarantined, and never held in memory whole"
    )
    max_depth: int = Field(
        64, ge=1, le=500, description="JSONL: a record with more brackets in one another is quarantined"
    )
    max_expansion: float = Field(
        200.0, gt=1, description="a compressed file that unpacks to more than so many times its size is refused"
    )
    strict: bool = Field(False, description="true: a quarantined record is an error")
    store: str = Field(
        "runs/datasets",
        min_length=1,
        description="folder where encoded datasets are kept, each under the hash of what it was made from",
    )

    @property
    def texts(self) -> tuple[str, ...]:
        """The columns with the text."""
        return (self.text,) if isinstance(self.text, str) else self.text


class Screen(Section):
    """Which records are kept, beyond the rules that always hold, and what is repaired: see docs/screening.md."""

    min_characters: int = Field(0, ge=0, description="shorter texts are refused; space around a text does not count")
    max_characters: int = Field(0, ge=0, description="longer texts are refused; 0: no limit")
    scripts: Annotated[tuple[Script, ...], Field(strict=False)] = Field(
        (), description='scripts that letters should be of, by Unicode\'s names: ["Latin", "Greek"]; empty: any'
    )
    script_share: Share = Field(0.5, description="scripts: smallest share of a text's letters that must be of them")
    invisible: Literal["keep", "strip", "refuse"] = Field(
        "keep", description="control and invisible characters; refuse: texts with more than invisible_share of them"
    )
    invisible_share: Share = Field(0.01, description="invisible: largest share of such characters that is let pass")
    repeated_lines_share: Share = Field(
        1.0, description="largest share of a text's lines that stood in it before; 1: any"
    )
    mojibake: Literal["keep", "mend", "refuse"] = Field(
        "keep", description="UTF-8 that was read as something else, such as Ã© for é; mend and refuse need ftfy"
    )
    mail: Personal = Field("keep", description="mail addresses; mask: [mail] in their place")
    card: Personal = Field("keep", description="numbers of payment cards, by length and check digit; mask: [card]")
    phone: Personal = Field(
        "keep", description="phone numbers that exist, if they begin with +; mask: [phone]; needs phonenumbers"
    )
    phone_region: str = Field(
        "", pattern="^([A-Z]{2})?$", description="phone: also numbers as they are written there: US, DE, CN, …"
    )
    near_duplicates: Literal["keep", "refuse"] = Field(
        "keep", description="texts of which about 80 % is in an earlier text of their split, or in one of train"
    )
    contradicted: Literal["keep", "refuse"] = Field(
        "keep", description="records whose near-duplicates mostly have another class"
    )
    contradicted_neighbours: int = Field(
        3, ge=1, description="contradicted: near-duplicates that a record must have to be judged by them"
    )
    contradicted_share: Rate = Field(
        0.5, description="contradicted: a record is refused if more than this share of them has another class"
    )

    @model_validator(mode="after")
    def _some_length_is_allowed(self) -> Screen:
        if 0 < self.max_characters < self.min_characters:
            raise ValueError(
                f"min_characters {self.min_characters} is above max_characters {self.max_characters}: no text could "
                "be kept; lower the one or raise the other"
            )
        return self


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
    max_tokens: int = Field(256, ge=2, description="longer texts are cut, which is said; ngrams: so many words")
    lowercase: bool = Field(True, description="ngrams, wordpiece, bpe: fold case (and accents, for wordpiece)")
    ngrams: int = Field(2, ge=1, le=5, description="ngrams: longest run of words that is one feature")
    prefix: int = Field(
        0, ge=0, le=32, description="ngrams: first letters of a word that are a feature as well; 0: none"
    )
    features: int = Field(
        131_072, ge=16, description="ngrams: how many are kept, those in the most training texts; others are left out"
    )


class Bag(Section):
    """A bag of word n-grams, weighted by rarity: an embedding for each, added up; then a linear or a hidden layer."""

    kind: Literal["bag"] = "bag"
    width: int = Field(32, ge=1, le=1_048_576, description="numbers per embedding")
    hidden: int = Field(0, ge=0, le=1_048_576, description="width of a hidden layer; 0: none")
    dropout: Rate = Field(0.0, description="dropout on the summed embedding and the hidden layer")


class Transformer(Section):
    """A transformer encoder, trained from scratch."""

    kind: Literal["transformer"] = "transformer"
    layers: int = Field(4, ge=1, le=10_000, description="encoder blocks")
    width: int = Field(256, ge=1, le=1_048_576, description="size of the hidden states")
    heads: int = Field(4, ge=1, description="attention heads; divides width")
    feedforward: int = Field(1024, ge=1, le=1_048_576, description="inner size of the feed-forward layers")
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
    """How the weights are trained. Every key except `device`, `audit_every` and `loader_workers` decides bits."""

    epochs: float = Field(1.0, gt=0, le=1e9, description="passes over the training samples; a fraction is allowed")
    max_steps: int = Field(0, ge=0, description="stop after so many steps; 0: no limit")
    samples_per_step: int = Field(64, ge=1, description="global batch size: samples in one step")
    drop_last: bool = Field(
        False, description="true: the last step of an epoch is left out where it has fewer samples than the others"
    )
    microbatches: int = Field(8, ge=1, le=65_536, description="parts of a step; the largest number of workers")
    optimizer: Literal["sgd", "adam", "adamw", "lion"] = Field("adamw", description="update rule")
    learning_rate: float = Field(1e-3, gt=0, description="peak rate")
    pretrained_rate: float = Field(1.0, ge=0, description="factor on the rate of the pretrained part")
    weight_decay: float = Field(0.01, ge=0, description="decay of weights; biases and norms are spared")
    momentum: Rate = Field(0.9, description="sgd: momentum; the share of the last direction that is kept")
    nesterov: bool = Field(False, description="sgd: look ahead along the momentum")
    beta1: Rate = Field(0.9, description="adam, adamw, lion: β₁, decay of the average of gradients")
    beta2: Rate = Field(0.999, description="adam, adamw: β₂, decay of the average of squares; lion: of gradients")
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
    numerics: Literal["native", "portable"] = Field(
        "native",
        description="native: all instruction sets of the processor; portable: those that AVX2 and AVX-512 processors "
        'share, the same bits on both, about three times as slow where products are large; needs device = "cpu"; '
        "docs/design/0015-portable-numerics.md",
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in backward, to save memory")
    ema_decay: Rate = Field(0.0, description="keep an averaged copy of the weights, and test and export that; 0: none")
    lazy_rows: bool = Field(
        False,
        description="sparse embeddings: update and decay only the rows that a step touched, as torch.optim.SparseAdam "
        "does; false: all of them",
    )
    start_from: str = Field(
        "",
        description="run folder of a finished run: begin with its weights, for new data or another schedule; of the "
        "head, the classes that both have; a text model reads the run's vocabulary; docs/longer-training.md",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of weights, order and dropout")
    threads: int = Field(1, ge=1, le=1024, description="CPU threads per worker; other counts give other bits")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: GPUs where there are any")
    loader_workers: int = Field(
        0,
        ge=0,
        le=1024,
        description="own datasets: processes per worker that load items ahead; 0: each worker loads its own, in turn",
    )
    audit_every: int = Field(
        0,
        ge=0,
        description="steps between audits: another worker recomputes a microbatch, and bits are compared; 0: off",
    )

    @model_validator(mode="after")
    def _portable_numerics_are_for_processors(self) -> Train:
        if self.numerics == "portable" and self.device != "cpu":
            raise ValueError(
                f'numerics = "portable" with device = {self.device!r}: GPUs of different kinds give different bits; '
                'allowed is device = "cpu", or numerics = "native"'
            )
        return self

    @model_validator(mode="after")
    def _lazy_rows_have_no_average(self) -> Train:
        if self.lazy_rows and self.ema_decay:
            raise ValueError(
                "lazy_rows and ema_decay: an average follows all rows at every step; allowed is one of both"
            )
        return self


class Evaluate(Section):
    """When to evaluate on the validation samples (or the test samples, if there are none), and what follows."""

    every_epochs: float = Field(1.0, ge=0, description="0: only at the end")
    every_steps: int = Field(0, ge=0, description="instead of every_epochs; 0: off")
    samples_per_microbatch: int = Field(64, ge=1, description="samples evaluated at once")
    metric: str = Field("loss", description="what `patience` and `keep_best` compare")
    mode: Literal["auto", "min", "max"] = Field(
        "auto", description="whether less or more of the metric is better; auto: as the metric itself says"
    )
    patience: int = Field(0, ge=0, description="stop after so many evaluations without a better one; 0: off")
    keep_best: bool = Field(
        False, description="true: test and export the weights of the best evaluation, not the last ones"
    )
