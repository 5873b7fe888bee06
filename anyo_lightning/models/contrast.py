"""The contrast of two views of each history, over the histories of all processes, and SRA-CL's mixture of views."""

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
    count, start = len(first), distributed.rows_before(len(first), first.device)
    keys = torch.cat([distributed.gather_rows(view, with_gradient=True) for view in (first, second)])
    total = len(keys) // 2
    own = start + torch.arange(count, device=first.device)
    excluded = torch.arange(total, device=first.device) == own[:, None]
    if identities is not None:
        excluded |= shared_identity(identities, distributed.gather_rows(identities))
    return info_nce(
        torch.cat([first, second]),
        keys,
        torch.cat([own + total, own]),
        temperature=temperature,
        excluded=excluded.repeat(2, 2),
    )


def same_history(batch: HistoryBatch) -> Int[Tensor, "histories kinds"]:
    """The user of each history and the target of its last supervised boundary."""
    return boundary_identities(batch)[batch.last_states]


def boundary_identities(batch: HistoryBatch) -> Int[Tensor, "targets kinds"]:
    """The user and the target of each supervised boundary."""
    return torch.stack([batch.user[batch.target_places[0]], batch.targets], dim=1)


def shared_identity(
    some: Int[Tensor, "some kinds"], others: Int[Tensor, "others kinds"]
) -> Bool[Tensor, "some others"]:
    """True for two histories that have an identity in common."""
    return (some[:, None] == others).any(2)


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
