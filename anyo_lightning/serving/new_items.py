"""Items that a run has not seen, given by their texts: read, checked, and handed to the encoders."""

import re
import string
from collections.abc import Container
from dataclasses import dataclass

import polars as pl
from torch import nn

from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.data.item_texts import item_texts, title_texts
from anyo_lightning.data.schema import first_few
from anyo_lightning.encoders.base import TakesItems
from anyo_lightning.errors import InputError
from anyo_lightning.models.base import RetrievalModule


@dataclass(frozen=True)
class NewItems:
    """Ids, whole texts and titles of items, in one order."""

    item_ids: list[str]
    texts: list[str]
    titles: list[str]


def read(items: pl.DataFrame, *, template: str, taken: Container[str]) -> NewItems:
    """The items of a table, their texts by the template of the run's own catalogue.

    Args:
        items: `item_id`, and columns of the template; one that is missing is empty.
        template: The run's template.
        taken: Ids that there are already.

    Raises:
        InputError: There is no `item_id`, an id is taken or there twice, or an item has no text.
    """
    if "item_id" not in items.columns:
        raise InputError(f"Expected a column item_id for new items, got {', '.join(items.columns)}")
    ids = items["item_id"].cast(pl.String)
    if not len(ids) or ids.null_count():
        raise InputError(f"Expected an id for each new item, got {ids.null_count()} of {len(ids)} without")
    for what, bad in (
        ("that the catalogue has not", [item for item in ids if item in taken]),
        ("that differ", ids.filter(ids.is_duplicated()).unique(maintain_order=True).to_list()),
    ):
        if bad:
            raise InputError(f"Expected ids of new items {what}, got {len(bad)} others ({first_few(pl.Series(bad))})")
    fields = [name for _, name, _, _ in string.Formatter().parse(template) if name]
    columns = items.with_columns(pl.lit(None, pl.String).alias(name) for name in fields if name not in items.columns)
    texts = item_texts(columns, template)
    without = [item for item, text in zip(ids, texts, strict=True) if not re.search(r"\w", text)]
    if without:
        raise InputError(
            f"Expected a text for each new item, by the template {template!r} from the columns "
            f"{', '.join(items.columns)}, got {len(without)} of {len(ids)} without ({first_few(pl.Series(without))})"
        )
    titles = title_texts(columns, template)
    return NewItems(ids.to_list(), texts, [title or text for title, text in zip(titles, texts, strict=True)])


def add(model: RetrievalModule, items: NewItems, *, catalogue: RecDataModule) -> None:
    """Let a trained model encode further items and read them in histories; it cannot be trained afterwards.

    Args:
        model: Built, with trained weights.
        items: What it has not seen.
        catalogue: The data module on which it was trained: statistics of texts are those of its catalogue.

    Raises:
        InputError: The model does not know items by their texts; it is as it was, then.
    """
    if model.encoders is None:
        why = "is made of several runs" if model.runs_read() else "knows an item only by its interactions"
        raise InputError(
            f"Expected a run whose items are read as texts to add items by their texts, got {type(model).__name__}, "
            f"which {why}"
        )
    found = model.encoders.read_items(
        items.texts,
        items.titles if catalogue.titles_only else items.texts,
        data=catalogue,
        history_encoder=model.history_encoder,
        item_encoder=model.item_encoder,
        device=model.device,
    )
    for part in nn.ModuleList([model.history_encoder, model.item_encoder]).modules():  # one in both only once
        if isinstance(part, TakesItems):
            part.add_items(found)
    model.reading = model.reading.with_items(items.item_ids, items.texts, items.titles, tokens=found.history_tokens)
