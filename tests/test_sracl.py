"""SRA-CL: its contrasts by arithmetic, where gradients go, what a weight of zero saves, and that it learns."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CONFIGS, Anyo, MakeData, differing, fit, prepare, tiny, validated, weights
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.encoders.ids import IdEncoders
from anyo_lightning.encoders.text import TextEncoders
from anyo_lightning.errors import InputError
from anyo_lightning.llm.language_model import LLM
from anyo_lightning.models.contrast import Synthesizer
from anyo_lightning.models.sasrec import SASRec
from anyo_lightning.models.sracl import SRACL
from anyo_lightning.runs import RunFolder
from anyo_lightning.views.neighbours import training_prefixes

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


def contrast_by_hand(
    first: Tensor, second: Tensor, identities: list[tuple[int, int]] | None, *, temperature: float, unit: bool
) -> Tensor:
    """Each of the 2N vectors against all but itself and its false negatives; its positive is the other of the two."""
    vectors = torch.cat([first, second])
    if unit:
        vectors = vectors / vectors.norm(dim=1, keepdim=True)
    count, losses = len(first), []
    for i in range(2 * count):
        positive = (i + count) % (2 * count)

        def false(j: int, i: int = i) -> bool:
            return identities is not None and any(
                a == b for a, b in zip(identities[i % count], identities[j % count], strict=True)
            )

        kept = [j for j in range(2 * count) if j == positive or (j != i and not false(j))]
        scores = (vectors[i] @ vectors[kept].T) / temperature
        losses.append(scores.logsumexp(0) - scores[kept.index(positive)])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("unit", [False, True])
def test_inter_user_by_hand(tiny_bert: str, data: RecDataModule, masked: bool, unit: bool) -> None:
    """Equal weights (a = 0) make a positive the mean of neighbours' states; who has no neighbour takes no part."""
    model = made(tiny_bert, data, mask_false_negatives=masked, temperature=0.5, unit_length=unit)
    model.synthesizer.attention.data.zero_()
    model.states_of_prefixes.normal_(std=0.5)
    batch = first_batch(data)
    targets = batch.target_positions
    own = model.prefix_of_target[targets]
    model.prefix_neighbours[own[0]] = -1
    model.prefix_neighbours[own[1], 1:] = -1
    states = torch.randn(len(targets), 16, generator=torch.Generator().manual_seed(1)) / 2
    rows = list(range(1, len(targets)))
    assert model.taking_part(batch).tolist() == rows
    means = []
    for row in rows:
        found = model.prefix_neighbours[own[row]]
        means.append(model.states_of_prefixes[found[found >= 0]].mean(0))
    split = data.split
    users = split.user_of_interaction[targets.numpy()]
    identities = [(int(users[row]), int(split.items[targets[row]])) for row in rows]
    assert len({target for _, target in identities}) < len(rows) > 10
    loss = model.inter_user(states, batch, torch.tensor(rows))
    expected = contrast_by_hand(
        states[rows], torch.stack(means), identities if masked else None, temperature=0.5, unit=unit
    )
    torch.testing.assert_close(loss, expected)


def test_at_most_the_asked_number_of_anchors(tiny_bert: str, data: RecDataModule) -> None:
    """Drawn anew in each step; the batch has more."""
    model = made(tiny_bert, data, anchors=5)
    batch = first_batch(data)
    draws = [tuple(model.taking_part(batch).tolist()) for _ in range(20)]
    assert len(batch.targets) > 20
    assert all(len(set(rows)) == 5 for rows in draws)
    assert len(set(draws)) > 10


@pytest.mark.parametrize("masked", [False, True])
def test_intra_user_by_hand(tiny_bert: str, data: RecDataModule, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two views per history, items before the last replaced by neighbours but the target; each against the others."""
    model = made(tiny_bert, data, mask_false_negatives=masked, share=0.5)
    items = np.arange(data.split.catalogue_size)[:, None]
    model.item_neighbours = (items + np.arange(1, 4)) % data.split.catalogue_size  # with many a target among them
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
    targets = batch.targets[batch.last_states].tolist()
    similar = 0
    for view, original, target in zip(read, originals * 2, targets * 2, strict=True):
        changed = np.flatnonzero(view != original)
        assert view[-1] == original[-1]
        assert all(view[i] in model.item_neighbours[original[i]] and view[i] != target for i in changed)
        similar += sum(target in model.item_neighbours[original[i]] for i in changed)
    assert similar > 10
    assert any((a != b).any() for a, b in zip(read[:count], read[count:], strict=True))
    identities = list(zip(batch.user.tolist(), batch.targets[batch.last_states].tolist(), strict=True))
    expected = contrast_by_hand(
        states[:count], states[count:], identities if masked else None, temperature=0.2, unit=True
    )
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("bank", [False, True])
def test_gradients_reach_what_should_train(tiny_bert: str, data: RecDataModule, bank: bool) -> None:
    """Of the inter-user term: W, a and the user's state always; the neighbours' states where they are encoded again."""
    model = made(tiny_bert, data, bank=bank)
    if bank:
        model.refresh_bank()
    batch = first_batch(data)
    states = model(batch).detach().requires_grad_()
    model.inter_user(states, batch, model.taking_part(batch)).backward()
    assert states.grad is not None
    assert states.grad.abs().sum() > 0
    for name, parameter in model.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert reached == (name.startswith("synthesizer") or not bank), name
    model.zero_grad()
    model.intra_user(batch).backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith("synthesizer"))


def test_each_distinct_neighbour_is_encoded_once(
    tiny_bert: str, data: RecDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The states are those after each prefix read alone, whatever the batches."""
    model = made(tiny_bert, data, bank=False).eval()
    read: list[np.ndarray] = []
    encode = model.encode_histories

    def counting(histories: list[np.ndarray], **options: Any) -> Tensor:
        read.extend(histories)
        return encode(histories, **options)

    monkeypatch.setattr(model, "encode_histories", counting)
    states = model.neighbour_states(torch.tensor([[7, 3], [30, 7]]))
    assert len(read) == 3
    prefixes = training_prefixes(data.split, shuffled_ties=False)
    for row, column, prefix in [(0, 0, 7), (0, 1, 3), (1, 0, 30), (1, 1, 7)]:
        alone = encode([data.split.items[prefixes.start[prefix] : prefixes.end[prefix]]])[0]
        torch.testing.assert_close(states[row, column], alone, rtol=1e-4, atol=1e-5)


def test_bank_holds_the_states_of_the_epochs_start(tiny_bert: str, make_data: MakeData) -> None:
    """Without dropout and gradient; it follows the weights when it is refreshed, and the mode comes back.

    Histories fit into one window: in a later one a prefix is read with less context than alone.
    """
    model = made(tiny_bert, make_data(batch_tokens=150, max_items=50), dropout=0.5).train()
    model.refresh_bank()
    assert model.training
    before = model.states_of_prefixes.clone()
    model.eval()
    with torch.no_grad():
        expected = model.encode_histories(model.histories)
    torch.testing.assert_close(before, expected, rtol=1e-4, atol=1e-5)
    assert not before.requires_grad
    model.item_encoder.embedding.weight.data.add_(torch.randn(16, 16))
    torch.testing.assert_close(model.states_of_prefixes, before)
    model.refresh_bank()
    assert not torch.allclose(model.states_of_prefixes, before, atol=1e-2)


@pytest.mark.parametrize("user_semantics", ["mean", "texts"])
def test_nothing_outside_training_is_seen(tiny_bert: str, make_data: MakeData, user_semantics: str) -> None:
    """Other validation and test items, or with one prefix per user other last training items: the same neighbours."""
    found = []
    for change in (None, "evaluation", "last"):
        data = make_data(**SIZES["ids"])
        split = data.split
        if change == "evaluation":
            split.items[split.stages > 0] = (split.items[split.stages > 0] + 3) % 16
        if change == "last":
            last = split.offsets[:-1] + [len(split.training_history(user)) - 1 for user in range(split.users)]
            split.items[last] = (split.items[last] + 3) % 16
        found.append([made(tiny_bert, data, user_semantics=user_semantics, prefixes=most) for most in (None, 1)])
    (every, longest), evaluation, last = found
    for model, other in ((every, evaluation[0]), (longest, evaluation[1]), (longest, last[1])):
        assert torch.equal(model.prefix_vectors, other.prefix_vectors)
        assert torch.equal(model.prefix_neighbours, other.prefix_neighbours)
        assert np.array_equal(model.item_neighbours, other.item_neighbours)
        assert all(map(np.array_equal, model.histories, other.histories))
    assert len(longest.histories) == 40
    assert (every.prefix_neighbours >= 0).all()


@pytest.mark.parametrize("positives", ["others", "own", "own_without_target", "all"])
@pytest.mark.parametrize("bank", [False, True])
def test_every_arm_trains(tiny_bert: str, data: RecDataModule, positives: str, bank: bool) -> None:
    """Its neighbours are whose they should be, and its loss has a gradient."""
    model = made(tiny_bert, data, positives=positives, bank=bank)
    if bank:
        model.refresh_bank()
    batch = first_batch(data)
    rows = model.taking_part(batch)
    split = data.split
    prefixes = training_prefixes(split, shuffled_ties=False)
    neighbours = model.prefix_neighbours[model.prefix_of_target[batch.target_positions[rows]]]
    own, contains = set(), set()
    for row, found in zip(rows.tolist(), neighbours.tolist(), strict=True):
        position = int(batch.target_positions[row])
        for prefix in (prefix for prefix in found if prefix >= 0):
            own.add(bool(prefixes.user[prefix] == split.user_of_interaction[position]))
            if prefixes.user[prefix] == split.user_of_interaction[position]:
                contains.add(split.items[position] in prefixes.histories()[prefix])
    assert own == {"others": {False}, "all": {False, True}}.get(positives, {True})
    assert contains == {"others": set(), "own_without_target": {False}}.get(positives, {False, True})
    loss, parts = model.loss(model(batch), batch)
    loss.backward()
    assert float(parts["inter_user"].detach()) > 0
    assert all(parameter.grad is not None for parameter in model.parameters())


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
    assert hasattr(model, "synthesizer") == hasattr(model, "states_of_prefixes") == inter
    assert hasattr(model, "item_neighbours") == (not inter)
    batch = first_batch(data)
    states = model(batch)
    before = model.seen.tokens
    _, parts = model.loss(states, batch)
    assert set(parts) == {"next_item", *(("inter_user", "inter_user_anchors") if inter else ("intra_user",))}
    if inter:
        assert float(parts["inter_user_anchors"]) == len(batch.targets) > 0
    assert (model.seen.tokens == before) == inter  # the bank reads nothing in a step, views do


def test_mistakes_are_refused(tiny_bert: str, data: RecDataModule) -> None:
    """No encoder of texts, and sizes that cannot work."""
    with pytest.raises(InputError, match="semantics"):
        prepare(SRACL(IdEncoders(dim=16)), data)
    cases: dict[str, dict[str, Any]] = {
        "neighbours": {"neighbours": 0},
        "temperature": {"temperature": 0.0},
        "share": {"share": 1.5},
        "anchors": {"anchors": 0},
        "prefixes": {"prefixes": 0},
    }
    for words, changes in cases.items():
        with pytest.raises(InputError, match=words):
            made(tiny_bert, data, **changes)


@pytest.mark.parametrize(
    ("training", "options", "message"),
    [
        ("aaa", {"alpha": 0.0}, r"Expected at least two training items to find neighbours among, got 1"),
        ("a", {"beta": 0.0}, r"Expected a training history of two items to find neighbours of, got none"),
        ("abcd", {}, r"two items of different timestamps, since data\.shuffle_ties is true to find neighbours of, got"),
    ],
    ids=["one item", "one interaction", "one timestamp"],
)
def test_data_without_neighbours_are_refused(
    training: str, options: dict[str, float], message: str, tiny_bert: str, tmp_path: Path
) -> None:
    """Instead of an error within a step."""
    tied = "timestamps" in message
    rows = [
        f"{user},{item},{time if time >= len(training) or not tied else 0}"
        for user in range(4)
        for time, item in enumerate(training + "xy")
    ]
    (tmp_path / "interactions.csv").write_text("user_id,item_id,timestamp\n" + "\n".join(rows))
    (tmp_path / "items.csv").write_text("item_id,title\n" + "\n".join(f"{item},film {item}" for item in "abcdxy"))
    files = {name: tmp_path / f"{name}.csv" for name in ("interactions", "items")}
    with pytest.raises(InputError, match=message):
        made(tiny_bert, RecDataModule(**files, k_core=0, shuffle_ties=tied), **options)


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


@pytest.mark.parametrize("bank", [False, True])
def test_a_trained_run_finds_no_neighbours(
    bank: bool, tiny_bert: str, tiny_data: tuple[Path, Path], small: list[str], anyo: Anyo, tmp_path: Path
) -> None:
    """Nor needs the language model that they were found by: tested and asked again, it says the same without it."""
    semantics, run = tmp_path / "semantics", RunFolder(tmp_path / "run")
    shutil.copytree(tiny_bert, semantics)
    options = [f"--model.semantics.name={semantics}", "--model.encoders.dim=16", f"--model.bank={str(bank).lower()}"]
    anyo("fit", f"--config={CONFIGS / 'sracl_paper'}.yaml", *small, *options, f"--run={run.path}")
    asked = ["recommend", f"--run={run.path}", "--like=GoldenEye (1995)", "--k=3"]
    figures, lists = run.read_metrics()["metrics"], anyo(*asked)
    shutil.rmtree(semantics)
    anyo("test", f"--run={run.path}", "--trainer.enable_progress_bar=false")
    again = run.read_metrics()["metrics"]
    assert {name: figure for name, figure in again.items() if "seconds" not in name} == {
        name: figure for name, figure in figures.items() if "seconds" not in name
    }
    assert anyo(*asked) == lists
    with pytest.raises(SystemExit):  # training goes on with neighbours alone
        anyo("fit", f"--run={run.path}", "--trainer.max_epochs=2")


def test_a_checkpoint_of_another_kind_is_refused(tiny_bert: str, data: RecDataModule) -> None:
    """Where a run is tested by a checkpoint that lacks the synthesizer or the bank: with a sentence."""
    others = {
        "got no .*synthesizer": made(tiny_bert, data, alpha=0.0),
        "got no states_of_prefixes": made(tiny_bert, data, bank=False),
        "of model SRACL, got SASRec": prepare(SASRec(IdEncoders(dim=16)), data),
    }
    for message, other in others.items():
        checkpoint: dict[str, Any] = {"state_dict": other.state_dict()}
        other.on_save_checkpoint(checkpoint)
        model = SRACL(IdEncoders(dim=16), semantics=LLM(tiny_bert, dtype="float32"))
        prepare(model, data, saved=checkpoint["state_dict"])
        load = model.on_load_checkpoint if isinstance(other, SASRec) else model.load_state_dict
        with pytest.raises(InputError, match=message):
            load(checkpoint if isinstance(other, SASRec) else checkpoint["state_dict"])


def test_a_run_with_a_bank_starts_from_one_without(tiny_bert: str, make_data: MakeData, tmp_path: Path) -> None:
    """And the other way round: the bank is filled at the start of each epoch, and costs no trained token."""
    make = variant("ids", "", tiny_bert)
    for bank in (False, True):
        folder = tmp_path / str(bank)
        fit(make(bank=bank), make_data(**SIZES["ids"]), folder, epochs=1)
        saved = weights(RunFolder(folder).best_checkpoint)
        started = prepare(make(bank=not bank, init_from=folder), make_data(**SIZES["ids"]))
        assert differing(started.state_dict(), saved) == {"states_of_prefixes"}
        if not bank:
            started.refresh_bank()
            assert bool(started.states_of_prefixes.any())
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
    bank = weights(saved)["states_of_prefixes"]
    found: list[Tensor] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            found.append(pl_module.states_of_prefixes.clone())

    model = make()
    fit(model, make_data(**SIZES["ids"]), tmp_path / "resumed", epochs=1, callbacks=[Watch()], ckpt_path=saved)
    assert found
    assert all(torch.equal(states, bank) for states in found)
    model.refresh_bank()
    assert not torch.allclose(model.states_of_prefixes, bank, atol=1e-3)


def test_one_batch_overfits(tiny_bert: str, data: RecDataModule) -> None:
    """All three parts of one batch's loss fall, the next-item loss to nearly nothing."""
    model = made(tiny_bert, data, dim=32, bank=False)
    # The tiny tokenizer's vocabulary differs between processes, and with it who is alike: neighbours are given here.
    prefixes, items = torch.arange(len(model.histories))[:, None], np.arange(data.split.catalogue_size)[:, None]
    model.prefix_neighbours.copy_((prefixes + torch.arange(1, 4)) % len(model.histories))
    model.item_neighbours = (items + np.arange(1, 4)) % data.split.catalogue_size
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    windows = data.train_dataloader().dataset
    batch = windows[[0, 1, 2, 3]]
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
