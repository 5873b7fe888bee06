"""What probes change: the order and the length of histories, and the texts of items.

Each change is made for one test pass and undone. Nothing is embedded or tokenised again, and no cache is written: a
shuffle of titles moves existing vectors and tokens. That is exact, since whitening does not depend on their order.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from anyo_lightning.data.batches import HistoryDataset
from anyo_lightning.encoders.base import HoldsTexts


def shuffled_order(dataset: HistoryDataset, *, seed: int) -> HistoryDataset:
    """The same items of each history in random order: those that are read, so that only their order changes.

    Args:
        dataset: Histories to evaluate.
        seed: Seed of the shuffle.
    """
    changed, items, random = copy.copy(dataset), dataset.items.copy(), np.random.default_rng(seed)
    spans = np.unique(np.stack([dataset.start, dataset.end]), axis=1)  # a user's targets share one history
    for start, end in spans.T:
        random.shuffle(items[start:end])
    changed.items = items
    return changed


def last_item_only(dataset: HistoryDataset) -> HistoryDataset:
    """Of each history its last item alone."""
    changed = copy.copy(dataset)
    changed.start = dataset.end - 1
    return changed


def parts_with_texts(encoder: nn.Module) -> list[HoldsTexts]:
    """The parts of an encoder that hold the items' texts, or vectors of them."""
    return [part for part in encoder.modules() if isinstance(part, HoldsTexts) and part.texts_in]


@contextmanager
def other_titles(encoder: nn.Module, text_of: np.ndarray) -> Iterator[None]:
    """Inside, an encoder has another item's text for each item: in vectors of texts, and in texts that it reads.

    Args:
        encoder: A history encoder or an item encoder.
        text_of: (catalogue,) the item whose text each item gets.
    """
    places = [(part, place) for part in parts_with_texts(encoder) if (place := part.texts_in)]
    before = [getattr(module, place) for module, place in places]
    try:
        for (module, place), titles in zip(places, before, strict=True):
            of_others = titles[torch.from_numpy(text_of)] if isinstance(titles, Tensor) else titles.of_items(text_of)
            setattr(module, place, of_others)
        yield
    finally:
        for (module, place), titles in zip(places, before, strict=True):
            setattr(module, place, titles)
