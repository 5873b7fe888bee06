"""Tokens a second of LoRA training on one core: peft and transformers as a user would, and each of our ways added.

    python benchmarks/training_speed.py [--layers 3] [--repeats 7] [--compile] [--output benchmarks/training_speed.md]

Forward and backward pass of smollm2-135m-instruct's first layers, LoRA of rank 32 on every linear layer. Rows of one
table take turns in one process, in `repeats` rounds; a row's ratio is the median over rounds of its time against that
of "before" in the same round, since other work on a machine slows down neighbours alike. Seconds are the processor's,
of one thread, for the same reason. Useful tokens are real ones, with a prompt per history: the same for all rows of a
table.

- naive: transformers' model with LoRA injected by peft, autocast to bfloat16, an attention mask, a prompt in each row,
  states of all positions.
- before: our backbone (attention by blocks, the last layer only where it is read) with peft's own LoRA, a prompt in
  each row.
- then what each way adds; "all" is what a run does by itself, "compiled" what `compile: true` adds to it.

Texts: histories of some 37 titles of 7 tokens, as those of MovieLens-100K, 3,000 tokens a step, a state per title read.
Vectors: histories as short as Amazon Beauty's, one vector per item behind a prompt of 10 tokens, 1,200 tokens a step.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from transformers import AutoModel

from anyo_lightning.llm import backbone as backbones
from anyo_lightning.llm.aliases import load_config, locate
from anyo_lightning.llm.backbone import Backbone
from anyo_lightning.llm.low_rank import Adapted

LORA: dict[str, Any] = {"r": 32, "lora_alpha": 64, "target_modules": "all-linear"}
NAME = "smollm2-135m-instruct"
PROMPT = 10  # tokens
TITLE = 7  # tokens
BEAUTY = {1: 9, 2: 16, 3: 14, 4: 9, 5: 6, 6: 4, 7: 3, 8: 3, 10: 3, 13: 2, 18: 2, 28: 1, 50: 1}  # histories by length

Step = Callable[[], object]


def main() -> None:
    """Print and write two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()  # of the naive model's layers that are left out
    dtype = Backbone(NAME, layers=1).identity["dtype"]
    wide = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "neon", "bf16")  # those that decide a product's speed
    features = ", ".join(name for name in wide if torch.cpu.get_capabilities().get(name))
    lines = [
        "# Tokens a second of LoRA training",
        "",
        f"`python benchmarks/training_speed.py --layers {options.layers}{' --compile' * options.compile}`: "
        f"{options.layers} layers of {NAME}, {dtype}, one core of {processor()} ({features}), torch "
        f"{torch.__version__}. What the rows are is said in the script.",
    ]
    print(*lines, sep="\n", flush=True)
    for title, steps, tokens in (texts(options, dtype), vectors(options, dtype)):
        found = table(title, steps, tokens, options.repeats)
        print(*found, sep="\n", flush=True)
        lines += found
    if options.output is not None:
        options.output.write_text("\n".join(lines) + "\n")


def processor() -> str:
    """The processor's name."""
    file = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in file.read_text().splitlines() if "model name" in line]
    return names[0] if names else platform.processor()


def texts(options: argparse.Namespace, dtype: str) -> tuple[str, dict[str, Step], int]:
    """Histories of titles: the rows of a table."""
    lengths = [TITLE * count for count in (40, 41, 42, 43, 43, 44, 45, 46, 47, 48)]
    ids = torch.randint(1, 1000, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0))
    rows = torch.cat([torch.full((length // TITLE,), row) for row, length in enumerate(lengths)])
    columns = torch.cat([torch.arange(TITLE - 1, length, TITLE) for length in lengths])
    read = rows, columns
    naive, ours = naive_model(options.layers, dtype), lora_backbone(options.layers, dtype)
    mask = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]

    def plain() -> None:
        with autocast(dtype):
            states = naive(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        backward(states[read])

    def step(model: Backbone) -> None:
        backward(model(ids, read=read))

    def before() -> None:
        with pefts(ours):
            step(ours)

    steps: dict[str, Step] = {"naive": plain, "before": before, "all (LoRA by added products)": lambda: step(ours)}
    if options.compile:
        compiled = lora_backbone(options.layers, dtype, compile=True)
        steps["compiled"] = lambda: step(compiled)
    return "Histories of titles", steps, sum(lengths)


def vectors(options: argparse.Namespace, dtype: str) -> tuple[str, dict[str, Step], int]:
    """Short histories of item vectors behind a prompt: the rows of a table."""
    lengths = sorted(length for length, count in BEAUTY.items() for _ in range(4 * count))
    batches = []  # rows of similar length, of at most 1,200 tokens with their prompts
    while lengths:
        size = next(n for n in range(len(lengths), 0, -1) if n * (lengths[n - 1] + PROMPT) <= 1200 or n == 1)
        own, lengths = lengths[:size], lengths[size:]
        rows = torch.cat([torch.full((length,), row) for row, length in enumerate(own)])
        items = torch.randn(size, max(own), 576, generator=torch.Generator().manual_seed(0)) * 0.1
        batches.append((items, (rows, torch.cat([torch.arange(length) for length in own])), own))
    naive, ours = naive_model(options.layers, dtype), lora_backbone(options.layers, dtype)
    prompt = ours.embed(torch.arange(1, 1 + PROMPT)).detach()

    def plain() -> None:
        for items, (rows, columns), own in batches:
            given = torch.cat([prompt.float().expand(len(items), -1, -1), items.requires_grad_()], dim=1)
            mask = torch.arange(given.shape[1]) < PROMPT + torch.tensor(own)[:, None]
            with autocast(dtype):
                states = naive(inputs_embeds=given, attention_mask=mask, use_cache=False).last_hidden_state
            backward(states[rows, PROMPT + columns])

    def step(model: Backbone) -> None:
        for items, read, _ in batches:
            backward(model(input_embeddings=items.requires_grad_(), prefix=prompt, read=read))

    def before() -> None:
        with pefts(ours), prompt_in_each_row():
            step(ours)

    def products() -> None:
        with prompt_in_each_row():
            step(ours)

    def shared() -> None:
        with pefts(ours):
            step(ours)

    steps: dict[str, Step] = {
        "naive": plain,
        "before": before,
        "LoRA by added products": products,
        "prompt read once": shared,
        "all": lambda: step(ours),
    }
    if options.compile:
        compiled = lora_backbone(options.layers, dtype, compile=True)
        steps["compiled"] = lambda: step(compiled)
    return "Short histories of item vectors", steps, sum(sum(own) + PROMPT * len(own) for *_, own in batches)


def table(title: str, steps: dict[str, Step], tokens: int, repeats: int) -> list[str]:
    """Time the steps in turns, the first round (and compilation) left out; a table's lines."""
    started = time.perf_counter()
    for step in steps.values():
        step()
    warming = time.perf_counter() - started
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            started = time.process_time()
            step()
            seconds[name].append(time.process_time() - started)
    lines = ["", f"## {title}", "", "| way | useful tokens/s | times before's speed | quartiles |", "|---|---|---|---|"]
    for name, found in seconds.items():
        ratios = [other / one for one, other in zip(found, seconds["before"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        lines.append(f"| {name} | {tokens / min(found):,.0f} | {middle:.2f} | {low:.2f} to {high:.2f} |")
    return [*lines, "", f"{tokens:,} useful tokens; the first round, compilation included, took {warming:.0f} s."]


def backward(states: torch.Tensor) -> None:
    """A loss whose gradient is no rounding error (the states are normalised)."""
    generator = torch.Generator().manual_seed(0)
    (states.float() * torch.randn(states.shape, generator=generator)).sum().backward()


def autocast(dtype: str) -> Any:
    """What a Trainer's mixed precision opens."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16")


def lora_backbone(layers: int, dtype: str, **options: Any) -> Backbone:
    """Ours, ready to train."""
    return Backbone(NAME, layers=layers, dtype=dtype, lora=LORA, **options).place(torch.device("cpu"))  # type: ignore[arg-type]


def naive_model(layers: int, dtype: str) -> Any:
    """Transformers' model as loaded in the same dtype, LoRA injected by peft."""
    location = locate(NAME, None)
    config = load_config(location)
    config.num_hidden_layers = layers
    model = AutoModel.from_pretrained(location.source, config=config, dtype=getattr(torch, dtype)).requires_grad_(False)
    inject_adapter_in_model(LoraConfig(**LORA), model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model.train()


@contextmanager
def pefts(model: Backbone) -> Iterator[None]:
    """Inside, LoRA is computed by peft's own forward."""
    kinds = {module: type(module) for module in model.modules() if isinstance(module, Adapted)}
    for module in kinds:
        module.__class__ = LoraLinear  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, kind in kinds.items():
            module.__class__ = kind


@contextmanager
def prompt_in_each_row() -> Iterator[None]:
    """Inside, no prefix is shared."""
    sharing = backbones.can_share
    backbones.can_share = lambda *_: False
    try:
        yield
    finally:
        backbones.can_share = sharing


if __name__ == "__main__":
    main()
