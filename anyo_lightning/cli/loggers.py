"""A run's loggers beside what Lightning does: a resumed run goes on in the W&B or MLflow run that it began.

loggers.json in the run folder keeps their ids, each by the logger's class and the place where it writes: the same run
in another project or experiment, or at another server, has another id.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger

from anyo_lightning.cli import launch
from anyo_lightning.runs import RunFolder

Options = dict[str, tuple[str, ...]]
IDS: Options = {"WandbLogger": ("id", "version"), "MLFlowLogger": ("run_id",)}  # that name a run, Lightning's first
PLACES: Options = {
    "WandbLogger": ("entity", "project"),
    "MLFlowLogger": ("tracking_uri", "save_dir", "experiment_name"),
}
# What counts where the option is not given. Of tracking_uri, MLFLOW_TRACKING_URI is Lightning's own default.
VARIABLES = {"entity": "WANDB_ENTITY", "project": "WANDB_PROJECT"}


@contextmanager
def going_on(logger: Any, run: RunFolder) -> Iterator[None]:
    """Give loggers the ids that the run folder keeps for them, within; config.yaml is not to have them.

    Args:
        logger: The value of `trainer.logger`, changed in place and put back.
        run: Where results go. A logger to which an id was given keeps that; where the server has no such run any more,
            another one begins.
    """
    kept, given = run.read_logger_ids(), []
    for entry in _entries(logger):
        own = any(entry.init_args.get(option) for option in _of(IDS, entry))
        if not own and (known := kept.get(_key(entry))) is not None and _is_there(entry, known):
            options = {_of(IDS, entry)[0]: known}
            if "resume" in entry.init_args and entry.init_args.resume is None:
                options["resume"] = "allow"  # Lightning's own default, in whose place a parsed null would overwrite
            for option, value in options.items():
                given.append((entry, option, entry.init_args.get(option)))
                entry.init_args[option] = value
    try:
        yield
    finally:
        for entry, option, before in given:
            entry.init_args[option] = before


def keep_ids(logger: Any, loggers: Sequence[Logger], run: RunFolder) -> None:
    """Write the loggers' ids into the run folder, those of other places left there.

    Args:
        logger: The value of `trainer.logger`.
        loggers: What it has become, in its order, on the process of rank zero.
        run: Where results go.
    """
    entries = _entries(logger)
    pairs = zip(entries, loggers, strict=True) if entries else ()
    found = {_key(entry): str(one.version) for entry, one in pairs if isinstance(one, WandbLogger | MLFlowLogger)}
    if found.items() - run.read_logger_ids().items():
        run.write_logger_ids(run.read_logger_ids() | found)


def log_settings(loggers: Sequence[Logger], settings: dict[str, Any]) -> None:
    """Tell loggers a run's settings; MLflow, which refuses to change one, keeps those with which a run began.

    Args:
        loggers: On the process of rank zero.
        settings: One level deep.
    """
    for logger in loggers:
        known = logger.experiment.get_run(logger.run_id).data.params if isinstance(logger, MLFlowLogger) else {}
        logger.log_hyperparams({name: value for name, value in settings.items() if name not in known})


def finish(loggers: Sequence[Logger]) -> None:
    """End W&B's run: it ends with its process otherwise, and the next run of this process would go on in it."""
    wandb: Any = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None and any(isinstance(one, WandbLogger) for one in loggers):
        wandb.finish()


def _entries(logger: Any) -> list[Namespace]:
    """The loggers of a configuration, in order."""
    found = logger if isinstance(logger, list) else [logger]
    return [entry for entry in found if isinstance(entry, Namespace)]


def _of(options: Options, entry: Namespace) -> tuple[str, ...]:
    return options.get(entry.class_path.rpartition(".")[2], ())


def _is_there(entry: Namespace, run_id: str) -> bool:
    """Whether a run can be gone on in: MLflow's may be gone; W&B makes one of that id where it has none."""
    if not entry.class_path.endswith(".MLFlowLogger") or launch.rank() != 0:  # elsewhere nothing is written
        return True
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    place = entry.init_args.tracking_uri or f"file:{entry.init_args.save_dir}"
    try:
        if MlflowClient(place).get_run(run_id).info.lifecycle_stage == "active":
            return True
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    print(f"MLflow has no run {run_id}, in which this one began: another one begins", file=sys.stderr)
    return False


def _key(entry: Namespace) -> str:
    """What tells a logger from another: its class and where it writes."""
    given, variables = entry.get("init_args", {}), os.environ
    places = (given.get(option) or variables.get(VARIABLES.get(option, "")) for option in _of(PLACES, entry))
    return " ".join([entry.class_path.rpartition(".")[2], *(str(place) for place in places if place)])
