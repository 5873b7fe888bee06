"""Losses: tensors in, a scalar out. Knows no Lightning and no transformers."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 2**22  # 16 MiB in float32, about what a core's caches hold
CHUNK_LOGITS_ON_GPU = 2**26  # 256 MiB: many rows per product, also over a vocabulary
# From torch 2.13 on; without it the backward pass computes each chunk's logits again: four products instead of three.
FUSED = hasattr(F, "linear_cross_entropy") and hasattr(nn, "LinearCrossEntropyOptions")


def full_softmax(
    states: Float[Tensor, "targets dim"],
    vectors: Float[Tensor, "items dim"],
    targets: Int[Tensor, " targets"],
    *,
    excluded: tuple[Bool[Tensor, "histories items"], Int[Tensor, " targets"]] | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy over all items, without holding all logits at once.

    Computes `-1/T Σ_t log( exp(s_t·v_{y_t}) / Σ_j exp(s_t·v_j) )`, j over all items or those that are not excluded. For
    one state (1, 0), vectors (1, 0) and (0, 1) and target 0 this is `-log(e / (e + 1)) = 0.3133`.

    Products run in the states' precision; the sum is in float32 at least.

    Args:
        states: One state per supervised boundary.
        vectors: The vectors of all candidate items.
        targets: For each state, the row of its target in `vectors`.
        excluded: For each history, True at items that are no candidates, and for each state its history. The target
            stays in any case. Takes about twice the time, without torch's kernel.

    Returns:
        The mean over targets; 0 (with zero gradients) when there are none.

    Reference: E4SRec (arXiv 2312.02443), eq. 6; `torch.nn.functional.linear_cross_entropy`.
    """
    rows = max(64, (CHUNK_LOGITS if states.device.type == "cpu" else CHUNK_LOGITS_ON_GPU) // len(vectors))
    # torch's own gives the sum in the states' precision
    fused = FUSED and excluded is None and states.dtype not in (torch.bfloat16, torch.float16)
    total = _fused(states, vectors, targets, rows) if fused else _recomputed(states, vectors, targets, rows, excluded)
    return total / max(len(targets), 1)


def sampled_softmax(
    states: Float[Tensor, "targets dim"],
    target_vectors: Float[Tensor, "targets dim"],
    negative_vectors: Float[Tensor, "negatives dim"],
    *,
    accidental: Bool[Tensor, "targets negatives"],
    log_expected: Float[Tensor, " negatives"],
) -> Float[Tensor, ""]:
    """Cross-entropy of the target against negatives that all rows share, corrected for how they were sampled.

    Computes `-1/T Σ_t log( exp(s_t·v_{y_t}) / (exp(s_t·v_{y_t}) + Σ_{j not y_t} exp(s_t·v_j - log E_j)) )`, where `E_j`
    is the expected count of item j in the sample. The sum over negatives is then an unbiased estimate of the sum over
    the catalogue (but for what is left out), and it is that sum when every item is certain to be drawn (`E_j = 1`): the
    full softmax. The target is always there, so its own logit is not corrected.

    Args:
        states: One state per supervised boundary.
        target_vectors: The vector of each state's target.
        negative_vectors: The vectors of the sampled items.
        accidental: True where a sampled item is left out of the row's sum: its target, and what is no negative of it.
        log_expected: Log of the expected count of each sampled item.

    Returns:
        The mean over targets; 0 (with zero gradients) when there are none.

    Reference: Bengio and Senécal, Adaptive importance sampling, 2008; Yi et al., RecSys 2019 (logQ), eq. 3–5.
    """
    positive = (states * target_vectors).sum(1, keepdim=True)
    negative = states @ negative_vectors.T - log_expected
    logits = torch.cat([positive, negative.masked_fill(accidental, -torch.inf)], dim=1)
    return (logits.logsumexp(1) - positive[:, 0]).sum() / max(len(states), 1)


def info_nce(
    queries: Float[Tensor, "queries dim"],
    keys: Float[Tensor, "keys dim"],
    positive: Int[Tensor, " queries"],
    *,
    temperature: float | Float[Tensor, ""] = 1.0,
    excluded: Bool[Tensor, "queries keys"] | None = None,
    log_expected: Float[Tensor, " keys"] | None = None,
    negative_weight: float = 1.0,
) -> Float[Tensor, ""]:
    """Cross-entropy of each query's positive key against all other keys.

    Computes `-1/N Σ_i log( exp(q_i·k_{p_i}/τ) / (exp(q_i·k_{p_i}/τ) + Σ_{j not p_i} exp(w·q_i·k_j/τ - log E_j)) )`, the
    sum without excluded keys, w = 1 by default. For one query (1, 0), keys (1, 0) and (0, 1), positive 0 and τ = 1 this
    is `-log(e / (e + 1)) = 0.3133`. Inner products: normalise before for cosines.

    Args:
        queries: One per row.
        keys: Positives and negatives of all queries together; each query takes all others as negatives.
        positive: For each query, the row of its positive among the keys.
        temperature: τ.
        excluded: True where a key is no negative of a query: a false negative, or the query itself. The positive
            stays in any case.
        log_expected: Log of the expected count of each key among the negatives (logQ); the positive is not corrected.
        negative_weight: w, a factor of the negatives' scores.

    Returns:
        The mean over queries; 0 (with zero gradients) when there are none.

    Reference: van den Oord et al., CPC (arXiv 1807.03748), eq. 4; Yi et al., RecSys 2019 (logQ).
    """
    scores = queries @ keys.T / temperature
    logits = scores if negative_weight == 1 else negative_weight * scores
    if log_expected is not None:
        logits = logits - log_expected
    if excluded is not None:
        logits = logits.masked_fill(excluded, -torch.inf)
    own = scores.gather(1, positive[:, None])
    logits = logits.scatter(1, positive[:, None], own)
    return (logits.logsumexp(1) - own[:, 0]).sum() / max(len(queries), 1)


def bag_of_tokens(
    states: Float[Tensor, "states dim"],
    head: Float[Tensor, "vocabulary dim"],
    bags: Int[Tensor, "tokens 2"],
    weights: Float[Tensor, " tokens"],
) -> Float[Tensor, ""]:
    """Cross-entropy of sets of tokens, each predicted by one state.

    Computes `-Σ_n w_n log softmax(W e_{i_n})_{t_n}` over pairs (i_n, t_n) of state and token. One state (1, 0), head
    rows (1, 0) and (0, 1) and both tokens at weight 1/2 give `(0.3133 + 1.3133) / 2 = 0.8133`.

    Args:
        states: e.
        head: W, the language model's output embeddings; the product runs in their precision.
        bags: Pairs of a state's row and a token, one pair per row.
        weights: Weight of each pair.

    Returns:
        The weighted sum.

    Reference: Llama2Vec (arXiv 2312.15503), section 3.2; there w = 1/|T|, and t ranges over the distinct tokens of T.
    """
    logits = (states.to(head.dtype) @ head.T).float()
    row, token = bags.T
    return (weights * (logits.logsumexp(1)[row] - logits[row, token])).sum()


def inclusion_probabilities(weights: Float[Tensor, " items"], count: int) -> Float[Tensor, " items"]:
    """Probabilities `min(1, c·w_i)` that sum to `count`: each item's chance to be in a sample of `count` items.

    Args:
        weights: Non-negative sampling weights.
        count: Size of the sample.

    Returns:
        In float64; all ones when `count` is at least the number of items of positive weight.
    """
    weights = weights.double()
    certain = torch.zeros_like(weights, dtype=torch.bool)
    if count >= int((weights > 0).sum()):
        return (weights > 0).double()
    while True:
        rest = torch.where(certain, 0.0, weights)
        probabilities = torch.where(certain, 1.0, rest * (count - int(certain.sum())) / rest.sum())
        above = (probabilities > 1) & ~certain
        if not above.any():
            return probabilities
        certain |= above


def systematic_sample(
    probabilities: Float[Tensor, " items"], *, generator: torch.Generator | None = None
) -> Int[Tensor, " negatives"]:
    """Distinct items, each with exactly its probability (which therefore is its expected count).

    The items are laid in random order on a line, each as long as its probability, and taken where the points
    `u, u+1, u+2, …` fall, with `u` uniform in [0, 1).

    Args:
        probabilities: Chances of inclusion, at most 1, with an integer sum.
        generator: Source of randomness.

    Returns:
        As many items as the probabilities sum to.

    Reference: Madow, On the theory of systematic sampling II, 1949.
    """
    order = torch.randperm(len(probabilities), generator=generator)
    ends = probabilities.double().cpu()[order].cumsum(0)
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    points = offset + torch.arange(round(float(ends[-1])), dtype=torch.float64)
    # The last point lies below the sum of probabilities, except for rounding: clamp.
    taken: Tensor = order[torch.searchsorted(ends, points, right=True).clamp(max=len(order) - 1)]
    return taken.sort().values


def _fused(states: Tensor, vectors: Tensor, targets: Tensor, rows: int) -> Float[Tensor, ""]:
    """The sum over targets by torch's own chunks of rows."""
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None)
    return F.linear_cross_entropy(states, vectors, targets, reduction="sum", options=options)


def _recomputed(
    states: Tensor, vectors: Tensor, targets: Tensor, rows: int, excluded: tuple[Tensor, Tensor] | None
) -> Float[Tensor, ""]:
    """The same sum, holding the logits of one chunk of rows at a time, in the forward and in the backward pass."""
    total = states.new_zeros((), dtype=torch.promote_types(states.dtype, torch.float32))
    of_histories, histories = (None, targets) if excluded is None else excluded
    # without targets one part, empty
    parts = zip(*(torch.split(of_targets, rows) for of_targets in (states, targets, histories)), strict=True)
    for part in parts:
        inputs = vectors, of_histories, *part
        total = total + checkpoint(_chunk_loss, *inputs, use_reentrant=False, preserve_rng_state=False)
    return total


def _chunk_loss(
    vectors: Tensor, excluded: Tensor | None, states: Tensor, targets: Tensor, histories: Tensor
) -> Float[Tensor, ""]:
    with torch.autocast(states.device.type, enabled=False):  # torch's kernel takes no notice of it either
        logits = states @ vectors.T
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if excluded is not None:
            wrong = excluded[histories].scatter(1, targets[:, None], False)
            logits = logits.masked_fill_(wrong, -torch.inf)  # of the product, which does not need it any more
        return F.cross_entropy(logits, targets, reduction="sum")
