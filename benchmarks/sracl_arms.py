"""Where SRA-CL's gain comes from: its inter-user contrast with four sources of positives, and none, on Amazon Beauty.

    python benchmarks/sracl_arms.py --data FOLDER [--folder runs/sracl_arms] [--epochs 30] [--seeds 0 1 2] [--jobs 2]

FOLDER has `interactions.csv.gz` and `items.csv.gz`. The arms differ in `model.positives`, each by two scales, and have
the same epochs and seeds; a finished run is not repeated, an interrupted one resumes: for other epochs or options take
a new folder.
Prints, and writes to benchmarks/sracl_arms.md, each arm's difference to no contrast, paired by user. Further options of
`anyo fit` may follow, for all arms: `--model.alpha=0.02`.
"""

import argparse
import shlex
from pathlib import Path

from ablations import PROJECT, paired_table, train_rows

CONTROL = "no contrast"
POSITIVES = {
    "others' prefixes": "others",
    "own prefixes": "own",
    "own prefixes without target": "own_without_target",
    "all prefixes": "all",
}
COSINES = ["--model.unit_length=true", "--model.temperature=0.2", "--model.alpha=0.02"]
ARMS = {
    CONTROL: ["--model.alpha=0"],
    **{arm: [f"--model.positives={positives}"] for arm, positives in POSITIVES.items()},
    **{f"{arm}, cosines": [f"--model.positives={positives}", *COSINES] for arm, positives in POSITIVES.items()},
}
ABOUT = """\
# Where the gain of SRA-CL's inter-user contrast comes from

The state after a training prefix is drawn to a mixture of the states after its 10 most similar prefixes:
those of other users; those of the same user; those of the same user that do not contain the item to be predicted; or
all, as in the paper's code, its own user's included. Only training interactions, and never the prefix itself. States
are compared by inner products at weight .1, as in that code, or as cosines at temperature .2 and weight .02. No
intra-user contrast. SASRec as in that code (`configs/sracl_paper.yaml`), {epochs} epochs each; unlike there neighbours'
states are those of the epoch's start, without gradient (`model.bank`).

Made by `{command}`.
"""


def main() -> None:
    """Train what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("runs/sracl_arms"))
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; give each its threads: OMP_NUM_THREADS=1")
    options, further = parser.parse_known_args()
    folder, data = options.folder.resolve(), options.data.resolve()  # runs start in the project's folder
    common = [
        "--config=configs/sracl_paper.yaml",
        "--config=configs/overlays/beauty.yaml",
        f"--data.interactions={data / 'interactions.csv.gz'}",
        f"--data.items={data / 'items.csv.gz'}",
        "--data.batch_tokens=5274",  # 256 prefixes, as in the code; the overlay's batches are of whole histories
        "--model.beta=0",
        f"--trainer.max_epochs={options.epochs}",
        *further,
    ]
    train_rows(folder, common, ARMS, seeds=options.seeds, jobs=options.jobs)
    seeds = " ".join(map(str, options.seeds))
    command = "python benchmarks/sracl_arms.py --data FOLDER"
    command += f" --epochs {options.epochs} --seeds {seeds} {shlex.join(further)}".rstrip()
    about = ABOUT.format(epochs=options.epochs, command=command)
    text = f"{about}\n{paired_table(folder, CONTROL)}"
    (PROJECT / "benchmarks" / "sracl_arms.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
