"""What loggers show of an evaluation beside its curves: recommendations, figures, slices, costs, the items' vectors."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from lightning.pytorch.loggers import Logger
from torch import Tensor

from anyo_lightning.evaluation.boards import Shown, Table, boards
from anyo_lightning.evaluation.evaluation import Evaluation

SAMPLES = 5  # users whose recommendations are shown, the same in every epoch
PROJECTED_ITEMS = 10_000  # that TensorBoard's projector draws: more are slow in a browser


def log_recommendations(loggers: Iterable[Logger], evaluation: Evaluation, *, tag: str, step: int) -> None:
    """Show the lists of a few users, each beside the end of its history and its target.

    Args:
        loggers: The Trainer's; those without a board are passed over.
        evaluation: Whose rows; the users are spread evenly over them.
        tag: The name under which they are shown.
        step: Of training.
    """
    for board in boards(loggers):
        board.show_lists(tag, _lists(evaluation), step)


def log_results(loggers: Iterable[Logger], results: dict[str, Any], *, step: int) -> None:
    """Show a test's figures with their intervals, its slices, and its costs, each of these as a curve of one point.

    Args:
        loggers: The Trainer's; those without a board get the costs alone.
        results: The content of metrics.json.
        step: Of training.
    """
    loggers = list(loggers)
    for board in boards(loggers):
        board.show_table("test/figures", _figures(results["metrics"]), step)
        board.show_table("test/slices", _slices(results["slices"]), step)
    cost = {f"cost/{name}": value for name, value in results["cost"].items()}
    for logger in loggers:
        logger.log_metrics(cost, step)


def log_items(
    loggers: Iterable[Logger], vectors: Float[Tensor, "catalogue dim"], texts: list[str], counts: np.ndarray
) -> None:
    """Show the items' vectors with their texts: all, or the most frequent `PROJECTED_ITEMS`.

    Args:
        loggers: The Trainer's; those without a board are passed over.
        vectors: Of all items; sparse ones, as wide as the catalogue, are not drawn.
        texts: Of all items.
        counts: How often each occurs in training.
    """
    if vectors.is_sparse:
        return
    shown = np.sort(np.argsort(-counts, kind="stable")[:PROJECTED_ITEMS])
    metadata = [(" ".join(texts[item].split()) or "(no text)", int(counts[item])) for item in shown]
    for board in boards(loggers):
        board.show_items(vectors[torch.from_numpy(shown)].cpu(), metadata)


def _lists(evaluation: Evaluation) -> list[Shown]:
    """For each user what was read last, the target with its rank, and the first ten."""
    split, queries, ranking = evaluation.split, evaluation.queries, evaluation.ranking
    found = []
    for place in np.unique(np.linspace(0, len(evaluation.rows) - 1, SAMPLES).astype(int)):
        row = int(evaluation.rows[place])
        target, items = int(queries.target[row]), [int(i) for i in ranking.top_items[place][:10] if i >= 0]
        found.append(
            Shown(
                user=str(split.user_ids[queries.user[row]]),
                read=[split.item_texts[item] for item in queries.history(row)[-5:]],
                target=split.item_texts[target],
                rank=float(ranking.ranks[place]),
                items=[split.item_texts[item] for item in items],
                found=items.index(target) if target in items else None,
            )
        )
    return found


def _figures(metrics: dict[str, dict[str, float | None]]) -> Table:
    """A row per figure, with the ends of its 95% interval where it has one."""
    rows = [[name, figure.get("value"), figure.get("low"), figure.get("high")] for name, figure in metrics.items()]
    return Table(["figure", "value", "low", "high"], rows)


def _slices(slices: dict[str, Any]) -> Table:
    """A row per slice, with its hit rates and NDCG."""
    parts = [
        (group, name, part["rows"], {metric.rpartition("/")[2]: figure for metric, figure in part["metrics"].items()})
        for group, found in slices.items()
        for name, part in found.items()
    ]
    names = sorted({name for *_, figures in parts for name in figures if name.startswith(("hr@", "ndcg@"))})
    rows = [[group, name, count, *(_figure(figures.get(n)) for n in names)] for group, name, count, figures in parts]
    return Table(["slice", "part", "rows", *names], rows)


def _figure(figure: dict[str, float | None] | None) -> str | None:
    if not figure or figure.get("value") is None:
        return None
    value, low, high = figure["value"], figure.get("low"), figure.get("high")
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} ({low:.3f} to {high:.3f})"
