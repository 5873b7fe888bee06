"""LightningCLI's fit, validate, test and predict, whose runs live in run folders."""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

import anyo_lightning
from anyo_lightning import checkpoint_io
from anyo_lightning.cli import launch, loggers
from anyo_lightning.cli.config_writer import ConfigWriter, as_written
from anyo_lightning.cli.main import STAGES
from anyo_lightning.cli.option_checks import check_monitor, check_precision, check_trainer
from anyo_lightning.cli.outcome import say_figures, say_interrupted, say_training
from anyo_lightning.cli.output import check_counted, check_no_output, output_folder
from anyo_lightning.cli.queries import predict_queries
from anyo_lightning.cli.resuming import Change, changes, check
from anyo_lightning.cli.run_config import at, config_name, with_config_of_run
from anyo_lightning.cli.run_options import add_run_options, callbacks
from anyo_lightning.cli.teach import teach
from anyo_lightning.cli.trainer import AnyoTrainer
from anyo_lightning.cli.words import nulls_as_configs
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.errors import InputError, fault_in_code, in_own_words
from anyo_lightning.hardware import fast_dtype
from anyo_lightning.models.base import RetrievalModule
from anyo_lightning.probes.probe import probe
from anyo_lightning.runs import RunFolder


def run_lightning(arguments: list[str], *, cli: "Callable[..., AnyoCLI] | None" = None) -> "AnyoCLI":
    """Run one of the stages.

    Args:
        arguments: The words of the command line, the stage first.
        cli: What to make instead of an `AnyoCLI`.

    Returns:
        The command line, with its trainer, model and data.
    """
    for name in anyo_lightning.__all__:  # imported, a class is found by its name alone in a yaml
        getattr(anyo_lightning, name)
    return (cli or AnyoCLI)(
        args=with_config_of_run(arguments),
        model_class=RetrievalModule,
        datamodule_class=RecDataModule,
        trainer_class=AnyoTrainer,
        subclass_mode_model=True,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        save_config_callback=ConfigWriter,
        save_config_kwargs={"save_to_log_dir": False},
        trainer_defaults={
            "default_root_dir": "runs",
            "gradient_clip_val": 1.0,
            "num_sanity_val_steps": 0,
            "use_distributed_sampler": False,
            "reload_dataloaders_every_n_epochs": 1,  # windows may depend on the epoch
            "enable_model_summary": False,
            "log_every_n_steps": 10,
        },
        parser_kwargs={name: {"exit_on_error": False} for name in STAGES} | {"exit_on_error": False, "prog": "anyo"},
    )


class AnyoCLI(LightningCLI):
    """LightningCLI whose runs live in run folders."""

    def __init__(self, **settings: Any) -> None:
        self.made_folder: RunFolder | None = None
        self.changed: list[Change] = []
        self.claim = contextlib.ExitStack()
        try:
            super().__init__(**settings)
        except Exception as error:
            if getattr(self, "trainer", None) is not None and self.trainer.global_step > 0:
                raise
            if self.made_folder is not None:
                self.made_folder.remove()  # nothing half-written stays
            if isinstance(error, InputError | ArgumentError) or (fault := fault_in_code(error)) is error:
                raise
            if fault is not None:
                raise fault from None  # what jsonargparse makes of it names no line
            reason = " ".join(str(error).split())[:400] or type(error).__name__
            raise InputError(f"Expected options with which a run can be set up, got: {reason}") from error
        finally:
            loggers.finish(getattr(getattr(self, "trainer", None), "loggers", []))
            self.claim.close()

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the words that were given, and no others: Lightning's own would warn that `sys.argv` has words, too."""
        try:
            self.config = parser.parse_args(nulls_as_configs(args))
        except UnicodeDecodeError as error:
            raise InputError(f"Expected configuration files in UTF-8, got other bytes: {error}") from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what every run has beside LightningCLI's own."""
        add_run_options(parser)

    def before_instantiate_classes(self) -> None:
        """Choose the run folder and let everything write there."""
        config = self.config[self.subcommand]
        if self.subcommand == "fit":  # a test watches nothing, and may be asked for other figures
            for option in ("checkpoint.monitor", "early_stopping.monitor"):
                check_monitor(option, config[option], config.metrics, str(config.model.class_path))
        self.probing, config.probe = config.probe, False  # of this command: no setting of the run
        self.output, config.output = output_folder(config, stage=str(self.subcommand), probing=self.probing), None
        if self.probing and self.subcommand != "test":
            raise InputError(f"Expected --probe with test, got it with {self.subcommand}")
        self.teaching, config.teach = config.teach, 0
        if self.teaching < 0 or (self.teaching and self.subcommand != "predict"):
            raise InputError(
                f"Expected --teach with predict and a positive number, got {self.teaching} with {self.subcommand}"
            )
        check_trainer(config)
        if self.subcommand == "fit":
            check_precision(config)
            check_no_output(config.run)
        self._choose_folder(config)
        before = self._config_of_trained_run()
        for name, value in list(config.model.items()):  # nested ones by their path
            if name.endswith(".dtype") and value == "auto":  # for config.yaml: a run keeps it on any machine
                config.model[name] = at(before, f"model.{name}") or fast_dtype()
        config.trainer.default_root_dir = str(self.results.path)  # for files of Lightning's own
        config.metrics.folder = self.results.path if self._writes_results(config) else None
        config.metrics.weights_of = None if self.output is None else self.run_folder.path
        fits = self.subcommand == "fit"
        self.save_config_kwargs |= {"run": self.results, "fits": fits, "tests": self.output is not None}
        seed = int(config.seed_everything)
        config.metrics.seed = seed
        if config.data.seed is None:
            config.data.seed = seed
        if before is not None:
            self.changed = self._checked_changes(before, self.run_folder.path)
        self.save_config_kwargs["changed"] = self.changed if self.output is None else []

    @property
    def results(self) -> RunFolder:
        """Where a test writes: the run folder, or the one that `--output` names."""
        return self.output or self.run_folder

    def _checked_changes(self, before: dict[str, Any], trained: Path) -> list[Change]:
        """What differs from the configuration of something trained; refused where it may not."""
        found = changes(before, as_written(self._parser(self.subcommand), self.config[self.subcommand]))
        decays = bool(at(before, "model.init_args.decay"))
        check(found, stage=str(self.subcommand), run=str(trained), decays=decays, output=self.output is not None)
        return found

    def _writes_results(self, config: Namespace) -> bool:
        """Whether a test's results are the run's: not those of another checkpoint than its best one."""
        named = self._checkpoint_named(config.get("ckpt_path"))
        if (
            self.subcommand != "test"
            or self.output is not None
            or named is None
            or Path(named).resolve() == self.run_folder.best_checkpoint.resolve()
        ):
            return True
        print(f"Testing {named}: {self.run_folder.path} keeps the results of its best checkpoint", file=sys.stderr)
        return False

    def _config_of_trained_run(self) -> dict[str, Any] | None:
        """The config.yaml of the run folder, where there are weights or, outside of fit, results that it describes.

        Raises:
            InputError: There are, and it is not there or not a configuration.
        """
        run = self.run_folder
        trained = run.last_checkpoint.is_file() or run.best_checkpoint.is_file()
        if not trained and (self.subcommand == "fit" or not run.finished):
            return None
        return run.read_config()

    def instantiate_classes(self) -> None:
        """Make the objects; a mistake that the constructor of a nested one names is told in its own words."""
        with in_own_words(), loggers.going_on(self.config[self.subcommand].trainer.logger, self.results):
            super().instantiate_classes()

    def _choose_folder(self, config: Namespace) -> None:
        """The run folder: named, or the next free one, or the one of the process that started this one."""
        made = False
        if config.run is not None:
            self.run_folder = RunFolder(config.run)
        elif (chosen := launch.folder_of_starter()) is not None:
            self.run_folder = RunFolder(chosen)
        elif launch.started_by_launcher() or launch.several_tasks() or config.trainer.num_nodes > 1:
            raise InputError("Expected --run FOLDER, so that all processes write into one, got none")
        else:
            self.run_folder, made = RunFolder.new(config.trainer.default_root_dir, config_name(config)), True
            launch.pass_folder_on(self.run_folder.path)
        if self.subcommand != "validate" and launch.rank() == 0:
            made |= self.claim.enter_context(self.results.claimed("--run" if self.output is None else "--output"))
        self.made_folder = self.results if made else None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add what every run has: TensorBoard, the cost ledger, the guards, checkpoints to resume from."""
        config = self.config[self.subcommand]
        if self.probing:
            kwargs["logger"] = False  # figures of probes are not the run's
        elif config.trainer.logger in (None, True):
            kwargs["logger"] = TensorBoardLogger(str(self.results.path), name="", version="", default_hp_metric=False)
        given = self.config_init[self.subcommand].trainer
        given.plugins = [*(given.plugins or []), checkpoint_io.AtomicCheckpoints()]
        if self.subcommand == "fit":
            defaults = self._parser("fit").get_defaults().checkpoint
            given.callbacks = [*(given.callbacks or []), *callbacks(config, self.run_folder, defaults=defaults)]
        return super().instantiate_trainer(**kwargs)

    def fit(self, model: RetrievalModule, *, ckpt_path: str | None = None, **kwargs: Any) -> None:
        """Train, from the last checkpoint where the run folder has one, then test the best checkpoint."""
        last, best = self.run_folder.last_checkpoint, self.run_folder.best_checkpoint
        if model.trained:
            start = self._checkpoint_named(ckpt_path) or (str(last) if last.is_file() else None)
            if start is not None:
                self._check_start(Path(start))
                model.restore_from(Path(start))
            self._train(model, start, **kwargs)
        elif self.trainer.world_size > 1:
            raise InputError(f"Expected one process to fit {type(model).__name__}, got {self.trainer.world_size}")
        if not self.config.fit.final_test or self.trainer.interrupted:
            return
        if model.trained and not best.is_file():
            print(f"Not tested: no epoch was validated, so that there is no {best}")
        else:
            data, checkpoint = kwargs.get("datamodule"), str(best) if best.is_file() else None
            self.trainer.test(model, data, ckpt_path=checkpoint, verbose=False)
            say_figures(self.trainer, self.results, tested=True)

    def _train(self, model: RetrievalModule, start: str | None, **kwargs: Any) -> None:
        """Train from a checkpoint.

        Raises:
            InputError: It is of a later epoch than the last one to be trained.
        """
        try:
            self.trainer.fit(model, ckpt_path=start, **kwargs)
            say_training(self.trainer)
        except SystemExit:
            if self.trainer.interrupted and self.trainer.is_global_zero:
                say_interrupted(self.run_folder)
            raise
        except MisconfigurationException as error:
            reached, last = self.trainer.current_epoch, self.trainer.max_epochs
            if last is None or last == -1 or reached <= last:
                raise
            raise InputError(
                f"Expected trainer.max_epochs of at least {reached}, which the run has reached, got {last}"
            ) from error

    def _check_start(self, start: Path) -> None:
        """Refuse to resume from another run's checkpoint with other settings than those beside it.

        Raises:
            InputError: The settings differ, or there are none.
        """
        if start.resolve().parent == self.run_folder.checkpoints.resolve() or not start.is_file():
            return
        before = RunFolder(start.parent.parent).read_config()
        self._checked_changes(before, start)

    def validate(self, model: LightningModule, **kwargs: Any) -> None:
        """Validate the run's best checkpoint."""
        self.trainer.validate(model, **self._with_checkpoint(kwargs))

    def test(self, model: LightningModule, **kwargs: Any) -> None:
        """Test the run's best checkpoint and write its results, or those of its probes."""
        options = self._with_checkpoint(kwargs)
        if self.output is not None and not self.model.trained:
            self.datamodule.prepare_data()
            check_counted(self.run_folder, self.datamodule.split, with_texts=bool(self.model.runs_read()))
        if self.probing:
            asked, checkpoint = self.config.test.probe_memory, options["ckpt_path"]
            probe(self.trainer, self.model, self.datamodule, self.run_folder, checkpoint=checkpoint, asked=asked)
            say_figures(self.trainer, self.results, tested=False)
        else:
            written = self.config.test.metrics.folder is not None
            self.trainer.test(model, **options | ({"verbose": False} if written else {}))
            say_figures(self.trainer, self.results, tested=written)

    def predict(self, model: LightningModule, **kwargs: Any) -> None:
        """Write the test users' query vectors, by the run's best checkpoint, to queries.parquet, or what it teaches."""
        kwargs.pop("return_predictions", None)
        options = self._with_checkpoint(kwargs)
        if self.teaching:
            teach(self.trainer, self.model, self.datamodule, self.run_folder, k=self.teaching, options=options)
        else:
            predict_queries(self.trainer, model, self.datamodule, self.run_folder, options=options)
        say_figures(self.trainer, self.results, tested=False)

    def _checkpoint_named(self, name: str | Path | None) -> str | None:
        """The run folder's own file for `best` and `last`, as Lightning's users name them.

        Of Lightning's `str | Path` jsonargparse gives either, by which of the two any library has named first.
        """
        own = {"best": self.run_folder.best_checkpoint, "last": self.run_folder.last_checkpoint}
        return None if name is None else str(own.get(str(name), name))

    def _with_checkpoint(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Let the Trainer load the run's best checkpoint, unless another is named or the model is not trained."""
        best, path = self.run_folder.best_checkpoint, self._checkpoint_named(kwargs.pop("ckpt_path", None))
        if path is None and self.model.trained:
            if not best.is_file():
                raise InputError(f"Expected --run with a trained run folder or --ckpt_path, got no {best}")
            path = str(best)
        if not self.model.trained:
            checkpoint_io.check_runs_read(self.run_folder, self.model.runs_read())
        if path is not None:
            model: RetrievalModule = self.model
            model.restore_from(Path(path), other_data=self.output is not None)
        return kwargs | {"ckpt_path": path}
