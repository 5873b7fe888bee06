"""`anyo augment`: let an LLM write views of the training histories, once, before training."""

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.data.splits import Split
from anyo_lightning.errors import InputError
from anyo_lightning.views.prompts import (
    NO_REPEAT,
    PROMPTS,
    Kind,
    View,
    check_prompt,
    new_tokens,
    read_answer,
    write_prompt,
)
from anyo_lightning.views.store import Answer, AnswerStore, cost_of, views_file, write_views
from anyo_lightning.views.writers import DEFAULT, EndpointWriter, LocalWriter, Writer

SHOWN = 3  # prompts that a dry run prints


def augment(
    data: RecDataModule,
    *,
    kind: Kind = "summarise",
    backend: Literal["local", "endpoint"] = "local",
    llm: str | None = None,
    prompt: str | None = None,
    max_items: int = 20,
    parts: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    batch: int = 32,
    dry_run: bool = False,
    output: Path | None = None,
) -> None:
    """Write views of the training histories, for CLLMRec; views that exist are not written again.

    A view is written from a user's training items without the last one, which is what a state at the end of the
    history is trained to predict. Each view notes the items that it was written from.

    Args:
        data: The data set and its split.
        kind: `summarise`: one text per history; `rewrite`: one text per item.
        backend: `local`: a causal LLM on this machine; `endpoint`: an OpenAI-compatible one, found by the environment
            variables OPENAI_BASE_URL and OPENAI_API_KEY. Histories are sent there.
        llm: Local: alias, folder or hub id, by default smollm2-135m-instruct; endpoint: the model's name there, by
            default OPENAI_MODEL.
        prompt: What to ask, with `{history}` in it.
        max_items: The most items that a view is written from.
        parts: A history is cut from its end into parts of `max_items`; each of the latest `parts` gets a view, with
            None each of all. A training window that shares no item with a view has none; fewer parts cost less.
        temperature: Of sampling; 0 takes the most likely token.
        seed: Seed of the sampling.
        batch: Prompts answered at once; a killed run loses at most these.
        dry_run: Print prompts and token counts, ask nothing.
        output: Parquet file to write instead of the one in the cache, where CLLMRec looks.

    Raises:
        InputError: An option is out of range, or the LLM or the endpoint cannot be used.
    """
    template = PROMPTS[kind] if prompt is None else prompt
    check_prompt(template)
    for name, value in {"max_items": max_items, "parts": parts, "batch": batch}.items():
        if value is not None and value < 1:
            raise InputError(f"Expected --{name} to be positive, got {value}")
    data.setup("fit")
    split = data.split
    sources = list(_sources(split, max_items=max_items, parts=parts))
    prompts = [write_prompt(template, [split.item_texts[item] for item in items], kind=kind) for _, items in sources]
    if not prompts:
        raise InputError("Expected a user with at least 2 training interactions, got none")
    writer: Writer
    if backend == "endpoint":
        writer = EndpointWriter(llm, temperature=temperature, seed=seed)
    else:
        writer = LocalWriter(llm or DEFAULT, temperature=temperature, seed=seed, no_repeat=NO_REPEAT[kind])
    limit = new_tokens(kind, max_items)
    store = AnswerStore(
        views_file(kind, split).parent / "answers",
        {"kind": kind, "max_new_tokens": str(limit), "temperature": str(temperature), "seed": str(seed)}
        | writer.identity,
    )
    answers = store.read()
    missing = list(dict.fromkeys(text for text in prompts if store.key(text) not in answers))
    if dry_run:
        _print_plan(prompts, missing, writer.count_tokens(missing), limit)
        return
    for done in _answer(missing, writer, max_new_tokens=limit, batch=batch):
        shard = {store.key(text): answer for text, answer in done.items()}
        store.write(shard)
        answers |= shard
    views = [
        _view(answers[store.key(text)], kind=kind, items=len(items))
        for text, (_, items) in zip(prompts, sources, strict=True)
    ]
    rows = [
        (str(split.user_ids[user]), [str(name) for name in split.item_ids[items]], list(view.texts), view.outcome)
        for (user, items), view in zip(sources, views, strict=True)
    ]
    file = views_file(kind, split) if output is None else output
    cost = cost_of([answers[key] for key in dict.fromkeys(map(store.key, prompts))])
    settings = json.loads(store.settings) | {"prompt": template, "max_items": max_items, "parts": parts}
    write_views(file, rows, kind=kind, split=split, settings=json.dumps(settings), cost=cost)
    _print_result(views, written=len(missing), file=file)


def _sources(split: Split, *, max_items: int, parts: int | None) -> Iterator[tuple[int, np.ndarray]]:
    """Users and the items that each of their views is written from, never with a user's last training item."""
    for user in range(split.users):
        items = split.training_history(user)[:-1]
        for end in list(range(len(items), 0, -max_items))[:parts]:
            yield user, items[max(end - max_items, 0) : end]


def _answer(prompts: list[str], writer: Writer, *, max_new_tokens: int, batch: int) -> Iterator[dict[str, Answer]]:
    """Answers in batches of prompts of similar length, the longest first."""
    if not prompts:
        return
    lengths = writer.count_tokens(prompts)
    order = sorted(range(len(prompts)), key=lambda index: (-lengths[index], prompts[index]))
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr)) as progress:
        task = progress.add_task("Writing views", total=len(order))
        for start in range(0, len(order), batch):
            asked = [prompts[index] for index in order[start : start + batch]]
            started = time.perf_counter()
            answers = writer.write(asked, max_new_tokens=max_new_tokens)
            share = (time.perf_counter() - started) / len(asked)
            yield {text: replace(answer, seconds=share) for text, answer in zip(asked, answers, strict=True)}
            progress.advance(task, len(asked))


def _view(answer: Answer, *, kind: Kind, items: int) -> View:
    if answer.finish == "refused":
        return View((), "refused")
    return read_answer(answer.text, kind=kind, items=items, cut=answer.finish == "length")


def _print_plan(prompts: list[str], missing: list[str], tokens: list[int], limit: int) -> None:
    for text in missing[:SHOWN]:
        print(f"{text}\n{'-' * 80}")
    print(
        f"{len(prompts):,} views, {len(missing):,} of them to write: {sum(tokens):,} tokens to read "
        f"({max(tokens, default=0):,} at most in a prompt), at most {len(missing) * limit:,} to write"
    )


def _print_result(views: list[View], *, written: int, file: Path) -> None:
    outcomes = Counter(view.outcome for view in views)
    lines = [text for view in views for text in view.texts]
    print(
        f"{len(views):,} views, {written:,} answered now; fall back to the original: {outcomes['refused']:,} refused, "
        f"{outcomes['empty']:,} empty, {sum(text is None for text in lines):,} of {len(lines):,} lines of the others"
    )
    print(f"Views: {file}")
