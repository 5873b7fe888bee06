"""Losses against arithmetic by hand and float64 oracles."""

import math
import weakref
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from anyo_lightning import losses
from anyo_lightning.losses import (
    full_softmax,
    inclusion_probabilities,
    info_nce,
    sampled_softmax,
    systematic_sample,
)


def problem(targets: int = 7, items: int = 13, dim: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random states, vectors and targets in float64, with gradients."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(targets, dim, generator=generator, dtype=torch.float64, requires_grad=True)
    vectors = torch.randn(items, dim, generator=generator, dtype=torch.float64, requires_grad=True)
    return states, vectors, torch.randint(items, (targets,), generator=generator)


WAYS = [
    pytest.param(
        True, marks=pytest.mark.skipif(not losses.FUSED, reason="torch has linear_cross_entropy from 2.13 on")
    ),
    False,
]


@pytest.fixture(params=WAYS, ids=lambda fused: "fused" if fused else "recomputed")
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Each of the two ways to the full softmax: torch's kernel, and our chunks for a torch without it."""
    monkeypatch.setattr(losses, "FUSED", request.param)
    return request.param


def test_torch_kernel_is_used_where_it_is_there() -> None:
    """Chosen by what torch offers."""
    assert hasattr(F, "linear_cross_entropy") == losses.FUSED


@pytest.mark.usefixtures("way")
def test_full_softmax_by_hand() -> None:
    """State (1, 0), vectors (1, 0) and (0, 1), target 0: -log(e / (e + 1))."""
    loss = full_softmax(torch.tensor([[1.0, 0.0]]), torch.eye(2), torch.tensor([0]))
    assert float(loss) == pytest.approx(math.log(1 + 1 / math.e), abs=1e-6)


@pytest.mark.usefixtures("way")
def test_full_softmax_equals_cross_entropy() -> None:
    """Value and gradients equal those of the logits' cross-entropy."""
    states, vectors, targets = problem()
    loss = full_softmax(states, vectors, targets)
    gradients = torch.autograd.grad(loss, (states, vectors))
    expected = F.cross_entropy(states @ vectors.T, targets)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (states, vectors)))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("count", [1, 64, 65, 200])
def test_full_softmax_in_chunks_equals_cross_entropy(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One to four chunks, full or short: the same value and gradients, also of what lies before states and vectors."""
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 1)  # chunks of the smallest size, 64 targets
    states, vectors, targets = problem(targets=count)
    loss = full_softmax(2 * states, vectors.exp(), targets)
    expected = F.cross_entropy(2 * states @ vectors.exp().T, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(loss, (states, vectors)),
        torch.autograd.grad(expected, (states, vectors)),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.skipif(not losses.FUSED, reason="torch has linear_cross_entropy from 2.13 on")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("trained", ["both", "states", "vectors"])
def test_both_ways_to_the_full_softmax_agree(
    dtype: torch.dtype, mixed: bool, trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients to 1e-6, whichever side is trained, and also where the Trainer's precision is mixed."""
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 1)
    states, vectors, targets = problem(targets=200)
    found = []
    for fused in (True, False):
        monkeypatch.setattr(losses, "FUSED", fused)
        sides = [
            side.detach().to(dtype).requires_grad_(trained in ("both", name))
            for side, name in ((states, "states"), (vectors, "vectors"))
        ]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            loss = full_softmax(*sides, targets)
        loss.backward()
        assert [side.grad is not None for side in sides] == [side.requires_grad for side in sides]
        found.append([loss.detach(), *(side.grad for side in sides if side.grad is not None)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)


class Seen(TorchDispatchMode):
    """Notes the results of all operations, without keeping them."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.results: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.sizes.append(value.numel())
                self.results.append(weakref.ref(value))
        return result


def test_excluded_items_are_no_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradients are those of the logits with -inf at a history's excluded items; the target stays."""
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 1)  # chunks of 64 rows, the fewest
    states, vectors, targets = problem(targets=150)
    random = torch.Generator().manual_seed(1)
    excluded = torch.rand(3, 13, generator=random) < 0.5
    histories = torch.randint(3, (150,), generator=random)
    assert excluded[histories, targets].any()
    loss = full_softmax(states, vectors, targets, excluded=(excluded, histories))
    logits = []
    for state, target, history in zip(states, targets, histories, strict=True):
        row = [
            torch.dot(state, vector) if item == target or not excluded[history, item] else torch.tensor(-math.inf)
            for item, vector in enumerate(vectors)
        ]
        logits.append(torch.stack(row))
    expected = F.cross_entropy(torch.stack(logits), targets)
    torch.testing.assert_close(loss, expected)
    for found, wanted in zip(
        torch.autograd.grad(loss, (states, vectors)), torch.autograd.grad(expected, (states, vectors)), strict=True
    ):
        torch.testing.assert_close(found, wanted)
    nothing = torch.empty(0, dtype=torch.long)
    assert full_softmax(states[:0], vectors, nothing, excluded=(excluded, nothing)).item() == 0


def test_recomputed_chunks_never_hold_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither pass makes a tensor larger than one chunk's logits, and none of that size waits for the backward pass."""
    monkeypatch.setattr(losses, "FUSED", False)
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 1)
    states, vectors, targets = problem(targets=640, items=1000)
    with Seen() as seen:
        loss = full_softmax(states, vectors, targets)
        kept = [tensor.numel() for result in seen.results if (tensor := result()) is not None]
        loss.backward()
    assert max(kept, default=0) < 64 * 1000 == max(seen.sizes)


@pytest.mark.usefixtures("way")
def test_no_targets_give_zero() -> None:
    """A batch without targets has loss 0 and zero gradients, not NaN and not none: DDP waits for one of each."""
    states, vectors, _ = problem(targets=1)
    loss = full_softmax(states[:0], vectors, torch.empty(0, dtype=torch.long))
    assert loss.item() == 0
    gradients = torch.autograd.grad(loss, (states, vectors))
    assert [gradient.abs().sum().item() for gradient in gradients] == [0, 0]
    none = sampled_softmax(
        states[:0],
        vectors[:0],
        vectors,
        accidental=torch.zeros(0, 13, dtype=torch.bool),
        log_expected=torch.zeros(13, dtype=torch.float64),
    )
    assert none.item() == 0


def test_sampled_softmax_is_full_when_all_items_are_drawn() -> None:
    """Every item certain to be drawn: the same value and gradients."""
    states, vectors, targets = problem()
    drawn = torch.arange(13)
    loss = sampled_softmax(
        states,
        vectors[targets],
        vectors[drawn],
        accidental=targets[:, None] == drawn,
        log_expected=torch.zeros(13, dtype=torch.float64),
    )
    expected = F.cross_entropy(states @ vectors.T, targets)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, (states, vectors)), torch.autograd.grad(expected, (states, vectors))
    )


def test_sampled_softmax_by_hand() -> None:
    """Positive logit 2, negatives 1 (expected 0.5: corrected to 1 + log 2) and the target itself (masked)."""
    loss = sampled_softmax(
        torch.tensor([[1.0]]),
        torch.tensor([[2.0]]),
        torch.tensor([[1.0], [2.0]]),
        accidental=torch.tensor([[False, True]]),
        log_expected=torch.tensor([math.log(0.5), math.log(0.25)]),
    )
    assert float(loss) == pytest.approx(math.log(1 + 2 * math.e / math.e**2), abs=1e-6)


def test_sampled_sum_is_unbiased() -> None:
    """The mean over samples of Σ exp(s_j) / E_j is the sum over the catalogue, however often an item is drawn."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(20, generator=generator, dtype=torch.float64)
    probabilities = inclusion_probabilities(torch.arange(1, 21) ** 0.7, 6)
    sums = []
    for _ in range(4000):
        sample = systematic_sample(probabilities, generator=generator)
        sums.append((scores[sample].exp() / probabilities[sample]).sum())
    mean, error = torch.stack(sums).mean(), torch.stack(sums).std() / math.sqrt(4000)
    assert abs(mean - scores.exp().sum()) < 4 * error


def test_inclusion_probabilities_are_capped_and_sum_to_the_count() -> None:
    """Shares of 10: weights 100, 1, 1, 1, 1 and 3 draws: the first is certain, the others share 2."""
    probabilities = inclusion_probabilities(torch.tensor([100.0, 1, 1, 1, 1]), 3)
    assert probabilities.tolist() == pytest.approx([1, 0.5, 0.5, 0.5, 0.5])
    assert inclusion_probabilities(torch.tensor([2.0, 1, 0]), 5).tolist() == [1, 1, 0]


def test_sample_has_distinct_items_with_the_given_chances() -> None:
    """Always as many items as asked for, none twice; frequencies match within four standard errors."""
    generator = torch.Generator().manual_seed(1)
    probabilities = inclusion_probabilities(torch.arange(1, 31).double(), 8)
    counts = torch.zeros(30)
    for _ in range(3000):
        sample = systematic_sample(probabilities, generator=generator)
        assert len(sample.unique()) == len(sample) == 8
        counts[sample] += 1
    error = (probabilities * (1 - probabilities) / 3000).sqrt()
    assert ((counts / 3000 - probabilities).abs() <= 4 * error + 1e-12).all()


def test_info_nce_by_hand() -> None:
    """Query (1, 0), keys (1, 0) and (0, 1), temperature 0.5: -log(e² / (e² + 1))."""
    query, keys = torch.tensor([[1.0, 0.0]]), torch.eye(2)
    loss = info_nce(query, keys, torch.tensor([0]), temperature=0.5)
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-2)), abs=1e-6)
    excluded = torch.tensor([[True, True]])  # the positive stays in any case
    assert float(info_nce(query, keys, torch.tensor([0]), excluded=excluded)) == pytest.approx(0, abs=1e-7)


def test_info_nce_with_weighted_negatives_by_hand() -> None:
    """Query (1, 0), keys (1, 0) and (.8, .6), temperature .1, weight .5 of the negative: -log(e^10 / (e^10 + e^4))."""
    query, keys = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    options = {"temperature": 0.1, "negative_weight": 0.5}
    loss = info_nce(query, keys, torch.tensor([0]), **options)
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-6)), rel=1e-4)
    loss = info_nce(query, keys, torch.tensor([1]), **options)  # -log(e^8 / (e^8 + e^5))
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-3)), rel=1e-4)


def test_info_nce_over_all_items_is_the_full_softmax() -> None:
    """Keys are the catalogue, no key left out: the full softmax, its gradients too."""
    states, vectors, targets = problem()
    loss, expected = info_nce(states, vectors, targets), full_softmax(states, vectors, targets)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, (states, vectors)), torch.autograd.grad(expected, (states, vectors))
    )


def test_info_nce_with_log_q_is_the_sampled_softmax() -> None:
    """Targets first, then negatives: the logQ correction concerns the negatives alone."""
    states, vectors, targets = problem()
    negatives = torch.tensor([2, 5, 11])
    log_expected = torch.tensor([0.3, 0.1, 0.7], dtype=torch.float64).log()
    accidental = targets[:, None] == negatives
    expected = sampled_softmax(
        states, vectors[targets], vectors[negatives], accidental=accidental, log_expected=log_expected
    )
    keys = torch.cat([vectors[targets], vectors[negatives]])
    others = torch.ones(len(targets), len(targets), dtype=torch.bool)
    loss = info_nce(
        states,
        keys,
        torch.arange(len(targets)),
        excluded=torch.cat([others, accidental], dim=1),
        log_expected=torch.cat([torch.full((len(targets),), 9.0, dtype=torch.float64), log_expected]),
    )
    torch.testing.assert_close(loss, expected)


def test_info_nce_without_queries_is_zero() -> None:
    """No query: loss 0, not NaN."""
    assert info_nce(torch.zeros(0, 3), torch.eye(3), torch.zeros(0, dtype=torch.long)).item() == 0
