"""The contrast of two views of the histories before boundaries, over all processes; SRA-CL's mixture of states."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from anyo_lightning import distributed
from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.losses import info_nce


def contrast_views(
    first: Float[Tensor, "histories dim"],
    second: Float[Tensor, "histories dim"],
    *,
    identities: Int[Tensor, "histories kinds"] | None,
    temperature: float,
) -> Float[Tensor, ""]:
    """InfoNCE over the 2N views of all processes' N histories.

    Computes, as the mean over this process's views i, `-log( exp(z_i·z_j/τ) / Σ_{k not in F(i)} exp(z_i·z_k/τ) )`,
    with `z_j` the other view of i's history. F(i) holds i itself and the false negatives: the views of histories with
    which i's shares an identity. Negatives of other processes have gradients.

    Args:
        first: One view of each of this process's histories.
        second: The other.
        identities: Two histories are false negatives of each other if any column is equal, such as those of
            `same_history`; None leaves only i itself out.
        temperature: τ.

    Reference: Chen et al., SimCLR (arXiv 2002.05709), eq. 1; Xie et al., CL4SRec (arXiv 2010.14395), contrastive loss.
    """
    keys = torch.cat([distributed.gather_rows(view, with_gradient=True) for view in (first, second)])
    total = len(keys) // 2
    own, excluded = _own_and_excluded(len(first), total, identities, first.device)
    return info_nce(
        torch.cat([first, second]),
        keys,
        torch.cat([own + total, own]),
        temperature=temperature,
        excluded=excluded.repeat(2, 2),
    )


def contrast_weighted(
    first: Float[Tensor, "histories dim"],
    second: Float[Tensor, "histories dim"],
    *,
    identities: Int[Tensor, "histories kinds"] | None,
    temperature: float,
    weight: float,
) -> Float[Tensor, ""]:
    """InfoNCE of each history's first view against the second views of all, in which negatives' scores are weighted.

    Computes, as the mean over this process's histories i,
    `-log( exp(p_i·n_i/τ) / (exp(p_i·n_i/τ) + Σ_{j not in F(i)} exp(w·p_i·n_j/τ)) )`, F(i) as in `contrast_views`.

    Args:
        first: p, one view of each of this process's histories.
        second: n, the other.
        identities: As in `contrast_views`.
        temperature: τ.
        weight: w.
    """
    keys = distributed.gather_rows(second, with_gradient=True)
    own, excluded = _own_and_excluded(len(first), len(keys), identities, first.device)
    return info_nce(first, keys, own, temperature=temperature, excluded=excluded, negative_weight=weight)


def sampled(
    batch: HistoryBatch, rows: Int[Tensor, " rows"], anchors: int, *, random: torch.Generator
) -> Int[Tensor, " sampled"]:
    """Those of this process's rows that are in a sample, without replacement, of the rows of all processes.

    Each row of a step is as likely as any other, and a seed draws the same ones however they are shared out.

    Args:
        batch: This process's part of the step.
        rows: Some of its supervised boundaries.
        anchors: How many are wanted of all processes together; all of them are taken if they are fewer.
        random: On the CPU, in the same state on all processes.

    Returns:
        In the order given.
    """
    own = batch.on_cpu.target_positions[rows.cpu()]  # a boundary's name: its target's place in the data
    everyone = own if distributed.world_size() == 1 else distributed.gather_rows(own.to(batch.user.device)).cpu()
    if len(everyone) <= anchors:
        return rows
    drawn = everyone.sort().values[torch.randperm(len(everyone), generator=random)[:anchors]]
    return rows[torch.isin(own, drawn).to(rows.device)]


def prefixes(batch: HistoryBatch, rows: Int[Tensor, " rows"]) -> list[np.ndarray]:
    """The items that were read before each of these supervised boundaries, without its target: copies."""
    here = batch.on_cpu
    items = here.item_ids.cpu().numpy()
    places = zip(*(places[rows.cpu()].tolist() for places in map(Tensor.cpu, here.target_places)), strict=True)
    return [items[row, : column + 1].copy() for row, column in places]


def sizes_before(
    states: Float[Tensor, "targets dim"], batch: HistoryBatch, rows: Int[Tensor, " rows"]
) -> list[np.ndarray]:
    """For each boundary: the mean absolute value of the state at each item of its history; γ without attention.

    Args:
        states: The states at all items of the batch.
        batch: Its histories, each item of which is supervised.
        rows: The boundaries.
    """
    sizes = states.detach().abs().mean(1).cpu().numpy()
    columns = batch.on_cpu.target_places[1].cpu().numpy()
    return [sizes[row - columns[row] : row + 1] for row in rows.tolist()]


def same_history(batch: HistoryBatch) -> Int[Tensor, "histories kinds"]:
    """The user of each history and the target of its last supervised boundary."""
    return boundary_identities(batch)[batch.last_states]


def boundary_identities(batch: HistoryBatch) -> Int[Tensor, "targets kinds"]:
    """The user and the target of each supervised boundary."""
    return torch.stack([batch.user[batch.target_places[0]], batch.targets], dim=1)


def same_content(arrays: Sequence[np.ndarray]) -> Int[Tensor, "arrays 1"]:
    """A number for each array that two have in common when they hold the same integers: the same on all processes."""
    return torch.tensor([_number(values) for values in arrays], dtype=torch.long)[:, None]


def shared_identity(
    some: Int[Tensor, "some kinds"], others: Int[Tensor, "others kinds"]
) -> Bool[Tensor, "some others"]:
    """True for two histories that have an identity in common."""
    return (some[:, None] == others).any(2)


def _own_and_excluded(
    count: int, total: int, identities: Int[Tensor, "histories kinds"] | None, device: torch.device
) -> tuple[Int[Tensor, " histories"], Bool[Tensor, "histories all_histories"]]:
    """Where this process's histories are among all, and which of those are no negatives of each."""
    own = distributed.rows_before(count, device) + torch.arange(count, device=device)
    excluded = torch.arange(total, device=device) == own[:, None]
    if identities is not None:
        excluded |= shared_identity(identities, distributed.gather_rows(identities))
    return own, excluded


def _number(values: np.ndarray) -> int:
    """63 bits of a hash of an array."""
    digest = hashlib.blake2b(values.astype(np.int64).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Synthesizer(nn.Module):
    """`p_uj = softmax_j LeakyReLU(aᵀ [W x_u ‖ W x_j])`: the weight of each neighbour's state in a user's positive.

    The slope of the LeakyReLU is 0.2, that of the graph attention network whose form this is; the paper names none.

    Args:
        width: Width of the semantic vectors x.
        dim: Rows of W.
    """

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.map = nn.Linear(width, dim, bias=False)
        self.attention = nn.Parameter(torch.empty(2, dim))  # the two halves of a
        for weight in (self.map.weight, self.attention):
            nn.init.xavier_uniform_(weight)

    def forward(
        self,
        users: Float[Tensor, "users width"],
        neighbours: Float[Tensor, "users k width"],
        there: Bool[Tensor, "users k"],
    ) -> Float[Tensor, "users k"]:
        """The weights of each user's neighbours: they sum to one over those that are there."""
        own, others = self.map(users) @ self.attention[0], self.map(neighbours) @ self.attention[1]
        scores = F.leaky_relu(own[:, None] + others, 0.2)
        return scores.masked_fill(~there, -torch.inf).softmax(1)
