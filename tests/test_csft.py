"""CSFT: what is predicted of which title, in parts as at once, and what runs that start from it take over."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LORA, MakeData, fit, prepare, started_backbone, tiny, weights
from torch import nn
from torch.nn import functional as F
from transformers import GraniteConfig, GraniteForCausalLM

from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.encoders.items import text_vectors
from anyo_lightning.encoders.live import LiveTextEncoders
from anyo_lightning.encoders.next_titles import NextTitles
from anyo_lightning.encoders.text import TextEncoders
from anyo_lightning.errors import InputError
from anyo_lightning.llm.backbone import load_tokenizer
from anyo_lightning.llm.text_vectors import embed_texts
from anyo_lightning.models.cllmrec import CLLMRec
from anyo_lightning.models.csft import CSFT
from anyo_lightning.models.e4srec import E4SRec
from anyo_lightning.models.llara import LLaRA
from anyo_lightning.runs import RunFolder

Make = Callable[..., Any]


@pytest.fixture
def make(tiny_llm: str) -> Make:
    """CSFT over the tiny LLM; options of the LLM are given as `llm`."""

    def build(llm: dict[str, Any] | None = None, encoders: dict[str, Any] | None = None, **settings: Any) -> CSFT:
        live = LiveTextEncoders(
            tiny(tiny_llm, **(llm or {})), **({"dim": None, "whiten": False, "self_prompt": ""} | (encoders or {}))
        )
        return CSFT(live, **({"optimizer": partial(torch.optim.AdamW, lr=1e-2)} | settings))

    return build


@pytest.fixture
def built(make: Make, make_data: MakeData) -> Make:
    """The same on the data, with LoRA away from zero, in training mode."""

    def build(data: dict[str, Any] | None = None, **settings: Any) -> CSFT:
        torch.manual_seed(0)
        module = prepare(make(**settings), make_data(titles_only=True, **(data or {})))
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        return module.train()

    return build


def some(module: CSFT, rows: int = 7) -> HistoryBatch:
    """Training windows; not of equal lengths, and of long histories some that begin with context."""
    batch: HistoryBatch = module.data.train_dataloader().dataset[list(range(rows))]
    return batch


def title_loss_by_hand(module: CSFT, batch: HistoryBatch) -> float:
    """The mean of -log p(token | titles before, tokens before) over the titles, each prefix read on its own."""
    backbone, store, found = module.backbones[0], module.data.tokens, []
    head = backbone.model.get_input_embeddings().weight
    for row in range(len(batch.user)):
        items = batch.item_ids[row][batch.item_mask[row]].tolist()
        for place in batch.target_mask[row].nonzero()[:, 0].tolist():
            before = np.concatenate([store.span(item) for item in items[: place + 1]])
            title = store.span(int(batch.target_ids[row, place]))
            for length in range(len(title)):
                read = torch.from_numpy(np.concatenate([before, title[:length]]).astype(np.int64))[None]
                logits = head @ backbone(read)[0, -1]
                found.append(float(F.cross_entropy(logits, torch.tensor(int(title[length]))).detach()))
    return float(np.mean(found))


def test_rows_by_hand(built: Make) -> None:
    """The first title is read, all others are predicted, the target's last; context is read and not predicted."""
    module = built()
    store = module.data.tokens
    batch = module.data.collate([np.array([3, 5, 2])])
    batch.target_ids[0, :3] = torch.tensor([5, 2, 7])
    batch.target_mask[0] = torch.tensor([False, True, True])
    rows = NextTitles.of(batch, store)
    spans = [store.span(item).tolist() for item in (3, 5, 2, 7)]
    assert rows.token_ids.tolist() == [[token for span in spans for token in span]]
    assert rows.targets.tolist() == spans[2] + spans[3]
    start = len(spans[0]) + len(spans[1])
    assert rows.columns.tolist() == list(range(start - 1, len(rows.token_ids[0]) - 1))
    assert set(rows.rows.tolist()) == {0}


@pytest.mark.parametrize("data", [{}, {"max_items": 4, "overlap": 0.5}])
def test_loss_is_that_of_each_prefix_and_its_next_title(data: dict[str, Any], built: Make) -> None:
    """One pass over a history: the same mean as one pass per prefix and token."""
    module = built(data).eval()
    batch = some(module, 5)
    states, tokens = module.title_states(batch)
    loss = module.title_loss(states, tokens)
    assert len(tokens) == int(module.data.tokens.lengths[batch.targets.numpy()].sum())
    assert float(loss.detach()) == pytest.approx(title_loss_by_hand(module, batch), rel=1e-4)


def test_parts_give_the_same_loss_and_gradients(built: Make) -> None:
    """With `data.micro_batch_tokens` activations are recomputed; the mean is over the whole step."""
    module = built()
    batch, found = some(module), []
    for held in (None, 80):
        module.zero_grad()
        module.data.held_tokens = held
        loss = module.title_loss(*module.title_states(batch))
        loss.backward()
        found.append((loss.detach(), [p.grad for p in module.parameters() if p.requires_grad]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
    assert all(bool(gradient.any()) for gradient in found[0][1])


def test_validation_reads_once(built: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its queries are the states of the histories' last boundaries, those that a test gives."""
    module, logged = built().eval(), {}
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: float(value)}))
    for batch in module.data.val_dataloader():
        with torch.no_grad():
            found, expected = module.validation_step(batch, 0), module.test_step(batch, 0)
            by_hand = title_loss_by_hand(module, batch)
        assert torch.equal(found["row"], expected["row"])
        torch.testing.assert_close(found["query"], expected["query"], rtol=1e-4, atol=1e-5)
        assert logged["val/title_loss"] == pytest.approx(by_hand, rel=1e-4)


def test_tokens_and_targets_are_counted(built: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the histories and of their last targets, each once."""
    module = built()
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    batch = some(module)
    module.training_step(batch, 0)
    rows = NextTitles.of(batch, module.data.tokens).token_ids
    lengths = module.data.tokens.lengths
    last = [int(of[mask][-1]) for of, mask in zip(batch.target_ids, batch.item_mask, strict=True)]
    expected = int(lengths[batch.item_ids[batch.item_mask].numpy()].sum() + lengths[last].sum())
    assert module.seen.tokens == expected <= rows.numel()
    assert module.seen.targets == len(batch.targets)


def test_training_lowers_the_loss_of_titles_and_starts_other_models(
    make: Make, make_data: MakeData, tiny_llm: str, tmp_path: Path
) -> None:
    """Text variants take LoRA over, and their frozen item vectors are those of the fine-tuned LLM."""
    data = partial(make_data, titles_only=True)
    first = fit(make(), data(), tmp_path / "first", epochs=1)
    trainer = fit(make(), data(), tmp_path / "csft", epochs=12)
    figures = trainer.callback_metrics
    assert float(figures["val/title_loss"]) < float(first.callback_metrics["val/title_loss"]) - 0.25
    assert 0 <= float(figures["val/ndcg@10"]) <= 1
    saved = weights(RunFolder(tmp_path / "csft").best_checkpoint)
    lora = {key: value for key, value in saved.items() if key.startswith("history_encoder.backbone.")}
    assert any("lora_B" in key and bool(value.any()) for key, value in lora.items())
    texts = TextEncoders(tiny(tiny_llm), dim=16, pooling="bidirectional")
    for model in (
        E4SRec(texts, init_from=tmp_path / "csft"),
        CLLMRec(TextEncoders(tiny(tiny_llm), dim=16, reads="both"), init_from=tmp_path / "csft"),
        LLaRA(LiveTextEncoders(tiny(tiny_llm), dim=16), init_from=tmp_path / "csft"),
        make(init_from=tmp_path / "csft"),
    ):
        prepare(model, data())
        state = model.state_dict()
        assert all(torch.equal(state[key], value) for key, value in lora.items()), type(model).__name__
        if isinstance(model.encoders, TextEncoders):
            pooling = model.encoders.pooling
            expected = text_vectors(model.backbones[0], model.data, pooling=pooling, adapted=True)
            frozen = text_vectors(model.backbones[0], model.data, pooling=pooling)
            torch.testing.assert_close(state["item_encoder.vectors"], expected)
            assert not torch.allclose(state["item_encoder.vectors"], frozen, atol=1e-2)
    fit(E4SRec(texts, init_from=tmp_path / "csft"), data(), tmp_path / "e4srec", epochs=1)
    kept = weights(RunFolder(tmp_path / "e4srec").best_checkpoint)
    (tmp_path / "csft" / "checkpoints" / "best.ckpt").unlink()  # a trained run needs nothing of the one before
    again = prepare(E4SRec(texts, init_from=tmp_path / "csft"), data(), saved=kept)
    assert torch.equal(again.state_dict()["item_encoder.vectors"], kept["item_encoder.vectors"])


@pytest.mark.parametrize(
    ("llm", "message"),
    [
        ({"lora": LORA | {"r": 2}}, r'Expected model.encoders.backbone lora .*"r": 4.*, got lora .*"r": 2'),
        ({"lora": LORA | {"lora_alpha": 4}}, r"Expected model.encoders.backbone lora .*with which .*csft was trained"),
        ({"lora": None}, "got lora null"),
        ({"layers": 1}, "Expected a run whose LoRA has the layers, .* got 21 adapters of r 4"),
    ],
    ids=["r", "alpha", "none", "layers"],
)
def test_another_lora_is_refused(
    llm: dict[str, Any], message: str, make: Make, make_data: MakeData, tiny_llm: str, tmp_path: Path
) -> None:
    """Before anything is embedded."""
    fit(make(), make_data(titles_only=True), tmp_path / "csft", epochs=1, limit_train_batches=1)
    model = E4SRec(TextEncoders(tiny(tiny_llm, **llm), dim=16), init_from=tmp_path / "csft")
    with pytest.raises(InputError, match=message):
        prepare(model, make_data(titles_only=True))


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        ({"encoders": {"dim": 16}}, {}, "Expected model.encoders.dim null"),
        ({"encoders": {"pooled_tokens": 2}}, {}, "pooled_tokens 0 and"),
        ({}, {"supervision": "last"}, "and data.supervision all, got .* and last"),
        ({"llm": {"lora": None}}, {}, "Expected model.encoders.backbone.lora"),
    ],
)
def test_what_does_not_fit_is_refused(
    options: dict[str, Any], data: dict[str, Any], message: str, make: Make, make_data: MakeData
) -> None:
    """One sentence, before training."""
    with pytest.raises(InputError, match=message):
        prepare(make(**options), make_data(**data))


# --- item vectors ----------------------------------------------------------------------------------------------------


def test_vectors_of_another_adapter_are_others(tiny_llm: str, tmp_path: Path) -> None:
    """The store keeps vectors with LoRA on by its weights: frozen ones and those of others are not mixed up."""
    backbone = started_backbone(tiny_llm)
    embed = partial(embed_texts, backbone, *[load_tokenizer(tiny_llm), ["red green", "blue"]], folder=tmp_path)
    frozen, adapted = embed(), embed(adapted=True)
    assert np.abs(frozen - adapted).max() > 1e-2
    assert np.array_equal(embed(adapted=True), adapted)
    name, weight = next((n, p) for n, p in backbone.named_parameters() if "lora_B" in n)
    with torch.no_grad():
        weight += 0.1
    assert np.abs(embed(adapted=True) - adapted).max() > 1e-3, name
    assert np.array_equal(embed(), frozen)


def test_bidirectional_pooling(tiny_llm: str, tmp_path: Path) -> None:
    """The mean of states that read the whole text, whatever the batch, and not that of causal reading."""
    backbone, tokenizer = started_backbone(tiny_llm), load_tokenizer(tiny_llm)
    texts = ["red green blue", "blue", "red red green blue green"]
    embed = partial(embed_texts, backbone, tokenizer, folder=tmp_path, pooling="bidirectional", adapted=True)
    found = embed(texts)
    for text, vector in zip(texts, found, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        whole = torch.ones(1, ids.shape[1], ids.shape[1], dtype=torch.bool)
        expected = backbone(ids, attention_mask=whole)[0].mean(0)
        torch.testing.assert_close(torch.from_numpy(vector), expected.detach(), rtol=1e-4, atol=1e-5)
    causal = embed_texts(backbone, tokenizer, texts, folder=tmp_path, pooling="mean", adapted=True)
    assert np.abs(found[0] - causal[0]).max() > 1e-3


def test_logits_that_are_more_than_products_are_refused(tmp_path: Path, tiny_llm: str, make_data: MakeData) -> None:
    """Granite divides its logits: their cross-entropy would be another one than the model's."""
    folder = tmp_path / "granite"
    tokenizer = load_tokenizer(tiny_llm)
    tokenizer.save_pretrained(str(folder))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = GraniteConfig(
        **sizes, vocab_size=len(tokenizer), num_hidden_layers=2, logits_scaling=8.0, tie_word_embeddings=True
    )
    GraniteForCausalLM(config).save_pretrained(str(folder))
    model = CSFT(LiveTextEncoders(tiny(str(folder)), dim=None, whiten=False, self_prompt=""))
    with pytest.raises(InputError, match=r"times its output embeddings, got .* with logits_scaling 8"):
        prepare(model, make_data(titles_only=True))
