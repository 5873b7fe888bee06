"""A table of items that starts as its texts' components: by independent computation, frozen and cold items, a run."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LORA, MakeData, fit, prepare, tiny, validated, weights

from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.encoders.ids import IdEncoders
from anyo_lightning.encoders.text_start import TextStartEncoders
from anyo_lightning.encoders.whitening import leading_components
from anyo_lightning.errors import InputError
from anyo_lightning.llm.language_model import LLM
from anyo_lightning.llm.text_vectors import frozen_vectors
from anyo_lightning.models.sasrec import SASRec
from anyo_lightning.runs import RunFolder

Make = Callable[..., SASRec]
NEVER_TRAINED = 5  # the item that `cold` data have in nobody's training part


@pytest.fixture
def make(tiny_llm: str) -> Make:
    """SASRec on the tiny language model, all of its table trained unless told otherwise."""

    def model(**options: Any) -> SASRec:
        torch.manual_seed(0)
        encoders = TextStartEncoders(tiny(tiny_llm, lora=None), **({"dim": 8, "dropout": 0.0} | options))
        return SASRec(encoders, optimizer=partial(torch.optim.AdamW, lr=1e-2))

    return model


@pytest.fixture
def cold(tiny_data: tuple[Path, Path], make_data: MakeData, tmp_path: Path) -> RecDataModule:
    """The tiny data where one item is nobody's but as the last of a history: a target of the test alone."""
    rows = [line.split(",") for line in tiny_data[0].read_text().splitlines()]
    last = {row[0]: number for number, row in enumerate(rows)}  # rows are in the order of time
    kept = [row for number, row in enumerate(rows) if row[1] != f"m{NEVER_TRAINED}" or last[row[0]] == number]
    assert f"m{NEVER_TRAINED}" in {row[1] for row in kept}
    (tmp_path / "cold.csv").write_text("\n".join(map(",".join, kept)) + "\n")
    data = make_data(interactions=tmp_path / "cold.csv", k_core=0)
    assert (data.split.training_counts() == 0).nonzero()[0].tolist() == [cold_id(data)]
    return data


def cold_id(data: RecDataModule) -> int:
    """The number of the item that nobody trained on."""
    return data.split.item_ids.tolist().index(f"m{NEVER_TRAINED}")


def texts_of(llm: str, data: RecDataModule) -> np.ndarray:
    """The vectors of the catalogue's texts as the language model gives them, float64."""
    backbone = tiny(llm, lora=None).load()
    found = frozen_vectors(backbone, data.split.item_texts, pooling="mean", max_tokens=data.max_item_tokens)
    return found.double().numpy()


def by_svd(vectors: np.ndarray, count: int) -> np.ndarray:
    """Their first principal components of variance 1, by another way than through their covariance."""
    left, _, right = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    signs = np.sign([row[np.abs(row).argmax()] for row in right])
    return (left * signs * len(vectors) ** 0.5)[:, :count]


def test_components_are_uncorrelated_and_in_order_of_variance() -> None:
    """By singular values; two directions of four are empty; equal vectors have none."""
    random = np.random.default_rng(0)
    vectors = random.normal(size=(50, 2)) @ np.array([[3.0, 1, 2, 0], [0, 1, 0, 1]]) + 7
    found = leading_components(torch.from_numpy(vectors), 4)
    np.testing.assert_allclose(found.numpy(), by_svd(vectors, 2), atol=1e-9)
    np.testing.assert_allclose(found.T @ found / 50, np.eye(2), atol=1e-9)
    np.testing.assert_allclose(leading_components(torch.from_numpy(vectors), 1), found[:, :1], atol=1e-12)
    assert leading_components(torch.full((5, 3), 0.1), 2).shape == (5, 0)


@pytest.mark.parametrize("tied", [True, False])
def test_the_table_starts_as_the_texts_components(make: Make, tiny_llm: str, make_data: MakeData, tied: bool) -> None:
    """In inputs and outputs, at the standard deviation that is asked for; other texts give another start."""
    data = make_data()
    model = prepare(make(scale=0.3, tied=tied), data)
    expected = torch.from_numpy(0.3 * by_svd(texts_of(tiny_llm, data), 8)).float()
    assert expected.std() == pytest.approx(0.3, rel=0.01)
    for table in (model.history_encoder.embedding.weight, model.encode_items(torch.arange(16))):
        torch.testing.assert_close(table, expected, atol=1e-4, rtol=1e-3)
    assert (model.history_encoder.embedding is model.item_encoder.embedding) == tied
    assert not model.encoders.texts
    assert not model.backbones


def test_dimensions_that_texts_lack_start_at_random(make: Make, make_data: MakeData) -> None:
    """16 texts have 15 components: the 16th dimension starts as in `IdEncoders`, and 16 cannot be frozen."""
    vectors = prepare(make(dim=16), make_data()).encode_items(torch.arange(16)).detach()
    assert vectors[:, :15].std() == pytest.approx(0.02, rel=0.05)
    assert 0.01 < vectors[:, 15].std() < 0.04
    with pytest.raises(InputError, match=r"frozen at most 15, the components of 16 items' texts .* 32 .*, got 16"):
        prepare(make(dim=16, frozen=16), make_data())


@pytest.mark.parametrize("tied", [True, False])
def test_frozen_dimensions_stay_and_the_others_learn(
    make: Make, tiny_llm: str, make_data: MakeData, tmp_path: Path, tied: bool
) -> None:
    """After two epochs the first dimensions are the texts' components, and they are no parameters."""
    data = make_data()
    model = make(frozen=5, scale=0.2, tied=tied)
    before = prepare(model, data).encode_catalogue()
    read_before = model.history_encoder.embedding(torch.arange(16)).detach()
    fit(model, data, tmp_path, epochs=2)
    expected = torch.from_numpy(0.2 * by_svd(texts_of(tiny_llm, data), 5)).float()
    after = model.encode_catalogue()
    torch.testing.assert_close(after[:, :5], expected, atol=1e-4, rtol=1e-3)
    assert ((after - before)[:, 5:].abs() > 1e-3).all()
    tables = [parameter for name, parameter in model.named_parameters() if ".rows." in name]
    assert [tuple(table.shape) for table in tables] == [(16, 3)] * (1 if tied else 2)
    read = model.history_encoder.embedding(torch.arange(16)).detach()
    torch.testing.assert_close(read[:, :5], expected, atol=1e-4, rtol=1e-3)
    assert ((read - read_before)[:, 5:].abs() > 1e-3).all()


def test_all_dimensions_may_be_frozen(make: Make, make_data: MakeData, tmp_path: Path) -> None:
    """SASRec's transformer alone learns: no item has a parameter."""
    model = make(frozen=8)
    first = float(fit(make(frozen=8), make_data(), tmp_path / "first", epochs=1).callback_metrics["train/loss"])
    last = float(fit(model, make_data(), tmp_path, epochs=15).callback_metrics["train/loss"])
    assert last < 0.9 * first
    assert not [name for name, _ in model.named_parameters() if "rows" in name or "embedding" in name]


def test_a_cold_item_is_its_text(make: Make, cold: RecDataModule, tmp_path: Path) -> None:
    """What it is read and scored as is the text and zeros, trained or not, however its row starts."""
    model = make(frozen=5)
    item = cold_id(cold)
    start = prepare(model, cold).encode_items(torch.tensor([item]))
    assert torch.equal(start[0, 5:], torch.zeros(3))
    assert (start[0, :5] != 0).all()
    fit(model, cold, tmp_path, epochs=2)
    with torch.no_grad():
        model.item_encoder.rows.weight[item] = 7.0
    assert torch.equal(model.encode_items(torch.tensor([item])), start)
    assert torch.equal(model.history_encoder.embedding(torch.tensor([[item]])), start[None])
    trained = model.training_items
    assert (model.encode_items(trained)[:, 5:] != 0).all()


def test_a_cold_item_keeps_its_start_in_a_trained_table(make: Make, cold: RecDataModule) -> None:
    """No step of the loss moves its row; of all others it does."""
    model = prepare(make(), cold)
    (batch, *_) = cold.train_dataloader()
    model.loss(model(batch), batch)[0].backward()
    gradient = model.item_encoder.embedding.weight.grad
    assert (gradient.abs().sum(1) == 0).nonzero()[:, 0].tolist() == [cold_id(cold)]


@pytest.mark.parametrize("frozen", [0, 5])
def test_a_checkpoint_needs_no_language_model(
    make: Make, tiny_llm: str, make_data: MakeData, tmp_path: Path, frozen: int
) -> None:
    """The table lies in it: where the LLM is gone, its figures are the same, and other settings are refused."""
    folder = RunFolder(tmp_path)
    trainer = fit(make(frozen=frozen), make_data(), folder.path, epochs=1)
    expected = validated(trainer.lightning_module, make_data(), folder.best_checkpoint)
    gone = tiny(str(tmp_path / "gone" / Path(tiny_llm).name), lora=None)
    model = SASRec(TextStartEncoders(gone, dim=8, frozen=frozen))
    model.restore_from(folder.best_checkpoint)
    assert validated(model, make_data(), folder.best_checkpoint) == expected
    llm = tiny(tiny_llm, lora=None)
    for encoders, words in (
        (TextStartEncoders(llm, dim=8, frozen=3), rf"frozen {frozen}, with which .* got "),
        (TextStartEncoders(llm, dim=8, frozen=frozen, pooling="last"), "pooling mean, with which .* got last"),
        (IdEncoders(dim=8), "max_item_tokens 48, with which .* got None"),
    ):
        other = SASRec(encoders)
        other.restore_from(folder.best_checkpoint)
        with pytest.raises(InputError, match=words):
            validated(other, make_data(), folder.best_checkpoint)


def test_a_run_starts_from_another(make: Make, make_data: MakeData, tmp_path: Path) -> None:
    """`init_from` takes all of its weights, whatever the texts' components are."""
    fit(make(), make_data(), tmp_path, epochs=1)
    started = make()
    started.init_from = tmp_path
    prepare(started, make_data())
    for name, value in weights(RunFolder(tmp_path).best_checkpoint).items():
        torch.testing.assert_close(started.state_dict()[name], value, msg=name)


def test_bad_options(tiny_llm: str) -> None:
    """Sizes that do not fit, LoRA on a model that is read once."""
    for options, words in (
        ({"frozen": 9}, r"frozen between 0 and model\.encoders\.dim 8, got 9"),
        ({"frozen": -1}, "frozen between 0 and .* got -1"),
        ({"scale": 0.0}, "scale to be positive, got 0"),
        ({"heads": 3}, r"multiple of model\.encoders\.heads, got 8 and 3"),
        ({"layers": 0}, "layers to be positive, got 0"),
        ({"dropout": 1.0}, "dropout in"),
    ):
        with pytest.raises(InputError, match=words):
            TextStartEncoders(LLM(tiny_llm), **({"dim": 8} | options))
    with pytest.raises(InputError, match="without lora"):
        TextStartEncoders(LLM(tiny_llm, lora=LORA))
