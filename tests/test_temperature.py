"""E4SRec over cosines: unit length on both sides, a learned temperature, what it is refused with."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from helpers import CONFIGS, Anyo, MakeData, fit, prepare, refused, tiny, validated, weights
from lightning.pytorch.callbacks import LambdaCallback

from anyo_lightning.encoders.adapted import AdaptedTextEncoders
from anyo_lightning.encoders.live import LiveTextEncoders
from anyo_lightning.encoders.text import TextEncoders
from anyo_lightning.errors import InputError
from anyo_lightning.models.anyo import Anyo as AnyoModel
from anyo_lightning.models.e4srec import E4SRec
from anyo_lightning.models.temperature import Temperature
from anyo_lightning.models.unisrec import UniSRec
from anyo_lightning.runs import RunFolder


def cosines(llm: str, *, temperature: float = 0.1, training: dict[str, Any] | None = None, **encoders: Any) -> E4SRec:
    """E4SRec on the tiny language model, without dropout."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"dim": 16, "dropout": 0.0, "input_dropout": 0.0, "unit_length": True} | encoders
    return E4SRec(TextEncoders(tiny(llm), **settings), temperature=temperature, **(training or {}))


def test_a_temperature_starts_where_it_is_told_and_stays_in_range() -> None:
    """The exponential of a parameter at zero; steps beyond 0.01 and 1 are taken back, and a gradient is left there."""
    temperature = Temperature(0.05)
    assert float(temperature().detach()) == pytest.approx(0.05)
    assert float(temperature.log_ratio.detach()) == 0
    for far, expected in ((-9.0, 0.01), (9.0, 1.0), (math.log(2), 0.1)):
        torch.nn.init.constant_(temperature.log_ratio, far)
        temperature.clip()
        assert float(temperature().detach()) == pytest.approx(expected)
        (gradient,) = torch.autograd.grad(temperature(), [temperature.log_ratio])
        assert float(gradient) == pytest.approx(expected)


@pytest.mark.parametrize("encoders", [{}, {"reads": "vectors", "id_residual": True}, {"reads": "both"}])
def test_loss_is_the_softmax_of_cosines(tiny_llm: str, make_data: MakeData, encoders: dict[str, Any]) -> None:
    """States and items have length 1, a free row included; by hand, with τ as it is now, and its gradient."""
    model = prepare(cosines(tiny_llm, **encoders), make_data())
    if "id_residual" in encoders:
        torch.nn.init.normal_(model.item_encoder.residual.weight)
    assert model.temperature is not None
    torch.nn.init.constant_(model.temperature.log_ratio, math.log(2.5))  # τ is .25
    (batch, *_) = model.data.train_dataloader()
    states, vectors = model(batch), model.encode_items(torch.arange(16))
    torch.testing.assert_close(states.norm(dim=1), torch.ones(len(states)))
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(16))
    expected = torch.stack(
        [
            (vectors @ state / 0.25).logsumexp(0) - vectors[target] @ state / 0.25
            for state, target in zip(states, batch.targets, strict=True)
        ]
    ).mean()
    loss, parts = model.loss(states, batch)
    torch.testing.assert_close(loss, expected)
    assert float(parts["temperature"]) == pytest.approx(0.25)
    loss.backward()
    assert float(model.temperature.log_ratio.grad) != 0


def test_without_it_nothing_changes(tiny_llm: str, make_data: MakeData) -> None:
    """Neither a parameter nor a factor; the item encoder's names are the same with it."""
    plain = prepare(E4SRec(TextEncoders(tiny(tiny_llm), dim=16)), make_data())
    assert not [name for name, _ in plain.named_parameters() if "temperature" in name]
    (batch, *_) = plain.data.train_dataloader()
    states = plain.eval()(batch)
    assert torch.equal(plain.loss(states, batch)[0], plain.next_item_loss(states, batch))
    assert (
        plain.item_encoder.state_dict().keys()
        == prepare(cosines(tiny_llm), make_data()).item_encoder.state_dict().keys()
    )


def test_it_learns_its_temperature_and_restores(tiny_llm: str, make_data: MakeData, tmp_path: Path) -> None:
    """The loss falls, τ moves and is in the checkpoint; a ranking does not ask for it."""
    training = {"optimizer": partial(torch.optim.AdamW, lr=1e-2)}
    taus: list[float] = []
    watch = LambdaCallback(on_train_batch_end=lambda *_: taus.append(float(model.temperature().detach())))
    model = cosines(tiny_llm, temperature=0.2, training=training)
    first = float(
        fit(cosines(tiny_llm, temperature=0.2, training=training), make_data(), tmp_path / "first", 1).callback_metrics[
            "train/loss"
        ]
    )
    trainer = fit(model, make_data(), tmp_path / "run", epochs=20, callbacks=[watch])
    assert float(trainer.callback_metrics["train/loss"]) < 0.9 * first
    assert float(trainer.callback_metrics["val/hr@5"]) > 0.5
    assert abs(taus[-1] - 0.2) > 0.005
    assert float(trainer.callback_metrics["train/temperature"]) == pytest.approx(taus[-2], rel=1e-4)
    best = RunFolder(tmp_path / "run").best_checkpoint
    figures = validated(model, make_data(), best)
    other = cosines(tiny_llm, temperature=0.9)
    assert validated(other, make_data(), best) == figures
    assert torch.equal(other.temperature.log_ratio, weights(best)["temperature.log_ratio"])


def test_a_step_beyond_the_floor_is_taken_back(tiny_llm: str, make_data: MakeData, tmp_path: Path) -> None:
    """Before a checkpoint can be written."""
    seen: list[float] = []
    push = LambdaCallback(
        on_before_optimizer_step=lambda _, module, __: module.temperature.log_ratio.grad.fill_(1.0),
        on_train_batch_end=lambda _, module, *__: seen.append(float(module.temperature().detach())),
    )
    training = {"learning_rates": {"temperature": 3.0}, "warmup": 0.0, "decay": False}
    fit(cosines(tiny_llm, temperature=0.02, training=training), make_data(), tmp_path, epochs=2, callbacks=[push])
    assert seen
    assert seen == pytest.approx([0.01] * len(seen))


def test_what_does_not_go_together(
    tiny_llm: str, anyo: Anyo, small: list[str], small_llm: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """One of the two alone, a start out of range, a model without a temperature; UniSRec has one."""
    texts = partial(TextEncoders, tiny(tiny_llm), dim=16)
    for encoders, temperature, words in (
        (texts(unit_length=True), None, r"unit_length is true, and there alone, got null with true"),
        (texts(), 0.05, "got 0.05 with false"),
        (texts(unit_length=True), 0.0, "temperature between 0.01 and 1, got 0"),
        (texts(unit_length=True), 2.0, "temperature between 0.01 and 1, got 2"),
    ):
        with pytest.raises(InputError, match=words):
            E4SRec(encoders, temperature=temperature)
    dual = LiveTextEncoders(tiny(tiny_llm))  # of unit length in any case
    for other in (texts(unit_length=True), dual):
        with pytest.raises(InputError, match=r"a temperature for encoders of unit length, such as E4SRec, got Anyo"):
            AnyoModel(other)
    assert E4SRec(dual, temperature=0.05).logit_scale() == 1  # learned once the data are known
    with pytest.raises(InputError, match=r"got null with true"):
        E4SRec(dual)
    UniSRec(AdaptedTextEncoders(tiny(tiny_llm, lora=None), dim=16))
    options = [f"--config={CONFIGS / 'e4srec_vectors.yaml'}", *small, *small_llm, "--model.temperature=0.05"]
    assert "unit_length is true, and there alone, got 0.05 with false" in refused(capsys, anyo, "fit", *options)


def test_from_the_command_line(anyo: Anyo, small: list[str], small_llm: list[str], tmp_path: Path) -> None:
    """A run of any configuration of E4SRec; the temperature is in its curves; a change of either is refused."""
    options = ["--model.encoders.unit_length=true", "--model.temperature=0.05", f"--run={tmp_path}"]
    anyo("fit", f"--config={CONFIGS / 'e4srec_vectors_hybrid.yaml'}", *small, *small_llm, *options)
    curves = pl.read_csv(RunFolder(tmp_path).curves_file)
    assert curves["train/temperature"].drop_nulls().to_list() == pytest.approx([0.05], rel=0.05)
    with pytest.raises(SystemExit):
        anyo("fit", f"--run={tmp_path}", "--model.temperature=0.06", "--trainer.max_epochs=2")
