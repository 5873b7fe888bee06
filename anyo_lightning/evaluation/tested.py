"""What a test leaves in a run folder: metrics.json, predictions.parquet and catalogue.parquet."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from anyo_lightning.evaluation.evaluation import Evaluation
from anyo_lightning.runs import LINEAGE, RunFolder


def write_results(
    run: RunFolder,
    evaluation: Evaluation,
    item_tokens: np.ndarray | None,
    cost: Mapping[str, Any],
    *,
    variant: str,
    seed: int | None,
    protocol: Mapping[str, Any],
    environment: Mapping[str, Any],
    lineage: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Write predictions.parquet, catalogue.parquet and, last, the metrics.json that marks a finished run.

    A test of some rows never replaces one of more.

    Args:
        run: Where they go.
        evaluation: What the test has found.
        item_tokens: (catalogue,) tokens of each item's text, where histories are read as text.
        cost: The ledger of training and serving.
        variant: Name of the variant.
        seed: Of the run.
        protocol: How it was ranked, beside cutoffs and counts of rows.
        environment: Where it was trained and tested.
        lineage: The runs that it has read, by the options that name them (`checkpoint_io.describe_run`).

    Returns:
        The content of metrics.json; None where what is there is kept.
    """
    split = evaluation.split
    before = run.read_metrics() if run.finished else None
    same_split = before is not None and before["split"]["fingerprint"] == split.fingerprint
    if before is not None and same_split and (rows := before["protocol"]["rows"]) > len(evaluation.rows):
        print(f"Tested {len(evaluation.rows)} rows: {run.path} keeps its results of {rows}")
        return None
    figures, cost = evaluation.figures("test/"), dict(cost)
    if cost.get("flops") and "test/ndcg@10" in figures:
        cost["ndcg@10_per_pflop"] = figures["test/ndcg@10"]["value"] / (cost["flops"] / 1e15)
    run.write_predictions(evaluation.predictions(item_tokens))
    counts = split.training_counts()
    catalogue = {"item_id": split.item_ids.tolist(), "text": split.item_texts, "training_count": counts}
    run.write_catalogue(pl.DataFrame(catalogue))
    metrics = {
        "variant": variant,
        "seed": seed,
        "split": {
            "name": split.name,
            "strategy": split.strategy,
            "ties": split.ties,
            "fingerprint": split.fingerprint,
            "counts": split.counts,
        },
        "protocol": {
            "cutoffs": list(evaluation.cutoffs),
            **protocol,
            "rows": len(evaluation.rows),
            "repeated_targets": split.repeated_targets("test"),
        },
        "metrics": figures,
        "slices": evaluation.slices("test/", item_tokens),
        "cost": cost,
        "environment": environment,
        **({LINEAGE: lineage} if lineage else {}),
    }
    run.write_metrics(metrics)
    return metrics


def training_cost(run: RunFolder, *, elsewhere: bool = False) -> dict[str, float]:
    """What a run's training took, as the last line of its curves.csv says, and the bytes of its best checkpoint.

    Args:
        run: Its folder.
        elsewhere: Whether results go to another folder: then also the size of what was trained, as the run's own
            results have it, since another catalogue's model has other rows.
    """
    curves = run.read_curves()
    if curves is None or curves.is_empty():
        return {}
    own = run.read_metrics()["cost"] if elsewhere and run.finished else {}
    sizes = {name: own[name] for name in ("trainable_parameters", "parameters") if name in own}
    checkpoint = run.best_checkpoint
    size = {"checkpoint_bytes": checkpoint.stat().st_size} if checkpoint.is_file() else {}
    last = curves.row(-1, named=True)
    same = ("tokens", "targets", "flops", "peak_memory_gib")
    names = {"train_seconds": "seconds", **{name: name for name in same}}
    return {name: last[column] for name, column in names.items() if last.get(column) is not None} | size | sizes
