"""SRA-CL: its contrasts by arithmetic, where gradients go, what a weight of zero saves, and that it learns."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CONFIGS, MakeData, differing, fit, prepare, settings_of, tiny, validated, weights
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.encoders.ids import IdEncoders
from anyo_lightning.encoders.text import TextEncoders
from anyo_lightning.errors import InputError
from anyo_lightning.llm.language_model import LLM
from anyo_lightning.models.sasrec import SASRec
from anyo_lightning.models.sracl import SRACL, Synthesizer
from anyo_lightning.runs import RunFolder

SIZES = {"ids": {"batch_tokens": 150}, "text": {"batch_tokens": 2000}}


@pytest.fixture
def data(make_data: MakeData) -> RecDataModule:
    """The tiny data set in small batches."""
    return make_data(**SIZES["ids"])


def made(folder: str, data: RecDataModule, *, dim: int = 16, dropout: float = 0.0, **changes: Any) -> SRACL:
    """SRA-CL over ids without dropout, prepared."""
    torch.manual_seed(0)
    settings = {"semantics": LLM(folder, dtype="float32"), "neighbours": 3}
    return prepare(SRACL(IdEncoders(dim=dim, dropout=dropout), **(settings | changes)), data)


def first_batch(data: RecDataModule) -> HistoryBatch:
    """A training batch."""
    return next(iter(data.train_dataloader()))


def test_synthesizer_by_hand() -> None:
    """W = (1, 0), a = (1, 2): scores 1 + 2 = 3 and 0.2 · (1 - 4) = -0.6; a missing neighbour weighs nothing."""
    synthesizer = Synthesizer(2, 1)
    synthesizer.map.weight.data = torch.tensor([[1.0, 0.0]])
    synthesizer.attention.data = torch.tensor([[1.0], [2.0]])
    users = torch.tensor([[1.0, 7.0]]).expand(2, -1)
    neighbours = torch.tensor([[[1.0, 5.0], [-2.0, 5.0], [9.0, 9.0]]]).expand(2, -1, -1)
    there = torch.tensor([[True, True, False], [False, True, False]])
    expected = torch.tensor([3.0, -0.6]).softmax(0)
    weights = synthesizer(users, neighbours, there)
    torch.testing.assert_close(weights, torch.tensor([[expected[0], expected[1], 0], [0, 1, 0]]))


@pytest.mark.parametrize("masked", [False, True])
def test_inter_user_by_hand(tiny_bert: str, data: RecDataModule, masked: bool) -> None:
    """Equal weights (a = 0) make a positive the mean of neighbours' states; who has no neighbour takes no part."""
    model = made(tiny_bert, data, mask_false_negatives=masked, temperature=0.5)
    model.synthesizer.attention.data.zero_()
    model.states_of_users.normal_(std=0.5)
    batch = first_batch(data)
    model.user_neighbours[batch.user[0]] = -1
    model.user_neighbours[batch.user[1], 1:] = -1
    last = torch.randn(len(batch.user), 16, generator=torch.Generator().manual_seed(1)) / 2
    users, targets = batch.user.tolist(), batch.targets[batch.last_states].tolist()
    assert batch.final is not None
    rows = [row for row in range(1, len(users)) if batch.final[row]]
    mean = {}
    for v in rows:
        found = model.user_neighbours[users[v]]
        mean[v] = model.states_of_users[found[found >= 0]].mean(0)
    losses = []
    for u in rows:
        others = [v for v in rows if v == u or not (masked and targets[v] == targets[u])]
        scores = torch.stack([last[u] @ mean[v] / 0.5 for v in others])
        losses.append(scores.logsumexp(0) - last[u] @ mean[u] / 0.5)
    assert len(rows) > 4
    assert len({targets[v] for v in rows}) < len(rows)
    torch.testing.assert_close(model.inter_user(last, batch, model.taking_part(batch)), torch.stack(losses).mean())


@pytest.mark.parametrize("masked", [False, True])
def test_intra_user_by_hand(tiny_bert: str, data: RecDataModule, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two views per history, a fifth (at least one item) replaced by neighbours; each against all but itself."""
    model = made(tiny_bert, data, mask_false_negatives=masked)
    batch = first_batch(data)
    count = len(batch.user)
    states = torch.randn(2 * count, 16, generator=torch.Generator().manual_seed(1))
    read: list[np.ndarray] = []

    def encode(histories: list[np.ndarray]) -> Tensor:
        read.extend(histories)
        return states

    monkeypatch.setattr(model, "encode_histories", encode)
    loss = model.intra_user(batch)
    originals = batch.histories()
    for view, original in zip(read, originals * 2, strict=True):
        changed = np.flatnonzero(view != original)
        assert len(changed) == max(len(original) // 5, 1)
        assert all(view[i] in model.item_neighbours[original[i]] for i in changed)
    assert any((a != b).any() for a, b in zip(read[:count], read[count:], strict=True))
    users, targets = batch.user.tolist(), batch.targets[batch.last_states].tolist()
    losses = []
    for i in range(2 * count):
        positive = (i + count) % (2 * count)

        def same(j: int, i: int = i) -> bool:
            return users[j % count] == users[i % count] or targets[j % count] == targets[i % count]

        kept = [j for j in range(2 * count) if j == positive or (j != i and not (masked and same(j)))]
        losses.append((states[i] @ states[kept].T).logsumexp(0) - states[i] @ states[positive])
    torch.testing.assert_close(loss, torch.stack(losses).mean())


@pytest.mark.parametrize("bank", [False, True])
def test_gradients_reach_what_should_train(tiny_bert: str, data: RecDataModule, bank: bool) -> None:
    """Of the inter-user term: W, a and the user's state always; the neighbours' states where they are encoded again."""
    model = made(tiny_bert, data, bank=bank)
    if bank:
        model.refresh_bank()
    batch = first_batch(data)
    last = model(batch)[batch.last_states].detach().requires_grad_()
    model.inter_user(last, batch, model.taking_part(batch)).backward()
    assert last.grad is not None
    assert last.grad.abs().sum() > 0
    for name, parameter in model.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert reached == (name.startswith("synthesizer") or not bank), name
    model.zero_grad()
    model.intra_user(batch).backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith("synthesizer"))


def test_each_distinct_neighbour_is_encoded_once(
    tiny_bert: str, data: RecDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The states are those of each user's own training history without its last item, whatever the batches."""
    model = made(tiny_bert, data, bank=False).eval()
    read: list[np.ndarray] = []
    encode = model.encode_histories

    def counting(histories: list[np.ndarray]) -> Tensor:
        read.extend(histories)
        return encode(histories)

    monkeypatch.setattr(model, "encode_histories", counting)
    states = model.neighbour_states(torch.tensor([[7, 3], [30, 7]]))
    assert len(read) == 3
    for row, column, user in [(0, 0, 7), (0, 1, 3), (1, 0, 30), (1, 1, 7)]:
        alone = encode([data.split.training_history(user)[:-1]])[0]
        torch.testing.assert_close(states[row, column], alone, rtol=1e-4, atol=1e-5)


def test_bank_holds_the_states_of_the_epochs_start(tiny_bert: str, data: RecDataModule) -> None:
    """Without dropout and gradient; it follows the weights when it is refreshed, and the mode comes back."""
    model = made(tiny_bert, data, dropout=0.5).train()
    model.refresh_bank()
    assert model.training
    before = model.states_of_users.clone()
    model.eval()
    with torch.no_grad():
        expected = model.encode_histories(model.histories)
    torch.testing.assert_close(before, expected, rtol=1e-4, atol=1e-5)
    assert not before.requires_grad
    model.item_encoder.embedding.weight.data.add_(torch.randn(16, 16))
    torch.testing.assert_close(model.states_of_users, before)
    model.refresh_bank()
    assert not torch.allclose(model.states_of_users, before, atol=1e-2)


@pytest.mark.parametrize("user_semantics", ["mean", "texts"])
def test_nothing_outside_training_is_seen(tiny_bert: str, make_data: MakeData, user_semantics: str) -> None:
    """Other validation and test items or other last training items: the same vectors and neighbours."""
    found = []
    for change in (None, "evaluation", "last"):
        data = make_data(**SIZES["ids"])
        split = data.split
        if change == "evaluation":
            split.items[split.stages > 0] = (split.items[split.stages > 0] + 3) % 16
        if change == "last":
            last = split.offsets[:-1] + [len(split.training_history(user)) - 1 for user in range(split.users)]
            split.items[last] = (split.items[last] + 3) % 16
        found.append(made(tiny_bert, data, user_semantics=user_semantics))
    for other in found[1:]:
        assert torch.equal(other.user_vectors, found[0].user_vectors)
        assert torch.equal(other.user_neighbours, found[0].user_neighbours)
        assert np.array_equal(other.item_neighbours, found[0].item_neighbours)
        assert all(map(np.array_equal, other.histories, found[0].histories))
    own = torch.arange(40)[:, None]
    assert not (found[0].user_neighbours == own).any()
    assert (found[0].user_neighbours >= 0).all()


def test_without_contrasts_it_is_sasrec(data: RecDataModule) -> None:
    """α = β = 0: the same weights and the bit-identical loss, and no semantic encoder is loaded: there is none."""
    torch.manual_seed(0)
    model = prepare(SRACL(IdEncoders(dim=16, dropout=0.0), semantics=LLM("nowhere"), alpha=0, beta=0), data)
    torch.manual_seed(0)
    sasrec = prepare(SASRec(IdEncoders(dim=16, dropout=0.0)), data)
    sasrec.load_state_dict(model.state_dict())
    batch = first_batch(data)
    loss, parts = model.loss(model(batch), batch)
    assert torch.equal(loss, sasrec.loss(sasrec(batch), batch)[0])
    assert set(parts) == {"next_item"}
    model.on_train_epoch_start()


@pytest.mark.parametrize("weights", [{"alpha": 0.0}, {"beta": 0.0}])
def test_a_term_of_weight_zero_costs_nothing(tiny_bert: str, data: RecDataModule, weights: dict[str, float]) -> None:
    """No synthesizer and no bank without α; no view and no neighbours of items without β."""
    model = made(tiny_bert, data, **weights)
    inter = "alpha" not in weights
    assert hasattr(model, "synthesizer") == hasattr(model, "states_of_users") == inter
    assert hasattr(model, "item_neighbours") == (not inter)
    batch = first_batch(data)
    states = model(batch)
    before = model.seen.tokens
    _, parts = model.loss(states, batch)
    assert set(parts) == {"next_item", *(("inter_user", "inter_user_histories") if inter else ("intra_user",))}
    if inter:
        assert float(parts["inter_user_histories"]) == int(batch.final.sum()) > 0
    assert (model.seen.tokens == before) == inter  # the bank reads nothing in a step, views do


@pytest.mark.parametrize("name", ["sracl", "sracl_paper"])
def test_most_steps_have_last_windows_to_contrast(name: str, tmp_path: Path) -> None:
    """With each configuration's batches of windows; by their length, last windows come in steps of their own."""
    random = np.random.default_rng(0)
    rows = [
        f"u{u},m{i},{t}" for u in range(80) for t, i in enumerate(random.integers(50, size=random.integers(9, 300)))
    ]
    (tmp_path / "i.csv").write_text("user_id,item_id,timestamp\n" + "\n".join(rows) + "\n")
    (tmp_path / "c.csv").write_text("item_id,title\n" + "\n".join(f"m{i},Movie {i}" for i in range(50)) + "\n")
    settings = settings_of(CONFIGS / f"{name}.yaml")["data"]

    def alone(**changes: Any) -> float:
        options = settings | changes
        data = RecDataModule(interactions=tmp_path / "i.csv", items=tmp_path / "c.csv", **options)
        data.setup("fit")
        counts = [int(batch.final.sum()) for batch in data.train_dataloader()]
        return float(np.mean([count < 2 for count in counts]))

    assert alone() < 0.15
    assert alone(group_by_length=True) > 0.4


def test_mistakes_are_refused(tiny_bert: str, data: RecDataModule) -> None:
    """No encoder of texts, and sizes that cannot work."""
    with pytest.raises(InputError, match="semantics"):
        prepare(SRACL(IdEncoders(dim=16)), data)
    cases: dict[str, dict[str, Any]] = {
        "neighbours": {"neighbours": 0},
        "temperature": {"temperature": 0.0},
        "share": {"share": 1.5},
    }
    for words, changes in cases.items():
        with pytest.raises(InputError, match=words):
            made(tiny_bert, data, **changes)


def variant(kind: str, llm: str, bert: str) -> Callable[..., SRACL]:
    """SRA-CL over ids as in the paper, or over text with a bank and the LLM's own vectors."""
    shared: dict[str, Any] = {"neighbours": 3, "optimizer": partial(torch.optim.AdamW, lr=1e-2)}
    if kind == "ids":
        semantics = LLM(bert, dtype="float32")
        encoders = IdEncoders(dim=16, dropout=0.1)
        return partial(SRACL, encoders, semantics=semantics, bank=False, mask_false_negatives=False, **shared)
    return partial(SRACL, TextEncoders(tiny(llm), dim=16, reads="both"), temperature=0.2, **shared)


@pytest.mark.parametrize("kind", ["ids", "text"])
def test_it_learns_and_comes_back(
    kind: str, tiny_llm: str, tiny_bert: str, make_data: MakeData, tmp_path: Path
) -> None:
    """Far above chance on loops through the catalogue; another module with the checkpoint gives the same figures."""
    make = variant(kind, tiny_llm, tiny_bert)
    trainer = fit(make(), make_data(**SIZES[kind]), tmp_path, epochs=15 if kind == "ids" else 8)
    assert float(trainer.callback_metrics["val/hr@5"]) > 0.5  # chance .31
    best = RunFolder(tmp_path).best_checkpoint
    first = validated(trainer.lightning_module, make_data(), best)
    assert validated(make(), make_data(), best) == first


def test_a_run_with_a_bank_starts_from_one_without(tiny_bert: str, make_data: MakeData, tmp_path: Path) -> None:
    """And the other way round: the bank is filled at the start of each epoch, and costs no trained token."""
    make = variant("ids", "", tiny_bert)
    for bank in (False, True):
        folder = tmp_path / str(bank)
        fit(make(bank=bank), make_data(**SIZES["ids"]), folder, epochs=1)
        saved = weights(RunFolder(folder).best_checkpoint)
        started = prepare(make(bank=not bank, init_from=folder), make_data(**SIZES["ids"]))
        assert differing(started.state_dict(), saved) == {"states_of_users"}
        if not bank:
            started.refresh_bank()
            assert bool(started.states_of_users.any())
            assert started.seen.tokens == 0


@pytest.mark.parametrize("kind", ["ids", "text"])
def test_a_resumed_run_is_the_whole_one(
    kind: str, tiny_llm: str, tiny_bert: str, make_data: MakeData, tmp_path: Path
) -> None:
    """Four epochs in two parts end with the weights of four in one: bank, views and dropout included."""
    make = partial(variant(kind, tiny_llm, tiny_bert), decay=False, warmup=0.0)
    options = {"shuffle_ties": True, "random_cuts": True, **SIZES[kind]}
    fit(make(), make_data(**options), tmp_path / "whole", epochs=4)
    fit(make(), make_data(**options), tmp_path / "parts", epochs=2)
    last = RunFolder(tmp_path / "parts").last_checkpoint
    fit(make(), make_data(**options), tmp_path / "parts", epochs=4, ckpt_path=last)
    whole, parts = (
        torch.load(RunFolder(tmp_path / name).last_checkpoint, weights_only=True) for name in ("whole", "parts")
    )
    assert whole["global_step"] == parts["global_step"] > 4
    assert not differing(whole["state_dict"], parts["state_dict"])


class SaveAt(Callback):
    """Saves a checkpoint after a step, once."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save."""
        if trainer.global_step == self.step and not self.path.is_file():
            trainer.save_checkpoint(self.path)


def test_a_run_resumed_within_an_epoch_has_the_bank_of_its_start(
    tiny_bert: str, make_data: MakeData, tmp_path: Path
) -> None:
    """The bank comes from the checkpoint, and is not the one that the checkpoint's weights would fill."""
    make = partial(variant("ids", "", tiny_bert), bank=True)
    saved = tmp_path / "middle.ckpt"
    trainer = fit(make(), make_data(**SIZES["ids"]), tmp_path, callbacks=[SaveAt(3, saved)])
    assert trainer.num_training_batches > 3
    bank = weights(saved)["states_of_users"]
    found: list[Tensor] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            found.append(pl_module.states_of_users.clone())

    model = make()
    fit(model, make_data(**SIZES["ids"]), tmp_path / "resumed", epochs=1, callbacks=[Watch()], ckpt_path=saved)
    assert found
    assert all(torch.equal(states, bank) for states in found)
    model.refresh_bank()
    assert not torch.allclose(model.states_of_users, bank, atol=1e-3)


def test_one_batch_overfits(tiny_bert: str, data: RecDataModule) -> None:
    """All three parts of one batch's loss fall, the next-item loss to nearly nothing."""
    model = made(tiny_bert, data, dim=32, bank=False)
    # The tiny tokenizer's vocabulary differs between processes, and with it who is alike: neighbours are given here.
    users, items = torch.arange(data.split.users)[:, None], np.arange(data.split.catalogue_size)[:, None]
    model.user_neighbours.copy_((users + torch.arange(1, 4)) % data.split.users)
    model.item_neighbours = (items + np.arange(1, 4)) % data.split.catalogue_size
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    windows = data.train_dataloader().dataset
    batch = windows[np.flatnonzero(windows.final)[:4]]
    found = []
    for _ in range(300):
        loss, parts = model.loss(model(batch), batch)
        found.append({name: float(value.detach()) for name, value in parts.items()})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert found[-1]["next_item"] < 0.5 < 2 < found[0]["next_item"]
    for contrast in ("inter_user", "intra_user"):  # views are drawn: means over steps
        first, last = (np.mean([parts[contrast] for parts in steps]) for steps in (found[:10], found[-50:]))
        assert last < 0.7 * first
