"""The command line `anyo`: LightningCLI's fit, validate, test and predict, and the small commands."""

import logging
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import polars as pl
import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from anyo_lightning.compare.table import compare
from anyo_lightning.costs import CostLedger
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.data.summary import print_summary, summarise, write_parquet
from anyo_lightning.encoders.backbone import load_tokenizer
from anyo_lightning.errors import InputError, argument_sentence
from anyo_lightning.evaluation.callback import RetrievalMetrics
from anyo_lightning.models import checkpoints
from anyo_lightning.models.anyo import Anyo  # noqa: F401
from anyo_lightning.models.base import RetrievalModule
from anyo_lightning.models.e4srec import E4SRec  # noqa: F401 - so that its name alone is enough in a yaml
from anyo_lightning.models.floors import EASE, Markov, Popularity  # noqa: F401
from anyo_lightning.models.sasrec import SASRec  # noqa: F401
from anyo_lightning.runs import RunFolder

MONITOR = "val/ndcg@10"
LIGHTNING = ("fit", "validate", "test", "predict")


class AnyoCLI(LightningCLI):
    """LightningCLI whose runs live in run folders."""

    def __init__(self, **settings: Any) -> None:
        self.made_folder: RunFolder | None = None
        try:
            super().__init__(**settings)
        except InputError:
            started = getattr(self, "trainer", None) is not None and self.trainer.global_step > 0
            if self.made_folder is not None and not started:
                shutil.rmtree(self.made_folder.path, ignore_errors=True)  # nothing half-written stays
            raise

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add `--run` and the callbacks that every run has."""
        parser.add_argument(
            "--run", type=Path | None, default=None, help="Run folder; by default the next free below default_root_dir."
        )
        parser.add_argument(
            "--final_test", type=bool, default=True, help="Whether fit ends with a test of the best checkpoint."
        )
        parser.add_lightning_class_args(RetrievalMetrics, "metrics")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(EarlyStopping, "early_stopping")
        parser.set_defaults(
            {
                "checkpoint.monitor": MONITOR,
                "checkpoint.mode": "max",
                "checkpoint.filename": "best",
                "checkpoint.enable_version_counter": False,
                "early_stopping.monitor": MONITOR,
                "early_stopping.mode": "max",
                "early_stopping.patience": 10,
                "early_stopping.strict": False,
            }
        )

    def before_instantiate_classes(self) -> None:
        """Choose the run folder and let everything write there."""
        config = self.config[self.subcommand]
        for option in ("checkpoint.monitor", "early_stopping.monitor"):
            _check_monitor(option, config[option], config.metrics.cutoffs)
        if config.run is not None:
            self.run_folder = RunFolder(config.run)
            self.made_folder = None if config.run.exists() else self.run_folder
        else:
            self.run_folder = self.made_folder = RunFolder.new(config.trainer.default_root_dir, _config_name(config))
        config.trainer.default_root_dir = str(self.run_folder.path)
        config.checkpoint.dirpath = str(self.run_folder.checkpoints)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add TensorBoard, the cost ledger and the learning-rate curve, unless the configuration says otherwise."""
        logger = self.config[self.subcommand].trainer.logger
        if logger in (None, True):
            kwargs["logger"] = TensorBoardLogger(str(self.run_folder.path), name="", version="")
        if self.subcommand == "fit":
            own = [CostLedger(), *([LearningRateMonitor("step")] if logger is not False else [])]
            given = self.config_init[self.subcommand].trainer.callbacks or []
            self.config_init[self.subcommand].trainer.callbacks = [*given, *own]
        trainer = super().instantiate_trainer(**kwargs)
        if self.subcommand == "fit":  # after the best checkpoint's callback, whose state it holds
            folder = self.run_folder.checkpoints
            last = ModelCheckpoint(folder, filename="last", enable_version_counter=False)
            trainer.callbacks.append(last)  # type: ignore[attr-defined]
        return trainer

    def fit(self, model: LightningModule, *, ckpt_path: str | None = None, **kwargs: Any) -> None:
        """Train, from the last checkpoint where the run folder has one, then test the best checkpoint."""
        last = self.run_folder.last_checkpoint
        start = ckpt_path or (str(last) if last.is_file() else None)
        if model.trained:
            if start is not None:
                checkpoints.load(Path(start))
            self.trainer.fit(model, ckpt_path=start, **kwargs)
        elif self.trainer.world_size > 1:
            raise InputError(f"Expected one process to fit {type(model).__name__}, got {self.trainer.world_size}")
        if self.config.fit.final_test and not self.trainer.interrupted:
            best = self.run_folder.best_checkpoint
            self.trainer.test(model, kwargs.get("datamodule"), ckpt_path=str(best) if best.is_file() else None)
            print(f"Run folder: {self.run_folder.path}")

    def validate(self, model: LightningModule, **kwargs: Any) -> None:
        """Validate the run's best checkpoint."""
        self.trainer.validate(model, **self._with_checkpoint(kwargs))

    def test(self, model: LightningModule, **kwargs: Any) -> None:
        """Test the run's best checkpoint and write its results."""
        self.trainer.test(model, **self._with_checkpoint(kwargs))
        print(f"Run folder: {self.run_folder.path}")

    def predict(self, model: LightningModule, **kwargs: Any) -> None:
        """Write the test users' query vectors, by the run's best checkpoint, to queries.parquet."""
        kwargs.pop("return_predictions", None)
        found: list[Any] = self.trainer.predict(model, **self._with_checkpoint(kwargs)) or []
        rows, queries = (torch.cat([batch[key].cpu() for batch in found]).numpy() for key in ("row", "query"))
        users = self.datamodule.split.user_ids[self.datamodule.queries("test").user[rows]]
        self.run_folder.write_queries(pl.DataFrame({"user_id": users.tolist(), "query": queries}))
        print(f"Run folder: {self.run_folder.path}")

    def _with_checkpoint(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The run's best checkpoint, unless another is named or the model is counted, not trained."""
        best = self.run_folder.best_checkpoint
        if kwargs.get("ckpt_path") is None and self.model.trained:
            if not best.is_file():
                raise InputError(f"Expected --run with a trained run folder or --ckpt_path, got no {best}")
            kwargs["ckpt_path"] = str(best)
        if kwargs.get("ckpt_path"):
            checkpoints.load(Path(kwargs["ckpt_path"]))
        return kwargs


class ConfigWriter(SaveConfigCallback):
    """Writes config.yaml when a stage really starts: a refused checkpoint leaves the run's own configuration alone."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it: what the checkpoint goes on with is known to fit."""
        super().setup(trainer, pl_module, "fit")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it where there is none: for a model that is counted, not trained."""
        if not RunFolder(trainer.default_root_dir).config_file.is_file():
            super().setup(trainer, pl_module, "test")


def data(dataset: RecDataModule, *, tokenizer: str, output: Path | None) -> None:
    """Print what was read and how it is split; write it as Parquet."""
    source = dataset.read()
    dataset.setup("fit")
    load = load_tokenizer(tokenizer)

    def count_tokens(texts: list[str]) -> np.ndarray:
        return np.array([len(ids) + 1 for ids in load(texts, add_special_tokens=False)["input_ids"]])  # + separator

    print_summary(summarise(dataset.split, source, count_tokens, dataset.max_tokens))
    if output is not None:
        write_parquet(dataset.split, output)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a user's mistake ends it with one line and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    _quiet()
    try:
        if arguments and arguments[0] in LIGHTNING:
            _run_lightning(arguments)
        else:
            _run_small_command(arguments or ["--help"])
    except InputError as error:
        _refuse(" ".join(str(error).split()))
    except ArgumentError as error:
        _refuse(argument_sentence(error))


def _refuse(sentence: str) -> NoReturn:
    print(f"anyo: error: {sentence}", file=sys.stderr)
    sys.exit(2)


def _run_lightning(arguments: list[str]) -> None:
    sys.argv[1:] = _with_config_of_run(arguments)  # where Lightning's launchers, too, read it
    AnyoCLI(
        model_class=RetrievalModule,
        datamodule_class=RecDataModule,
        subclass_mode_model=True,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        save_config_callback=ConfigWriter,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={
            "default_root_dir": "runs",
            "gradient_clip_val": 1.0,
            "num_sanity_val_steps": 0,
            "use_distributed_sampler": False,
            "reload_dataloaders_every_n_epochs": 1,  # windows may depend on the epoch
            "enable_model_summary": False,
            "log_every_n_steps": 10,
        },
        parser_kwargs={name: {"exit_on_error": False} for name in LIGHTNING} | {"exit_on_error": False},
    )


def _run_small_command(arguments: list[str]) -> None:
    parser = ArgumentParser(
        prog="anyo", description="LLMs as encoders, nearest-neighbour search as the recommender.", exit_on_error=False
    )
    commands = parser.add_subcommands(required=True)
    for name in LIGHTNING:
        commands.add_subcommand(name, ArgumentParser(), help=f"LightningCLI's {name}: anyo {name} --help")
    comparison = ArgumentParser(description="Compare runs in a table.", exit_on_error=False)
    comparison.add_argument("runs", nargs="+", type=Path, help="Run folders, or folders of run folders.")
    comparison.add_function_arguments(compare, skip={"runs"})
    commands.add_subcommand("compare", comparison, help="compare runs in a table")
    summary = ArgumentParser(description="Print what was read and how it is split.", exit_on_error=False)
    summary.add_class_arguments(RecDataModule)
    summary.add_argument("--tokenizer", default="smollm2-135m-instruct", help="The LLM whose tokens are counted.")
    summary.add_argument("--output", type=Path | None, default=None, help="Folder for the normalised Parquet files.")
    commands.add_subcommand("data", summary, help="print what was read and how it is split")
    settings = parser.parse_args(arguments)
    chosen = settings[settings.subcommand]
    if settings.subcommand == "compare":
        compare(**chosen.as_dict())
    else:
        chosen = summary.instantiate_classes(chosen)
        tokenizer, output = chosen.pop("tokenizer"), chosen.pop("output")
        data(RecDataModule(**chosen), tokenizer=tokenizer, output=output)


def _with_config_of_run(arguments: list[str]) -> list[str]:
    """Read the configuration from the run folder that `--run` names, unless one is given."""
    for i, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == "--run":
            file = RunFolder(value or arguments[min(i + 1, len(arguments) - 1)]).config_file
            given = any(a.partition("=")[0] in ("-c", "--config") for a in arguments)
            if file.is_file() and not given:
                return [arguments[0], f"--config={file}", *arguments[1:]]
    return arguments


def _check_monitor(option: str, monitor: str | None, cutoffs: list[int]) -> None:
    """Refuse, before training, to watch a metric that `RetrievalMetrics` will not log."""
    k = (monitor or "").rpartition("@")[2]
    if k.isdigit() and int(k) not in cutoffs:
        raise InputError(f"Expected {option} at one of metrics.cutoffs {cutoffs}, got {monitor}")


def _config_name(config: Namespace) -> str:
    """The stem of the first configuration file, else the model's name."""
    if config.get("config"):
        return Path(str(config.config[0])).stem
    return str(config.model.class_path).rpartition(".")[2].lower()


def _quiet() -> None:
    """Silence what tells a user nothing: Lightning's tips and the DataLoader's advice on workers."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Each new shape of a matrix product on a CPU is a compiled kernel of about 1 MB; by default 1,024 are kept.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's calls, not ours
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*smaller than the logging.*",
    ):
        warnings.filterwarnings("ignore", message=message)


if __name__ == "__main__":
    main()
