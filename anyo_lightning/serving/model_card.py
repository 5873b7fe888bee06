"""The model card of an exported run: what it is for, how it is used, its figures, cost, licences and limits."""

import fnmatch
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from anyo_lightning.data.sources import GROUPLENS_TERMS
from anyo_lightning.llm.aliases import ALIASES
from anyo_lightning.models.restored_run import RestoredRun
from anyo_lightning.runs import LINEAGE
from anyo_lightning.serving.exported_model import Base

UNKNOWN = "not known to anyo-lightning: look it up before you publish or sell anything"
FILES = {  # patterns, of which the first that a name fits describes it
    "items.parquet": "item_id, title, text and vector of each item",
    "vectors.npy": "the same vectors, (items, dim), float32",
    "items.faiss": "a FAISS index of them by inner product; its ids are rows of items.json",
    "items.json": "item_id, title and text in the order of the vectors",
    "recommender.json": "how a history is read, and what is compared",
    "projectors.safetensors": "the linear maps behind the language model",
    "item_inputs.npy": "the input embedding that stands for each item",
    "adapter": "LoRA by itself, for peft",
    "base": "the frozen language model under it",
    "config.json": "the language model, in float32; LoRA, where there is some, is merged into it",
    "model*": "its weights",
    "[0-9]_*": "a step of the item side for sentence-transformers",
    "*sentence*": "its settings",
    "modules.json": "the order of its steps",
    "*": "the language model's tokenizer",
}


@dataclass(frozen=True)
class Exported:
    """What an export holds, and why it lacks the rest.

    Attributes:
        base: Where the frozen language model is; None without one.
        script: The lines that give a history its list; None where there are none.
        left_out: What the export lacks, and why.
        sentences: Whether the item side opens in sentence-transformers.
    """

    base: Base | None
    script: str | None
    left_out: dict[str, str]
    sentences: bool


def model_card(exported: Exported, metrics: dict[str, Any], restored: RestoredRun, folder: Path) -> str:
    """The whole README.md.

    Args:
        exported: What the folder holds.
        metrics: The run's metrics.json.
        restored: The run, whose language models compute as they have in the export.
        folder: Holds everything but the card.
    """
    split, variant = metrics["split"], metrics["variant"]
    figures = {name: figure for name, figure in metrics["metrics"].items() if figure["value"] is not None}
    results = [
        EvalResult(
            task_type="recommendation",
            task_name="next-item recommendation, full ranking",
            dataset_type=split["name"],
            dataset_name=f"{split['name']}, split {split['fingerprint']}",
            metric_type=name.removeprefix("test/"),
            metric_value=round(figure["value"], 5),
        )
        for name, figure in figures.items()
    ]
    base = exported.base
    described = ModelCardData(
        library_name="sentence-transformers" if exported.sentences else "anyo-lightning",
        tags=["recommender-system", "sequential-recommendation", "anyo-lightning"],
        base_model=base.name if base is not None and base.revision is not None else None,
        model_name=variant,
        eval_results=results,
    )
    parts = [
        f"# {variant}",
        _task(restored, split, exported),
        _use(exported),
        _files(folder),
        _figures(figures, metrics, restored),
        _data(metrics, restored),
        _cost(metrics),
        _licences(split["name"], restored, base),
        _limits(metrics, restored),
    ]
    return str(ModelCard(f"---\n{described.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def _task(restored: RestoredRun, split: dict[str, Any], exported: Exported) -> str:
    model = type(restored.model).__name__
    counts = split["counts"]
    text = (
        f"Next-item recommendation: from the items that a user has had, oldest first, a ranking of {counts['items']:,} "
        f"items. A history becomes one vector, so does each item, and their inner product is the score. The model is "
        f"anyo-lightning's `{model}`"
    )
    if exported.base is not None:
        text += f", on the language model `{exported.base.name}`"
    return text + f", trained on `{split['name']}`."


def _use(exported: Exported) -> str:
    parts = ["## Use"]
    if exported.script is not None:
        packages = ", ".join(
            name for name in ("transformers", "peft", "safetensors") if f"from {name}" in exported.script
        )
        parts.append(
            f"A history's list, by {packages} and numpy alone (the files are read from this folder; the history is an "
            "example, of the items that are most frequent in training):\n\n"
            f"```python\n{exported.script}```"
        )
    if exported.sentences:
        parts.append(
            "Vectors of items, also of ones that the model has not seen, by sentence-transformers:\n\n"
            "```python\nfrom sentence_transformers import SentenceTransformer\n\n"
            'vectors = SentenceTransformer(".").encode(["the text of an item"])\n```'
        )
    parts.append(
        "Items like the first one, by FAISS and the cosine (`items.faiss` has inner products, which rank for a "
        "history's vector):\n\n"
        "```python\nimport json\n\nimport faiss\nimport numpy as np\n\n"
        'vectors, items = np.load("vectors.npy"), json.load(open("items.json", encoding="utf-8"))\n'
        "faiss.normalize_L2(vectors)\n"
        "index = faiss.IndexFlatIP(vectors.shape[1])\n"
        "index.add(vectors)\n"
        "cosines, places = index.search(vectors[:1], 11)\n"
        'print([items["title"][place] for place in places[0] if place > 0])  # without the item itself\n```'
    )
    if exported.left_out:
        lines = [f"- {what}: {why}." for what, why in exported.left_out.items()]
        parts.append("Not in this export:\n\n" + "\n".join(lines))
    if exported.script is None:
        parts.append("Histories become vectors by anyo-lightning: `Recommender.load(run).recommend([history])`.")
    return "\n\n".join(parts)


def _files(folder: Path) -> str:
    """What the folder holds, beside the card."""
    left = {path.name for path in folder.iterdir()} - {"README.md"}
    rows = []
    for pattern, what in FILES.items():
        names = sorted(fnmatch.filter(left, pattern))
        left -= set(names)
        if names:
            shown = (f"`{name}/`" if (folder / name).is_dir() else f"`{name}`" for name in names)
            rows.append((", ".join(shown), what))
    return "## Files\n\n" + _table(("file", "content"), rows)


def _figures(figures: dict[str, Any], metrics: dict[str, Any], restored: RestoredRun) -> str:
    protocol = metrics["protocol"]
    rows = []
    for name, figure in figures.items():
        low, high = figure.get("low"), figure.get("high")
        shown = "" if low is None or high is None else f"{low:.4f} to {high:.4f}"
        rows.append((name.removeprefix("test/"), f"{figure['value']:.4f}", shown))
    masked = "left out of" if protocol["history_masked"] else "kept in"
    return (
        f"## Figures\n\nOn the test part of the split, {protocol['rows']:,} rows, each target ranked among all items; "
        f"what a history holds is {masked} the ranking. Intervals are 95%, by bootstrap over users; seed "
        f"{metrics['seed']}. {_precision(restored)}\n\n"
    ) + _table(("metric", "value", "95% interval"), rows)


def _precision(restored: RestoredRun) -> str:
    """In what the run has computed its figures, and the export its vectors."""
    backbones = restored.model.backbones
    own = {backbone.identity["dtype"] for backbone in backbones}
    own |= {str(restored.mixed).removeprefix("torch.")} if restored.mixed is not None else set()
    lower = " and ".join(sorted(own - {"float32"}))
    kept = {str(backbone.dtype).removeprefix("torch.") for backbone in backbones} - {"float32"}
    if kept:
        return (
            f"The run computed in {lower}; this export's language model, which is quantised, computes in "
            f"{' and '.join(sorted(kept))}, all else in float32."
        )
    if lower:
        return f"The run computed in {lower}; this export computes in float32."
    return "The run and this export compute in float32."


def runs_read(lineage: dict[str, Any]) -> list[tuple[str, str]]:
    """A row for each run whose weights, vectors or lists a run has been given, and for those that these had read.

    Args:
        lineage: As metrics.json has it.
    """
    rows = []
    for option, run in lineage.items():
        weights = f", weights `{run['weights']}`" if run.get("weights") else ""
        rows.append((f"the run that `{option}` named", f"{run.get('variant')}, `{run.get('model')}`{weights}"))
        rows += [(f"{what}, in that run", which) for what, which in runs_read(run.get(LINEAGE) or {})]
    return rows


def _data(metrics: dict[str, Any], restored: RestoredRun) -> str:
    split, data = metrics["split"], restored.data
    counts = split["counts"]
    rows = [
        ("data set", split["name"]),
        ("fingerprint of data, filters and split", f"`{split['fingerprint']}`"),
        ("split, order of ties", f"{split['strategy']}, {split['ties']}"),
        *((name.replace("_", " "), f"{count:,}") for name, count in counts.items()),
        ("an item's text", f"`{data.template}`" + (", histories read titles only" if data.titles_only else "")),
        *runs_read(metrics.get(LINEAGE, {})),
    ]
    return "## Data\n\n" + _table(("", ""), rows)


def _cost(metrics: dict[str, Any]) -> str:
    cost, environment = metrics["cost"], metrics["environment"]["training"]
    hardware = environment["hardware"]
    machine = ", ".join(hardware["gpus"]) or f"{hardware['cpu_cores']} cores of {hardware['cpu']}"
    rows = [("hardware", machine)]
    names = {
        "train_seconds": ("training, minutes", 1 / 60, ",.1f"),
        "trainable_parameters": ("trained parameters", 1, ",.0f"),
        "parameters": ("parameters", 1, ",.0f"),
        "tokens": ("tokens read in training (items, without text)", 1, ",.0f"),
        "targets": ("supervised targets", 1, ",.0f"),
        "flops": ("FLOPs of training", 1, ".2e"),
        "peak_memory_gib": ("peak memory, GiB", 1, ".1f"),
    }
    rows += [
        (text, format(cost[name] * factor, form))
        for name, (text, factor, form) in names.items()
        if cost.get(name) is not None
    ]
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in environment["versions"].items())))
    return "## Cost\n\n" + _table(("", ""), rows)


def _licences(data: str, restored: RestoredRun, base: Base | None) -> str:
    terms = GROUPLENS_TERMS.format(name=data) if data.startswith("ml-") else UNKNOWN
    lines = [f"- Data, of which this folder holds item ids, titles and texts ({data}): {terms}."]
    if base is not None:
        sources = {backbone.source: backbone.identity["name"] for backbone in restored.model.backbones}
        lines += [f"- Language model ({name}): {_licence_of(*source)}." for source, name in sources.items()]
    return "## Licences\n\n" + "\n".join(lines)


def _licence_of(name: str, revision: str | None) -> str:
    """What is known of a language model's licence, without asking anyone."""
    if (alias := ALIASES.get(name)) is not None:
        return f"{alias.license}; {alias.note}, from the wheel {alias.requirement}"
    card = Path(name).expanduser() / "README.md"
    with suppress(Exception):  # a card that is no card says nothing
        licence = ModelCard.load(card).data.license if card.is_file() else None
        if licence:
            return str(licence)
    return f"see its page, https://huggingface.co/{name}" if not Path(name).expanduser().is_dir() else UNKNOWN


def _limits(metrics: dict[str, Any], restored: RestoredRun) -> str:
    lines = [
        "- It has learned from one data set, up to one moment, and knows what its users had there, not why.",
        "- Its figures say how often a held-out item is ranked high, not whether people like what they are shown.",
        "- It repeats what its data prefer; `popularity`, `coverage` and `gini` above say how much.",
        "- A text can change a list: whoever writes item texts can move items up.",
    ]
    if without := metrics["split"]["counts"].get("items_without_training"):
        lines.append(f"- {without:,} items have no training interaction.")
    if not restored.model.encoders or not restored.model.encoders.texts:
        lines[3] = "- It knows items by their interactions alone: an item without any has a meaningless vector."
    return "## Limits\n\n" + "\n".join(lines)


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
