"""The dual encoder's two sides: pooling, prompts, whitening."""

from pathlib import Path

import numpy as np
import pytest
import torch
from dual_encoders import Make, batch_of, builder, fit, maker
from helpers import MakeData, differing, prepare, weights
from torch.nn import functional as F

from anyo_lightning.encoders.live import LiveTextEncoders, PromptedHistory
from anyo_lightning.encoders.projector import Projector
from anyo_lightning.encoders.whitening import Whitened, whiten
from anyo_lightning.errors import InputError
from anyo_lightning.llm.backbone import load_tokenizer
from anyo_lightning.llm.language_model import LLM
from anyo_lightning.models.llara import LLaRA
from anyo_lightning.runs import RunFolder


@pytest.fixture
def make(tiny_llm: str) -> Make:
    return maker(tiny_llm)


@pytest.fixture
def built(make: Make, make_data: MakeData) -> Make:
    return builder(make, make_data)


def test_items_are_pooled_at_their_own_eos_whatever_the_batch(built: Make, tiny_llm: str) -> None:
    """Text, prompt, EOS, read alone: the last state of the LLM; beside 15 others: the same."""
    model = built(dim=None, whiten=False, self_prompt=" itself")
    tokenizer = load_tokenizer(tiny_llm)
    together = model.item_encoder(torch.arange(16))
    prompt, end = tokenizer(" itself")["input_ids"], tokenizer.eos_token_id
    for item, text in enumerate(model.data.split.item_texts):
        tokens = [*tokenizer(text)["input_ids"], *prompt, end]
        expected = F.normalize(model.backbones[0](torch.tensor([tokens]))[0, -1], dim=0)
        torch.testing.assert_close(together[item], expected, rtol=1e-4, atol=1e-5)
    model.item_encoder.batch_tokens = 40  # other passes, same vectors, in the order asked for
    order = torch.tensor([7, 0, 7, 12])
    torch.testing.assert_close(model.item_encoder(order), together[order], rtol=1e-4, atol=1e-5)
    assert model.item_encoder(torch.empty(0, dtype=torch.long)).shape == (0, 32)


def test_passes_over_items_grow_with_the_step(built: Make) -> None:
    """A step that a GPU wants large reads its items in as large passes: small ones cost it as much time each."""
    assert built(data={"batch_tokens": 100}).item_encoder.batch_tokens == 8192
    assert built(data={"batch_tokens": 20_000}).item_encoder.batch_tokens == 20_000


def test_text_is_cut_before_prompt_and_eos(built: Make) -> None:
    """The longest item loses the end of its text, not its pooled token."""
    model = built(data={"max_item_tokens": 5})
    (text,) = model.item_encoder.texts(torch.tensor([5]))
    assert len(text) == 4
    assert model.item_encoder.token_count(torch.tensor([5])) == 4 + len(model.item_encoder.suffix)
    assert model.item_encoder.suffix[-1] == model.item_encoder.reader.end


def test_added_tokens_are_pooled_by_their_mean_and_trained(built: Make) -> None:
    """Their rows get gradients, the LLM's own table has none, and the vector is the mean over their states."""
    model = built(dim=None, whiten=False, pooled_tokens=3)
    reader, items = model.item_encoder.reader, model.item_encoder
    (text,) = items.texts(torch.tensor([2]))
    before = torch.tensor([[*text, *items.suffix[:-3]]])
    embeddings = torch.cat([model.backbones[0].embed(before), reader.added[None]], dim=1)
    states = model.backbones[0](input_embeddings=embeddings)[0, -3:]
    torch.testing.assert_close(items(torch.tensor([2, 5]))[0], F.normalize(states.mean(0), dim=0), rtol=1e-4, atol=1e-5)
    items(torch.arange(4))[:, 0].sum().backward()
    assert bool((reader.added.grad.abs().sum(1) > 0).all())
    assert model.backbones[0].model.get_input_embeddings().weight.grad is None


@pytest.mark.parametrize("pooled_tokens", [0, 2])
def test_last_supervision_ends_histories_in_the_next_prompt(built: Make, pooled_tokens: int) -> None:
    """The prompt stands where the last separator was; a padded row has the state that it has alone."""
    settings = {"dim": None, "whiten": False, "next_prompt": " next", "pooled_tokens": pooled_tokens}
    model = built(data={"supervision": "last"}, **settings)
    assert isinstance(model.history_encoder, PromptedHistory)
    data, reader = model.data, model.item_encoder.reader
    histories = [np.array([3]), np.array([1, 5, 2])]
    states = model(data.collate(histories))
    prompt = load_tokenizer(*model.backbones[0].source)(" next")["input_ids"]
    for state, history in zip(states, histories, strict=True):
        tokens = [*np.concatenate([data.tokens.span(item) for item in history])[:-1], *prompt]
        row = torch.tensor([[*tokens, *[reader.end] * reader.count]])
        places = len(tokens) + torch.arange(reader.count)
        expected = F.normalize(reader(row, places[None, None])[0, 0], dim=0)
        torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-5)


def test_states_and_items_are_unit_vectors(built: Make) -> None:
    """Both sides, with a projector."""
    model = built()
    states = model(batch_of(model))
    torch.testing.assert_close(states.norm(dim=1), torch.ones(len(states)))
    torch.testing.assert_close(model.encode_catalogue().norm(dim=1), torch.ones(16))


@pytest.mark.parametrize("supervision", ["all", "last"])
def test_both_sides_are_whitened_before_training(make: Make, make_data: MakeData, supervision: str) -> None:
    """Items reach the projector as `whiten` makes them of their own states; histories are measured, too."""
    model = prepare(make(dim=None), make_data(supervision=supervision))
    items, histories = (
        next(module for module in encoder.modules() if isinstance(module, Whitened))
        for encoder in (model.item_encoder, model.history_encoder)
    )
    assert items is not histories
    for side in (items, histories):
        assert float((side.rotation - torch.eye(32)).abs().max()) > 0.1
        assert float(side.mean.abs().max()) > 0.01
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    items.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    model.encode_catalogue()
    ((states, whitened),) = seen
    torch.testing.assert_close(whitened, whiten(states), rtol=1e-3, atol=1e-3)


def test_init_from_a_run_keeps_its_whitening(make: Make, make_data: MakeData, tmp_path: Path) -> None:
    """Measured again on trained states it would be another basis than the one the projectors have learned."""
    fit(make(), make_data(), tmp_path, epochs=1)
    saved = weights(RunFolder(tmp_path).best_checkpoint)
    again = prepare(make(init_from=tmp_path), make_data())
    assert not differing(saved, {key: again.state_dict()[key] for key in saved})


def test_nothing_is_drawn_before_the_first_mining(built: Make) -> None:
    """So that the first epoch is that of a run without mined negatives, dropout and all."""
    model = built(hard_negatives=2, mined_negatives=4)
    before = torch.get_rng_state()
    assert len(model.sample_mined(torch.arange(3))) == 0
    assert torch.equal(torch.get_rng_state(), before)


def test_whitening_meets_no_other_default_device(make: Make, make_data: MakeData) -> None:
    """Lightning builds models with a GPU as the default device."""
    model = make()
    with torch.device("meta"):
        prepare(model, make_data())
    assert {p.device.type for p in [*model.parameters(), *model.buffers()]} == {"cpu"}


def test_items_have_a_perceptron_of_their_own_where_asked(built: Make) -> None:
    """`hidden` gives items other weights than histories have; without it both share one map."""
    for hidden, shared in ((None, True), (24, False)):
        model = built(hidden=hidden)
        sides = (model.history_encoder, model.item_encoder)
        of_histories, of_items = (next(m for m in side.modules() if isinstance(m, Projector)) for side in sides)
        assert (of_histories is of_items) == shared
        assert of_items.map[0].out_features == (hidden or 16)


def test_a_bidirectional_backbone_is_refused(tiny_bert: str, make_data: MakeData) -> None:
    """EOS would be the first token as well as the last one: it is a causal model's pooling."""
    data = make_data(supervision="last", max_tokens=40, max_item_tokens=20)
    with pytest.raises(InputError, match="causal backbone"):
        prepare(LLaRA(LiveTextEncoders(LLM(tiny_bert, dtype="float32"))), data)
