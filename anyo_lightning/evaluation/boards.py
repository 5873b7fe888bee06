"""Where an evaluation is shown beside its curves: TensorBoard, Weights & Biases, MLflow.

A board is chosen by its logger's class, which Lightning defines without importing wandb or mlflow. Only the process of
rank zero may ask for boards: elsewhere a logger's experiment is a dummy. Other loggers get the figures alone.
"""

import csv
import html
import io
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from jaxtyping import Float
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from torch import Tensor


@dataclass(frozen=True)
class Table:
    """Cells of words, numbers or None, in rows as wide as `columns`."""

    columns: list[str]
    rows: list[list[Any]]


@dataclass(frozen=True)
class Shown:
    """One user's recommendations; the texts are as the data has them.

    Attributes:
        user: Id.
        read: The last items of the history, the latest last.
        target: The item to find.
        rank: Of the target, ties at mid-rank.
        items: The list's first items, the best first.
        found: Place of the target in `items`, None where it is not there.
    """

    user: str
    read: list[str]
    target: str
    rank: float
    items: list[str]
    found: int | None


class Board(Protocol):
    """What each kind of logger can show."""

    def show_table(self, tag: str, table: Table, step: int) -> None:
        """Show a table under a name like `test/slices`, at a step of training."""
        ...

    def show_lists(self, tag: str, lists: Sequence[Shown], step: int) -> None:
        """Show the recommendations for a few users."""
        ...

    def show_items(self, vectors: Float[Tensor, "items dim"], metadata: Sequence[tuple[str, int]]) -> None:
        """Show items' vectors, each with its text and how often it occurs in training."""
        ...


def boards(loggers: Iterable[Logger]) -> Iterator[Board]:
    """The boards of those loggers that have one."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            yield TensorBoard(logger)
        elif isinstance(logger, WandbLogger):
            yield WeightsAndBiases(logger)
        elif isinstance(logger, MLFlowLogger):
            yield MLflow(logger)


class TensorBoard:
    """Text in Markdown, and the projector."""

    def __init__(self, logger: TensorBoardLogger) -> None:
        self.writer = logger.experiment

    def show_table(self, tag: str, table: Table, step: int) -> None:
        """As a table in Markdown."""
        lines = [table.columns, ["---"] * len(table.columns), *([_cell(cell) for cell in row] for row in table.rows)]
        self.writer.add_text(tag, "\n".join(f"| {' | '.join(line)} |" for line in lines), step)

    def show_lists(self, tag: str, lists: Sequence[Shown], step: int) -> None:
        """A heading and a numbered list per user."""
        lines = []
        for shown in lists:
            lines += [
                f"#### User {_as_text(shown.user)}: {_as_text(shown.target)} at rank {shown.rank:g}",
                "",
                f"Read last: {' · '.join(map(_as_text, shown.read))}",
                "",
            ]
            for place, item in enumerate(shown.items):
                text = _as_text(item)
                lines.append(
                    f"{place + 1}. **{text}** (the target)" if place == shown.found else f"{place + 1}. {text}"
                )
            lines.append("")
        self.writer.add_text(tag, "\n".join(lines), step)

    def show_items(self, vectors: Float[Tensor, "items dim"], metadata: Sequence[tuple[str, int]]) -> None:
        """In the projector, in the place of an earlier test's."""
        shutil.rmtree(Path(self.writer.log_dir) / "00000" / "items", ignore_errors=True)
        rows = [list(row) for row in metadata]
        self.writer.add_embedding(vectors, rows, tag="items", metadata_header=["item", "in training"])


class TablesOnly(Board, Protocol):
    """A board of a server that shows lists as a table, too."""

    def show_lists(self, tag: str, lists: Sequence[Shown], step: int) -> None:
        """A row per user."""
        self.show_table(tag, _as_table(lists), step)

    def show_items(self, vectors: Float[Tensor, "items dim"], metadata: Sequence[tuple[str, int]]) -> None:
        """Not at all: thousands of vectors would be sent to a server."""
        return


class WeightsAndBiases(TablesOnly):
    """Tables in the run's workspace."""

    def __init__(self, logger: WandbLogger) -> None:
        self.logger = logger

    def show_table(self, tag: str, table: Table, step: int) -> None:
        """As a table whose columns can be sorted and filtered."""
        self.logger.log_table(tag, columns=table.columns, data=table.rows, step=step)


class MLflow(TablesOnly):
    """Artifacts of the run: CSV files, which its page shows as tables."""

    def __init__(self, logger: MLFlowLogger) -> None:
        self.logger = logger

    def show_table(self, tag: str, table: Table, step: int) -> None:
        """As TAG/STEP.csv."""
        content = io.StringIO()
        csv.writer(content, lineterminator="\n").writerows([table.columns, *table.rows])
        self.logger.experiment.log_text(self.logger.run_id, content.getvalue(), f"{tag}/{step:06}.csv")


def _as_table(lists: Sequence[Shown]) -> Table:
    """A row per user, with as many places as the longest list has."""
    places = max((len(shown.items) for shown in lists), default=0)
    rows = [
        [
            shown.user,
            " · ".join(shown.read),
            shown.target,
            shown.rank,
            *shown.items,
            *[None] * (places - len(shown.items)),
        ]
        for shown in lists
    ]
    return Table(["user", "read last", "target", "rank", *(str(place + 1) for place in range(places))], rows)


def _cell(cell: Any) -> str:
    if cell is None:
        return ""
    return f"{cell:.4f}" if isinstance(cell, float) else _as_text(str(cell))


def _as_text(text: str) -> str:
    """Markdown that shows a text as it is: texts come from data."""
    escaped = re.sub(r"([\\`*_{}\[\]()#+\-.!])", r"\\\1", " ".join(text.split()) or "(no text)")
    return html.escape(escaped, quote=False).replace("|", "&#124;")
