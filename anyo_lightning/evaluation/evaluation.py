"""From ranks and lists to what a run reports: logged means, figures with intervals, slices, predictions."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float, Int
from torch import Tensor

from anyo_lightning.data.splits import Queries, Split
from anyo_lightning.evaluation.diversity import intra_list_diversity
from anyo_lightning.evaluation.index import index_recall
from anyo_lightning.evaluation.intervals import bootstrap_means
from anyo_lightning.evaluation.metrics import (
    average_popularity,
    coverage,
    gini,
    ndcg,
    novelty,
    popularity_ranks,
    serendipity,
    user_metrics,
)
from anyo_lightning.evaluation.ranking import Ranking, excluded_items, list_ranks
from anyo_lightning.evaluation.slices import (
    HISTORY_BANDS,
    TOKEN_BANDS,
    WORD_BANDS,
    band,
    popularity_band,
    slice_figures,
    slice_masks,
)

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
    extra: Collection[str] = ()  # of `metrics.EXTRA`
    vectors: Float[Tensor, "catalogue dim"] | None = None  # of all items, where extra has ild
    history_masked: bool = True

    def by_user(self) -> dict[str, np.ndarray]:
        """Every figure that is a mean over users, as one value per user in ascending order of users."""
        ranking, user = self.ranking, self.queries.user[self.rows]
        values = user_metrics(ranking.ranks, user, self.cutoffs, self.extra)
        counts, lists = self.split.training_counts(), self._one_list_per_user(ranking.top_items)
        for k in self.cutoffs:
            values[f"popularity@{k}"] = average_popularity(lists[:, :k], counts)
        values |= self._extra_by_user(lists, counts)
        if not self.exact_index:
            target, exact_lists = self.queries.target[self.rows], self._one_list_per_user(ranking.exact_top_items)
            exact, found = (list_ranks(top, target) for top in (ranking.exact_top_items, ranking.top_items))
            for k in self.cutoffs:
                values[f"index_recall@{k}"] = index_recall(lists[:, :k], exact_lists[:, :k])
                values[f"index_ndcg_cost@{k}"] = ndcg(exact, user, k) - ndcg(found, user, k)
        return values

    def _extra_by_user(self, lists: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
        """What is asked for of the figures beside accuracy."""
        target, values = self.queries.target[self.rows], dict[str, np.ndarray]()
        if "novelty" in self.extra:
            values |= {f"novelty@{k}": novelty(lists[:, :k], counts) for k in self.cutoffs}
        if "ild" in self.extra:
            assert self.vectors is not None
            pairs = [k for k in self.cutoffs if k > 1]
            values |= {f"ild@{k}": intra_list_diversity(lists[:, :k], self.vectors) for k in pairs}
        if "serendipity" in self.extra:
            excluded = excluded_items(self.rows, target, self.queries.history) if self.history_masked else None
            popular, user = popularity_ranks(target, counts, excluded), self.queries.user[self.rows]
            values |= {f"serendipity@{k}": serendipity(self.ranking.ranks, popular, user, k) for k in self.cutoffs}
        return values

    def of_lists(self) -> dict[str, float]:
        """Figures of all lists together, which are not means over users."""
        lists, size = self._one_list_per_user(self.ranking.top_items), self.split.catalogue_size
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
        masks, user = slice_masks(self._parts(item_tokens)), self.queries.user[self.rows]
        return slice_figures(masks, self.ranking.ranks, user, self.cutoffs, prefix=prefix, extra=self.extra)

    def predictions(self, item_tokens: np.ndarray | None) -> pl.DataFrame:
        """One line per row: whose, what, at which rank, what was recommended, after which history, in which slices."""
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
                pl.Series("target_tokens", tokens, pl.Int64),
            ]
        ).hstack(self._parts(item_tokens))

    def _parts(self, item_tokens: np.ndarray | None) -> pl.DataFrame:
        """In which slice of each group a row is; null in the groups that are not known."""
        queries, rows = self.queries, self.rows
        target, counts = queries.target[rows], self.split.training_counts()
        words = np.array([len(text.split()) for text in self.split.item_texts])
        unknown = pl.Series([None] * len(rows), dtype=pl.String)
        return pl.DataFrame(
            {
                "target_popularity": popularity_band(target, counts),
                "history_band": band(queries.history_lengths[rows], HISTORY_BANDS),
                "target_tied": queries.tied[rows],
                "target_words_band": band(words[target], WORD_BANDS),
                "target_tokens_band": unknown if item_tokens is None else band(item_tokens[target], TOKEN_BANDS),
            }
        )

    def _one_list_per_user(self, lists: np.ndarray) -> np.ndarray:
        """The list of each user's first row: a user with several targets is still shown one list."""
        kept: np.ndarray = lists[np.unique(self.queries.user[self.rows], return_index=True)[1]]
        return kept
