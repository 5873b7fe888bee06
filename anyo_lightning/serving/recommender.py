"""`Recommender`: a finished run's top lists for any histories, for users of its data, and for items.

    recommender = Recommender.load("runs/mine")
    lists = recommender.recommend([["168", "234"], recommender.history("196")], k=10)

Lists and scores are those of the run's evaluation: the same encoders, the same exact scores, the smallest number first
of items that tie. Item vectors are encoded once, when the run is loaded.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from anyo_lightning.data.splits import MISSING
from anyo_lightning.data.windows import latest_start
from anyo_lightning.errors import InputError
from anyo_lightning.evaluation.index import ItemIndex, dense_for_index
from anyo_lightning.evaluation.scores import at_unit_length
from anyo_lightning.models.restored_run import RestoredRun, chosen_device, restore_run
from anyo_lightning.serving import new_items
from anyo_lightning.serving.best_lists import best_lists, check_length
from anyo_lightning.serving.titles import TitleMatcher, nearest_ids

SHOWN = 3  # examples in a sentence


class Recommender:
    """Top lists of one finished run; `load` makes it.

    Attributes:
        vectors: (items, dim) of the catalogue and of items that were added, float32; sparse for a floor that counts.
    """

    def __init__(self, restored: RestoredRun, *, index: str = "Flat") -> None:
        """Encode the catalogue.

        Args:
            restored: The run.
            index: As in `load`.
        """
        self.restored, self.factory = restored, index
        self.model, self.data = restored.model, restored.data
        self.longest = self.data.longest_history()  # what positions are known to hold
        self.vectors: Float[Tensor, "items dim"] = self.model.encode_catalogue().detach().float()
        self._describe()

    @classmethod
    def load(cls, run: str | Path, *, device: str | None = None, index: str = "Flat") -> "Recommender":
        """Restore a finished run of any variant, and encode its catalogue; nothing is written into its folder.

        Args:
            run: Run folder. Its data must be where its config.yaml says.
            device: Of the model, such as `cpu` or `cuda:0`; by default the first GPU if there is one.
            index: FAISS factory string, as `metrics.index`: `Flat` is exact, anything else trades quality for speed on
                large catalogues.

        Raises:
            InputError: There is no run, no checkpoint that fits it, no data, or no such device; or FAISS cannot make
                the index.
        """
        return cls(restore_run(Path(run), device=chosen_device(device)), index=index)

    def recommend(
        self,
        histories: Sequence[Sequence[str]],
        k: int = 10,
        *,
        hide_seen: bool | None = None,
        allow: Iterable[str] | None = None,
        block: Iterable[str] = (),
    ) -> pl.DataFrame:
        """The k best items for each history.

        Args:
            histories: Item ids of each history, oldest first, at least one; the latest that fit are read. They may
                be of anyone.
            k: Length of the lists.
            hide_seen: Whether the items of a history are left out of its list; None does what the run's evaluation did.
            allow: Ids of the only items that may be listed; None allows all.
            block: Ids of items that are never listed.

        Returns:
            One line per history and place, in this order: `history` (its number, from 0), `rank` (from 1), `item_id`,
            `title`, `score`. A history has fewer than k lines if fewer items may be listed (or if an approximate index
            finds fewer).

        Raises:
            InputError: k is not positive, a history is empty, or an id is not in the catalogue.
        """
        check_length(k)
        listable = self._listable(allow, block)
        chosen = [self.numbers(items, f"history {number}") for number, items in enumerate(histories)]
        queries = self.encode(chosen)
        hides = self.restored.history_masked if hide_seen is None else hide_seen
        excluded = [np.unique(items) if hides else items[:0] for items in chosen]
        return self._table(*best_lists(queries, self.vectors, k, excluded, listable, index=self._index))

    def similar(
        self,
        items: Sequence[str],
        k: int = 10,
        *,
        allow: Iterable[str] | None = None,
        block: Iterable[str] = (),
    ) -> pl.DataFrame:
        """The k items whose vectors are most like each item's own, by cosine; without that item.

        Args:
            items: Item ids.
            k: Length of the lists.
            allow: Ids of the only items that may be listed; None allows all.
            block: Ids of items that are never listed.

        Returns:
            As `recommend`; `history` is the item's place among those given, `score` the cosine.

        Raises:
            InputError: k is not positive, an id is not in the catalogue, or item vectors have no directions: those of
                Popularity are numbers.
        """
        check_length(k)
        if self.vectors.shape[1] < 2:
            raise InputError(
                f"Expected a run whose item vectors can be compared, got {type(self.model).__name__}, whose are numbers"
            )
        chosen = self.numbers(items, "items")
        vectors = self._directions
        queries = vectors.index_select(0, torch.from_numpy(chosen).to(vectors.device))
        listable = self._listable(allow, block)
        return self._table(*best_lists(queries, vectors, k, list(chosen[:, None]), listable))

    def history(self, user: str) -> list[str]:
        """The item ids of a user of the run's data, oldest first: of training, validation and test.

        Args:
            user: The user's id in the data.

        Raises:
            InputError: There is no such user among those that were kept; the nearest ids are named.
        """
        split, number = self.data.split, self._number_of_user.get(str(user))
        if number is None:
            near = ", ".join(nearest_ids(str(user), list(self._number_of_user)))
            raise InputError(
                f"Expected one of the {split.users:,} users of {split.name}, got {user}; near it are {near}"
            )
        ids: list[str] = split.item_ids[split.items[slice(*split.offsets[number : number + 2])]].tolist()
        return ids

    def find(self, title: str) -> str:
        """The id of the item that a typed title means, as `TitleMatcher` finds it.

        Args:
            title: As typed; case, punctuation and small mistakes do not count.

        Raises:
            InputError: No title is close; the nearest are named.
        """
        return self.item_ids[self._matcher.find(title)]

    def add_items(self, items: pl.DataFrame) -> None:
        """Add items that the run has not seen, given by their texts, without training: to lists and to histories.

        Their vectors are those that the run's item encoder makes of their texts alone.

        Args:
            items: `item_id`, and the columns of the run's item text template (`title` …), as far as they are known.

        Raises:
            InputError: The run does not know items by their texts, an id is in the catalogue already or twice, or an
                item has no text; nothing is added then.
        """
        more = new_items.read(items, template=self.data.template, taken=self.place_of_item)
        before = len(self.item_ids)
        new_items.add(self.model, more, catalogue=self.data)
        numbers = torch.arange(before, before + len(more.item_ids), device=self.model.device)
        with self.restored.as_evaluated(), torch.autocast(self.model.device.type, enabled=False):
            vectors = self.model.encode_items(numbers)
        self.vectors = torch.cat([self.vectors, vectors])
        self._describe()

    def numbers(self, items: Sequence[str], what: str) -> Int[np.ndarray, " items"]:
        """The places of items in `item_ids`.

        Args:
            items: Their ids.
            what: What they are, for the sentence.

        Raises:
            InputError: Some are not there, with their count and examples; there are none; or a text was given for a
                list.
        """
        if isinstance(items, str):
            raise InputError(f"Expected a list of item ids as {what}, got {items!r}")
        unknown = [str(item) for item in items if str(item) not in self.place_of_item]
        if unknown:
            shown = ", ".join(dict.fromkeys(unknown[:SHOWN])) + (", …" if len(unknown) > SHOWN else "")
            near = ", ".join(nearest_ids(unknown[0], self.item_ids))
            raise InputError(
                f"Expected ids of the catalogue in {what}, got {len(unknown)} of {len(items)} that are not in it "
                f"({shown}; near {unknown[0]} are {near})"
            )
        if not len(items):
            raise InputError(f"Expected at least one item in {what}, got none")
        return np.array([self.place_of_item[str(item)] for item in items], dtype=np.int64)

    def encode(self, histories: Sequence[Int[np.ndarray, " items"]]) -> Float[Tensor, "histories dim"]:
        """The query vector of each history, float32; sparse for a floor that counts.

        Args:
            histories: Numbers of items, oldest first, at least one.
        """
        tokens = self.model.reading.item_token_counts
        read = []
        for items in histories:
            lengths = np.ones(len(items), dtype=np.int64) if tokens is None else tokens[items]
            places = np.cumsum([0, *lengths])
            start = latest_start(places, len(items), 0, max_items=self.data.max_items, max_length=self.longest)
            read.append(items[start:])
        with self.restored.as_evaluated():
            return self.model.encode_in_batches(read, budget=self.data.evaluation_batch_tokens)

    def _describe(self) -> None:
        """What is said of the items, and how they are searched: again, after items were added."""
        split = self.model.reading.split
        self.item_ids: list[str] = split.item_ids.tolist()
        self.titles: list[str] = self.model.reading.titles
        self.texts: list[str] = split.item_texts
        self.place_of_item = {item: number for number, item in enumerate(self.item_ids)}
        self._index = None if self.factory == "Flat" else ItemIndex(dense_for_index(self.vectors), factory=self.factory)
        for name in ("_matcher", "_directions"):
            self.__dict__.pop(name, None)

    @cached_property
    def _number_of_user(self) -> dict[str, int]:
        return {user: number for number, user in enumerate(self.data.split.user_ids.tolist())}

    @cached_property
    def _matcher(self) -> TitleMatcher:
        counts = np.zeros(len(self.item_ids), dtype=np.int64)
        trained = self.data.split.training_counts()
        counts[: len(trained)] = trained
        return TitleMatcher(self.titles, self.texts, counts)

    @cached_property
    def _directions(self) -> Float[Tensor, "items dim"]:
        return at_unit_length(self.vectors)

    def _listable(self, allow: Iterable[str] | None, block: Iterable[str]) -> Bool[np.ndarray, " items"]:
        """(items,) True where an item may be listed."""
        listable = np.full(len(self.item_ids), allow is None)
        if allow is not None:
            listable[self.numbers(list(allow), "the list of allowed items")] = True
        if blocked := list(block):
            listable[self.numbers(blocked, "the list of blocked items")] = False
        return listable

    def _table(self, items: Int[np.ndarray, "rows k"], scores: Float[np.ndarray, "rows k"]) -> pl.DataFrame:
        """Lists as lines."""
        row, place = np.nonzero(items != MISSING)
        numbers = items[row, place]
        return pl.DataFrame(
            [
                pl.Series("history", row, pl.Int64),
                pl.Series("rank", place + 1, pl.Int64),
                pl.Series("item_id", self.item_ids, pl.String).gather(numbers),
                pl.Series("title", self.titles, pl.String).gather(numbers),
                pl.Series("score", scores[row, place], pl.Float32),
            ]
        )
