"""Semantic neighbours: which prefixes of training histories and which items have similar texts.

A prefix is what comes before a training target, so its vector does not know that target. But the user's longer
prefixes contain it, and SRA-CL's released code takes neighbours from all: `Positives` says which are used.

Reference: Cui et al., SRA-CL, NeurIPS 2025 (arXiv 2503.04162), sections 3.2 and 3.3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.data.splits import MISSING, Split
from anyo_lightning.errors import InputError
from anyo_lightning.llm.backbone import Backbone
from anyo_lightning.llm.text_vectors import Pooling, frozen_vectors

UserSemantics = Literal["mean", "texts"]
Positives = Literal["others", "own", "own_without_target", "all"]
PROFILE_TOKENS = 256  # MiniLM's training length; texts are newest first, so that a cut drops the oldest items
MOST_SCORES = 2**27  # at a time: half a GiB


@dataclass(frozen=True)
class Prefixes:
    """Prefixes of training histories, user by user, shortest first: `items[start:end]`, whose target is at `end`."""

    items: Int[np.ndarray, " interactions"]  # the split's
    user: Int[np.ndarray, " prefixes"]
    start: Int[np.ndarray, " prefixes"]  # positions in `items`
    end: Int[np.ndarray, " prefixes"]
    first_seen: Int[np.ndarray, " prefixes"]  # the first position of the target's item in the user's history

    def __len__(self) -> int:
        """The number of prefixes."""
        return len(self.end)

    def histories(self) -> list[np.ndarray]:
        """The items of each prefix, oldest first; views: do not write into them."""
        return [self.items[start:end] for start, end in zip(self.start, self.end, strict=True)]

    def of_targets(self) -> Int[np.ndarray, " interactions"]:
        """For each interaction, the prefix whose target it is; -1 where there is none."""
        found = np.full(len(self.items), MISSING, dtype=np.int64)
        found[self.end] = np.arange(len(self))
        return found


def training_prefixes(split: Split, *, shuffled_ties: bool, most: int | None = None) -> Prefixes:
    """The prefixes before each training item of a history but the first.

    Where training items of one timestamp change places between epochs (`data.shuffle_ties`), prefixes end only where
    a timestamp begins, so that they hold the same items in every epoch; the target is then any item of that timestamp.

    Args:
        split: The split; only interactions of stage 0 are used.
        shuffled_ties: Whether they change places.
        most: Prefixes per user at most, evenly spaced, the longest among them; None takes all.

    Raises:
        InputError: There is none.
    """
    users, starts, ends, seen = [], [], [], []
    for user in range(split.users):
        items, start = split.training_history(user), int(split.offsets[user])
        _, first, which = np.unique(items, return_index=True, return_inverse=True)
        bounds = np.arange(len(items))
        if shuffled_ties and len(items):
            times = split.timestamps[start : start + len(items)]
            bounds = np.flatnonzero(np.append(True, times[1:] != times[:-1]))
        if len(bounds) < 2:
            continue
        first_seen = np.minimum.reduceat(first[which], bounds)[1:]
        bounds = bounds[1:]
        if most is not None and len(bounds) > most:
            chosen = np.sort(len(bounds) - 1 - np.arange(most) * len(bounds) // most)
            bounds, first_seen = bounds[chosen], first_seen[chosen]
        users.append(np.full(len(bounds), user))
        starts.append(np.full(len(bounds), start))
        ends.append(start + bounds)
        seen.append(start + first_seen)
    if not users:
        ties = " of different timestamps, since data.shuffle_ties is true" if shuffled_ties else ""
        raise InputError(f"Expected a training history of two items{ties} to find neighbours of, got none")
    columns = [np.concatenate([np.empty(0, dtype=np.int64), *found]) for found in (users, starts, ends, seen)]
    return Prefixes(split.items, *columns)


def similar_prefixes(
    prefixes: Prefixes, vectors: Float[Tensor, "prefixes width"], positives: Positives, *, k: int
) -> Int[np.ndarray, "prefixes k"]:
    """For each prefix the k most similar of those that may be its positives, best first; never itself.

    Args:
        prefixes: The prefixes.
        vectors: Their semantic vectors.
        positives: Whose prefixes: of `others`; the user's `own`, of which the longer ones contain the target;
            `own_without_target`, those that do not; or `all`, as in SRA-CL's code.
        k: Neighbours per prefix.

    Returns:
        Numbers of prefixes; -1 at the end if there are fewer than k.
    """
    everyone = np.arange(len(prefixes))
    if positives in ("others", "all"):
        return nearest(vectors, everyone, k=k, groups=prefixes.user if positives == "others" else None)
    unit = F.normalize(vectors.float(), dim=1).cpu()
    found = np.full((len(prefixes), k), MISSING, dtype=np.int64)
    bounds = np.append(np.flatnonzero(np.diff(prefixes.user, prepend=MISSING)), len(prefixes))
    for start, end in pairwise(bounds):
        scores = unit[start:end] @ unit[start:end].T
        scores.fill_diagonal_(-torch.inf)
        if positives == "own_without_target":
            contains = prefixes.end[start:end] > prefixes.first_seen[start:end, None]
            scores[torch.from_numpy(contains)] = -torch.inf
        best, places = scores.topk(min(k, end - start), dim=1)
        found[start:end, : best.shape[1]] = torch.where(best > -torch.inf, places + start, MISSING).numpy()
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


def mean_vectors(prefixes: Prefixes, vectors: Float[Tensor, "catalogue width"]) -> Float[Tensor, "prefixes width"]:
    """The mean of each prefix's item vectors, of unit length.

    Args:
        prefixes: The prefixes.
        vectors: The items' vectors.
    """
    found = torch.zeros(len(prefixes), vectors.shape[1])
    bounds = np.append(np.flatnonzero(np.diff(prefixes.user, prepend=MISSING)), len(prefixes))
    for first, last in zip(bounds[:-1], bounds[1:] - 1, strict=True):
        start = prefixes.start[first]
        items = torch.from_numpy(prefixes.items[start : prefixes.end[last]].astype(np.int64))
        sums = vectors[items].double().cumsum(0)
        found[first : last + 1] = sums[torch.from_numpy(prefixes.end[first : last + 1] - start - 1)].float()
    return F.normalize(found, dim=1)


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
    vectors: Float[Tensor, "rows width"],
    candidates: Int[np.ndarray, " candidates"],
    *,
    k: int,
    groups: Int[np.ndarray, " rows"] | None = None,
) -> Int[np.ndarray, "rows k"]:
    """For each row the k candidates of the highest cosine, best first, its own group left out; exact.

    Args:
        vectors: One per row.
        candidates: The rows that may be neighbours.
        k: Neighbours per row.
        groups: The group of each row, counted from 0; None leaves out the row itself alone.

    Returns:
        Row numbers; -1 at the end if there are fewer than k other candidates.

    Raises:
        InputError: A vector is not finite, or there is no other candidate.
    """
    if k < 1:  # of the number of training items, less the row itself
        raise InputError(f"Expected at least two training items to find neighbours among, got {len(candidates)}")
    unit = F.normalize(vectors.float(), dim=1).cpu().numpy()  # whose products are float32 whatever torch is set to
    if not np.isfinite(unit).all():
        raise InputError("Expected finite vectors to find neighbours by, got NaN or infinity among them")
    found = np.full((len(unit), k), MISSING, dtype=np.int64)
    groups = np.arange(len(unit)) if groups is None else groups
    keys, by_group = unit[candidates], np.argsort(groups[candidates], kind="stable")
    sorted_groups = groups[candidates][by_group]
    rows = max(1, MOST_SCORES // max(1, len(candidates)))
    for start in range(0, len(unit), rows):
        block = slice(start, start + rows)
        scores = torch.from_numpy(unit[block] @ keys.T)
        first, last = (np.searchsorted(sorted_groups, groups[block], side) for side in ("left", "right"))
        for row in np.flatnonzero(last > first):
            scores[row, by_group[first[row] : last[row]]] = -torch.inf
        best, places = scores.topk(min(k, len(candidates)), dim=1)
        found[block, : best.shape[1]] = np.where(best > -torch.inf, candidates[places], MISSING)
    return found
