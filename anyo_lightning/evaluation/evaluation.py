"""From ranks and lists to what a run reports: logged means, figures with intervals, slices, predictions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Int

from anyo_lightning.data.splits import Queries, Split
from anyo_lightning.evaluation.index import index_recall
from anyo_lightning.evaluation.intervals import bootstrap_means
from anyo_lightning.evaluation.metrics import average_popularity, coverage, gini, ndcg, user_metrics
from anyo_lightning.evaluation.ranking import Ranking, list_ranks
from anyo_lightning.evaluation.slices import slice_figures, slice_masks

Figure = dict[str, float | None]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One stage's rows with their ranks and lists."""

    split: Split
    queries: Queries
    rows: Int[np.ndarray, "rows"]
    ranking: Ranking
    cutoffs: Sequence[int]
    exact_index: bool

    def by_user(self) -> dict[str, np.ndarray]:
        """Every figure that is a mean over users, as one value a user in ascending order of users."""
        ranking, user = self.ranking, torch.from_numpy(self.queries.user[self.rows])
        values = user_metrics(torch.from_numpy(ranking.ranks), user, self.cutoffs)
        counts = torch.from_numpy(self.split.training_counts())
        lists = torch.from_numpy(self._one_list_a_user(ranking.top_items))
        for k in self.cutoffs:
            values[f"popularity@{k}"] = average_popularity(lists[:, :k], counts)
        if not self.exact_index:
            target = self.queries.target[self.rows]
            exact, found = (
                torch.from_numpy(list_ranks(top, target)) for top in (ranking.exact_top_items, ranking.top_items)
            )
            for k in self.cutoffs:
                exact_lists, found_lists = (
                    self._one_list_a_user(top)[:, :k] for top in (ranking.exact_top_items, ranking.top_items)
                )
                values[f"index_recall@{k}"] = torch.from_numpy(index_recall(found_lists, exact_lists))
                values[f"index_ndcg_cost@{k}"] = ndcg(exact, user, k) - ndcg(found, user, k)
        return {name: value.numpy() for name, value in values.items()}

    def of_lists(self) -> dict[str, float]:
        """Figures of all lists together, which are not means over users."""
        lists, size = torch.from_numpy(self._one_list_a_user(self.ranking.top_items)), self.split.catalogue_size
        values = {f"coverage@{k}": coverage(lists[:, :k], size) for k in self.cutoffs}
        return values | {f"gini@{k}": gini(lists[:, :k], size) for k in self.cutoffs}

    def means(self, prefix: str) -> dict[str, float]:
        """All figures without intervals, as they are logged."""
        values = {name: float(value.mean()) for name, value in self.by_user().items()} | self.of_lists()
        return {prefix + name: value for name, value in values.items()}

    def figures(self, prefix: str) -> dict[str, Figure]:
        """All figures with 95% bootstrap intervals over users; those of all lists together have none (null)."""
        by_user = self.by_user()
        low, high = bootstrap_means(np.stack(list(by_user.values()), axis=1))
        found: dict[str, Figure] = {
            prefix + name: {"value": float(value.mean()), "low": float(low[column]), "high": float(high[column])}
            for column, (name, value) in enumerate(by_user.items())
        }
        return found | {
            prefix + name: {"value": value, "low": None, "high": None} for name, value in self.of_lists().items()
        }

    def slices(self, prefix: str, item_tokens: np.ndarray | None) -> dict[str, Any]:
        """Figures of each slice of the rows; `item_tokens` are the tokens of each item's text, where known."""
        masks = slice_masks(
            target=self.queries.target[self.rows],
            history_length=self.queries.history_lengths[self.rows],
            tied=self.queries.tied[self.rows],
            training_counts=self.split.training_counts(),
            item_words=np.array([len(text.split()) for text in self.split.item_texts]),
            item_tokens=item_tokens,
        )
        user = self.queries.user[self.rows]
        return slice_figures(masks, self.ranking.ranks, user, self.cutoffs, prefix=prefix)

    def predictions(self, item_tokens: np.ndarray | None) -> pl.DataFrame:
        """One line a row: whose, what, at which rank, what was recommended instead, and after which history."""
        item_ids, queries, rows, ranking = self.split.item_ids, self.queries, self.rows, self.ranking
        target = queries.target[rows]
        present = ranking.top_items >= 0
        lists = [items[kept] for items, kept in zip(ranking.top_items, present, strict=True)]
        scores = [values[kept].tolist() for values, kept in zip(ranking.top_scores, present, strict=True)]
        tokens = [None] * len(rows) if item_tokens is None else item_tokens[target].tolist()
        ids = pl.List(pl.String)
        return pl.DataFrame(
            [
                pl.Series("user_id", self.split.user_ids[queries.user[rows]].tolist(), pl.String),
                pl.Series("target_item_id", item_ids[target].tolist(), pl.String),
                pl.Series("rank", ranking.ranks, pl.Float64),
                pl.Series("top_item_ids", [item_ids[items].tolist() for items in lists], ids),
                pl.Series("top_scores", scores, pl.List(pl.Float32)),
                pl.Series("history_item_ids", [item_ids[queries.history(int(row))].tolist() for row in rows], ids),
                pl.Series("history_length", queries.history_lengths[rows], pl.Int64),
                pl.Series("target_count", self.split.training_counts()[target], pl.Int64),
                pl.Series("target_tied", queries.tied[rows], pl.Boolean),
                pl.Series("target_tokens", tokens, pl.Int64),
            ]
        )

    def _one_list_a_user(self, lists: np.ndarray) -> np.ndarray:
        """The list of each user's first row: a user with several targets is still shown one list."""
        kept: np.ndarray = lists[np.unique(self.queries.user[self.rows], return_index=True)[1]]
        return kept
