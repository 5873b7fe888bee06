"""A run's weights over another catalogue or split: what carries over, and what starts afresh.

Weights that are no single item's carry over. An item's own rows do where the run knows the item: where its id and its
text are those of an item there. An id alone says little, since most data sets count their items from 1; only where the
split is the run's, texts apart, are the items the same. `Encoders` name their rows; vectors of texts are made again
from the texts at hand.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Int
from torch import Tensor

from anyo_lightning import distributed
from anyo_lightning.checkpoint_io import METADATA, describe_catalogue
from anyo_lightning.data.item_texts import TrainedTexts
from anyo_lightning.data.splits import Split, placeholder
from anyo_lightning.encoders.base import LANGUAGE_MODEL, Encoders
from anyo_lightning.errors import InputError
from anyo_lightning.lineage import describe_items
from anyo_lightning.runs import RunFolder

TRAINED = "*.trained"  # which items have a trained row, in any encoder
KINDS = ("item_rows", "run_rows", "text_rows")
LEAK = 0.01  # share of the test targets: where two data sets count users and items from 1, chance alone is below
FEW = 0.01  # share of the items: what two data sets have in common by chance


@dataclass(frozen=True, eq=False)
class Transfer:
    """From a checkpoint's items to those of a split.

    Attributes:
        run: The checkpoint's run folder.
        split: The split.
        here: Numbers of the split's items that the run knows.
        there: Their numbers in the run.
        trained_texts: The texts of the run's items.
        namesakes: How many of the split's items share an id with one of the run, but not the text.
        same_split: Whether the split is the run's, under other texts.
        encoders: The model's, which name their rows; None where the model makes its own, and has none.
    """

    run: RunFolder
    split: Split
    here: Int[Tensor, " known"]
    there: Int[Tensor, " known"]
    trained_texts: TrainedTexts
    namesakes: int
    same_split: bool
    encoders: Encoders | None

    @classmethod
    def of(
        cls, folder: Path, checkpoint: Mapping[str, Any], split: Split, encoders: Encoders | None
    ) -> "Transfer | None":
        """What a checkpoint gives to another split; None where the split is its own.

        Args:
            folder: The checkpoint's run folder.
            checkpoint: Its content.
            split: The split.
            encoders: The model's.

        Raises:
            InputError: The catalogue is another one, and the folder's catalogue.parquet is not that of the checkpoint.
        """
        found, own = checkpoint[METADATA], describe_catalogue(split)
        if all(found[part] == own[part] for part in own):
            return None
        run = RunFolder(folder)
        named = () if encoders is None else encoders.text_rows
        weights: Mapping[str, Tensor] = checkpoint["state_dict"]
        vectors = next((weights[name] for name in weights if any(fnmatch(name, one) for one in named)), None)
        everything, same_split = torch.arange(split.catalogue_size), found["split"] == own["split"]
        if found["catalogue"] == own["catalogue"]:
            texts = TrainedTexts(split.item_texts, vectors)
            return cls(run, split, everything, everything, texts, 0, same_split, encoders)
        there = run.read_catalogue()
        if describe_items(there["item_id"].to_list(), there["text"].to_list()) != found["catalogue"]:
            raise InputError(f"Expected {run.catalogue_file} to be that of the checkpoint beside it, got another")
        texts = TrainedTexts(there["text"].to_list(), vectors)
        if same_split:
            return cls(run, split, everything, everything, texts, 0, same_split, encoders)
        here = pl.DataFrame({"item_id": split.item_ids.tolist(), "text": split.item_texts})
        by_id = here.with_row_index("here").join(there.with_row_index("there"), on="item_id", suffix="_there")
        untold = pl.Series([placeholder(item) for item in by_id["item_id"]], dtype=pl.String)  # any data set has these
        known = by_id.filter((pl.col("text") == pl.col("text_there")) & (pl.col("text") != untold)).sort("here")
        ours, theirs = (torch.from_numpy(known[name].to_numpy().astype(np.int64)) for name in ("here", "there"))
        return cls(run, split, ours, theirs, texts, len(by_id) - len(known), same_split, encoders)

    @property
    def name(self) -> str:
        """What a test of the run on these data is: under `other texts`, on `other data`, or `zero-shot`.

        Zero-shot is a test whose items the run has not seen, `FEW` of them apart.
        """
        if self.same_split:
            return "other texts"
        return "other data" if len(self.here) > FEW * self.split.catalogue_size else "zero-shot"

    def check_testable(self) -> None:
        """Refuse to test a model of ids on items of which it knows none, or on interactions that it was trained on.

        Raises:
            InputError: It knows no item and reads no text; more than `LEAK` of the test targets were trained on; or the
                run has no predictions.parquet, which says what was.
        """
        if self.same_split:
            return
        if not len(self.here) and not (self.encoders and self.encoders.texts):
            raise InputError(
                f"Expected items that {self.run.path} knows by id and text, since it reads ids alone, got none among "
                f"{self.split.catalogue_size:,}"
            )
        trained, rows = self.trained_targets(), len(self.split.queries("test"))
        covered = self.run.finished and self.run.read_metrics()["split"]["counts"]["users"] == len(self._histories())
        if not covered and len(self.here) + self.namesakes > LEAK * self.split.catalogue_size:
            raise InputError(
                f"Expected a run with a test row of each user, to see what it was trained on, to test it on data that "
                f"share items with its own, got {self.run.path} with {len(self._histories()):,} users tested"
            )
        if trained > LEAK * rows:
            raise InputError(
                f"Expected test targets that {self.run.path} has not been trained on, got {trained:,} of {rows:,} in "
                "its histories of the same users"
            )

    def trained_targets(self) -> int:
        """Of the split's test targets, those in the run's histories of the same user, and not in the split's own.

        Items are the same by id and text. If by their ids alone many more targets are found than other users' histories
        would have by chance, the data are the same under other texts, and these count.

        Raises:
            InputError: The run has no predictions.parquet.
        """
        users = self._histories()
        histories = users.explode("item_id").unique()
        queries, known = self.split.queries("test"), set(self.here.tolist())
        new = [row for row, target in enumerate(queries.target.tolist()) if target not in queries.history(row)]
        item = queries.target[new]
        targets = pl.DataFrame(
            {
                "user_id": pl.Series(self.split.user_ids[queries.user[new]].tolist(), dtype=pl.String),
                "item_id": pl.Series(self.split.item_ids[item].tolist(), dtype=pl.String),
                "known": pl.Series([number in known for number in item.tolist()], dtype=pl.Boolean),
            }
        )
        found = targets.join(histories, on=("user_id", "item_id"), how="semi")
        shares = histories.group_by("item_id").agg(pl.len() / max(len(users), 1))
        chance = float(targets.join(shares, on="item_id")["len"].sum())
        same_data = len(found) > 2 * chance + LEAK * len(queries)
        return len(found) if same_data else int(found["known"].sum())

    def _histories(self) -> pl.DataFrame:
        """The items of each user of whom the run has a test row, as its longest history has them.

        Raises:
            InputError: The run has no predictions.parquet.
        """
        rows = self.run.read_predictions(["user_id", "history_item_ids"])
        return rows.group_by("user_id").agg(pl.col("history_item_ids").explode().unique().alias("item_id"))

    def to_build_with(self, weights: Mapping[str, Tensor], language_model: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `Encoders.build` is given where the run is tested: no rows of its own items, no vectors of their texts.

        Args:
            weights: The checkpoint's.
            language_model: Trained weights with which vectors of texts were made before training; empty if without.
        """
        found = {
            name: value
            for name, value in weights.items()
            if not name.startswith(LANGUAGE_MODEL)
            and not self._is(name, "text_rows")
            and not self._is(name, "item_rows")
        }
        for name, value in found.items():
            if self._is(name, "run_rows"):
                found[name] = self._placed(value.new_zeros(self.split.catalogue_size, *value.shape[1:]), value)
        return {**found, **language_model}

    def weights(
        self, weights: Mapping[str, Tensor], own: Mapping[str, Tensor], *, starts_afresh: Collection[str], tested: bool
    ) -> dict[str, Tensor]:
        """A module's state with what it takes over from the checkpoint.

        Args:
            weights: The checkpoint's.
            own: The module's state, as it was built.
            starts_afresh: Names of state that is not taken over.
            tested: Whether it is tested as it is. Otherwise it is trained first: it keeps the vectors of other runs
                that it has read itself, and items have a trained row if they have one here or there.

        Raises:
            InputError: Something has a row per item of the run, and the encoders do not name it.
        """
        found = {name: value for name, value in own.items() if name in starts_afresh}
        for name, value in weights.items():
            if name in starts_afresh:
                continue
            self._check_named(name, value, own.get(name))
            if name not in own or own[name].shape[1:] != value.shape[1:]:
                found[name] = value  # refused where it is loaded
            elif self._is(name, "text_rows") or (self._is(name, "run_rows") and not tested):
                found[name] = own[name]
            elif fnmatch(name, TRAINED):
                there = self._placed(torch.zeros_like(own[name]), value)
                found[name] = there if tested else there | own[name]
            elif self._is(name, "item_rows") or self._is(name, "run_rows"):
                found[name] = self._placed(own[name].clone(), value)
            else:
                found[name] = value
        return found

    def say(self, weights: Mapping[str, Tensor]) -> None:
        """Print what carries over, once for all processes.

        Args:
            weights: Those that were taken over.
        """
        if distributed.rank():
            return
        if self.same_split:
            print(f"Weights of {self.run.path}: the split is the same, its items' texts are others")
            return
        namesakes = f" ({self.namesakes:,} share an id with another text there)" if self.namesakes else ""
        rows = any(self._is(name, "item_rows") for name in weights)
        taken = "they take over their rows, the others start afresh" if rows else "no weight is an item's own"
        print(
            f"Weights of {self.run.path}: {len(self.here):,} of {self.split.catalogue_size:,} items are known there by "
            f"id and text{namesakes}; {taken}"
        )
        leaked = self.trained_targets() if self.run.predictions_file.is_file() else 0
        if leaked:
            targets = len(self.split.queries("test"))
            print(f"Not free of leaks: {leaked:,} of {targets:,} test targets are in its histories of the same users")

    def _is(self, name: str, kind: str) -> bool:
        """Whether a weight is of a kind that the encoders name."""
        patterns = () if self.encoders is None else getattr(self.encoders, kind)
        return any(fnmatch(name, pattern) for pattern in patterns)

    def _check_named(self, name: str, value: Tensor, own: Tensor | None) -> None:
        """Refuse what looks like rows of items and is not named so: it would end up with other items.

        Rows of items are as many as items there and here. Where both catalogues have equally many, and in another
        order, a weight of that first size cannot be told from them and is refused, too.
        """
        sizes = len(self.trained_texts.texts), self.split.catalogue_size
        in_order = torch.arange(sizes[0])
        if own is None or (torch.equal(self.here, in_order) and torch.equal(self.there, in_order)):
            return
        named = fnmatch(name, TRAINED) or any(self._is(name, kind) for kind in KINDS)
        if not named and ".backbone." not in name and value.ndim and (len(value), len(own)) == sizes:
            raise InputError(
                f"Expected encoders that name {name}, which has a row per item, in {', '.join(KINDS)}, got "
                f"{type(self.encoders).__name__}"
            )

    def _placed(self, table: Tensor, rows: Tensor) -> Tensor:
        """A table with the rows of the items that the run knows."""
        table[self.here] = rows[self.there].to(table)
        return table
