"""What TensorBoard shows of an evaluation beside its curves: recommendations, slices, costs, the items' vectors.

Other loggers get the figures alone.
"""

import html
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from anyo_lightning.evaluation.evaluation import Evaluation

SAMPLES = 5  # users whose recommendations are shown, the same in every epoch
PROJECTED_ITEMS = 10_000  # that the projector draws: more are slow in a browser


def log_recommendations(loggers: Iterable[Any], evaluation: Evaluation, *, tag: str, step: int) -> None:
    """Write the lists of a few users as text, each beside the end of its history and its target.

    Args:
        loggers: The Trainer's; those that are not TensorBoard's are passed over.
        evaluation: Whose rows; the users are spread evenly over them.
        tag: Where TensorBoard shows the text.
        step: Of training.
    """
    for writer in _writers(loggers):
        writer.add_text(tag, _recommendations(evaluation), step)


def log_slices(loggers: Iterable[Any], slices: dict[str, Any], *, tag: str, step: int) -> None:
    """Write the figures of slices (as in metrics.json) as a table."""
    rows = [
        (group, name, part["rows"], {metric.rpartition("/")[2]: figure for metric, figure in part["metrics"].items()})
        for group, parts in slices.items()
        for name, part in parts.items()
    ]
    names = sorted({name for *_, figures in rows for name in figures if name.startswith(("hr@", "ndcg@"))})
    lines = [f"| slice | | rows | {' | '.join(names)} |", "|---" * (len(names) + 3) + "|"]
    for group, name, count, figures in rows:
        cells = [_figure(figures.get(metric)) for metric in names]
        lines.append(f"| {_as_text(group)} | {_as_text(name)} | {count} | {' | '.join(cells)} |")
    for writer in _writers(loggers):
        writer.add_text(tag, "\n".join(lines), step)


def log_costs(loggers: Iterable[Any], cost: dict[str, float], *, step: int) -> None:
    """Write the ledger (as in metrics.json), each figure as a curve of one point, below `cost/`."""
    for writer in _writers(loggers):
        for name, value in cost.items():
            writer.add_scalar(f"cost/{name}", value, step)


def log_items(
    loggers: Iterable[Any], vectors: Float[Tensor, "catalogue dim"], texts: list[str], counts: np.ndarray
) -> None:
    """Give the projector the items' vectors with their texts: all, or the most frequent `PROJECTED_ITEMS`.

    Args:
        loggers: The Trainer's; those that are not TensorBoard's are passed over.
        vectors: Of all items; sparse ones, as wide as the catalogue, are not drawn.
        texts: Of all items.
        counts: How often each occurs in training.
    """
    if vectors.is_sparse:
        return
    shown = np.sort(np.argsort(-counts, kind="stable")[:PROJECTED_ITEMS])
    metadata = [[" ".join(texts[item].split()) or "(no text)", int(counts[item])] for item in shown]
    for writer in _writers(loggers):
        shutil.rmtree(Path(writer.log_dir) / "00000" / "items", ignore_errors=True)  # an earlier test's
        writer.add_embedding(
            vectors[torch.from_numpy(shown)].cpu(), metadata, tag="items", metadata_header=["item", "in training"]
        )


def _writers(loggers: Iterable[Any]) -> Iterator[SummaryWriter]:
    yield from (logger.experiment for logger in loggers if isinstance(logger, TensorBoardLogger))


def _recommendations(evaluation: Evaluation) -> str:
    """Markdown: for each user what was read last, the target with its rank, and the first ten."""
    split, queries, ranking = evaluation.split, evaluation.queries, evaluation.ranking
    lines = []
    for place in np.unique(np.linspace(0, len(evaluation.rows) - 1, SAMPLES).astype(int)):
        row = int(evaluation.rows[place])
        target, rank = int(queries.target[row]), ranking.ranks[place]
        read = " · ".join(_as_text(split.item_texts[item]) for item in queries.history(row)[-5:])
        lines += [
            f"#### User {_as_text(str(split.user_ids[queries.user[row]]))}: "
            f"{_as_text(split.item_texts[target])} at rank {rank:g}",
            "",
            f"Read last: {read}",
            "",
        ]
        for number, item in enumerate(ranking.top_items[place][:10], 1):
            if item >= 0:
                text = _as_text(split.item_texts[item])
                lines.append(f"{number}. **{text}** (the target)" if item == target else f"{number}. {text}")
        lines.append("")
    return "\n".join(lines)


def _as_text(text: str) -> str:
    """Markdown that shows a text as it is: texts come from data."""
    escaped = re.sub(r"([\\`*_{}\[\]()#+\-.!])", r"\\\1", " ".join(text.split()) or "(no text)")
    return html.escape(escaped, quote=False).replace("|", "&#124;")


def _figure(figure: dict[str, float | None] | None) -> str:
    if not figure or figure.get("value") is None:
        return ""
    value, low, high = figure["value"], figure.get("low"), figure.get("high")
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} ({low:.3f} to {high:.3f})"
