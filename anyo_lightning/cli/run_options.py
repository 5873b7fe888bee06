"""What every run has beside LightningCLI's own: its options, and the callbacks of a training."""

from pathlib import Path

from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser

from anyo_lightning.evaluation.callback import RetrievalMetrics
from anyo_lightning.runs import RunFolder
from anyo_lightning.training.checkpointing import BestCheckpoint, LastCheckpoint, StepCheckpoint
from anyo_lightning.training.cost_ledger import CostLedger
from anyo_lightning.training.guards import Guards

MONITOR = "val/ndcg@10"


def add_run_options(parser: LightningArgumentParser) -> None:
    """Add the options to a stage's parser."""
    parser.add_argument(
        "--run",
        type=Path | None,
        default=None,
        help="Run folder: fit resumes what is in it; by default the next free one below trainer.default_root_dir.",
    )
    parser.add_argument(
        "--output",
        type=Path | None,
        default=None,
        help="With test: a folder for the results of --run's weights under other metrics.* or on other data.",
    )
    parser.add_argument(
        "--final_test", type=bool, default=True, help="Whether fit ends with a test of the best checkpoint."
    )
    parser.add_argument(
        "--save_every_n_steps",
        type=int,
        default=0,
        help="Steps between checkpoints to resume from, within an epoch; 0: at the end of each epoch only.",
    )
    parser.add_argument(
        "--probe",
        action="store_true",
        help="With test: how figures change with the order and length of histories and with items' texts; "
        "written to probes.json.",
    )
    parser.add_argument(
        "--probe_memory",
        type=int,
        default=200,
        help="With --probe: titles and users for which the bare LLM is asked what it remembers; 0 leaves it out.",
    )
    parser.add_argument(
        "--teach",
        type=int,
        default=0,
        help="With predict: length of the lists that are written for a Student, one per training boundary, beside all "
        "item vectors; 20 is enough for most.",
    )
    parser.add_lightning_class_args(RetrievalMetrics, "metrics")
    parser.add_class_arguments(ModelCheckpoint, "checkpoint")
    parser.add_lightning_class_args(EarlyStopping, "early_stopping")
    parser.set_defaults(
        {
            "checkpoint.monitor": MONITOR,
            "checkpoint.mode": "max",
            "early_stopping.monitor": MONITOR,
            "early_stopping.mode": "max",
            "early_stopping.patience": 10,
            "early_stopping.strict": False,
        }
    )


def callbacks(config: Namespace, run: RunFolder, *, defaults: Namespace) -> list[Callback]:
    """What every training has; the best checkpoint comes before the others, which hold its state.

    Args:
        config: Of `fit`.
        run: Run folder.
        defaults: Of `checkpoint`: a ModelCheckpoint is added where its options differ from them.
    """
    wanted, usual = config.checkpoint.as_dict(), defaults.as_dict()
    own: list[Callback] = [CostLedger(run), Guards(run)]
    if config.trainer.logger is not False:
        own.append(LearningRateMonitor("step"))
    own.append(BestCheckpoint(run, monitor=wanted["monitor"], mode=wanted["mode"]))
    if any(wanted[name] != usual[name] for name in wanted.keys() - {"monitor", "mode"}):
        own.append(ModelCheckpoint(**wanted | {"dirpath": wanted["dirpath"] or run.checkpoints}))
    own.append(LastCheckpoint(run))
    if config.save_every_n_steps:
        own.append(StepCheckpoint(run, every=config.save_every_n_steps))
    return own
