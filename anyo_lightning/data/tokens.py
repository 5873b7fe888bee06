"""Item texts, tokenised once: a flat, memory-mapped array of token ids and the span of each item."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from anyo_lightning.disk import folder_renamed_to, set_aside, text_sha256

Tokenize = Callable[[list[str]], list[list[int]]]
HIDDEN = "unknown"  # what a text encoder reads instead of an item that a view hides


@dataclass(frozen=True)
class ItemTokenStore:
    """The tokens of every item; each item's span ends in the separator token."""

    token_ids: np.ndarray  # (tokens of all items,) int32, memory-mapped
    offsets: np.ndarray  # (catalogue + 1,) int64
    separator: int
    hidden: np.ndarray  # the tokens of an item that a view hides

    def __getstate__(self) -> dict[str, Any]:
        """Of memory-mapped tokens only where they lie: pickled for a loader's worker, they would be copied."""
        state = dict(vars(self))
        if isinstance(self.token_ids, np.memmap) and not isinstance(self.token_ids.base, np.ndarray):  # the whole file
            state["token_ids"] = Path(str(self.token_ids.filename))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(place := state["token_ids"], Path):
            state = state | {"token_ids": np.load(place, mmap_mode="r")}
        vars(self).update(state)

    @property
    def lengths(self) -> np.ndarray:
        """(catalogue,) tokens of each item, its separator included."""
        return np.diff(self.offsets)

    def span(self, item_id: int) -> np.ndarray:
        """The tokens of an item."""
        return self.token_ids[self.offsets[item_id] : self.offsets[item_id + 1]]

    def of_items(self, item_ids: np.ndarray) -> "ItemTokenStore":
        """A store, in memory, in which the n-th item has the tokens of the n-th of these."""
        spans = [self.span(item) for item in item_ids]
        offsets = np.cumsum([0, *map(len, spans)], dtype=np.int64)
        return replace(self, token_ids=np.concatenate(spans), offsets=offsets)

    def joined(self, other: "ItemTokenStore") -> "ItemTokenStore":
        """A store, in memory, of these items and then those of another store of the same tokenizer."""
        offsets = np.concatenate([self.offsets, self.offsets[-1] + other.offsets[1:]])
        return replace(self, token_ids=np.concatenate([self.token_ids, other.token_ids]), offsets=offsets)

    @classmethod
    def build(
        cls, texts: Sequence[str], tokenize: Tokenize, *, separator: int, max_tokens: int, folder: Path, identity: str
    ) -> "ItemTokenStore":
        """Tokenise texts, or open what an earlier run has tokenised.

        Args:
            texts: The catalogue's texts.
            tokenize: Texts to token ids, without special tokens.
            separator: Token that ends each item.
            max_tokens: Most tokens per item, its separator included; the rest of the text is cut off.
            folder: Where stores are kept, one folder per content hash.
            identity: Name of the tokenizer, part of the hash.

        Returns:
            The store, memory-mapped.
        """
        key = json.dumps([identity, separator, max_tokens, list(texts)])
        place = folder / text_sha256(key)[:24]
        if place.is_dir() and not _is_whole(place):
            set_aside(place)
        if not place.is_dir():
            spans = [[*tokens[: max_tokens - 1], separator] for tokens in tokenize(list(texts))]
            with folder_renamed_to(place) as unfinished:
                np.save(unfinished / "token_ids.npy", np.concatenate([np.array(s, np.int32) for s in spans]))
                np.save(unfinished / "offsets.npy", np.cumsum([0, *map(len, spans)], dtype=np.int64))
        (hidden,) = tokenize([HIDDEN])
        return cls(
            np.load(place / "token_ids.npy", mmap_mode="r"),
            np.load(place / "offsets.npy"),
            separator,
            np.array([*hidden, separator], dtype=np.int32),
        )


def padded(rows: list[np.ndarray], padding: int) -> tuple[Int[Tensor, "rows tokens"], Int[Tensor, " rows"]]:
    """Rows of tokens as one tensor, padded on the right, and their lengths."""
    lengths = np.array([len(row) for row in rows])
    token_ids = np.full((len(rows), int(lengths.max())), padding, dtype=np.int64)
    token_ids[np.arange(token_ids.shape[1]) < lengths[:, None]] = np.concatenate(rows)
    return torch.from_numpy(token_ids), torch.from_numpy(lengths)


def _is_whole(place: Path) -> bool:
    """Whether the two files can be read and fit each other."""
    try:
        offsets = np.load(place / "offsets.npy")
        return len(np.load(place / "token_ids.npy", mmap_mode="r")) == int(offsets[-1])
    except Exception:  # numpy raises what the damaged header makes it stumble over
        return False
