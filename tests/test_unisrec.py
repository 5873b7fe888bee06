"""UniSRec: the adaptor's equations, text that reaches both sides, unit length, a run."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import LORA, MakeData, fit, validated
from torch.nn import functional as F

from anyo_lightning.encoders.adapted import AdaptedItems, AdaptedTextEncoders, MoEAdaptor
from anyo_lightning.errors import InputError
from anyo_lightning.llm.language_model import LLM
from anyo_lightning.models.unisrec import UniSRec
from anyo_lightning.runs import RunFolder


def test_adaptor_is_the_gated_sum_of_its_whitening_networks() -> None:
    """Equations 1 to 4, one expert and one row after the other; noise in training only."""
    torch.manual_seed(0)
    adaptor = MoEAdaptor(5, 3, experts=4, dropout=0.0).eval()
    for parameter in adaptor.parameters():
        torch.nn.init.normal_(parameter)
    vectors = torch.randn(2, 7, 5)
    adapted = adaptor(vectors)
    for place in np.ndindex(2, 7):
        x = vectors[place]
        gates = (x @ adaptor.gate).softmax(0)
        expected = sum(gate * (w @ (x - b)) for gate, w, b in zip(gates, adaptor.maps, adaptor.means, strict=True))
        torch.testing.assert_close(adapted[place], expected)
    adaptor.train()
    assert not torch.allclose(adaptor(vectors), adaptor(vectors))
    still = MoEAdaptor(5, 3, experts=4, dropout=0.0, noise=False)
    still.load_state_dict({name: weight for name, weight in adaptor.state_dict().items() if name != "noise"})
    torch.testing.assert_close(still(vectors), adapted)


def test_rows_are_added_to_trained_items_only() -> None:
    """Another item's place in the batch changes nothing; an untrained item is its text alone."""
    torch.manual_seed(0)
    trained = torch.tensor([True, True, False, True])
    items = AdaptedItems(
        torch.randn(4, 5), adaptor=MoEAdaptor(5, 3, experts=2, dropout=0.0), dim=3, trained=trained, ids=True
    ).eval()
    ids = torch.tensor([[3, 2], [2, 0]])
    vectors = items(ids)
    torch.testing.assert_close(vectors[0, 1], items.adaptor(items.vectors[2]))
    torch.testing.assert_close(vectors[0, 1], vectors[1, 0])
    assert items.rows is not None
    torch.testing.assert_close(vectors[1, 1], items.adaptor(items.vectors[0]) + items.rows.weight[0])


@pytest.mark.parametrize("ids", [False, True])
def test_a_step_lowers_the_loss_and_both_sides_read_the_text(tiny_llm: str, make_data: MakeData, ids: bool) -> None:
    """States and items have unit length; every weight has a gradient; other texts give other vectors."""
    torch.manual_seed(0)
    data = make_data(max_items=12)
    model = UniSRec(AdaptedTextEncoders(LLM(tiny_llm), dim=8, experts=3, ids=ids), temperature=0.5)
    data.read_for(model)
    model.prepare(data)
    (batch, *_) = data.train_dataloader()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(20):
        states = model(batch)
        loss, _parts = model.loss(states, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    model.eval()
    everything = torch.arange(data.split.catalogue_size)
    vectors = model.encode_items(everything)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(vectors)))
    torch.testing.assert_close(model(batch).norm(dim=1), torch.ones(len(batch.targets)))
    expected = F.cross_entropy(
        model(batch) @ vectors[model.training_items].T / 0.5, model.position_in_training[batch.targets]
    )
    torch.testing.assert_close(model.loss(model(batch), batch)[0], expected)
    before = model(batch)
    model.item_encoder[0].vectors.copy_(torch.randn_like(model.item_encoder[0].vectors))
    assert not torch.allclose(model(batch), before, atol=1e-3)


def test_bad_options(tiny_llm: str) -> None:
    """LoRA on frozen vectors, widths that do not fit, a temperature of 0."""
    with pytest.raises(InputError, match="without lora"):
        AdaptedTextEncoders(LLM(tiny_llm, lora=LORA))
    with pytest.raises(InputError, match=r"multiple of model\.encoders\.heads, got 9 and 2"):
        AdaptedTextEncoders(LLM(tiny_llm), dim=9)
    with pytest.raises(InputError, match="experts to be positive, got 0"):
        AdaptedTextEncoders(LLM(tiny_llm), experts=0)
    with pytest.raises(InputError, match=r"adaptor_dropout in \[0, 1\), got 1"):
        AdaptedTextEncoders(LLM(tiny_llm), adaptor_dropout=1)
    with pytest.raises(InputError, match="temperature to be positive, got 0"):
        UniSRec(AdaptedTextEncoders(LLM(tiny_llm), dim=8), temperature=0)


def test_a_checkpoint_needs_no_language_model(tiny_llm: str, make_data: MakeData, tmp_path: Path) -> None:
    """The texts' vectors lie in it: where the LLM is gone, its figures are the same."""
    folder = RunFolder(tmp_path)
    trained = UniSRec(AdaptedTextEncoders(LLM(tiny_llm), dim=8))
    trainer = fit(trained, make_data(), folder.path, epochs=1)
    assert not trained.backbones
    expected = validated(trainer.lightning_module, make_data(), folder.best_checkpoint)
    model = UniSRec(AdaptedTextEncoders(LLM(str(tmp_path / "gone" / Path(tiny_llm).name)), dim=8))
    model.restore_from(folder.best_checkpoint)
    assert validated(model, make_data(), folder.best_checkpoint) == expected
