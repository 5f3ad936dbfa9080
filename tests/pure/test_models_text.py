"""The text models: losses by their formulas, company that changes nothing, folders that are usable or not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bert import CONFIG, weights, write_bert
from unisono.config.sections import Bag, Model, Pretrained, Transformer
from unisono.data.encoding import ngrams
from unisono.engine.replica import same_bits
from unisono.errors import ModelError, RecipeError
from unisono.kernels.packing import pack
from unisono.tasks.text import bag
from unisono.tasks.text.classification import TextClassification
from unisono.tasks.text.pretrained import read_classifier, write_config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_bert(tmp_path / "bert")


def change_config(folder: Path, **keys: object) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | keys))


def task(model: Model, **settings: object) -> TextClassification:
    given = {"classes": 3, "vocabulary_size": 50, "padding": 0, "max_tokens": 24} | settings
    return TextClassification(model=model, **given)  # type: ignore[arg-type]


LENGTHS = (7, 3, 12)


def tokens(lengths: tuple[int, ...] = LENGTHS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 50, (sum(lengths),), generator=generator)
    offsets = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    return {"ids": ids, "offsets": offsets, "label": torch.arange(len(lengths)) % 3}


def rectangle(microbatch: dict[str, Tensor], lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    """Numbers and mask [n, longest], as transformers takes them."""
    rows = microbatch["ids"].split(list(lengths))
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return ids, torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]


def ragged() -> dict[str, Tensor]:
    ids = torch.tensor([4, 9, 9, 2, 30, 31, 7])
    return {"ids": ids, "offsets": torch.tensor([0, 3, 4]), "label": torch.tensor([2, 0, 1])}


def build(one: TextClassification, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return one.build()


def gradient(one: TextClassification, module: nn.Module, microbatch: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(77)
    module.zero_grad()
    one.loss(module, microbatch)[0].backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


SMALL = Transformer(layers=2, width=32, heads=4, feedforward=48, dropout=0.2)


# the task


def test_loss_is_a_sum_with_smoothing_and_a_weight_per_sample() -> None:
    factors = (1.0, 2.0, 0.5)
    one = task(Bag(width=4), label_smoothing=0.1, class_weights=factors)
    module = build(one).eval()
    loss, count = one.loss(module, ragged())
    logits, label = module(ragged()["ids"], ragged()["offsets"]), ragged()["label"]
    target = F.one_hot(label, 3) * 0.9 + 0.1 / 3
    each = -(target * logits.log_softmax(-1)).sum(-1) * torch.tensor(factors)[label]
    assert type(count) is int and count == 3
    torch.testing.assert_close(loss, each.sum())


def test_measure_is_neither_smoothed_nor_weighted() -> None:
    plain, treated = (
        task(Bag(width=4)),
        task(Bag(width=4), label_smoothing=0.3, class_weights=(9.0, 9.0, 9.0)),
    )
    module = build(plain).eval()
    measured = treated.measure(module, ragged())
    assert torch.equal(measured["label"], ragged()["label"])
    assert measured["loss"].shape == (3,) and measured["loss"].dtype == torch.float32
    torch.testing.assert_close(measured["loss"].sum(), plain.loss(module, ragged())[0])
    unlabelled = {name: tensor for name, tensor in ragged().items() if name != "label"}
    chances = plain.predict(module, unlabelled)["probabilities"]
    assert torch.equal(chances.argmax(-1), measured["predicted"])
    torch.testing.assert_close(chances.sum(-1), torch.ones(3))


@pytest.mark.parametrize("factors", [(1.0, 2.0), (1.0, -1.0, 1.0), (1.0, float("nan"), 1.0)])
def test_wrong_class_weights_are_refused(factors: tuple[float, ...]) -> None:
    with pytest.raises(RecipeError, match="each of the 3 classes"):
        task(Bag(), class_weights=factors)


def test_loss_is_float32_under_autocast() -> None:
    one = task(SMALL)
    module = build(one)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = one.loss(module, tokens())
        measured = one.measure(module, tokens())
    assert loss.dtype == measured["loss"].dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize("model", [Bag(width=4, hidden=8, dropout=0.2), SMALL])
def test_same_seed_same_bits(model: Model) -> None:
    one, microbatch = task(model), ragged() if isinstance(model, Bag) else tokens()
    first, second = build(one), build(one)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    before, after = gradient(one, first, microbatch), gradient(one, second, microbatch)
    assert before.keys() == after.keys() and all(same_bits(before[name], after[name]) for name in before)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), build(one, 1).parameters(), strict=True))


# the bag


@pytest.mark.parametrize("model", [Bag(width=4), Bag(width=4, hidden=6)])
def test_a_bag_is_a_weighted_sum_in_any_order_and_company(model: Bag) -> None:
    module = build(task(model)).eval()
    logits = module(ragged()["ids"], ragged()["offsets"])
    features, levels = torch.tensor([1, 2, 2]), torch.tensor([0, 1, 1])
    weights = (1 + math.log(2) * levels) * (1 + torch.log(1 + features / 40))
    summed = (module.embedding(features) * (weights / weights.norm())[:, None]).sum(0)
    torch.testing.assert_close(logits[0], module.head(4 * summed))
    torch.testing.assert_close(logits[:1], module(torch.tensor([9, 4, 9]), torch.tensor([0])))
    torch.testing.assert_close(logits[2:], module(ragged()["ids"][4:], torch.tensor([0])))


def test_encoder_and_bag_mean_the_same_by_a_token() -> None:
    assert bag.LEVELS == ngrams.LEVELS


def test_a_bag_has_sparse_gradients_of_the_same_values() -> None:
    one = task(Bag(width=4))
    sparse = gradient(one, build(one), ragged())
    module = build(one)
    module.embedding.sparse = False
    dense = gradient(one, module, ragged())
    assert [name for name, value in sparse.items() if value.is_sparse] == ["embedding.weight"]
    for name, value in sparse.items():
        torch.testing.assert_close(value.to_dense(), dense[name])


# encoders


@pytest.fixture(params=["transformer", "mean", "cls", "pooler"])
def encoder(request: pytest.FixtureRequest, folder: Path) -> Model:
    if request.param == "transformer":
        return SMALL
    return Pretrained(folder=str(folder), pooling=request.param, dropout=0.2, attention_dropout=0.3)


@pytest.mark.parametrize("lengths", [LENGTHS, (5, 5, 5), (1, 1), (1, 4)])
def test_company_changes_nothing(encoder: Model, lengths: tuple[int, ...]) -> None:
    module = build(task(encoder)).eval()
    microbatch = tokens(lengths)
    together = module(microbatch["ids"], microbatch["offsets"])
    for number, alone in enumerate(microbatch["ids"].split(list(lengths))):
        torch.testing.assert_close(together[number], module(alone, torch.tensor([0]))[0])


def test_order_of_tokens_counts(encoder: Model) -> None:
    module = build(task(encoder)).eval()
    ids, offsets = torch.tensor([1, 5, 9]), torch.tensor([0])
    assert not torch.allclose(module(ids, offsets), module(ids[[0, 2, 1]], offsets), atol=1e-4)


def test_recomputing_activations_gives_the_same_bits(encoder: Model) -> None:
    kept, recomputed = task(encoder), task(encoder, gradient_checkpointing=True)
    before = gradient(kept, build(kept), tokens())
    after = gradient(recomputed, build(recomputed), tokens())
    assert before.keys() == after.keys() and all(same_bits(before[name], after[name]) for name in before)


def test_dropout_acts_in_training_alone(encoder: Model) -> None:
    module = build(task(encoder))
    draws = [module(tokens()["ids"], tokens()["offsets"]) for _ in range(2)]
    assert not torch.equal(*draws)
    module.eval()
    assert torch.equal(*[module(tokens()["ids"], tokens()["offsets"]) for _ in range(2)])


# pretrained folders


def test_weights_are_read_and_copied_into_aligned_memory(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].rstrip() + b" "  # a header of an odd length: every tensor lies at an odd address
    header += b" " * (1 - len(header) % 2)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    assert any(t.data_ptr() % 64 for t in load_file(path).values()) or len(header) % 2
    module = build(task(Pretrained(folder=str(folder), pooling="pooler")))
    state = module.state_dict()
    for name, tensor in weights().items():
        assert torch.equal(state["bert." + name], tensor)
        assert state["bert." + name].data_ptr() % 64 == 0
    path.unlink()  # nothing is mapped any more
    assert torch.equal(module.state_dict()["bert." + name], tensor)


def rename(change: Callable[[str], str]) -> dict[str, Tensor]:
    return {change(name): tensor for name, tensor in weights().items()}


@pytest.mark.parametrize(
    "change",
    [
        lambda name: "bert." + name,
        lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"),
    ],
)
def test_other_spellings_of_the_names_are_read(folder: Path, change: Callable[[str], str]) -> None:
    save_file(rename(change), folder / "model.safetensors")
    state = build(task(Pretrained(folder=str(folder), pooling="pooler"))).state_dict()
    assert all(torch.equal(state["bert." + name], tensor) for name, tensor in weights().items())


def test_freeze_leaves_the_head_to_train(folder: Path) -> None:
    one = task(Pretrained(folder=str(folder), freeze=True))
    assert one.pretrained == ("bert.",)
    assert gradient(one, build(one), tokens()).keys() == {"classifier.weight", "classifier.bias"}


def test_half_precision_is_widened(folder: Path) -> None:
    save_file({name: tensor.bfloat16() for name, tensor in weights().items()}, folder / "model.safetensors")
    module = read_classifier(Pretrained(folder=str(folder)), 3, recompute=False)
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def spoil(folder: Path, how: str) -> None:
    path = folder / "model.safetensors"
    lost, table = "encoder.layer.1.output.dense.weight", weights()
    match how:
        case "missing":
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
        case "no config":
            (folder / "config.json").unlink()
        case "no weights":
            path.unlink()
        case "pickle":
            path.rename(folder / "pytorch_model.bin")
        case "no tokenizer":
            (folder / "tokenizer.json").unlink()
        case "damaged":
            path.write_bytes(path.read_bytes()[:-100])
        case "lacking":
            save_file({name: tensor for name, tensor in table.items() if name != lost}, path)
        case "shape":
            save_file(table | {lost: torch.zeros(32, 47)}, path)
        case "integers":
            save_file(table | {lost: torch.zeros(32, 48, dtype=torch.int8)}, path)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "no such folder"),
        ("no config", "config.json"),
        ("no weights", "has no model.safetensors"),
        ("pickle", "pytorch_model.bin.*safe_serialization"),
        ("no tokenizer", "has no tokenizer.json"),
        ("damaged", "not readable as safetensors"),
        ("lacking", "lacks tensor 'encoder.layer.1.output.dense.weight'"),
        ("shape", r"'encoder.layer.1.output.dense.weight' has shape \[32, 47\].*\[32, 48\]"),
        ("integers", "is I8"),
    ],
)
def test_unusable_folders_are_refused(folder: Path, how: str, message: str) -> None:
    spoil(folder, how)
    with pytest.raises(ModelError, match=message):
        task(Pretrained(folder=str(folder))).build()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": "roberta"}, "'roberta' is not supported; allowed is 'bert'"),
        ({"hidden_size": 0}, "hidden_size = 0"),
        ({"num_attention_heads": 5}, "no multiple of num_attention_heads"),
        ({"hidden_act": "silu"}, "hidden_act = 'silu'"),
        ({"hidden_act": ["gelu"]}, "hidden_act"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"is_decoder": True}, "is_decoder"),
        ({"vocab_size": 49}, "tokenizer has 50 entries"),
        ({"max_position_embeddings": 23}, "knows 23 positions"),
    ],
)
def test_other_architectures_are_refused(folder: Path, keys: dict[str, object], message: str) -> None:
    change_config(folder, **keys)
    with pytest.raises(ModelError, match=message):
        task(Pretrained(folder=str(folder))).build()


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_a_written_folder_opens_in_transformers_with_equal_outputs(
    folder: Path, tmp_path: Path, activation: str
) -> None:
    transformers = pytest.importorskip("transformers")
    change_config(folder, hidden_act=activation)
    module = build(task(Pretrained(folder=str(folder)))).eval()
    written = tmp_path / "written"
    written.mkdir()
    write_config(Pretrained(folder=str(folder)), written, ["no", "yes", "ja"])
    save_file(module.state_dict(), written / "model.safetensors", metadata={"format": "pt"})
    theirs, report = transformers.AutoModel.from_pretrained(written, add_pooling_layer=False, output_loading_info=True)
    assert not report["missing_keys"]
    assert theirs.config.id2label == {0: "no", 1: "yes", 2: "ja"}
    ids, mask = rectangle(tokens())
    with torch.no_grad():
        ours = module.bert(tokens()["ids"], pack(sum(LENGTHS), tokens()["offsets"]))
        expected = theirs.eval()(ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(ours, expected[mask], atol=1e-5, rtol=0)


def test_logits_and_gradients_are_those_of_transformers(folder: Path) -> None:
    """Its BertForSequenceClassification with the same weights, no dropout: the whole graph is the same function."""
    transformers = pytest.importorskip("transformers")
    one = task(Pretrained(folder=str(folder), pooling="pooler", dropout=0.0))
    module = build(one)
    config = transformers.BertConfig(**CONFIG, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    theirs = transformers.BertForSequenceClassification(config)
    left_over = theirs.load_state_dict(module.state_dict(), strict=False)
    assert not left_over.unexpected_keys and all("position_ids" in name for name in left_over.missing_keys)
    ids, mask = rectangle(tokens())
    logits = theirs.train()(ids, attention_mask=mask.long()).logits
    torch.testing.assert_close(module(tokens()["ids"], tokens()["offsets"]), logits, atol=1e-5, rtol=0)
    F.cross_entropy(logits, tokens()["label"], reduction="sum").backward()
    found = gradient(one, module, tokens())
    for name, parameter in theirs.named_parameters():
        given = found[name].to_dense() if found[name].is_sparse else found[name]
        torch.testing.assert_close(given, parameter.grad, atol=2e-5, rtol=1e-4)


def test_pooler_that_a_folder_lacks_is_refused(folder: Path) -> None:
    save_file({k: v for k, v in weights().items() if "pooler" not in k}, folder / "model.safetensors")
    build(task(Pretrained(folder=str(folder))))
    with pytest.raises(ModelError, match=r"lacks tensor 'pooler.dense.weight'.*mean"):
        task(Pretrained(folder=str(folder), pooling="pooler")).build()
