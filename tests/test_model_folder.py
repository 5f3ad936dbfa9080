"""The folder of a trained model: what others compute from it, and what is refused in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import unisono
from bert import CONFIG, weights, write_bert
from toy import WORDS, make_records
from unisono.config.sections import Pretrained
from unisono.data.encoding.tokens import train_wordpiece
from unisono.engine.replica import same_bits
from unisono.tasks.text.pretrained import read_classifier

pytestmark = pytest.mark.usefixtures("warm")

LONGEST = 12
TEXTS = ["goal match n3", "bread", "unknown words", "soup salt oven " * 2, "chip code data cloud phone " * 9]
"""Short, as long as the limit or a little longer, and longer than the encoder's positions."""


def fine_tune(folder: Path, pooling: str) -> Path:
    """A run folder: the encoder of `bert.py` with a tokenizer for the toy's words, trained for two steps."""
    encoder = write_bert(folder / "encoder")
    text = " ".join(WORDS.values())
    tokenizer = train_wordpiece([[text + " 0123456789"]], 90, True)
    (encoder / "tokenizer.json").write_text(tokenizer.to_str())
    words = max(tokenizer.get_vocab().values()) + 1
    larger = weights() | {"embeddings.word_embeddings.weight": 0.2 * torch.randn(words, 32)}
    save_file(larger, encoder / "model.safetensors", metadata={"format": "pt"})
    (encoder / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": words}))
    texts, labels = zip(*(line.rsplit(",", 1) for line in make_records(24)), strict=True)
    recipe = folder / "recipe.toml"
    recipe.write_text(
        f'[data]\nstore = "{folder}/datasets"\n[encode]\nmax_tokens = {LONGEST}\n'
        f'[model]\nkind = "pretrained"\nfolder = "{encoder}"\npooling = "{pooling}"\n'
        "[train]\nsamples_per_step = 8\nmicrobatches = 2\nmax_steps = 2\nlearning_rate = 0.01\n"
    )
    frame = {"text": list(texts), "label": list(labels)}
    return unisono.train(recipe, frame, workers=1, run=folder / "run", quiet=True).folder


@pytest.fixture(scope="module")
def tuned(warm: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pooling → run folder."""
    return {pooling: fine_tune(tmp_path_factory.mktemp(pooling), pooling) for pooling in ("pooler", "cls", "mean")}


@pytest.fixture
def transformers() -> Any:
    found = pytest.importorskip("transformers")
    found.logging.set_verbosity_error()
    return found


def test_the_pipeline_of_transformers_gives_the_same_classes(tuned: dict[str, Path], transformers: Any) -> None:
    """Fails if config.json names other classes, or tokenizer_config.json lacks the limit or the padding."""
    ours = unisono.load(tuned["pooler"])
    pipe = transformers.pipeline("text-classification", model=str(tuned["pooler"] / "model"), top_k=None)
    assert pipe.model.config.architectures == ["BertForSequenceClassification"]
    for alone in (True, False):  # in batches, texts are padded
        found = [pipe([text], truncation=True)[0] for text in TEXTS] if alone else pipe(
            TEXTS, truncation=True, batch_size=len(TEXTS)
        )  # fmt: skip
        by_name = [{one["label"]: one["score"] for one in row} for row in found]
        theirs = np.array([[row[label] for label in ours.labels] for row in by_name])
        np.testing.assert_allclose(theirs, ours.probabilities(TEXTS), atol=1e-5, rtol=0)
        assert [max(row, key=lambda name: row[name]) for row in by_name] == ours.predict(TEXTS)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_transformers_does_not_fill_in_a_random_pooler(tuned: dict[str, Path], transformers: Any, pooling: str) -> None:
    """Fails if a class with a pooler opens the folder of a model without."""
    model = str(tuned[pooling] / "model")
    for open_it in (
        transformers.AutoModelForSequenceClassification.from_pretrained,
        transformers.BertForSequenceClassification.from_pretrained,
        lambda folder: transformers.pipeline("text-classification", model=folder),
    ):
        with pytest.raises(ValueError, match="dropout probability"):
            open_it(model)
    transformers.AutoModel.from_pretrained(model, add_pooling_layer=False)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_without_a_pooler_the_guides_lines_give_the_same_classes(
    tuned: dict[str, Path], transformers: Any, pooling: str
) -> None:
    model = str(tuned[pooling] / "model")
    ours = unisono.load(tuned[pooling])
    theirs = transformers.AutoModelForTokenClassification.from_pretrained(model, classifier_dropout=0.0).eval()
    given = transformers.AutoTokenizer.from_pretrained(model)(TEXTS, truncation=True, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = theirs(**given).logits
    mask = given["attention_mask"][:, :, None]
    pooled = (logits * mask).sum(1) / mask.sum(1) if pooling == "mean" else logits[:, 0]
    np.testing.assert_allclose(pooled.softmax(-1), ours.probabilities(TEXTS), atol=1e-5, rtol=0)


def test_a_tuned_folder_can_be_tuned_again(tuned: dict[str, Path]) -> None:
    """What keeps transformers from opening the folder as a classifier keeps nobody from using its encoder."""
    folder = tuned["mean"] / "model"
    again = read_classifier(Pretrained(folder=str(folder)), 3, recompute=False)
    before = unisono.load(tuned["mean"]).module
    left, right = again.bert.state_dict(), before.bert.state_dict()
    assert left.keys() == right.keys() and all(same_bits(left[name], right[name]) for name in left)
