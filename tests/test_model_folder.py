"""The folder of a trained model: what others compute from it, and what is refused in it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import unisono
from bert import CONFIG, weights, write_bert
from toy import WORDS, Command, make_records, make_toy
from unisono.config.sections import Pretrained
from unisono.data.encoding.tokens import train_wordpiece
from unisono.engine.replica import same_bits
from unisono.errors import DamagedError, DataError, ModelError
from unisono.storage.model_files import FILES, write_model_facts
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


def reseal(model: Path, **changes: object) -> None:
    """Write the facts again, changed, with the hashes of the files as they are now."""
    path = model / "unisono.json"
    facts = json.loads(path.read_text())
    path.unlink()
    write_model_facts(path, {name: value for name, value in facts.items() if name != FILES} | changes)


def change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def harm(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors")
        reseal(model)

    return harm


def change_file(name: str, content: bytes) -> Callable[[Path], None]:
    def harm(model: Path) -> None:
        (model / name).write_bytes(content)
        reseal(model)

    return harm


def change_facts(content: str) -> Callable[[Path], object]:
    return lambda model: (model / "unisono.json").write_text(content)


def change_fields(name: str, **fields: object) -> Callable[[Path], None]:
    def harm(model: Path) -> None:
        (model / name).write_text(json.dumps(json.loads((model / name).read_text()) | fields))
        reseal(model)

    return harm


def pipe(name: str) -> Callable[[Path], None]:
    """A pipe in a file's place: whoever opens it to read waits for ever."""

    def harm(model: Path) -> None:
        (model / name).unlink()
        os.mkfifo(model / name)

    return harm


def endless(model: Path) -> None:
    (model / "unisono.json").unlink()
    (model / "unisono.json").symlink_to("/dev/zero")


def header(text: str, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text.encode() + bytes(64)


TENSOR = '{"dtype": "F32", "shape": [2], "data_offsets": [%d, %d]}'
HARMS = {
    "NaN": (change_weights(lambda one: next(iter(one.values())).view(-1)[3:4].fill_(torch.nan)), "1 numbers of .* NaN"),
    "infinite": (change_weights(lambda one: one["head.1.bias"].fill_(torch.inf)), "head.1.bias.* infinite"),
    "integers": (change_weights(lambda one: one.update({"head.1.bias": torch.ones(3, dtype=torch.int32)})), "int32"),
    "other floats": (change_weights(lambda one: one.update({"head.1.bias": torch.ones(3).half()})), "float16"),
    "other shape": (
        change_weights(lambda one: one.update({"head.1.bias": torch.ones(4)})),
        r"\[4\]; allowed is .*\[3\]",
    ),
    "one missing": (change_weights(lambda one: one.pop("head.1.bias")), "'head.1.bias' is missing"),
    "one too many": (change_weights(lambda one: one.update(more=torch.ones(3))), "'more' is not in the model"),
    "other weights": (change_weights(lambda one: one["head.1.bias"].add_(1)), "not those in summary.json"),
    "huge header": (change_file("model.safetensors", header("{}", 2**62)), "model.safetensors"),
    "deep header": (change_file("model.safetensors", header('{"a":' * 9999 + "1" + "}" * 9999)), "model.safetensors"),
    "wrong types": (change_file("model.safetensors", header('{"a": [1, "b"]}')), "model.safetensors"),
    "overlapping": (
        change_file("model.safetensors", header(f'{{"a": {TENSOR % (0, 8)}, "b": {TENSOR % (4, 12)}}}')),
        "model.safetensors",
    ),
    "label twice": (lambda model: reseal(model, labels=["food", "tech", "food"]), "'food' is in 'labels' twice"),
    "too few labels": (lambda model: reseal(model, labels=["food", "tech"]), "2 classes"),
    "numbers as labels": (lambda model: reseal(model, labels=[1, 2, 3]), "names of the classes"),
    "no recipe": (lambda model: reseal(model, recipe=[]), "'recipe' is no object"),
    "a list": (change_facts("[]"), "the file is no object"),
    "no JSON": (change_facts("{"), "unisono.json' is damaged"),
    "deep facts": (change_facts("[" * 99_999), "unisono.json' is damaged"),
    "long number": (change_facts("1" * 9999), "unisono.json' is damaged"),
    "hashes of another kind": (change_facts('{"recipe": {}, "files": [1]}'), "hashes are damaged"),
    "outside": (change_facts('{"recipe": {}, "files": {"../a": {"bytes": 1, "sha256": ""}}}'), "not in the folder"),
    "endless facts": (endless, "unisono.json"),
    "pipe as facts": (pipe("unisono.json"), "no regular file"),
    "pipe as weights": (pipe("model.safetensors"), "model.safetensors"),
    "pipe as encoder": (pipe("encoder.json"), "encoder.json"),
    "pipe as features": (pipe("features.npy"), "features.npy"),
    "deep encoder": (change_file("encoder.json", b"[" * 99_999), "encoder.json"),
    "huge features": (
        lambda model: change_file(
            "features.npy", (model / "features.npy").read_bytes().replace(b"(", b"(9999999999", 1)
        )(model),
        "features.npy",
    ),
    "altered features": (lambda model: (model / "features.npy").write_bytes(b"0"), "features.npy' is truncated"),
}


@pytest.mark.parametrize("what", HARMS)
def test_a_damaged_model_predicts_nothing(
    trained: dict[int, Path], tmp_path: Path, command: Command, what: str
) -> None:
    """Each harm alone; whatever can be made again, such as the recorded hashes, fits the harm."""
    run = shutil.copytree(trained[1], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    make_toy(tmp_path)
    harm, message = HARMS[what]
    harm(run / "model")
    code, _, err = command("predict", "run", "toy.csv", "out.csv")
    assert (code, "Traceback" in err) == (2, False), err
    assert re.search(message, err), err
    assert re.search("Restore|Give", err), err
    assert not (tmp_path / "out.csv").exists()
    with pytest.raises((ModelError, DamagedError)):
        unisono.load(run)


FINE_HARMS = {
    "other limit": (change_fields("encoder.json", max_tokens=2**40), "encoder.json"),
    "padding outside": (change_fields("encoder.json", padding=2**30), "padding = 1073741824"),
    "deep config": (change_file("config.json", b"[" * 99_999), "config.json"),
    "layers without end": (change_fields("config.json", num_hidden_layers=10**9), "num_hidden_layers"),
    "too wide": (change_fields("config.json", hidden_size=2**40, num_attention_heads=1), "hidden_size"),
    "tokenizer of another kind": (change_file("tokenizer.json", b"[1, 2]"), "tokenizer.json"),
    "deep tokenizer": (change_file("tokenizer.json", b"[" * 99_999), "tokenizer.json"),
    "pipe as tokenizer": (pipe("tokenizer.json"), "tokenizer.json"),
    "pipe as config": (pipe("config.json"), "config.json"),
}


@pytest.mark.parametrize("what", FINE_HARMS)
def test_a_damaged_fine_tuned_model_is_refused(tuned: dict[str, Path], tmp_path: Path, what: str) -> None:
    model = shutil.copytree(tuned["mean"] / "model", tmp_path / "model")
    harm, message = FINE_HARMS[what]
    harm(model)
    with pytest.raises((ModelError, DamagedError, DataError), match=message):
        unisono.load(model)


def test_a_model_without_its_run_and_one_without_hashes_are_used(trained: dict[int, Path], tmp_path: Path) -> None:
    """As copied to another machine, and as older versions wrote it."""
    model = shutil.copytree(trained[1] / "model", tmp_path / "moved")
    expected = unisono.load(trained[1]).probabilities(["goal match"])
    assert np.array_equal(unisono.load(model).probabilities(["goal match"]), expected)
    facts = json.loads((model / "unisono.json").read_text())
    assert set(facts.pop(FILES)) == {"model.safetensors", "encoder.json", "features.npy"}
    (model / "unisono.json").write_text(json.dumps(facts))
    assert np.array_equal(unisono.load(model).probabilities(["goal match"]), expected)
