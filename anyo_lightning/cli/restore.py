"""A finished run's states and item vectors, as `anyo test --run` has them; nothing is written."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from anyo_lightning.cli.lightning import AnyoCLI, run_lightning
from anyo_lightning.data.splits import Queries, Split, Stage
from anyo_lightning.errors import InputError
from anyo_lightning.evaluation.callback import RetrievalMetrics
from anyo_lightning.evaluation.index import dense_for_index
from anyo_lightning.evaluation.ranking import distinct_rows
from anyo_lightning.models.base import RetrievalModule
from anyo_lightning.runs import RunFolder


@dataclass(frozen=True, eq=False)
class Restored:
    """What a run knows of one stage.

    Attributes:
        split: The split.
        queries: All rows of the stage.
        rows: (rows,) numbers of the distinct rows, ascending.
        query_vectors: (rows, dim) their queries, float32.
        vectors: (catalogue, dim) all item vectors, float32.
        history_masked: Whether the run leaves the items of a history out.
    """

    split: Split
    queries: Queries
    rows: np.ndarray
    query_vectors: np.ndarray
    vectors: np.ndarray
    history_masked: bool


def restore(run: Path, *, stage: Stage = "test") -> Restored:
    """Encode the queries of a stage and all items, by the run's best checkpoint, on one device.

    Args:
        run: Run folder.
        stage: `test` or `validation`.

    Raises:
        InputError: The folder has no configuration or, for a trained model, no checkpoint that fits it; or the run is
            of a floor whose vectors are too large to write out.
    """
    if not RunFolder(run).config_file.is_file():
        raise InputError(f"Expected --run to name a run folder, got {run}, which has no config.yaml")
    one_process = ("--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto", "--trainer.logger=false")
    cli = run_lightning(["predict", f"--run={run}", *one_process], cli=partial(_RestoringCLI, stage=stage))
    assert isinstance(cli, _RestoringCLI)
    queries = cli.datamodule.queries(stage)
    vectors = dense_for_index(cli.catalogue.vectors)
    rows, query_vectors = (torch.cat([batch[key] for batch in cli.batches]).cpu() for key in ("row", "query"))
    metrics = next(c for c in cli.trainer.callbacks if isinstance(c, RetrievalMetrics))  # type: ignore[attr-defined]
    first = distinct_rows(rows.numpy(), queries.user, queries.target)
    return Restored(
        cli.datamodule.split,
        queries,
        rows.numpy()[first],
        query_vectors.to_dense().numpy()[first],
        vectors,
        metrics.history_masked,
    )


class _Catalogue(Callback):
    """Keeps the item vectors, made where and when a test would make them."""

    vectors: torch.Tensor

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Encode the catalogue."""
        assert isinstance(pl_module, RetrievalModule)
        self.vectors = pl_module.encode_catalogue().float()


class _RestoringCLI(AnyoCLI):
    """`anyo predict` that keeps what it finds instead of writing it."""

    batches: Sequence[Any]

    def __init__(self, *, stage: Stage, **settings: Any) -> None:
        self.stage, self.catalogue = stage, _Catalogue()
        super().__init__(**settings)

    def predict(self, model: LightningModule, **kwargs: Any) -> None:
        """Encode the stage's queries and the catalogue."""
        kwargs.pop("return_predictions", None)
        if self.stage == "validation":
            self.datamodule.predict_dataloader = self.datamodule.val_dataloader
        self.trainer.callbacks.append(self.catalogue)  # type: ignore[attr-defined]
        self.batches = self.trainer.predict(model, **self._with_checkpoint(kwargs)) or []
