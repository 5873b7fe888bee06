"""`anyo test --probe`: what a run's quality is made of, by taking parts of its input away.

One test pass each: as it is; the titles shuffled between items, in histories, in item vectors, in both; the histories'
items in random order; of each history its last item only. What a pass takes away from the figures, user by user, is
what the model uses. `memory.py` asks what the bare LLM knows of the data set.
"""

from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from rich.console import Console
from torch import nn

from anyo_lightning.compare.render import rich_table
from anyo_lightning.compare.rows import is_rank_metric
from anyo_lightning.compare.stats import paired_differences
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.encoders.base import Side
from anyo_lightning.errors import InputError
from anyo_lightning.evaluation.callback import RetrievalMetrics
from anyo_lightning.evaluation.intervals import bootstrap_means
from anyo_lightning.models.base import RetrievalModule
from anyo_lightning.probes.changes import last_item_only, other_titles, parts_with_texts, shuffled_order
from anyo_lightning.probes.display import MEMORY_NOTE, PROBE_NOTE, memory_columns, probe_columns
from anyo_lightning.probes.memory import BareLLM, next_items_from_memory, titles_from_memory
from anyo_lightning.runs import RunFolder
from anyo_lightning.views.writers import LocalWriter

AS_IT_IS = "as it is"
SHOWN_EXAMPLES = 10


def probe(
    trainer: Trainer,
    model: RetrievalModule,
    data: RecDataModule,
    run: RunFolder,
    *,
    checkpoint: str | None,
    asked: int,
    seed: int = 0,
) -> None:
    """Test a run under all probes; write probes.json and print it. Its metrics.json and predictions stay.

    Args:
        trainer: With `RetrievalMetrics` and no logger.
        model: The run's model.
        data: The run's data module.
        run: Where to write.
        checkpoint: The run's best; None for a model that is counted.
        asked: Titles and users for which the bare LLM is asked what it remembers; 0 leaves that out.
        seed: Seed of all shuffles and samples.

    Raises:
        InputError: `asked` is negative, the run is an ensemble, or a test is refused.
    """
    if not model.trained and model.runs_read():
        raise InputError(f"Expected --probe with a single run, got {run.path}, which is made of several: probe these")
    if asked < 0:
        raise InputError(f"Expected --probe_memory to be 0 or more, got {asked}")
    metrics = next(c for c in trainer.callbacks if isinstance(c, RetrievalMetrics))  # type: ignore[attr-defined]
    metrics.collected = []
    _say(trainer, AS_IT_IS)
    trainer.test(model, data, ckpt_path=checkpoint, verbose=False)
    probes = list(_probes(model, data, seed))
    for name, view in probes:
        _say(trainer, name)
        with view as changed:
            trainer.test(model, changed, verbose=False)
    if not trainer.is_global_zero:
        return
    by_user = [evaluation.by_user() for evaluation in metrics.collected]
    names = [name for name in by_user[0] if is_rank_metric(f"test/{name}")]
    content = {
        "split": data.split.fingerprint,
        "seed": seed,
        "users": len(by_user[0][names[0]]),
        "reads_titles": bool(_texts(model)),
        "figures": _figures([{name: of[name] for name in names} for of in by_user], [name for name, _ in probes]),
        "memory": _memory(model, data, asked=asked, seed=seed),
    }
    run.write_probes(content)
    show(content)


def show(content: dict[str, Any]) -> None:
    """Print the content of probes.json as tables."""
    console = Console()
    console.print(rich_table(probe_columns(content), console.width))
    console.print(PROBE_NOTE, style="dim")
    if not content["reads_titles"]:
        console.print("No titles are read: shuffling them would change nothing.", style="dim")
    memory = content["memory"]
    if isinstance(memory, str):
        console.print(f"The bare LLM was not asked: {memory}.", style="dim", markup=False)
        return
    console.print(f"\nWhat {memory['llm']} knows without training", style="dim", markup=False)
    console.print(rich_table(memory_columns(content), console.width))
    console.print(MEMORY_NOTE, style="dim")
    if examples := memory["titles"]["examples"]:
        console.print(f"Completed after the bar: {'; '.join(examples[:SHOWN_EXAMPLES])}", style="dim", markup=False)


def _probes(model: RetrievalModule, data: RecDataModule, seed: int) -> Iterator[tuple[str, Any]]:
    """The name of each probe, and a context that gives the data module of its pass."""
    text_of = np.random.default_rng(seed).permutation(data.split.catalogue_size)
    sides = _texts(model)
    if sides:
        yield "titles shuffled", _shuffled_titles(model, data, text_of, sides)
    in_items = parts_with_texts(model.item_encoder)
    shared = any(part in in_items for part in parts_with_texts(model.history_encoder))
    if len(sides) == 2 and not shared:
        yield "titles shuffled in histories", _shuffled_titles(model, data, text_of, {"histories"})
        yield "titles shuffled in item vectors", _shuffled_titles(model, data, text_of, {"items"})
    yield "order shuffled", nullcontext(data.view(change=partial(shuffled_order, seed=seed)))
    yield "last item only", nullcontext(data.view(change=last_item_only))


def _texts(model: RetrievalModule) -> Set[Side]:
    """The sides on which a model reads titles, as its encoders say; a model that makes its own is counted from ids."""
    return frozenset() if model.encoders is None else model.encoders.texts


@contextmanager
def _shuffled_titles(
    model: RetrievalModule, data: RecDataModule, text_of: np.ndarray, sides: Set[Side]
) -> Iterator[RecDataModule]:
    encoders = {"histories": model.history_encoder, "items": model.item_encoder}
    with other_titles(nn.ModuleList([encoders[side] for side in sorted(sides)]), text_of):  # a shared part once
        yield data.view(text_of=text_of) if "histories" in sides else data


def _figures(passes: Sequence[dict[str, np.ndarray]], names: Sequence[str]) -> dict[str, Any]:
    """For each metric each pass with its interval and, except for the first, its paired difference to the first."""
    found: dict[str, Any] = {}
    for metric in passes[0]:
        values = np.stack([of[metric] for of in passes], axis=1)
        low, high = bootstrap_means(values)
        differences = [None, *map(asdict, paired_differences(values[:, 1:], values[:, 0]))]
        found[f"test/{metric}"] = {
            name: {
                "value": float(values[:, column].mean()),
                "low": float(low[column]),
                "high": float(high[column]),
                "difference": differences[column],
            }
            for column, name in enumerate([AS_IT_IS, *names])
        }
    return found


def _memory(model: RetrievalModule, data: RecDataModule, *, asked: int, seed: int) -> dict[str, Any] | str:
    """What the bare LLM remembers, or why it was not asked."""
    if not model.backbones:
        return "the run has none"
    backbone = model.backbones[-1]  # of several the one that reads items' texts
    if not backbone.causal:
        return f"{backbone.identity['name']} cannot write"
    if not asked:
        return "--probe_memory 0"
    name, revision = backbone.source
    writer = LocalWriter(name, revision=revision)
    print(f"Asking {backbone.identity['name']} for {asked} titles and {asked} next items")
    try:
        llm = BareLLM(writer)
        titles = titles_from_memory(llm, data.titles, sample=asked, seed=seed)
        items = next_items_from_memory(llm, data.titles, data.queries("test"), sample=asked, seed=seed)
    except InputError as error:  # weights without an output layer
        return str(error)
    if titles is None or items is None:
        return "there are too few titles or users"
    return {"llm": backbone.identity["name"], "titles": titles, "next_items": items}


def _say(trainer: Trainer, name: str) -> None:
    if trainer.is_global_zero:
        print(f"Testing {name}", flush=True)
