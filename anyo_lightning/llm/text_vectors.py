"""Embed texts once: a content-hashed, resumable store of a frozen backbone's pooled vectors.

A vector's key is what made it: the backbone's identity, pooling, layer, token limit and the text itself. So if one
title changes, only that one is encoded again, a text that occurs twice is encoded once, and nothing has to be
invalidated. Vectors are kept in shards (`.npz`, whose checksums reveal a damaged one), written to a temporary name and
renamed: a run that is killed loses the current shard only. A shard is named by its contents, so several writers never
use one name.
"""

import hashlib
import json
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from anyo_lightning import distributed
from anyo_lightning.disk import cache_folder, renamed_to, set_aside
from anyo_lightning.errors import InputError
from anyo_lightning.llm.backbone import Backbone, load_tokenizer
from anyo_lightning.llm.evaluation_mode import evaluating
from anyo_lightning.llm.lora import lora_digest

Pooling = Literal["mean", "last", "bidirectional"]
LENGTH_STEP = 8  # rows are padded to a multiple of this, so that few shapes occur


def frozen_vectors(
    backbone: Backbone, texts: Sequence[str], *, pooling: Pooling, max_tokens: int, adapted: bool = False
) -> Float[Tensor, "texts hidden"]:
    """`embed_texts` from the store in the cache folder, by the backbone's own tokenizer."""
    tokenizer, folder = load_tokenizer(*backbone.source), cache_folder() / "embeddings"
    return torch.from_numpy(
        embed_texts(backbone, tokenizer, texts, folder=folder, pooling=pooling, max_tokens=max_tokens, adapted=adapted)
    )


def embed_texts(
    backbone: Backbone,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    folder: Path,
    pooling: Pooling = "mean",
    layer: int | None = None,
    batch_tokens: int = 4096,
    max_tokens: int = 128,
    shard_texts: int = 1024,
    adapted: bool = False,
) -> Float[np.ndarray, "texts hidden"]:
    """The pooled states of each text under the frozen backbone (LoRA off), from the store or encoded now.

    `mean` is the mean over a text's tokens, `last` the state of its last token; `bidirectional` is the mean where each
    token also reads those after it, with no causal mask (LLM2Rec, arXiv 2506.21579, section 3.2). A vector does not
    depend on the other texts of its batch, up to the rounding of the backbone's dtype.

    Args:
        backbone: The encoder; its mode and its LoRA are restored.
        tokenizer: The backbone's tokenizer.
        texts: Any number of texts, in any order, with repeats.
        folder: Where the store is; it may hold vectors of other backbones and settings.
        pooling: How states become a vector.
        layer: Pool the states after this many layers; None: after the last one and the final norm.
        batch_tokens: Tokens in a batch, padding included.
        max_tokens: A longer text is cut at its end.
        shard_texts: Texts in a shard: what a killed run may lose.
        adapted: With LoRA on as it is now; its weights are then part of the key.

    Returns:
        One float32 row per text, in the order given.

    Raises:
        InputError: When a text has no tokens, or a vector is not finite.
    """
    settings = {**backbone.identity, "pooling": pooling, "layer": str(layer), "max_tokens": str(max_tokens)}
    if adapted:
        settings["lora"] = lora_digest(backbone)
    store = folder / _digest(json.dumps(settings, sort_keys=True)).hex()
    store.mkdir(parents=True, exist_ok=True)
    if not (store / "settings.json").is_file():
        with renamed_to(store / "settings.json") as temporary:
            temporary.write_text(json.dumps(settings, indent=1))
    encode = partial(
        _encode,
        backbone,
        tokenizer,
        pooling=pooling,
        layer=layer,
        batch_tokens=batch_tokens,
        max_tokens=max_tokens,
        shard_texts=shard_texts,
        adapted=adapted,
    )
    distributed.barrier()  # all see the same store before one writes
    vectors = _read_shards(store)
    distributed.barrier()
    distinct = dict(zip([_digest(text) for text in texts], texts, strict=True))
    missing = {key: text for key, text in distinct.items() if key not in vectors}
    if distributed.world_size() > 1 and distributed.sum_over_ranks(len(missing), backbone.device):
        # Each process encodes its share and reads what the others wrote, or encodes it, too, without a shared disk.
        own = {key: missing[key] for key in sorted(missing)[distributed.rank() :: distributed.world_size()]}
        own = _some(own, distinct, backbone)
        for shard in encode(own):
            _write_shard(store, shard)
        distributed.barrier()
        vectors = _read_shards(store)
        missing = {key: text for key, text in distinct.items() if key not in vectors}
        if backbone.sharded and distributed.sum_over_ranks(len(missing), backbone.device):
            missing = _some(missing, distinct, backbone)
    if missing:
        for shard in encode(missing):
            _write_shard(store, shard)
            vectors |= shard
    if not texts:
        return np.zeros((0, backbone.hidden_size), dtype=np.float32)
    return np.stack([vectors[_digest(text)] for text in texts])


def _some(texts: dict[bytes, str], distinct: dict[bytes, str], backbone: Backbone) -> dict[bytes, str]:
    """These texts; for a process without any, one text, since all take part in each pass of a sharded backbone."""
    return dict(list(distinct.items())[:1]) if backbone.sharded and not texts else texts


def _encode(
    backbone: Backbone,
    tokenizer: PreTrainedTokenizerBase,
    texts: dict[bytes, str],
    *,
    pooling: Pooling,
    layer: int | None,
    batch_tokens: int,
    max_tokens: int,
    shard_texts: int,
    adapted: bool,
) -> Iterator[dict[bytes, np.ndarray]]:
    """Encode texts in batches of one padded length; yields them by shards."""
    if not texts:
        return
    keys = list(texts)
    max_tokens = min(max_tokens, backbone.max_positions or max_tokens)
    token_ids: list[list[int]] = tokenizer(list(texts.values()), truncation=True, max_length=max_tokens)["input_ids"]
    empty = [texts[key] for key, tokens in zip(keys, token_ids, strict=True) if not tokens]
    if empty:
        raise InputError(f"Expected every text to have a token, got {empty[0]!r}")
    backbone.check_token_ids(max(map(max, token_ids)))
    lengths = [min(-(-len(tokens) // LENGTH_STEP) * LENGTH_STEP, max_tokens) for tokens in token_ids]
    order = sorted(range(len(keys)), key=lambda index: (-lengths[index], keys[index]))
    batches: list[list[int]] = []
    start = 0
    while start < len(order):
        length = lengths[order[start]]
        batch = order[start : start + max(1, batch_tokens // length)]
        batches.append([index for index in batch if lengths[index] == length])
        start += len(batches[-1])
    own = len(batches)
    if backbone.sharded:
        batches = distributed.as_many(batches, backbone.device)
    shard: dict[bytes, np.ndarray] = {}
    with (
        evaluating(backbone),
        nullcontext() if adapted else backbone.with_lora_disabled(),
        _progress(len(keys)) as progress,
    ):
        task = progress.add_task("Encoding texts", total=len(keys))
        for number, batch in enumerate(batches, start=1):
            tokens = [token_ids[index] for index in batch]
            rows = _pool(backbone, tokens, lengths[batch[0]], pooling, layer)
            if number > own:  # a repeat, stored already
                continue
            if not np.isfinite(rows).all():
                name = backbone.identity["name"]
                raise InputError(
                    f"Expected finite states of {name} in {backbone.dtype}, got NaN or infinity; try dtype float32"
                )
            shard |= zip([keys[index] for index in batch], rows, strict=True)
            progress.advance(task, len(batch))
            if len(shard) >= shard_texts or number == own:
                yield shard
                shard = {}


def _pool(
    backbone: Backbone, token_ids: list[list[int]], length: int, pooling: Pooling, layer: int | None
) -> Float[np.ndarray, "texts hidden"]:
    """One batch, padded on the right with token 0; a causal backbone that reads causally needs no mask."""
    counts = torch.tensor([len(tokens) for tokens in token_ids], device=backbone.device)
    ids = torch.tensor([tokens + [0] * (length - len(tokens)) for tokens in token_ids], device=backbone.device)
    mask = torch.arange(length, device=backbone.device) < counts[:, None]  # (texts, tokens)
    attention_mask = None if backbone.causal else mask
    if backbone.causal and pooling == "bidirectional":
        attention_mask = mask[:, None].expand(-1, length, -1)  # each token, pads too, reads all real ones
    states = backbone(ids, attention_mask=attention_mask, layer=layer)
    pooled: Tensor
    if pooling == "last":
        pooled = states[torch.arange(len(ids), device=ids.device), counts - 1].float()
    else:
        pooled = states.float().masked_fill(~mask[..., None], 0).sum(1) / counts[:, None]
    rows: np.ndarray = pooled.cpu().numpy()
    return rows


def _read_shards(store: Path) -> dict[bytes, np.ndarray]:
    """All vectors of a store; a damaged shard is set aside, which means that its texts are encoded again."""
    vectors: dict[bytes, np.ndarray] = {}
    for path in sorted(store.glob("*.npz")):
        try:
            with np.load(path, allow_pickle=False) as shard:
                keys, rows = shard["keys"], shard["vectors"]
            if keys.shape[0] != rows.shape[0] or not np.isfinite(rows).all():
                raise ValueError("keys and vectors do not fit together")
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            set_aside(path, reason=f"damaged ({error})")
            continue
        vectors |= zip([key.tobytes() for key in keys], rows, strict=True)
    return vectors


def _write_shard(store: Path, shard: dict[bytes, np.ndarray]) -> None:
    keys = np.frombuffer(b"".join(shard), dtype=np.uint8).reshape(len(shard), -1)
    path = store / f"{hashlib.sha256(keys.tobytes()).hexdigest()[:16]}.npz"
    with renamed_to(path) as temporary, temporary.open("wb") as file:
        np.savez(file, keys=keys, vectors=np.stack(list(shard.values())))


def _progress(texts: int) -> Progress:
    return Progress(console=Console(file=sys.stderr), transient=True, disable=texts < 100)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:16]
