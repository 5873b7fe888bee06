"""The content of probes.json as columns, for the terminal and the report."""

from typing import Any

from anyo_lightning.compare.columns import Column, Style, as_change, half_of_interval, number, title

MEMORY = {
    ("titles", "completed"): "titles completed",
    ("titles", "log_likelihood"): "  log-likelihood per token",
    ("next_items", "completed"): "next items named",
    ("next_items", "log_likelihood"): "  log-likelihood per token",
}
PROBE_NOTE = (
    "change: to the run as it is, paired by user, ± half of its 95% bootstrap interval; * significant (sign-flip "
    "permutation, Holm-corrected over the probes, 5%). left: of the last figure."
)
MEMORY_NOTE = "control: the second half of another title; the next item after another user's history."


def shown_metrics(content: dict[str, Any]) -> list[str]:
    """HR and NDCG at 10, or at the largest cutoff if 10 is not one."""
    cutoffs = [int(name.partition("@")[2]) for name in content["figures"] if name.startswith("test/ndcg@")]
    k = 10 if 10 in cutoffs else max(cutoffs)
    return [f"test/hr@{k}", f"test/ndcg@{k}"]


def probe_columns(content: dict[str, Any]) -> list[Column]:
    """One line per probe: each figure, its paired difference to the run as it is, and the share that is left."""
    metrics = shown_metrics(content)
    names = list(content["figures"][metrics[0]])
    plain: list[Style] = ["plain"] * len(names)
    shown = [name.replace("titles shuffled in ", "  in ") for name in names]
    columns = [Column("probe", shown, plain)]
    for metric in metrics:
        of_metric = content["figures"][metric]
        figures = [of_metric[name] for name in names]
        texts = [number(f["value"], 3) + half_of_interval(f["low"], f["high"], 3) for f in figures]
        columns.append(Column(title(metric), texts, plain))
        differences = [of_metric[name]["difference"] for name in names[1:]]
        columns.append(Column("change ", ["", *map(_change, differences)], plain))
    whole = figures[0]["value"]
    left = [f"{figure['value'] / whole:.0%}" if whole else "-" for figure in figures]
    return [*columns, Column("left", left, plain)]


def memory_columns(content: dict[str, Any]) -> list[Column]:
    """One line per question to the bare LLM: what it got right, the control's value, and their paired difference."""
    lines = [(words, content["memory"][what], name) for (what, name), words in MEMORY.items()]
    plain: list[Style] = ["plain"] * len(lines)
    figures = [of[name] for _, of, name in lines]
    return [
        Column("question", [question for question, _, _ in lines], plain),
        Column("asked", [str(of["asked"]) for _, of, _ in lines], plain),
        Column("value", [number(figure["value"], 3) for figure in figures], plain),
        Column("control", [number(figure["control"], 3) for figure in figures], plain),
        Column("difference ", [_change(figure["difference"]) for figure in figures], plain),
    ]


def _change(difference: dict[str, float]) -> str:
    value, low, high = (difference[name] for name in ("value", "low", "high"))
    return as_change(value, low, high, 3, clear=difference["p_holm"] < 0.05)
