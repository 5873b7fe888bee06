"""The model card of an exported run: what it is for, how it is used, its figures, cost, licences and limits."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from anyo_lightning.data.sources import GROUPLENS_TERMS
from anyo_lightning.llm.aliases import ALIASES
from anyo_lightning.serving.exported_model import Base
from anyo_lightning.serving.restored_run import RestoredRun

UNKNOWN = "not known to anyo-lightning: look it up before you publish or sell anything"
FILES = {
    "items.parquet": "item_id, title, text and vector of each item",
    "vectors.npy": "the same vectors, (items, dim), float32",
    "items.faiss": "a FAISS index of them by inner product; its ids are rows of items.json",
    "items.json": "item_id, title and text in the order of the vectors",
    "recommender.json": "how a history is read, and what is compared",
}
FILES_OF_A_MODEL = {
    "config.json, model.safetensors, tokenizer.json": "the language model, with LoRA merged into it, in float32",
    "projectors.safetensors": "the linear maps behind it",
}


@dataclass(frozen=True)
class Exported:
    """What an export holds.

    Attributes:
        base: Where the frozen language model is; None without one.
        script: The lines that give a history its list; None where there are none.
        left_out: What the export lacks, and why.
        sentences: Whether the item side opens in sentence-transformers.
        language_model: Whether the merged language model is there.
    """

    base: Base | None
    script: str | None
    left_out: dict[str, str]
    sentences: bool
    language_model: bool


def model_card(exported: Exported, metrics: dict[str, Any], restored: RestoredRun) -> str:
    """The whole README.md.

    Args:
        exported: What the folder holds.
        metrics: The run's metrics.json.
        restored: The run.
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
        _files(exported),
        _figures(figures, metrics, restored),
        _data(split, restored),
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
        packages = "transformers, peft, safetensors" if "peft" in exported.script else "transformers, safetensors"
        parts.append(
            f"A history's list, by {packages} and numpy alone (the files are read from this folder):\n\n"
            f"```python\n{exported.script}```"
        )
    if exported.sentences:
        parts.append(
            "Vectors of items, also of ones that the model has not seen, by sentence-transformers:\n\n"
            "```python\nfrom sentence_transformers import SentenceTransformer\n\n"
            'vectors = SentenceTransformer(".").encode(["the text of an item"])\n```'
        )
    parts.append(
        "Items like the first one, by FAISS:\n\n"
        "```python\nimport json\n\nimport faiss\nimport numpy as np\n\n"
        'index, vectors = faiss.read_index("items.faiss"), np.load("vectors.npy")\n'
        "scores, places = index.search(vectors[:1], 10)\n"
        'items = json.load(open("items.json", encoding="utf-8"))\n'
        'print([items["title"][place] for place in places[0]])\n```'
    )
    if exported.left_out:
        lines = [f"- {what}: {why}." for what, why in exported.left_out.items()]
        parts.append("Not in this export:\n\n" + "\n".join(lines))
    if exported.script is None:
        parts.append("Histories become vectors by anyo-lightning: `Recommender.load(run).recommend([history])`.")
    return "\n\n".join(parts)


def _files(exported: Exported) -> str:
    files = dict(FILES)
    if exported.language_model:
        files |= FILES_OF_A_MODEL
    if exported.script is not None and "item_inputs" in exported.script:
        files["item_inputs.npy"] = "the input embedding that stands for each item"
    if (base := exported.base) is not None and base.adapted:
        files["adapter/"] = "LoRA by itself, for peft"
        if base.revision is None:
            files["base/"] = "the frozen language model under it"
    if exported.sentences:
        files["modules.json, 1_Pooling/ …"] = "the item side for sentence-transformers"
    return "## Files\n\n" + _table(("file", "content"), [(f"`{name}`", what) for name, what in files.items()])


def _figures(figures: dict[str, Any], metrics: dict[str, Any], restored: RestoredRun) -> str:
    protocol = metrics["protocol"]
    dtypes = {backbone.identity["dtype"] for backbone in restored.model.backbones}
    dtypes |= {str(restored.mixed).removeprefix("torch.")} if restored.mixed is not None else set()
    lower = " and ".join(sorted(dtypes - {"float32"}))
    computed = f"The run computed in {lower}; this export computes" if lower else "The run and this export compute"
    rows = []
    for name, figure in figures.items():
        low, high = figure.get("low"), figure.get("high")
        shown = "" if low is None or high is None else f"{low:.4f} to {high:.4f}"
        rows.append((name.removeprefix("test/"), f"{figure['value']:.4f}", shown))
    masked = "left out of" if protocol["history_masked"] else "kept in"
    return (
        f"## Figures\n\nOn the test part of the split, {protocol['rows']:,} rows, each target ranked among all items; "
        f"what a history holds is {masked} the ranking. Intervals are 95%, by bootstrap over users; seed "
        f"{metrics['seed']}. {computed} in float32.\n\n"
    ) + _table(("metric", "value", "95% interval"), rows)


def _data(split: dict[str, Any], restored: RestoredRun) -> str:
    counts, data = split["counts"], restored.data
    rows = [
        ("data set", split["name"]),
        ("fingerprint of data, filters and split", f"`{split['fingerprint']}`"),
        ("split, order of ties", f"{split['strategy']}, {split['ties']}"),
        *((name.replace("_", " "), f"{count:,}") for name, count in counts.items()),
        ("an item's text", f"`{data.template}`" + (", histories read titles only" if data.titles_only else "")),
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
        (backbone, *_) = restored.model.backbones
        lines.append(f"- Language model ({base.name}): {_licence_of(*backbone.source)}.")
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
