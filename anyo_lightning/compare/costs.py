"""The cost ledger as columns: what each is called, how it is worked out from metrics.json, and how it is shown."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anyo_lightning.errors import InputError

NONE = "-"


@dataclass(frozen=True)
class Cost:
    """A column of the ledger.

    Attributes:
        key: The figure's name under `cost` in metrics.json.
        meaning: What a note below a table says of it.
        unit: What the stored figure is divided by to be shown.
        text: Shows the divided figure.
        axis: What a plot against it is titled; None where quality is not bought with it.
    """

    key: str
    meaning: str
    unit: float
    text: Callable[[float], str]
    axis: str | None = None

    def value(self, cost: Mapping[str, Any]) -> float | None:
        """The figure in its unit; None where a run has none."""
        stored = cost.get(self.key)
        return None if stored is None else stored / self.unit

    def shown(self, cost: Mapping[str, Any]) -> str:
        """The figure as text, a dash if there is none."""
        value = self.value(cost)
        return NONE if value is None else self.text(value)


def as_count(count: float) -> str:
    """`12`, `1.3K`, `2.4M`, `7.0B`."""
    for power, letter in ((9, "B"), (6, "M"), (3, "K")):
        if count >= 10**power:
            return f"{count / 10**power:.1f}{letter}"
    return f"{count:.0f}"


def as_figures(value: float) -> str:
    """Three figures that mean something, no exponent: `0.00312`, `4.56`, `1,234`."""
    if value == 0:
        return "0"
    return f"{value:,.0f}" if value >= 100 else f"{float(f'{value:.3g}'):.10f}".rstrip("0").rstrip(".")


COSTS: dict[str, Cost] = {
    "minutes": Cost("train_seconds", "of training", 60, "{:.1f}".format, "training minutes"),
    "tokens": Cost("tokens", "read in training", 1, as_count, "tokens read in training"),
    "targets": Cost("targets", "supervised in training", 1, as_count, "supervised targets"),
    "pflop": Cost(
        "flops", "10^15 FLOPs of training, counted in a sample of its steps", 1e15, as_figures, "training PFLOPs"
    ),
    "ndcg/pflop": Cost("ndcg@10_per_pflop", "test NDCG@10 for each PFLOP of training", 1, as_figures),
    "memory": Cost("peak_memory_gib", "GiB at the peak of training", 1, "{:.2f}".format, "peak memory, GiB"),
    "trained": Cost("trainable_parameters", "number of trained parameters", 1, as_count, "trained parameters"),
    "checkpoint": Cost("checkpoint_bytes", "MB of the best checkpoint", 1e6, as_figures, "checkpoint, MB"),
    "catalogue": Cost(
        "catalogue_encode_seconds", "seconds that all items' vectors took, frozen text vectors given", 1, as_figures
    ),
    "index": Cost("index_build_seconds", "seconds that the index took", 1, as_figures),
    "queries/s": Cost("queries_per_second", "searched in the index, encoding apart", 1, as_figures),
    "views": Cost("views_seconds", "minutes that an LLM wrote views, before training", 60, "{:.1f}".format),
}
DEFAULT_COSTS = ("minutes", "trained")


def choose_costs(names: Sequence[str] | str | None) -> tuple[str, ...]:
    """The columns that a user asks for: a name, a list of names, `all`; None is the default.

    Raises:
        InputError: There is no such column.
    """
    if names == "all":
        return tuple(COSTS)
    chosen = DEFAULT_COSTS if names is None else (names,) if isinstance(names, str) else tuple(names)
    if unknown := [name for name in chosen if name not in COSTS]:
        raise InputError(f"Expected columns to be all, or among {', '.join(COSTS)}; got {unknown[0]!r}")
    return chosen


def cost_notes(names: Sequence[str]) -> str:
    """One sentence that says what the columns are."""
    return "; ".join(f"{name}: {COSTS[name].meaning}" for name in names) + "."
