"""Semantic neighbours: which users and items have similar texts, from the training split alone.

A user's vector must not know the target of the state that it is used with. That state is a user's last supervised
boundary, whose target is the last training item. So a user is his training history without that item, and without
every item that takes its place in some epoch (`data.shuffle_ties`). There is one vector per user and none per prefix,
so that no user finds his own prefixes, which contain his targets: the leak of SRA-CL's released code.

Reference: Cui et al., SRA-CL, NeurIPS 2025 (arXiv 2503.04162), sections 3.2 and 3.3.
"""

from collections.abc import Sequence
from typing import Literal

import faiss
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.data.splits import MISSING, Split
from anyo_lightning.llm.backbone import Backbone
from anyo_lightning.llm.text_vectors import Pooling, frozen_vectors

UserSemantics = Literal["mean", "texts"]
PROFILE_TOKENS = 256  # MiniLM's training length; texts are newest first, so that a cut drops the oldest items


def semantic_histories(split: Split, *, shuffled_ties: bool) -> list[np.ndarray]:
    """What represents each user: the training history without any item that may be its last one; copies.

    Args:
        split: The split; only interactions of stage 0 are used.
        shuffled_ties: Whether training items of one timestamp change places between epochs.

    Returns:
        Item ids of each user, oldest first; empty where nothing is left.
    """
    found = []
    for user in range(split.users):
        items = split.training_history(user)
        kept = max(len(items) - 1, 0)
        if shuffled_ties and len(items):
            times = split.timestamps[split.offsets[user] : split.offsets[user] + len(items)]
            kept = int(np.argmax(times == times[-1]))
        found.append(items[:kept].copy())
    return found


def semantic_item_vectors(
    backbone: Backbone, data: RecDataModule, *, pooling: Pooling
) -> Float[Tensor, "catalogue width"]:
    """The frozen backbone's vectors of the catalogue's texts (LoRA off), centred, of unit length; cached.

    Centred, since the texts of one catalogue share a direction that makes all of them similar. This removes hubs: on
    Amazon Beauty with MiniLM one user is a neighbour of 165 others instead of 940.

    Args:
        backbone: The encoder.
        data: The data module, set up.
        pooling: How a text's states become one vector.
    """
    vectors = frozen_vectors(backbone, data.split.item_texts, pooling=pooling, max_tokens=data.max_item_tokens)
    return F.normalize(vectors - vectors.mean(0), dim=1)


def mean_vectors(
    histories: Sequence[np.ndarray], vectors: Float[Tensor, "catalogue width"]
) -> Float[Tensor, "users width"]:
    """The mean of each history's item vectors, of unit length; zero for an empty history.

    Args:
        histories: Item ids of each user.
        vectors: The items' vectors.
    """
    lengths = torch.tensor([len(items) for items in histories])
    user = torch.repeat_interleave(torch.arange(len(histories)), lengths)
    items = torch.from_numpy(np.concatenate(histories).astype(np.int64))
    return F.normalize(torch.zeros(len(histories), vectors.shape[1]).index_add_(0, user, vectors[items]), dim=1)


def user_text_vectors(
    backbone: Backbone, texts: Sequence[str | None], *, pooling: Pooling
) -> Float[Tensor, "users width"]:
    """The frozen backbone's vectors of one text per user, centred, of unit length; zero without a text; cached.

    Args:
        backbone: The encoder.
        texts: What represents each user: the item texts of a history (`profile_texts`), or a summary of it.
        pooling: How a text's states become one vector.
    """
    there = torch.tensor([bool(text) for text in texts])
    found = frozen_vectors(backbone, [text for text in texts if text], pooling=pooling, max_tokens=PROFILE_TOKENS)
    vectors = torch.zeros(len(texts), backbone.hidden_size)
    vectors[there] = F.normalize(found - found.mean(0), dim=1)
    return vectors


def profile_texts(histories: Sequence[np.ndarray], item_texts: Sequence[str]) -> list[str | None]:
    """The texts of each history's items, newest first; None for an empty history.

    Args:
        histories: Item ids of each user, oldest first.
        item_texts: The catalogue's texts.
    """
    return ["; ".join(item_texts[item] for item in items[::-1]) or None for items in histories]


def nearest(
    vectors: Float[Tensor, "rows width"], candidates: Int[np.ndarray, " candidates"], *, k: int
) -> Int[np.ndarray, "rows k"]:
    """For each row the k candidates of the highest cosine, best first, itself left out (FAISS, exact).

    Args:
        vectors: One per row.
        candidates: The rows that may be neighbours.
        k: Neighbours per row.

    Returns:
        Row numbers; -1 at the end if there are fewer than k other candidates.
    """
    unit = F.normalize(vectors.float(), dim=1).cpu().numpy()
    found = np.full((len(unit), k), MISSING, dtype=np.int64)
    if not len(candidates):
        return found
    searched = min(k + 1, len(candidates))  # one more, since a candidate finds itself
    _, places = faiss.knn(unit, np.ascontiguousarray(unit[candidates]), searched, metric=faiss.METRIC_INNER_PRODUCT)
    others = candidates[places]
    # A row that is not among its own results (many equal vectors, or no candidate) gives up its last one instead.
    itself = others == np.arange(len(unit))[:, None]
    itself[:, -1] |= ~itself.any(axis=1) & (searched > k)
    rows, columns = np.nonzero(~itself)
    found[rows, (np.cumsum(~itself, axis=1) - 1)[rows, columns]] = others[rows, columns]
    return found
