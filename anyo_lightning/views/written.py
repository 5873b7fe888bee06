"""Written views as a history encoder reads them: the tokens of their texts, found by user and history."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.llm.language_model import LLM
from anyo_lightning.views.prompts import Kind
from anyo_lightning.views.store import read_views, read_views_cost, views_file


@dataclass(frozen=True)
class TokenisedView:
    """A written view, ready to be read.

    Attributes:
        items: (items,) what it was written from.
        spans: The tokens of each of its texts, which end in the separator.
    """

    items: np.ndarray
    spans: list[np.ndarray]


class WrittenViews:
    """The written views of one kind.

    Args:
        views: The views of each user.
        digest: Hash of the file that they come from.
        cost: Seconds and tokens that they took to write, where known.
    """

    def __init__(
        self, views: dict[int, list[TokenisedView]], *, digest: str, cost: dict[str, float] | None = None
    ) -> None:
        self.views, self.digest, self.cost = views, digest, cost or {}

    @classmethod
    def read(cls, file: Path | None, *, kind: Kind, data: RecDataModule, reader: LLM) -> "WrittenViews":
        """Read and tokenise the views of a data module's split.

        Args:
            file: Parquet file; None takes the one that `anyo augment` writes by default.
            kind: What the views are.
            data: Set up, with tokens.
            reader: The LLM that will read them.

        Raises:
            InputError: When there are no views of this kind and split.
        """
        assert data.tokens is not None
        tokens = data.tokens
        file = views_file(kind, data.split) if file is None else file
        read = read_views(file, kind=kind, split=data.split)
        texts = list({text for views in read.values() for view in views for text in view.texts if text is not None})
        limit = data.max_item_tokens if kind == "rewrite" else data.max_tokens
        token_ids = reader.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        spans: dict[str, np.ndarray] = {
            text: np.array([*ids[: limit - 1], tokens.separator], dtype=np.int32)
            for text, ids in zip(texts, token_ids, strict=True)
        }

        def span(item: int, text: str | None) -> np.ndarray:
            return tokens.span(item) if text is None else spans[text]

        return cls(
            {
                user: [
                    TokenisedView(view.items, list(map(span, view.items, view.texts)))  # as many as there are texts
                    for view in views
                ]
                for user, views in read.items()
            },
            digest=hashlib.sha256(file.read_bytes()).hexdigest()[:16],
            cost=read_views_cost(file),
        )

    def find(self, user: int, items: np.ndarray, target: int) -> TokenisedView | None:
        """The user's view that shares most with a history: at least half of the view's items are in the history.

        No view that was written from the target is returned: it would know what the state is trained to predict. With
        `data.shuffle_ties` a view may have seen items that share the target's timestamp.

        Args:
            user: The user.
            items: The history read.
            target: The item that follows it.
        """
        best, most = None, 0
        for view in self.views.get(user, ()):
            shared = int(np.isin(view.items, items).sum())
            if shared > most and 2 * shared >= len(view.items) and target not in view.items:
                best, most = view, shared
        return best
