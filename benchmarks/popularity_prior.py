"""How much of one run's gain over another is a better idea of what is popular.

    python benchmarks/popularity_prior.py BASELINE RUN [RUN ...]

Each run's logits get `strength` times the logarithm of one plus an item's training interactions; the strength that is
best for NDCG@10 on validation is taken to the test. It is one more dimension of the inner product: the strength in each
query, the logarithm in each item's vector. A strength of zero gives the run's own figures, and is checked to. Prints
NDCG@10 without and with it and the differences to the baseline, paired by user, with p corrected over the runs (Holm),
and below the validation of every strength.
Runs are of one split, and those with sparse vectors cannot take part.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from anyo_lightning.compare.columns import Column, as_change, as_p, number
from anyo_lightning.compare.render import markdown_table
from anyo_lightning.compare.stats import paired_differences
from anyo_lightning.data.splits import Stage
from anyo_lightning.evaluation.metrics import user_metrics
from anyo_lightning.evaluation.ranking import rank
from anyo_lightning.models.restored_run import RestoredRun, restore_run
from anyo_lightning.runs import RunFolder

STRENGTHS = (-0.7, -0.5, -0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
METRIC = "ndcg@10"
PASS = 16384  # items, or tokens, that are read at once


@dataclass(frozen=True, eq=False)
class Calibrated:
    """NDCG@10 of each user on the test, and the strength that validation chose."""

    folder: Path
    own: np.ndarray
    calibrated: np.ndarray
    strength: float
    validation: dict[float, float]  # of each strength


def main() -> None:
    """Calibrate every run, then compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    options = parser.parse_args()
    found = [calibrate(folder) for folder in options.runs]
    for texts in (comparison(found), validations(found)):
        columns = [Column(header, lines, ["plain"] * len(lines)) for header, lines in texts.items()]
        print("\n".join(markdown_table(columns)), end="\n\n")


def calibrate(folder: Path) -> Calibrated:
    """Choose the strength on validation and rank the test with and without it."""
    run = restore_run(folder, device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with run.as_evaluated(), torch.no_grad():
        vectors = run.model.encode_catalogue().float()
        validation, test = (encode(run, stage) for stage in ("validation", "test"))
    by_strength = {strength: ndcg(run, "validation", validation, vectors, strength) for strength in STRENGTHS}
    means = {strength: float(values.mean()) for strength, values in by_strength.items()}
    best = max(means, key=lambda strength: (means[strength], -abs(strength)))
    own = ndcg(run, "test", test, vectors, 0.0)
    recorded = RunFolder(folder).read_metrics()["metrics"][f"test/{METRIC}"]["value"]
    if abs(own.mean() - recorded) > 1e-4:
        raise SystemExit(f"{folder}: its test had {recorded:.4f}, here it has {own.mean():.4f}")
    return Calibrated(folder, own, ndcg(run, "test", test, vectors, best), best, means)


def encode(run: RestoredRun, stage: Stage) -> Tensor:
    """The state after each history of a stage, scaled so that its inner products are logits."""
    queries = run.data.queries(stage)
    histories = [queries.history(row) for row in range(len(queries.target))]
    return run.model.logit_scale() * run.model.encode_in_batches(histories, budget=PASS)


def ndcg(run: RestoredRun, stage: Stage, states: Tensor, vectors: Tensor, strength: float) -> np.ndarray:
    """NDCG@10 of each user with so much of the popularity in the scores."""
    counts = torch.from_numpy(run.data.split.training_counts()).to(vectors)
    queries = run.data.queries(stage)
    ranking = rank(
        np.arange(len(queries.target)),
        torch.cat([states, torch.full_like(states[:, :1], strength)], dim=1),
        torch.cat([vectors, counts.log1p()[:, None]], dim=1),
        queries.target,
        index=None,
        k=10,
        history=queries.history if run.history_masked else None,
    )
    return user_metrics(ranking.ranks, queries.user, [10])[METRIC]


def comparison(found: list[Calibrated]) -> dict[str, list[str]]:
    """A line for each run; differences are to the first."""
    texts: dict[str, list[str]] = {
        "variant": [run.folder.name for run in found],
        "strength": [number(run.strength, 1) for run in found],
        "validation": [number(run.validation[0.0], 4) for run in found],
        "validation, with it": [number(run.validation[run.strength], 4) for run in found],
    }
    for header, name in (("test", "own"), ("test, with it", "calibrated")):
        values = [getattr(run, name) for run in found]
        texts[header] = [number(float(of_run.mean()), 4) for of_run in values]
        differences = paired_differences(np.stack(values[1:], axis=1), values[0]) if values[1:] else []
        changes = [as_change(d.value, d.low, d.high, 4, clear=d.clear) for d in differences]
        texts[f"{header}: vs first"] = ["", *changes]
        texts[f"{header}: p"] = ["", *(as_p(difference.p_holm) for difference in differences)]
    return texts


def validations(found: list[Calibrated]) -> dict[str, list[str]]:
    """Each run's validation by strength."""
    by_strength = {number(one, 1): [number(run.validation[one], 4) for run in found] for one in STRENGTHS}
    return {"variant": [run.folder.name for run in found], **by_strength}


if __name__ == "__main__":
    main()
