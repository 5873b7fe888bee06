"""Options that Lightning would refuse late, with a traceback, or never: refused before a folder is made."""

from pathlib import Path

from jsonargparse import Namespace

from anyo_lightning.errors import InputError

LOGGED = ("val/hr", "val/recall", "val/ndcg", "val/mrr", "val/popularity", "val/coverage", "val/gini", "val/seconds")
LOGGED_BY = {"CSFT": ("val/title_loss",)}  # what a class logs beside these
PRECISIONS = (None, 32, 16, "32", "32-true", "16", "16-mixed", "bf16", "bf16-mixed")  # trained weights stay float32


def check_trainer(config: Namespace) -> None:
    """Refuse what Lightning or we would only find later, or never."""
    least = {"trainer.num_nodes": 1, "data.num_workers": 0, "save_every_n_steps": 0, "early_stopping.patience": 0}
    for option, value in least.items():
        if config[option] < value:
            raise InputError(f"Expected {option} to be at least {value}, got {config[option]}")
    strategy = config.trainer.strategy
    if not isinstance(strategy, str) or not strategy.startswith(("auto", "ddp", "single_device")):
        raise InputError(f"Expected trainer.strategy auto or one of Lightning's ddp strategies, got {strategy}")
    if not config.trainer.enable_checkpointing and config.trainer.enable_checkpointing is not None:
        raise InputError("Expected trainer.enable_checkpointing true: the best checkpoint is what is tested, got false")
    precision = config.trainer.precision
    if precision not in PRECISIONS:
        shown = ", ".join(sorted({str(name) for name in PRECISIONS if isinstance(name, str)}))
        raise InputError(f"Expected trainer.precision among {shown}, got {precision}")
    if config.checkpoint.filename in ("best", "last"):
        raise InputError(
            f"Expected checkpoint.filename other than best and last, which are the run's own, got "
            f"{config.checkpoint.filename}"
        )
    if config.run == Path():
        raise InputError("Expected --run to name a folder for the run, got the working directory")
    if config.trainer.overfit_batches:
        raise InputError(
            f"Expected trainer.overfit_batches 0, got {config.trainer.overfit_batches}: to train on few batches give "
            "trainer.limit_train_batches"
        )


def check_precision(config: Namespace) -> None:
    """Refuse to train through float16 without a loss scaler: small gradients would become zero there."""
    precision = config.trainer.precision
    for name, value in config.model.items():  # nested ones by their path
        if name.endswith(".dtype") and value == "float16" and precision != "16-mixed":
            option = f"model.{name}".replace(".init_args", "")
            raise InputError(
                f"Expected trainer.precision 16-mixed, whose loss scaler {option} float16 needs, got "
                f"{'null' if precision is None else precision}"
            )


def check_monitor(option: str, monitor: str | None, metrics: Namespace, model: str) -> None:
    """Refuse, before training, to watch a metric that nobody will log; a model of the user's own may log others."""
    name, _, k = (monitor or "").partition("@")
    if k.isdigit() and int(k) not in metrics.cutoffs:
        raise InputError(f"Expected {option} at one of metrics.cutoffs {metrics.cutoffs}, got {monitor}")
    if monitor == "val/ild@1":
        raise InputError(f"Expected {option} of lists with pairs of items, val/ild@2 or more, got val/ild@1")
    logged = LOGGED + tuple(f"val/{name}" for name in metrics.extra) + LOGGED_BY.get(model.rpartition(".")[2], ())
    if name not in logged and not name.startswith("train/") and model.startswith("anyo_lightning."):
        raise InputError(f"Expected {option} among {', '.join(logged)} (and @k), got {monitor}")
