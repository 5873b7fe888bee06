"""What may change on a run that exists: it takes effect and is recorded; everything else is refused.

A run's config.yaml describes the weights beside it. `fit --run` on a run that has been trained resumes it, and
`validate`, `test` and `predict` use it, with the settings that it has been trained with.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from anyo_lightning.defaults import at_default, by_path
from anyo_lightning.errors import InputError
from anyo_lightning.runs import RUN_OPTIONS, RunFolder

# Where and how fast a run computes, what it shows, and where its data lie now: fingerprints tell whose they are.
ANYWHERE = (
    *("trainer.accelerator", "trainer.strategy", "trainer.devices", "trainer.num_nodes"),
    *("trainer.logger*", "trainer.enable_*", "trainer.log_every_n_steps", "trainer.profiler"),
    *("trainer.default_root_dir", "trainer.max_time", "trainer.num_sanity_val_steps", "trainer.detect_anomaly"),
    *("trainer.deterministic", "trainer.benchmark", "trainer.inference_mode", "trainer.barebones"),
    *("trainer.limit_test_batches", "trainer.limit_predict_batches"),
    *("trainer.fast_dev_run", "trainer.model_registry"),
    *("data.source", "data.interactions", "data.items", "data.num_workers", "data.evaluation_batch_tokens"),
    *("*backbone.init_args.gradient_checkpointing", "*backbone.init_args.sharded"),
    *("*.views_from", "data.micro_batch_tokens"),
    *("run", "config", "final_test", "save_every_n_steps", "probe", "probe_memory", "metrics.variant", "metrics.top_k"),
    *("metrics.extra", "teach"),
)
# What lies elsewhere may do so as long as it is called the same: its content need not be there to be compared.
MOVED = (
    *("*backbone.init_args.name", "*.semantics.init_args.name"),
    *(f"model.*{name}" for name in RUN_OPTIONS),
)
# What a test may change whose results go to a folder of their own: the protocol, and the data.
TESTED = (
    *("metrics.*", "data.source", "data.interactions", "data.items", "data.columns.*", "data.template"),
    *("data.duplicates", "data.k_core", "data.rating_threshold", "data.ties", "data.ties_seed"),
    *("data.strategy", "data.ratios", "data.times", "data.quantiles"),
)
# Refused where the learning rate falls along a cosine that was planned for the run's own number of steps.
PLANNED = ("trainer.max_epochs", "trainer.max_steps", "data.batch_tokens")
DECIDES_BEST = ("checkpoint.monitor", "checkpoint.mode")


@dataclass(frozen=True)
class Change:
    """An option whose value is not that of the run's config.yaml."""

    option: str
    before: Any
    after: Any


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """The options whose values differ; one that the run's version did not have is none at its default.

    Args:
        before: The run's config.yaml.
        after: The configuration of the command at hand, written and read the same way.
    """
    old, new = by_path(before), by_path(after)
    added = [
        option
        for option in new
        if option not in old and option.startswith(("model.", "data.")) and not at_default(option, new)
    ]
    gone = [option for option in old if option not in new and option.startswith(("model.", "data."))]
    kept = [option for option in old if option in new and repr(old[option]) != repr(new[option])]  # 1 is not 1.0
    whole = {
        option: {n: v for n, v in new.items() if n.startswith(f"{option}.")} for option in gone
    }  # null became these
    return [Change(o, old.get(o), new.get(o, whole.get(o) or None)) for o in (*kept, *gone, *added)]


def check(found: list[Change], *, stage: str, run: str, decays: bool, output: bool = False) -> None:
    """Refuse what may not change.

    Args:
        found: All changes.
        stage: `fit`, `validate`, `test` or `predict`.
        run: The run folder, for the sentence.
        decays: Whether the run's learning rate falls along a cosine.
        output: Whether results go to a folder of their own.

    Raises:
        InputError: Naming the first option, with both values.
    """
    for change in found:
        allowed = any(fnmatch(change.option, pattern) for pattern in ANYWHERE)
        if any(fnmatch(change.option, pattern) for pattern in MOVED):
            allowed = _called(change.before) == _called(change.after)
        if stage == "fit":
            allowed |= change.option in PLANNED and not decays
            allowed |= fnmatch(change.option, "checkpoint.*") and change.option not in DECIDES_BEST
        else:
            allowed |= change.option in PLANNED[:2] or change.option.startswith(("early_stopping.", "checkpoint."))
        tested = stage == "test" and any(fnmatch(change.option, pattern) for pattern in TESTED)
        allowed |= tested and output
        if not allowed:
            why = ", which its cosine of learning rates was planned for" if change.option in PLANNED else ""
            option = change.option.replace(".init_args", "")
            raise InputError(
                f"Expected {option} {_word(change.before)}, with which {run} was trained{why}, got "
                f"{_word(change.after)}: without --config a run keeps its settings, and --run NEW is another run"
                f"{', or give --output FOLDER for such results' if tested else ''}"
            )


def _called(place: Any) -> tuple[Any, ...]:
    """What a model or a run is called wherever it lies: the folder's name, of a numbered run the one above, too."""
    if isinstance(place, list):
        return tuple(map(_called, place))
    path = Path(str(place))
    return (RunFolder(path).variant, path.name)


def _word(value: Any) -> str:
    return "null" if value is None else str(value)
