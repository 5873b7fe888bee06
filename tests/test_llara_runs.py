"""Runs of the dual encoder: trained, restored, resumed, started from one another."""

from pathlib import Path
from typing import Any

import pytest
import torch
from dual_encoders import Make, builder, fit, maker
from helpers import LORA, MakeData, differing, prepare, save_as_run, validated, weights

from anyo_lightning.data.splits import MISSING
from anyo_lightning.encoders.live import LiveTextItems
from anyo_lightning.errors import InputError
from anyo_lightning.models.llara_pretrain import LLaRAPretrain
from anyo_lightning.runs import RunFolder


@pytest.fixture
def make(tiny_llm: str) -> Make:
    return maker(tiny_llm)


@pytest.fixture
def built(make: Make, make_data: MakeData) -> Make:
    return builder(make, make_data)


def test_training_beats_chance(make: Make, make_data: MakeData, tmp_path: Path) -> None:
    """The data are loops through the catalogue: a model that learns anything ranks the next item high."""
    model = make(hard_negatives=1, mined_negatives=3, mask_false_negatives=False)
    trainer = fit(model, make_data(), tmp_path, epochs=25)
    assert float(trainer.callback_metrics["val/hr@5"]) > 0.5  # chance .31
    assert model.seen.targets < 25 * int((model.data.split.stages == 0).sum())
    assert bool((model.mined >= 0).any())


@pytest.mark.parametrize(("first", "then"), [(0, 2), (2, 0), (2, 2)])
def test_a_run_starts_from_one_with_other_negatives(
    make: Make, make_data: MakeData, tmp_path: Path, first: int, then: int
) -> None:
    """In-batch negatives first, mined ones then, or the reverse: the weights are taken over, the lists are not."""
    fit(make(hard_negatives=first, mined_negatives=4), make_data(), tmp_path, epochs=1)
    model = prepare(make(hard_negatives=then, mined_negatives=4, init_from=tmp_path), make_data())
    saved = weights(RunFolder(tmp_path).best_checkpoint)
    state = model.state_dict()
    assert any("lora_B" in key and bool(value.any()) for key, value in saved.items())
    for key, value in saved.items():
        assert key == "mined" or torch.equal(state[key], value), key
    assert ("mined" in state) == (then > 0)
    assert not then or bool((model.mined == MISSING).all())


def test_checkpoint_restores_exactly(make: Make, make_data: MakeData, tmp_path: Path) -> None:
    """Mined lists and all, without the LLM; the figures are the same."""
    settings = {"hard_negatives": 2, "mined_negatives": 4, "learn_temperature": True, "pooled_tokens": 2}
    model = make(**settings)
    trainer = fit(model, make_data(), tmp_path, epochs=2)
    last = RunFolder(tmp_path).last_checkpoint
    saved = weights(last)
    assert torch.equal(saved["mined"], model.mined)
    assert not any("base_layer" in key or "embed_tokens" in key for key in saved)
    first = validated(trainer.lightning_module, make_data(), last)
    other = make(**settings)
    assert validated(other, make_data(), last) == first
    assert torch.equal(other.mined, model.mined)


def test_a_resumed_run_equals_an_uninterrupted_one(make: Make, make_data: MakeData, tmp_path: Path) -> None:
    """Four epochs in two parts, mining after the second and the fourth, with dropout."""
    settings = {"hard_negatives": 2, "mined_negatives": 4, "refresh_epochs": 2, "dropout": 0.2}
    settings |= {"warmup": 0.0, "decay": False}
    whole = fit(make(**settings), make_data(batch_tokens=600), tmp_path / "whole", epochs=4).lightning_module
    fit(make(**settings), make_data(batch_tokens=600), tmp_path / "parts", epochs=2)
    start = RunFolder(tmp_path / "parts").last_checkpoint
    parts = fit(make(**settings), make_data(batch_tokens=600), tmp_path / "parts", epochs=4, ckpt_path=start)
    assert parts.global_step > 8
    assert not differing(whole.state_dict(), parts.lightning_module.state_dict())
    assert whole.seen == parts.lightning_module.seen


def test_mining_takes_the_vectors_of_the_validation(
    make: Make, make_data: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The catalogue is encoded once per epoch; a frozen LLM encodes it once in all."""
    passes: list[int] = []
    encode = LiveTextItems._encode

    def counted(self: LiveTextItems, ids: torch.Tensor, **options: bool) -> torch.Tensor:
        if len(ids) == 16 and not torch.is_grad_enabled():
            passes.append(1)
        return encode(self, ids, **options)

    monkeypatch.setattr(LiveTextItems, "_encode", counted)
    fit(make(hard_negatives=1), make_data(), tmp_path / "lora", epochs=3)
    assert len(passes) == 4  # before training, and at each validation
    passes.clear()
    model = make(lora=None, hard_negatives=1)
    fit(model, make_data(), tmp_path / "frozen", epochs=3)
    assert len(passes) == 1
    assert model.item_encoder.token_count(torch.arange(16)) == 0


READ = {"self_prompt": " This one.", "pooled_tokens": 2}


@pytest.mark.parametrize(
    ("encoders", "data", "message"),
    [
        ({"self_prompt": " Another."}, {}, 'encoders.self_prompt " This one.", with which .* trained, got " Another."'),
        ({"self_prompt": ""}, {}, 'got ""$'),
        ({"pooled_tokens": 3}, {}, "encoders.pooled_tokens 2, with which the checkpoint was trained, got 3"),
        ({"lora": LORA | {"lora_alpha": 4}}, {}, "encoders.backbone lora .*with which the checkpoint was trained, got"),
        ({}, {"max_item_tokens": 7}, "data.max_item_tokens 20, with which the checkpoint was trained, got 7"),
        ({}, {"titles_only": True}, "data.titles_only False, with which the checkpoint was trained, got True"),
        ({}, {}, None),
        ({}, {"template": "{title}", "titles_only": True}, None),
    ],
    ids=["prompt", "no prompt", "pooled tokens", "LoRA", "cut", "titles", "the same", "no more than titles"],
)
def test_a_pre_trained_start_reads_the_same(
    encoders: dict[str, Any], data: dict[str, Any], message: str | None, make: Make, make_data: MakeData, tmp_path: Path
) -> None:
    """Item vectors of other texts, prompts or LoRA would not be those that pre-training has made."""
    read = {"template": data.get("template", "{title} film"), "max_item_tokens": 20}
    start = make(LLaRAPretrain, **READ, next_prompt="")
    save_as_run(prepare(start, make_data(supervision="last", **read)), tmp_path / "start")
    model = make(**(READ | encoders), init_from=tmp_path / "start")
    if message is None:
        prepare(model, make_data(**(read | data)))
        assert torch.equal(
            model.state_dict()["item_encoder.reader.added"], start.state_dict()["item_encoder.reader.added"]
        )
    else:
        with pytest.raises(InputError, match=message):
            prepare(model, make_data(**(read | data)))


def test_settings_that_cannot_work_are_refused(make: Make, make_data: MakeData) -> None:
    """One sentence each."""
    refused: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.005, "learn_temperature": True},
        {"targets_per_history": 0},
        {"hard_negatives": 9, "mined_negatives": 3},
        {"hidden": 8, "dim": None},
        {"hard_negatives": 3, "keys": "catalogue"},
    ]
    for settings in refused:
        with pytest.raises(InputError, match=next(iter(settings))):
            make(**settings)
    with pytest.raises(InputError, match=r"backbone\.lora"):
        prepare(make(lora=None, dim=None), make_data())
    with pytest.raises(InputError, match=r"backbone\.lora"):
        prepare(make(LLaRAPretrain, lora=None), make_data(supervision="last"))
    with pytest.raises(InputError, match="titles_only"):
        prepare(make(LLaRAPretrain), make_data(supervision="last", titles_only=True))
    for settings, supervision in (({}, "all"), ({"dim": 16}, "last"), ({"whiten": True}, "last")):
        with pytest.raises(InputError, match=r"encoders\.dim null, model\.encoders\.whiten false and data"):
            prepare(make(LLaRAPretrain, **settings), make_data(supervision=supervision))
