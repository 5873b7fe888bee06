"""Models as Lightning trains them: they learn, save little, load back exactly, and refuse what is not theirs."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import MakeData, differing, fit, prepare, tiny, trainer_for, validated, weights
from lightning.pytorch import seed_everything
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional as F

from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.data.tokens import ItemTokenStore
from anyo_lightning.encoders.adapted import AdaptedTextEncoders
from anyo_lightning.encoders.base import Encoders
from anyo_lightning.encoders.hierarchical import HierarchicalEncoders
from anyo_lightning.encoders.history import TextHistory
from anyo_lightning.encoders.ids import IdEncoders
from anyo_lightning.encoders.live import LiveTextEncoders
from anyo_lightning.encoders.projector import Projector
from anyo_lightning.encoders.text import TextEncoders
from anyo_lightning.encoders.text_start import TextStartEncoders
from anyo_lightning.encoders.vectors import VectorEncoders, item_vectors
from anyo_lightning.errors import InputError
from anyo_lightning.llm.backbone import Backbone
from anyo_lightning.llm.language_model import LLM
from anyo_lightning.models import identity
from anyo_lightning.models.anyo import Anyo
from anyo_lightning.models.base import RetrievalModule
from anyo_lightning.models.e4srec import E4SRec
from anyo_lightning.models.llara import LLaRA
from anyo_lightning.models.sasrec import SASRec
from anyo_lightning.models.unisrec import UniSRec
from anyo_lightning.runs import RunFolder

Make = Callable[..., RetrievalModule]
NAMES = ["sasrec", "sasrec on texts", "unisrec", "e4srec", "hybrid", "anyo", "hllm"]


def variants(folder: str) -> dict[str, Make]:
    """The trained variants with tiny settings."""
    optimizer = partial(torch.optim.AdamW, lr=1e-2)
    texts = partial(TextEncoders, tiny(folder), dim=16)
    return {
        "sasrec": partial(SASRec, IdEncoders(dim=16, dropout=0.0), optimizer=optimizer),
        "sasrec on texts": partial(
            SASRec,
            TextStartEncoders(tiny(folder, lora=None), dim=16, frozen=8, dropout=0.0),
            optimizer=optimizer,
        ),
        "unisrec": partial(
            UniSRec,
            AdaptedTextEncoders(tiny(folder, lora=None), dim=16, dropout=0.0, ids=True),
            temperature=0.2,
            optimizer=optimizer,
        ),
        "e4srec": partial(E4SRec, texts(), optimizer=optimizer),
        "hybrid": partial(E4SRec, texts(id_residual=True), optimizer=optimizer),
        "anyo": partial(Anyo, texts(), negatives=8, optimizer=optimizer),
        "hllm": partial(
            LLaRA,
            HierarchicalEncoders(tiny(folder), item_backbone=tiny(folder, layers=2), dim=16, dropout=0.0),
            keys="catalogue",
            optimizer=optimizer,
        ),
    }


@pytest.mark.parametrize("name", NAMES)
def test_training_lowers_the_loss_and_beats_chance(
    name: str, tiny_llm: str, make_data: MakeData, tmp_path: Path
) -> None:
    """The data are loops through the catalogue: a model that learns anything ranks the next item high."""
    first = fit(variants(tiny_llm)[name](), make_data(), tmp_path / "first", epochs=1).callback_metrics
    last = fit(variants(tiny_llm)[name](), make_data(), tmp_path, epochs=25).callback_metrics
    assert float(last["train/loss"]) < 0.9 * float(first["train/loss"])
    assert float(last["val/hr@5"]) > 0.5  # chance .31: 5 of 16 items, none of which is masked here


@pytest.mark.parametrize("name", NAMES)
def test_checkpoint_restores_exactly_and_leaves_the_backbone_out(
    name: str, tiny_llm: str, make_data: MakeData, tmp_path: Path
) -> None:
    """Another process's model with the checkpoint gives the same figures; no frozen weight is in the file."""
    make = variants(tiny_llm)[name]
    trainer = fit(make(), make_data(), tmp_path)
    best = RunFolder(tmp_path).best_checkpoint
    first = validated(trainer.lightning_module, make_data(), best)
    seed_everything(123, verbose=False)
    model = make()
    assert validated(model, make_data(), best) == first
    saved = weights(best)
    assert not set(saved) & identity.frozen_keys(model)
    assert set(saved) | identity.frozen_keys(model) == set(model.state_dict())
    if name not in ("sasrec", "sasrec on texts", "unisrec"):
        assert any("lora_A" in key for key in saved)
        assert len(identity.frozen_keys(model)) > 20


@pytest.mark.parametrize("name", ["sasrec", "unisrec", "e4srec", "cosines", "anyo"])
def test_a_users_own_items_are_no_negatives(name: str, tiny_llm: str, make_data: MakeData) -> None:
    """With `mask_history` the loss is the cross-entropy without them; the target, which is one of them, stays.

    Anyo's is the same where all items are drawn.
    """
    torch.manual_seed(0)
    cosines = partial(TextEncoders, tiny(tiny_llm), dim=16, unit_length=True)
    make = {
        **variants(tiny_llm),
        "cosines": lambda **options: E4SRec(cosines(), temperature=0.2, **options),
        "anyo": partial(Anyo, TextEncoders(tiny(tiny_llm), dim=16), negatives=16),
    }[name]
    data = make_data(max_items=6)
    model = prepare(make(mask_history=True), data).eval()
    batch = next(iter(data.train_dataloader()))
    states = model(batch).float()
    logits = model.logit_scale() * states @ model.encode_items(model.training_items).T
    targets = model.position_in_training[batch.targets]
    for row, (history, target) in enumerate(zip(batch.target_places[0].tolist(), targets.tolist(), strict=True)):
        own = set(data.split.training_history(int(batch.user[history])).tolist())
        for place, item in enumerate(model.training_items.tolist()):
            if item in own and place != target:
                logits[row, place] = -torch.inf
    assert 0 < int(logits.isinf().sum()) < logits.numel()
    found, _ = model.loss(states, batch)
    torch.testing.assert_close(found, F.cross_entropy(logits, targets))


def test_losses_that_know_no_mask_refuse_it(tiny_llm: str) -> None:
    """One sentence that names those that do."""
    with pytest.raises(InputError, match=r"model\.mask_history with .*UniSRec or a class .*, got it for LLaRA"):
        LLaRA(LiveTextEncoders(tiny(tiny_llm)), mask_history=True)


def test_a_mask_is_refused_where_the_evaluation_has_none(tiny_llm: str, make_data: MakeData, tmp_path: Path) -> None:
    """The tests' trainer ranks histories' items, too."""
    with pytest.raises(InputError, match=r"metrics\.mask_history true with model\.mask_history"):
        fit(variants(tiny_llm)["sasrec"](mask_history=True), make_data(), tmp_path, epochs=1)


def test_foreign_checkpoints_are_refused(tiny_llm: str, make_data: MakeData, tmp_path: Path) -> None:
    """Another model, backbone depth or split: one sentence that names both."""
    make = variants(tiny_llm)["e4srec"]
    fit(make(), make_data(), tmp_path, epochs=1)
    best = RunFolder(tmp_path).best_checkpoint
    with pytest.raises(InputError, match="checkpoint of model Anyo, got E4SRec"):
        validated(variants(tiny_llm)["anyo"](), make_data(), best)
    with pytest.raises(InputError, match=r"checkpoint of backbones .*layers=2.*got .*layers=3"):
        validated(E4SRec(TextEncoders(tiny(tiny_llm, layers=2), dim=16)), make_data(), best)
    with pytest.raises(InputError, match="checkpoint of split"):
        validated(make(), make_data(ties="shuffle", ties_seed=3, k_core=0, strategy="ratio"), best)
    fit(variants(tiny_llm)["hybrid"](), make_data(), tmp_path / "hybrid", epochs=1)
    with pytest.raises(InputError, match=r"id_residual True, with which the checkpoint was trained, got False"):
        validated(make(), make_data(), RunFolder(tmp_path / "hybrid").best_checkpoint)


def test_item_vectors_and_init_come_from_runs(tiny_llm: str, make_data: MakeData, tmp_path: Path) -> None:
    """The paper's E4SRec reads a SASRec run's vectors, frozen; `init_from` starts from a run's weights."""
    fit(variants(tiny_llm)["sasrec"](), make_data(), tmp_path / "sasrec", epochs=1)
    encoders = VectorEncoders(tiny(tiny_llm), item_vectors_from=tmp_path / "sasrec", dim=16)
    model = E4SRec(encoders)
    fit(model, make_data(supervision="last"), tmp_path / "paper", epochs=1)
    trained = weights(RunFolder(tmp_path / "sasrec").best_checkpoint)["item_encoder.embedding.weight"]
    standardised = (trained - trained.mean(0)) / trained.std()
    torch.testing.assert_close(model.history_encoder.injection.item_vectors, standardised)
    again = prepare(E4SRec(encoders, init_from=tmp_path / "paper"), make_data(supervision="last"))
    best = weights(RunFolder(tmp_path / "paper").best_checkpoint)
    for key, value in best.items():
        torch.testing.assert_close(again.state_dict()[key], value, msg=key)
    gone = tmp_path / "gone"  # a finished run needs its own checkpoint, not the folders that it started from
    alone = E4SRec(VectorEncoders(tiny(tiny_llm), item_vectors_from=gone, dim=16), init_from=gone)
    prepare(alone, make_data(supervision="last"), saved=best)
    torch.testing.assert_close(alone.history_encoder.injection.item_vectors, standardised)
    with pytest.raises(InputError, match="item embeddings"):
        item_vectors(_run_without_ids(tiny_llm, make_data, tmp_path), make_data().split)


@pytest.mark.parametrize("reads", ["vectors", "both"])
def test_item_vectors_beside_texts(tiny_llm: str, make_data: MakeData, tmp_path: Path, reads: Any) -> None:
    """`TextEncoders` reads a SASRec run's vectors beside the texts', and items have them, but for untrained items."""
    data = make_data(ties="shuffle", k_core=0, strategy="ratio")
    fit(variants(tiny_llm)["sasrec"](), data, tmp_path / "sasrec", epochs=1)

    def make(source: Path) -> E4SRec:
        return E4SRec(TextEncoders(tiny(tiny_llm), reads=reads, dim=16, item_vectors_from=source))

    model = prepare(make(tmp_path / "sasrec"), data)
    text, beside = model.history_encoder.injection
    trained = weights(RunFolder(tmp_path / "sasrec").best_checkpoint)["item_encoder.embedding.weight"]
    known = (trained - trained.mean(0)) / trained.std()
    known[data.split.training_counts() == 0] = 0
    torch.testing.assert_close(beside.item_vectors, known)
    torch.testing.assert_close(model.item_encoder.known, known)
    assert [part.texts_in for part in (text, beside)] == ["item_vectors", None]  # what probes shuffle
    items = torch.arange(len(known))
    alone = model.item_encoder.projector(text.item_vectors)
    projected = alone + model.item_encoder.known_projector(known)
    torch.testing.assert_close(model.eval().item_encoder(items), projected)
    again = prepare(make(tmp_path / "gone"), data, saved=model.state_dict())
    torch.testing.assert_close(again.history_encoder.injection[1].item_vectors, known)


def _run_without_ids(tiny_llm: str, make_data: MakeData, tmp_path: Path) -> Path:
    fit(variants(tiny_llm)["e4srec"](), make_data(), tmp_path / "text", epochs=1)
    return tmp_path / "text"


def test_losses_range_over_training_items_only(tiny_llm: str, tmp_path: Path) -> None:
    """An item that occurs in the test alone is no candidate of the loss, and is ranked all the same."""
    rows = [f"u{u},m{(u + t) % 6},{t}" for u in range(12) for t in range(5)] + [f"u{u},new,9" for u in range(3)]
    (tmp_path / "i.csv").write_text("user_id,item_id,timestamp\n" + "\n".join(rows) + "\n")
    items = [f"m{i},Movie {i}" for i in range(6)] + ["new,A new one"]
    (tmp_path / "c.csv").write_text("item_id,title\n" + "\n".join(items) + "\n")
    data = RecDataModule(
        interactions=tmp_path / "i.csv",
        items=tmp_path / "c.csv",
        k_core=0,
        strategy="global_time",
        times=(4, 9),
        max_tokens=200,
    )
    model = prepare(variants(tiny_llm)["hybrid"](), data)
    model.eval()  # without dropout
    assert model.training_items.tolist() == list(range(6))
    batch = next(iter(data.train_dataloader()))
    states = model(batch)
    expected = F.cross_entropy(states @ model.encode_catalogue()[:6].T, batch.targets)
    torch.testing.assert_close(model.loss(states, batch)[0], expected)
    assert model.encode_catalogue().shape == (7, 16)


def test_learning_rates_by_name(tiny_llm: str, make_data: MakeData, tmp_path: Path) -> None:
    """The LoRA group has its own rate, the rest the optimizer's; both rise and fall together."""
    model = E4SRec(
        TextEncoders(tiny(tiny_llm), dim=16),
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
        learning_rates={"history_encoder.backbone": 1e-3},
    )
    trainer = fit(model, make_data(), tmp_path, epochs=3)
    groups = {group["name"]: group for group in trainer.optimizers[0].param_groups}
    assert groups["history_encoder.backbone"]["initial_lr"] == 1e-3
    assert groups["others"]["initial_lr"] == 1e-2
    lora = {id(p) for n, p in model.named_parameters() if "lora_" in n}
    assert {id(p) for p in groups["history_encoder.backbone"]["params"]} == lora
    assert groups["others"]["lr"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_models_are_made_on_the_cpu_whatever_the_default_device(name: str, tiny_llm: str, make_data: MakeData) -> None:
    """Lightning builds models with a GPU as the default device, where new tensors would meet those of numpy."""
    model = variants(tiny_llm)[name]()
    with torch.device("meta"):
        prepare(model, make_data())
    tensors = [*model.named_parameters(), *model.named_buffers()]
    assert len(tensors) > 5
    assert {name: t.device.type for name, t in tensors if t.device.type != "cpu"} == {}


def test_seeds_differ_in_their_batches(make_data: MakeData) -> None:
    """The data's own seed gives other batches, the same seed the same ones; a seed of the process changes nothing."""

    def batches(seed: int, *, of_process: int = 0) -> list[list[int]]:
        seed_everything(of_process, verbose=False)
        return list(make_data(batch_tokens=60, seed=seed).train_dataloader().sampler)

    assert batches(0) == batches(0, of_process=1)
    assert batches(0) != batches(1)


def test_a_tied_table_is_drawn_once(make_data: MakeData) -> None:
    """SASRec's one table is that of one draw, and one weight in its state; untied there are two of each."""
    for tied in (True, False):
        torch.manual_seed(0)
        drawn = [nn.Embedding(16, 16) for _ in range(1 if tied else 2)]
        for table in drawn:
            nn.init.normal_(table.weight, std=0.02)
        torch.manual_seed(0)
        model = prepare(SASRec(IdEncoders(dim=16, tied=tied)), make_data())
        assert torch.equal(model.item_encoder.embedding.weight, drawn[0].weight)
        assert torch.equal(model.history_encoder.embedding.weight, drawn[-1].weight)
        tables = [value for name, value in model.state_dict().items() if name.endswith("embedding.weight")]
        assert len({table.data_ptr() for table in tables}) == len(drawn)


class LiveItems(nn.Module):
    """Reads the catalogue's texts with a language model of its own in each call: the state at each text's end."""

    texts_in = "tokens"

    def __init__(self, backbone: Backbone, *, tokens: ItemTokenStore, projector: Projector) -> None:
        super().__init__()
        self.backbone, self.tokens, self.projector = backbone, tokens, projector

    def forward(self, item_ids: Tensor) -> Tensor:
        """One vector per item."""
        spans = [torch.tensor(self.tokens.span(item).tolist()) for item in item_ids.tolist()]
        ends = torch.tensor([len(span) - 1 for span in spans])
        rows = nn.utils.rnn.pad_sequence(spans, batch_first=True, padding_value=self.tokens.separator)
        return self.projector(self.backbone(rows, read=(torch.arange(len(spans)), ends)).float())


class TwoLLMs(Encoders):
    """An LLM for histories, and another one for items."""

    texts = frozenset({"histories", "items"})

    def __init__(self, users: LLM, *, items: LLM) -> None:
        self.users, self.items = users, items

    def item_tokens(self, data: RecDataModule) -> ItemTokenStore:
        """As the users' LLM reads them."""
        return self.users.item_tokens(data.texts_read, max_tokens=data.max_item_tokens)

    def build(
        self, data: RecDataModule, *, device: torch.device, saved: Mapping[str, Tensor] | None = None
    ) -> tuple[TextHistory, LiveItems]:
        """Each side with its own."""
        users, items = self.users.load(device), self.items.load(device)
        tokens = self.items.item_tokens(data.split.item_texts, max_tokens=data.max_item_tokens)
        history = TextHistory(users, projector=Projector(users.hidden_size, 16), supervision=data.supervision)
        return history, LiveItems(items, tokens=tokens, projector=Projector(items.hidden_size, 16))


def test_an_item_llm_beside_a_user_llm(
    tiny_llm: str, make_data: MakeData, make_tiny_llm: Callable[..., str], tmp_path: Path
) -> None:
    """Neither's frozen weights are saved, both are named, another of either is refused, and figures come back."""
    other = make_tiny_llm("other", seed=1)

    def make(users: dict[str, Any] | None = None, items: dict[str, Any] | None = None, item_llm: str = other) -> E4SRec:
        encoders = TwoLLMs(tiny(tiny_llm, **(users or {})), items=tiny(item_llm, **({"layers": 2} | (items or {}))))
        return E4SRec(encoders, optimizer=partial(torch.optim.AdamW, lr=1e-2))

    trainer = fit(make(), make_data(), tmp_path, epochs=2)
    model = trainer.lightning_module
    assert [len(backbone.model.layers) for backbone in model.backbones] == [3, 2]
    best = RunFolder(tmp_path).best_checkpoint
    saved = torch.load(best, weights_only=True)
    described = saved["anyo_lightning"]["backbones"]
    assert [(found["name"], found["layers"]) for found in described] == [("tiny-llm", "3"), ("other", "2")]
    kept, frozen = set(saved["state_dict"]), identity.frozen_keys(model)
    for side in ("history_encoder.backbone.", "item_encoder.backbone."):
        assert len([key for key in frozen if key.startswith(side)]) >= 20
        assert {"lora_A" in key or "lora_B" in key for key in kept if key.startswith(side)} == {True}
    assert not kept & frozen
    assert kept | frozen == set(model.state_dict())
    again = make()
    assert validated(again, make_data(), best) == validated(model, make_data(), best)
    assert not differing(again.state_dict(), model.state_dict())
    for changed in (make(users={"layers": 2}), make(items={"layers": 1}), make(item_llm=tiny_llm)):
        with pytest.raises(InputError, match=r"checkpoint of backbones (layers|name)=.* and .*, got .* and "):
            validated(changed, make_data(), best)


def test_a_built_model_refuses_other_data(make_data: MakeData, tmp_path: Path) -> None:
    """Ranks over another catalogue, split or length would mean nothing; the same data in another module will do."""
    model = SASRec(IdEncoders(dim=16))
    trainer = fit(model, make_data(), tmp_path, epochs=1)
    trainer.test(model, make_data(), verbose=False)
    for changes in ({"k_core": 7}, {"ties": "shuffle", "strategy": "ratio"}, {"max_items": 7}):
        with pytest.raises(InputError, match="that the model was built on"):
            trainer.test(model, make_data(**changes), verbose=False)
    with pytest.raises(InputError, match="Expected a data module for RetrievalMetrics, got loaders alone"):
        trainer_for(tmp_path / "loaders").fit(SASRec(IdEncoders(dim=16)), make_data().val_dataloader)


def test_two_models_may_share_a_data_module(small_llm: str, tiny_llm: str, make_data: MakeData) -> None:
    """Each reads what it was built to read, whoever reads the data afterwards."""
    data, histories = make_data(), [np.array([3, 1, 4])]
    first = prepare(E4SRec(TextEncoders(tiny(tiny_llm), dim=16)), data).eval()
    before = first.encode_histories(histories)
    prepare(SASRec(IdEncoders(dim=16)), data)
    torch.testing.assert_close(first.encode_histories(histories), before)


def test_settings_are_the_same_text_in_every_process(tiny_llm: str) -> None:
    """Peft keeps target modules in a set; defaults may be written out; what only training reads does not count."""
    plain = LLM(tiny_llm, lora={"r": 4, "target_modules": ["q_proj", "v_proj"]})
    others = [
        LLM(tiny_llm, lora={"target_modules": ["v_proj", "q_proj"], "r": 4, "lora_alpha": 8, "bias": "none"}),
        LLM(tiny_llm, lora=LoraConfig(r=4, target_modules={"v_proj", "q_proj"}, lora_dropout=0.3)),
        LLM(tiny_llm, lora={"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": "gaussian"}),
    ]
    assert {llm.lora_settings for llm in others} == {plain.lora_settings}
    changed = LLM(tiny_llm, lora={"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]})
    assert changed.lora_settings != plain.lora_settings

    class WithACallable(IdEncoders):
        def __init__(self) -> None:
            super().__init__(dim=16)
            self.hook = print

    with pytest.raises(InputError, match="got builtin_function_or_method as hook"):
        WithACallable().settings()
    with pytest.raises(TypeError, match="layerz"):
        LLM(tiny_llm, layerz=2)
