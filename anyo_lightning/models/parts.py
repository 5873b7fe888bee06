"""A batch that is read in parts, of which only one keeps its activations."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.encoders.recompute import recomputed

if TYPE_CHECKING:
    from anyo_lightning.models.encoding import EncodingModule

ONE_ITEM = [np.zeros(1, dtype=np.int64)]  # a history that is read only to take part in a pass


def states_in_parts(
    module: "EncodingModule", batch: HistoryBatch, cut: Sequence[np.ndarray], *, whole: bool
) -> Float[Tensor, "targets dim"]:
    """The states at a batch's supervised boundaries, in its order.

    Activations of parts are computed again in the backward pass, except those of the last part, whose backward pass
    comes first. A batch without histories (a process without a share of a step) has no states, but all trained weights
    have their place in its graph, and sharded ones their pass.

    Args:
        module: Built, on its device.
        batch: The batch.
        cut: The rows of each part; none where the batch has no histories.
        whole: Whether a batch keeps its activations, and processes need not make equally many passes.
    """
    if not len(batch.user):
        parts = [module.reading.collate(ONE_ITEM)]
    elif len(cut) == 1:  # as it is, in its own order
        cut, parts = [np.arange(len(batch.user))], [batch]
    else:
        parts = [batch.of_rows(rows) for rows in cut]
    if not whole:
        parts = module.as_many_passes(parts)
    found = []
    for number, part in enumerate(parts, start=1):
        here = part.to(module.device)
        if whole or (number == len(parts) and not module.reads_in_loss):
            found.append(module.history_encoder(here))
        else:
            found.append(recomputed(lambda _, here=here: module.history_encoder(here), here.item_ids))
    return torch.cat(found).index_select(0, batch.places_after(list(cut)).to(module.device, non_blocking=True))
