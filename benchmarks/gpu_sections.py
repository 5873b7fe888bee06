"""The sections of `gpu.py` that measure in a process of their own: each yields rows for its table."""

import gc
import importlib.util
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_models as models
import numpy as np
import torch
from peft import LoraConfig
from torch.nn import functional as F

from anyo_lightning.evaluation.index import ItemIndex
from anyo_lightning.evaluation.ranking import rank
from anyo_lightning.hardware import peak_memory_gib
from anyo_lightning.losses import full_softmax

Row = dict[str, Any]

# Dense products with float32 sums, TFLOP/s, by NVIDIA's data sheets: bfloat16, on the T4 float16. Longer names first.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L4": 121, "A10": 125, "T4": 65}

# Each line is a row of the table: what it adds to our backbone. None is peft and transformers without us.
# On a GPU ours takes Liger's kernels where `liger-kernel` is installed, unless it compiles.
BACKBONES: dict[str, dict[str, Any] | None] = {
    "ours": {},
    "ours, compile": {"compile": True},
    "ours, gradient checkpointing": {"gradient_checkpointing": True},
    "plain peft + transformers": None,
    "ours, flash_attention_2": {"attention": "flash_attention_2"},
}
# Of a step: so many that a card is kept busy by a host of ordinary speed.
TOKENS = {"tiny": 128, "SmolLM2-135M": 131072, "Qwen3-0.6B": 65536, "Llama-3.2-1B": 65536}
NEEDS = {"flash_attention_2": "flash_attn"}


def training(tiny: bool) -> Iterator[Row]:
    """(b) LoRA training: tokens and targets per second, share of the card's peak, memory.

    Rows that matter most come first: each way for all shapes before the next way.
    """
    shapes = ["tiny"] if tiny else ["Qwen3-0.6B", "SmolLM2-135M", "Llama-3.2-1B"]
    lengths = (32, 64) if tiny else (2048, 512)
    with tempfile.TemporaryDirectory() as temporary:
        folders = {shape: models.save_model(models.SHAPES[shape](), Path(temporary) / shape) for shape in shapes}
        for way, options in BACKBONES.items():
            if reason := _missing(options):
                yield {"way": way, "note": reason}
                continue
            for shape in shapes:
                try:
                    yield from _trained(way, options, folders[shape], shape, lengths, tokens=TOKENS[shape])
                except Exception as error:
                    traceback.print_exc()
                    yield {"way": way, "shape": shape, "failed": " ".join(str(error).split())[:200]}


def _trained(
    way: str, options: dict[str, Any] | None, folder: Path, shape: str, lengths: tuple[int, ...], tokens: int
) -> Iterator[Row]:
    """One way and shape at some lengths; where memory runs out, with half as many tokens."""
    built = models.Plain(folder) if options is None else models.Ours(folder, **options)
    module = built.to(models.device()).train()
    step, config = models.trainer_step(module), models.SHAPES[shape]()
    for length in lengths:
        held, row = max(tokens, length), None
        while row is None:
            batch = models.random_batch(held, length, config.vocab_size)
            _forget_peak()
            try:
                seconds = models.seconds_of(lambda batch=batch: step(batch), warm_up=3, repeats=5)  # type: ignore[misc]
            except torch.OutOfMemoryError:
                module.zero_grad()
                _forget_peak()
                if held <= length:
                    row = {"note": f"out of memory with one history of {length:,} tokens"}
                held = max(length, held // 2)
                continue
            count = batch.token_ids.numel()
            row = {
                "tokens": count,
                "tokens/s": count / seconds,
                "targets/s": len(batch.targets) / seconds,
                **_utilisation(models.train_flops(config, length) * count / seconds),
                "peak GiB": peak_memory_gib(),
                "host waits per step": _waits(lambda batch=batch: step(batch)),  # type: ignore[misc]
            }
        yield {"way": way, "shape": shape, "length": length, **row}
    del built, module, step
    _forget_peak()


def softmax(tiny: bool) -> Iterator[Row]:
    """(d) The full softmax over a catalogue, forward and backward, against cross-entropy over all logits at once."""
    items, dim = (1000, 16) if tiny else (1_000_000, 128)
    vectors = torch.randn(items, dim, device=models.device(), requires_grad=True)
    ways: dict[str, Callable[..., torch.Tensor]] = {
        "ours": full_softmax,
        "naive": lambda states, vectors, targets: F.cross_entropy(states @ vectors.T, targets),
    }
    for count in (64,) if tiny else (8192, 1024):
        states = torch.randn(count, dim, device=models.device(), requires_grad=True)
        targets = torch.randint(items, (count,), device=models.device())
        for way, loss in ways.items():

            def step(loss: Any = loss, states: Any = states, targets: Any = targets) -> None:
                states.grad = vectors.grad = None
                loss(states, vectors, targets).backward()

            row: Row = {"way": way, "states": count, "items": items}
            _forget_peak()
            if way == "naive" and not torch.cuda.is_available() and count * items > 10**8:
                yield row | {"note": "not tried: its logits alone are gigabytes"}
                continue
            try:
                seconds = models.seconds_of(step, warm_up=1, repeats=3)
                tables = 2 * vectors.numel() * 4 / 2**30  # the vectors and their gradient
                row |= {"seconds": seconds, "peak GiB": peak_memory_gib(), "of that tables": tables}
            except torch.OutOfMemoryError:
                row |= {"note": "out of memory"}
            yield row


def evaluation(tiny: bool) -> Iterator[Row]:
    """(e) Exact ranks and lists of 10 of all users over the whole catalogue, 50 items of each history masked."""
    users, items, dim = (300, 1000, 16) if tiny else (100_000, 100_000, 128)
    random = np.random.default_rng(0)
    vectors = torch.randn(items, dim, device=models.device())
    queries = torch.randn(users, dim, device=models.device())
    target, seen = random.integers(0, items, users), random.integers(0, items, (users, 50))
    index = ItemIndex(vectors.cpu().numpy())
    for count in (users // 20, users):  # few first: if the limit comes, there is a figure
        rows = np.arange(count)

        def evaluate(rows: np.ndarray = rows, count: int = count) -> None:
            rank(rows, queries[:count], vectors, target[:count], index=index, k=10, history=seen.__getitem__)

        seconds = models.seconds_of(evaluate, warm_up=0, repeats=1)
        yield {"users": count, "items": items, "seconds": seconds, "users/s": count / seconds}


def sentences(tiny: bool) -> Iterator[Row]:
    """(c) The same histories and items through sentence-transformers: one prefix per sample, its loss, a plain loop.

    Both read token ids that are there already. A sample's prefix ends at a random item; its positive is the next item.
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        yield {"note": "sentence-transformers is not installed"}
        return
    from sentence_transformers import SentenceTransformer
    from sentence_transformers import models as parts
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    shape, length, samples = ("tiny", 64, 8) if tiny else ("SmolLM2-135M", 512, 64)
    config = models.SHAPES[shape]()
    with tempfile.TemporaryDirectory() as temporary:
        folder = models.save_model(config, Path(temporary))
        (row,) = _trained("ours", {}, folder, shape, (length,), tokens=TOKENS[shape])
        yield {name: row[name] for name in ("way", "shape", "length", "targets/s", "peak GiB") if name in row}
        precision: Any = {"dtype": models.dtype()}
        transformer = parts.Transformer(str(folder), model_kwargs=precision, max_seq_length=length)
        pooling = parts.Pooling(config.hidden_size, pooling_mode="lasttoken")
        model = SentenceTransformer(modules=[transformer, pooling], device=str(models.device()))
        model.add_adapter(LoraConfig(**models.LORA))
    loss = MultipleNegativesRankingLoss(model)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)
    random = np.random.default_rng(0)

    def step() -> None:
        items = random.integers(1, length // models.ITEM_TOKENS, samples)  # from one item to all but the target
        optimizer.zero_grad()
        features = [_features(items * models.ITEM_TOKENS, config), _features(np.full(samples, 10), config)]
        with torch.autocast(models.device().type, dtype=models.dtype(), enabled=models.dtype() != torch.float32):
            value = loss(features, torch.zeros(samples, device=models.device()))
        value.backward()
        optimizer.step()

    _forget_peak()
    seconds = models.seconds_of(step, warm_up=3, repeats=9)
    yield {
        "way": "sentence-transformers",
        "shape": shape,
        "length": length,
        "targets/s": samples / seconds,
        "peak GiB": peak_memory_gib(),
    }


SECTIONS: dict[str, Callable[[bool], Iterator[Row]]] = {
    "training": training,
    "softmax": softmax,
    "evaluation": evaluation,
    "sentence-transformers": sentences,
}


def _features(lengths: np.ndarray, config: Any) -> dict[str, torch.Tensor]:
    """Random tokens, padded on the right to the longest row, as sentence-transformers' collator gives them."""
    mask = torch.arange(int(lengths.max())) < torch.from_numpy(lengths)[:, None]
    tokens = torch.randint(1, config.vocab_size, mask.shape)
    return {"input_ids": tokens.to(models.device()), "attention_mask": mask.long().to(models.device())}


def _missing(options: dict[str, Any] | None) -> str | None:
    """Why a way cannot be measured here, if so."""
    for value in (options or {}).values():
        needed = NEEDS.get(str(value))
        if needed is not None and (not torch.cuda.is_available() or importlib.util.find_spec(needed) is None):
            return f"not run: needs CUDA and the package {needed}"
    return None


def _utilisation(flops_per_second: float) -> Row:
    """TFLOP/s, and their share of the card's peak where that is known."""
    row: Row = {"TFLOP/s": flops_per_second / 1e12}
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        peak = next((value for card, value in PEAK_TFLOPS.items() if card in name), None)
        if peak is not None:
            row["MFU"] = flops_per_second / 1e12 / peak
    return row


def _waits(step: Callable[[], object]) -> int | None:
    """How often the host waits for the GPU within a step; None without one."""
    if not torch.cuda.is_available():
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def _forget_peak() -> None:
    """Free what is no longer used, so that the next row's peak is its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
