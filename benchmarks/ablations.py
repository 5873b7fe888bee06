"""What each contrastive term is worth: the same run with it and without it, three seeds each, on ML-100K.

    python benchmarks/ablations.py [--folder runs/ablations] [--seeds 0 1 2] [--only sracl ...] [--jobs 2]

A finished run is not repeated, an interrupted one resumes: after a change to code or configs, take a new folder.
Rows of a table differ only in the named options; they have the same epochs, not the same minutes. Prints, and writes to
benchmarks/ablations.md, each row's paired difference to the first row, whatever its sign; tables of other terms stay.
CLLMRec compares with what `anyo augment --kind summarise` has written: run that first.
"""

import argparse
import io
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import redirect_stdout
from pathlib import Path

from anyo_lightning.compare.environments import describe_environments
from anyo_lightning.compare.find_runs import find_runs
from anyo_lightning.compare.table import compare
from anyo_lightning.runs import RunFolder

PROJECT = Path(__file__).parents[1]
ONE_LAYER = ["--model.encoders.backbone.layers=1"]
PRETRAINED = "llara_pretrain/llara_pretrain/version_0"  # below the folder of all runs
SOURCE = (
    "Made by `python benchmarks/ablations.py`. Intervals and tests are over users, given these seeds; sd is over seeds."
)
# What LLaRA and its pre-training both read: titles, and a prompt behind an item's.
SAME_TEXTS = ["--data.template={movie_title}", "--model.encoders.self_prompt= This one."]
# Term: what it is, its configuration, what its runs have in common, and each run's own options; the first is "without".
TERMS: dict[str, tuple[str, str, list[str], dict[str, list[str]]]] = {
    "cllmrec": (
        "CLLMRec: the contrast between a history and the LLM's summary of it, one layer, 3 epochs, 50 items",
        "cllmrec",
        [*ONE_LAYER, "--data.max_items=50"],  # summaries are of 20 items each
        {"without": ["--model.weight=0"], "with": []},
    ),
    "cllmrec_importance": (
        "CLLMRec by a third party's equations: views without the least and the most important quarter, one layer, "
        "3 epochs, 20 items, 128 anchors",
        "cllmrec_importance",
        [*ONE_LAYER, "--model.anchors=128"],
        {"without": ["--model.weight=0"], "weight .01": ["--model.weight=0.01"], "weight .1": ["--model.weight=0.1"]},
    ),
    "sracl": (
        "SRA-CL on SASRec: contrasts with semantic neighbours, 256 prefixes per step, 20 epochs",
        "sracl_paper",
        ["--data.shuffle_ties=true", "--trainer.max_epochs=20"],
        {
            "without": ["--model.alpha=0", "--model.beta=0"],
            "inter-user": ["--model.beta=0"],
            "intra-user": ["--model.alpha=0"],
            "with both": [],
        },
    ),
    "sracl_text": (
        "SRA-CL on text: both contrasts by cosines, as in `sracl.yaml`, and none, one layer, 8 epochs, 50 items",
        "sracl",
        [*ONE_LAYER, "--trainer.max_epochs=8", "--data.max_items=50"],
        {"without": ["--model.alpha=0", "--model.beta=0"], "with both": []},
    ),
    "sracl_bank": (
        "SRA-CL on text: neighbours' states from a bank or encoded in each step, one layer, 3 epochs, 20 items",
        "sracl",
        ONE_LAYER,
        {"bank": [], "encoded anew": ["--model.bank=false"]},
    ),
    "llara_pretrain": (
        "LLaRA's pre-training, from which the next rows start",
        "llara_pretrain",
        [*ONE_LAYER, *SAME_TEXTS, "--data.max_items=1"],
        {"llara_pretrain": []},
    ),
    "llara": (
        "LLaRA: mined negatives, and the pre-trained start (why it fails: tried.md), one layer, two epochs, 20 items",
        "llara",
        [*ONE_LAYER, *SAME_TEXTS, "--trainer.max_epochs=2"],  # mining begins after the first
        {
            "cold start, no mined negatives": ["--model.hard_negatives=0"],
            "cold start, mined negatives": [],
            "pre-trained, no mined negatives": ["--model.hard_negatives=0", "PRETRAINED"],
            "pre-trained, mined negatives": ["PRETRAINED"],
        },
    ),
}


def main() -> None:
    """Train what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=TERMS, default=list(TERMS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; give each its threads: OMP_NUM_THREADS=1")
    options = parser.parse_args()
    options.folder = options.folder.resolve()  # runs start in the project's folder
    start = f"--model.init_from={options.folder / PRETRAINED}"
    for name in options.only:  # one after another: LLaRA's runs start from its pre-training
        _, config, common, rows = TERMS[name]
        train_rows(
            options.folder / name,
            [f"--config=configs/{config}.yaml", "--config=configs/overlays/ablation.yaml", *common],
            {row: [start if option == "PRETRAINED" else option for option in own] for row, own in rows.items()},
            seeds=options.seeds if name != "llara_pretrain" else [0],
            jobs=options.jobs,
        )
    write(options.folder, options.only)


def train_rows(
    folder: Path, common: Sequence[str], rows: Mapping[str, Sequence[str]], *, seeds: Sequence[int], jobs: int
) -> None:
    """The runs of a table, each in `folder/row/version_seed`, seed by seed."""
    with ThreadPoolExecutor(jobs) as pool:
        runs = [
            pool.submit(
                train,
                folder / row / f"version_{seed}",
                *common,
                *own,
                f"--metrics.variant={row}",
                f"--seed_everything={seed}",
            )
            for seed in seeds
            for row, own in rows.items()
        ]
        try:
            for run in as_completed(runs):
                run.result()
        except BaseException:  # also an interruption: start no further runs
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def train(folder: Path, *words: str) -> None:
    """One run, unless it is finished."""
    if not RunFolder(folder).finished:
        command = [sys.executable, "-m", "anyo_lightning", "fit", *words, f"--run={folder}"]
        subprocess.run([*command, "--trainer.enable_progress_bar=false"], check=True, cwd=PROJECT)


def paired_table(folder: Path, baseline: str) -> str:
    """The runs below a folder, each row's difference to the baseline paired by user, and what they ran on."""
    with redirect_stdout(io.StringIO()) as printed:
        compare([folder], baseline=baseline, format="markdown")
    runs = describe_environments([run.read_metrics()["environment"]["training"] for run in find_runs(folder)[0]])
    return f"{printed.getvalue().strip()}\n\nRuns on {runs}.\n"


def write(folder: Path, names: Sequence[str]) -> None:
    """The tables of some terms; the page keeps those of the others."""
    page = PROJECT / "benchmarks" / "ablations.md"
    parts = page.read_text().split("\n## ")[1:] if page.is_file() else []
    tables = {part.split(",")[0]: part for part in parts}  # a title says what up to its first comma, and how after it
    for name in names:
        what, *_, rows = TERMS[name]
        if len(rows) > 1:
            tables[what.split(",")[0]] = f"{what}\n\n{paired_table(folder / name, next(iter(rows)))}"
    parts = ["# What each contrastive term is worth", SOURCE]
    parts += [f"## {table.strip()}" for table in tables.values()]
    text = "\n\n".join(parts) + "\n"
    page.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
