"""LLaRA's pre-training: pretext rows and their losses."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dual_encoders import Make, builder, fit, maker
from helpers import MakeData, prepare, weights
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaModel

from anyo_lightning.encoders.pretext import PretextRows, output_embeddings
from anyo_lightning.errors import InputError
from anyo_lightning.llm.backbone import Backbone
from anyo_lightning.losses import bag_of_tokens
from anyo_lightning.models.llara_pretrain import LLaRAPretrain
from anyo_lightning.runs import RunFolder

TEXTS = [np.array([11, 12, 13]), np.array([21])]


@pytest.fixture
def make(tiny_llm: str) -> Make:
    return maker(tiny_llm)


@pytest.fixture
def built(make: Make, make_data: MakeData) -> Make:
    return builder(make, make_data)


def pretext_rows(self_prompt: list[int]) -> PretextRows:
    return PretextRows.of(TEXTS, self_prompt=self_prompt, next_prompt=[8, 9], end=0, count=1)


def test_pretext_rows_by_hand() -> None:
    """Tokens, positions and mask of a row of three tokens and one of one, which is padded."""
    rows = pretext_rows([5, 6])
    assert rows.token_ids.tolist() == [[11, 12, 13, 5, 6, 0, 8, 9, 0], [21, 5, 6, 0, 8, 9, 0, 0, 0]]
    assert rows.position_ids[0].tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert rows.position_ids[1, :7].tolist() == [0, 1, 2, 3, 1, 2, 3]
    assert rows.pooled.tolist() == [[[5], [8]], [[3], [6]]]
    seen = [row.nonzero()[:, 0].tolist() for row in rows.attention_mask[0]]
    assert seen[:6] == [list(range(i + 1)) for i in range(6)]
    assert seen[6:] == [[0, 1, 2, 6], [0, 1, 2, 6, 7], [0, 1, 2, 6, 7, 8]]


def test_next_does_not_see_self(built: Make) -> None:
    """Other SELF tokens change SELF's state and nothing in NEXT's; each is the state of its own text and prompt."""
    model = built(LLaRAPretrain)
    reader = model.item_encoder.reader

    def states(rows: PretextRows) -> torch.Tensor:
        return reader(rows.token_ids, rows.pooled, attention_mask=rows.attention_mask, position_ids=rows.position_ids)

    one, other = states(pretext_rows([5, 6])), states(pretext_rows([30, 6]))
    torch.testing.assert_close(one[:, 1], other[:, 1], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(one[:, 0], other[:, 0], atol=1e-2)
    for row, text in enumerate(TEXTS):
        for task, prompt in enumerate(([5, 6], [8, 9])):
            alone = model.backbones[0](torch.tensor([[*text, *prompt, 0]]))[0, -1]
            torch.testing.assert_close(one[row, task], alone, rtol=1e-4, atol=1e-5)


def test_pretext_in_bfloat16_falls_to_sdpa(tiny_llm: str) -> None:
    """The blocked kernel knows no mask of pairs: `auto` gives the states of `sdpa`."""
    rows = pretext_rows([5, 6])
    options = {"attention_mask": rows.attention_mask, "position_ids": rows.position_ids}
    make = partial(Backbone, tiny_llm, dtype="bfloat16")
    auto, sdpa = (make(attention=kind)(rows.token_ids, **options) for kind in ("auto", "sdpa"))
    assert torch.equal(auto, sdpa)
    with pytest.raises(InputError, match="attention auto or sdpa"):
        make(attention="eager")(rows.token_ids, **options)


def test_bag_of_tokens_by_hand() -> None:
    """-(1/2) (log p_0 + log p_1) for logits (1, 0) is (0.3133 + 1.3133) / 2."""
    bags, half = torch.tensor([[0, 0], [0, 1]]), torch.tensor([0.5, 0.5])
    assert float(bag_of_tokens(torch.tensor([[1.0, 0.0]]), torch.eye(2), bags, half)) == pytest.approx(0.8133, abs=1e-4)


def test_pretext_losses_by_hand(built: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """EBAE: the mean over a step's distinct items; EBAR: over its pairs; distinct tokens of each text count once."""
    model = built(LLaRAPretrain, data={"max_items": 1, "overlap": 0}, next_prompt="")
    logged: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(model, "log_dict", lambda values, **_: logged.update(values))
    batch = next(iter(model.data.train_dataloader()))
    assert batch.item_ids.shape[1] == 1
    loss = model.training_step(batch, 0)
    head = model.backbones[0].model.get_input_embeddings().weight

    def bag_loss(state: torch.Tensor, item: int) -> float:
        tokens = list(set(model.item_encoder.texts(torch.tensor([item]))[0].tolist()))
        return -float((head @ state).log_softmax(0)[tokens].mean())

    items = sorted(set(batch.item_ids[:, 0].tolist()))
    self_states, next_states = model.pretext_states(torch.tensor(items)).unbind(1)
    ebae = np.mean([bag_loss(state, item) for state, item in zip(self_states, items, strict=True)])
    pairs = zip(batch.item_ids[:, 0].tolist(), batch.targets.tolist(), strict=True)
    ebar = np.mean([bag_loss(next_states[items.index(item)], target) for item, target in pairs])
    assert float(logged["train/ebae"]) == pytest.approx(ebae, rel=1e-4)
    assert float(logged["train/ebar"]) == pytest.approx(ebar, rel=1e-4)
    share = len(batch.targets) / model.data.targets_per_batch  # so that all targets of an epoch weigh the same
    assert float(loss) == pytest.approx(share * (ebae + ebar), rel=1e-4)
    assert model.seen.targets == len(batch.targets)


@pytest.mark.parametrize("settings", [{"next_prompt": ""}, {}, {"pooled_tokens": 2}])
def test_pretext_states_are_what_the_dual_encoder_reads(settings: dict[str, Any], built: Make) -> None:
    """SELF is an item's vector, NEXT the query of a history of that item, by which it is validated, up to length."""
    model = built(LLaRAPretrain, **settings)
    states = F.normalize(model.pretext_states(torch.arange(16)), dim=-1)
    torch.testing.assert_close(states[:, 0], model.item_encoder(torch.arange(16)), rtol=1e-4, atol=1e-5)
    histories = model(model.data.collate([np.array([item]) for item in range(16)]))
    torch.testing.assert_close(states[:, 1], histories, rtol=1e-4, atol=1e-5)


def test_output_embeddings(tiny_llm: str, tmp_path: Path) -> None:
    """Tied: the input's; untied: loaded; an untied model that was saved without them is refused."""
    tied = Backbone(tiny_llm)
    assert output_embeddings(tied) is tied.model.get_input_embeddings().weight
    config = LlamaConfig.from_pretrained(tiny_llm, tie_word_embeddings=False)
    whole = LlamaForCausalLM(config)
    for name, model in (("whole", whole), ("headless", LlamaModel(config))):
        model.save_pretrained(str(tmp_path / name))
        AutoTokenizer.from_pretrained(tiny_llm).save_pretrained(str(tmp_path / name))
    found = output_embeddings(Backbone(str(tmp_path / "whole"), dtype="float32"))
    torch.testing.assert_close(found, whole.lm_head.weight.detach())
    with pytest.raises(InputError, match="output embeddings"):
        output_embeddings(Backbone(str(tmp_path / "headless")))


def test_pretraining_lowers_both_losses(make: Make, make_data: MakeData, tmp_path: Path) -> None:
    """And its run starts LLaRA: the same LoRA, the same added tokens, everything else afresh."""
    options = {"max_items": 1, "overlap": 0, "supervision": "last"}
    first = fit(make(LLaRAPretrain, pooled_tokens=2), make_data(**options), tmp_path / "first", epochs=1)
    trainer = fit(make(LLaRAPretrain, pooled_tokens=2), make_data(**options), tmp_path / "pre", epochs=15)
    for part in ("train/ebae", "train/ebar"):
        assert float(trainer.callback_metrics[part]) < float(first.callback_metrics[part]) - 0.25
    assert float(trainer.callback_metrics["val/hr@5"]) > 0.5  # chance .31
    saved = weights(RunFolder(tmp_path / "pre").best_checkpoint)
    started = make(pooled_tokens=2, hard_negatives=1, learn_temperature=True, init_from=tmp_path / "pre")
    state = prepare(started, make_data()).state_dict()
    assert any("lora_B" in key for key in saved)
    assert any(key.endswith("reader.added") for key in saved)
    for key, value in saved.items():
        assert key.startswith("history_encoder.") or torch.equal(state[key], value), key
    rotation = state["item_encoder.head.0.rotation"]  # of the weights that it starts from
    assert float((rotation - torch.eye(32)).abs().max()) > 0.1
    assert float(state["learned_temperature.log_ratio"]) == 0
    queries = make(pooled_tokens=2, init_from=tmp_path / "pre")  # a history encoder of another kind, of the same LLM
    prepare(queries, make_data(supervision="last"))
    assert torch.equal(queries.state_dict()["item_encoder.reader.added"], saved["item_encoder.reader.added"])
    names = [name for name, parameter in queries.named_parameters() if parameter.requires_grad and "lora" in name]
    assert all(name.startswith("history_encoder.backbone.") for name in names)  # as with supervision of all
    fresh = make(LLaRAPretrain, pooled_tokens=2, init_from=tmp_path / "llara")
    fit(make(pooled_tokens=2), make_data(), tmp_path / "llara", epochs=1)
    with pytest.raises(InputError, match="checkpoint of model LLaRAPretrain, got LLaRA"):
        prepare(fresh, make_data(**options))
    with pytest.raises(InputError, match="pooled_tokens 2, with which the checkpoint was trained, got 0"):
        prepare(make(init_from=tmp_path / "pre"), make_data())
