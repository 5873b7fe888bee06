"""`ConfigWriter`: a run's settings in its config.yaml and in its loggers."""

from collections.abc import Sequence
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from anyo_lightning.checkpoint_io import check_counted
from anyo_lightning.cli.loggers import keep_ids, log_settings
from anyo_lightning.cli.resuming import Change
from anyo_lightning.disk import renamed_to
from anyo_lightning.runs import RunFolder

OF_ONE_COMMAND = ("ckpt_path", "weights_only", "verbose")  # the next one on the same folder is not to be given them
# known wherever the run is
OF_THE_FOLDER = ("run", "output", "trainer.default_root_dir", "metrics.folder", "metrics.seed", "metrics.weights_of")


class ConfigWriter(SaveConfigCallback):
    """Writes config.yaml when a stage really starts: a refused checkpoint leaves the run's own configuration alone.

    Loggers learn the settings when training starts; TensorBoard's also with the test's figures, for its HParams tab.
    """

    def __init__(
        self, *arguments: Any, run: RunFolder, changed: Sequence[Change], fits: bool, tests: bool, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self.parser_of_fit, self.tests = fits, tests
        self.run, self.changed, self.written = run, changed, False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write nothing yet; a floor, which has no checkpoint that would not fit, is counted anew by fit alone.

        Raises:
            InputError: It would be counted on other data than the run's.
        """
        if not (self.parser_of_fit or self.tests or getattr(pl_module, "trained", True)):
            check_counted(self.run, trainer.datamodule.split)  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it: the checkpoint is known to fit. Earlier figures are no longer the run's."""
        if trainer.is_global_zero:
            for file in (self.run.metrics_file, self.run.probes_file, self.run.index_page_file):
                file.unlink(missing_ok=True)
        self._record(trainer, pl_module)
        if trainer.is_global_zero:
            log_settings(trainer.loggers, self._settings())
            keep_ids(self.config.trainer.logger, trainer.loggers, self.run)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the test's figures beside the settings."""
        if trainer.is_global_zero and trainer.loggers:
            keep_ids(self.config.trainer.logger, trainer.loggers, self.run)
        shown = ("test/hr", "test/ndcg")
        figures = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(shown)}
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(self._settings(), figures, trainer.global_step)

    def _settings(self) -> dict[str, Any]:
        """What a run is made of, one level deep: the model's own settings first, as an HParams table sorts by name."""
        found = self.config.as_dict()
        model = {"model": found["model"]["class_path"].rpartition(".")[2], **found["model"].get("init_args", {})}
        data = {name: value for name, value in found["data"].items() if name != "columns"}
        trainer = {name: found["trainer"][name] for name in ("max_epochs", "max_steps", "precision")}
        kept = {**model, "data": data, "trainer": trainer, "seed": found["seed_everything"]}
        return {name: value for name, value in _flat(kept).items() if value is not None}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it where fit had nothing to train (counted, or finished), or where a test has a folder of its own."""
        fits = self.parser_of_fit or not self.run.config_file.is_file()
        counted = not getattr(pl_module, "trained", True)
        if self.tests or (fits and not self.written and (self.changed or counted)):
            self._record(trainer, pl_module)

    def _record(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.run.add_changes([(trainer.global_step, c.option, c.before, c.after) for c in self.changed])
        self.written = True
        super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it to the run folder, whatever the logger: Lightning's own place is the first logger's folder."""
        with renamed_to(self.run.config_file) as temporary:
            temporary.write_text(_text(self.parser, self.config), encoding="utf-8")


def as_written(parser: ArgumentParser, config: Namespace) -> dict[str, Any]:
    """A configuration as config.yaml has it."""
    found: dict[str, Any] = yaml.safe_load(_text(parser, config))
    return found


def _text(parser: ArgumentParser, config: Namespace) -> str:
    config = config.clone()
    for name in (*OF_ONE_COMMAND, *OF_THE_FOLDER):
        config.pop(name, None)
    return str(parser.dump(config, skip_none=False))


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """`{"a": {"init_args": {"b": 1}}}` as `{"a.b": 1}`; what is neither a number nor a word becomes its text."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            prefix = "" if name == "init_args" else f"{name}."
            found |= {prefix + inner: content for inner, content in _flat(value).items()}
        else:
            found[name] = value if value is None or isinstance(value, bool | int | float | str) else str(value)
    return found
