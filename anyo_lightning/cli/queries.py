"""`anyo predict`: the test users' query vectors."""

from typing import Any

import numpy as np
import polars as pl
import torch
from lightning.pytorch import LightningModule, Trainer

from anyo_lightning import distributed
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.errors import InputError
from anyo_lightning.runs import RunFolder


def predict_queries(
    trainer: Trainer, model: LightningModule, data: RecDataModule, run: RunFolder, *, options: dict[str, Any]
) -> None:
    """Write them to the run's queries.parquet, unless that has more rows: those of a partial prediction.

    Args:
        trainer: On any number of processes.
        model: Gives `row` and `query`.
        data: Its data.
        run: Its run folder.
        options: What else the Trainer's `predict` takes.

    Raises:
        InputError: No batch is predicted.
    """
    found: list[Any] = trainer.predict(model, **options) or []
    if not found:
        raise InputError("Expected users to predict for, got none: trainer.limit_predict_batches is 0")
    rows, queries = (
        distributed.gather_rows(torch.cat([batch[key] for batch in found]).to(trainer.strategy.root_device))
        .cpu()
        .to_dense()  # a floor's are sparse
        .numpy()
        for key in ("row", "query")
    )
    if not trainer.is_global_zero:
        return
    rows, first = np.unique(rows, return_index=True)
    if (kept := run.queries_rows()) > len(first):
        print(f"Predicted {len(first)} rows: {run.path} keeps its {kept}")
        return
    users = data.split.user_ids[data.queries("test").user[rows]]
    run.write_queries(pl.DataFrame({"user_id": users.tolist(), "query": queries[first]}))
