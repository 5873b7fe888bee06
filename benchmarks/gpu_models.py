"""Language models of known shapes with random weights, and a step of training: what `gpu.py` and `scaling.py` time.

Speed does not depend on the weights. Each model is saved in a folder, so that `Backbone` loads it like a user's.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast, Qwen3Config

from anyo_lightning.hardware import fast_dtype
from anyo_lightning.llm.backbone import Backbone
from anyo_lightning.losses import full_softmax

LORA = {"r": 32, "lora_alpha": 64, "target_modules": "all-linear"}
ITEM_TOKENS = 10  # per item of a history, its separator included
CATALOGUE, WIDTH = 10_000, 128
LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256}
SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "Qwen3-0.6B": lambda: Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
    ),
    "SmolLM2-135M": lambda: LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "Llama-3.2-1B": lambda: LlamaConfig(
        **LLAMA_1B, num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072
    ),
    "tiny": lambda: LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    ),
}


def device() -> torch.device:
    """The first GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype() -> torch.dtype:
    """What the models compute in: bfloat16 where it is fast, float16 on older GPUs, float32 on older CPUs."""
    if torch.cuda.is_available() and fast_dtype() == "float32":
        return torch.float16
    return getattr(torch, fast_dtype())


def save_model(config: PretrainedConfig, folder: Path) -> Path:
    """Write a model of random weights, and a tokenizer of single bytes, into a folder; returns it."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device():
            AutoModel.from_config(config).save_pretrained(str(folder))
    finally:
        torch.set_default_dtype(before)
    bytes_alone = Tokenizer(models.BPE())
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False)
    bytes_alone.train_from_iterator([], trainer)
    PreTrainedTokenizerFast(tokenizer_object=bytes_alone, eos_token="<end>", pad_token="<end>").save_pretrained(
        str(folder)
    )
    return folder


@dataclass
class Batch:
    """Histories of one length, whole: no padding."""

    token_ids: Tensor  # (histories, tokens)
    read: tuple[Tensor, Tensor]  # the ends of items, but for the last item, which is a target only
    targets: Tensor  # (states read,)


def random_batch(tokens: int, length: int, vocabulary: int) -> Batch:
    """So many tokens, at least one history of this length."""
    rows, items = max(1, tokens // length), length // ITEM_TOKENS
    ends = torch.arange(1, items, device=device()) * ITEM_TOKENS - 1
    places = torch.arange(rows, device=device()).repeat_interleave(len(ends)), ends.repeat(rows)
    return Batch(
        torch.randint(1, min(vocabulary, 49152), (rows, length), device=device()),
        places,
        torch.randint(CATALOGUE, (len(places[0]),), device=device()),
    )


class Head(nn.Module):
    """Projector and item vectors: the rest of an `E4SRec`, the same in every row of a table."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.projector = nn.Linear(hidden, WIDTH)
        self.register_buffer("items", torch.randn(CATALOGUE, WIDTH))


class Ours(Head):
    """A `Backbone` with some options, read at the ends of items, and the full softmax."""

    def __init__(self, folder: Path, **options: object) -> None:
        backbone = Backbone(str(folder), lora=LORA, dtype=str(dtype()).removeprefix("torch."), **options)  # type: ignore[arg-type]
        super().__init__(backbone.hidden_size)
        self.backbone = backbone.place(device())  # compiles, or puts Liger's kernels in where they are installed

    def forward(self, batch: Batch) -> Tensor:
        """The mean loss."""
        states = self.backbone(batch.token_ids, read=batch.read)
        return full_softmax(self.projector(states.float()), self.get_buffer("items"), batch.targets)


class Plain(Head):
    """peft's model under autocast, as its documentation has it, and cross-entropy over all logits."""

    def __init__(self, folder: Path) -> None:
        model = AutoModel.from_pretrained(str(folder), dtype=dtype())
        super().__init__(int(model.config.hidden_size))
        self.model = get_peft_model(model, LoraConfig(**LORA))

    def forward(self, batch: Batch) -> Tensor:
        """The mean loss."""
        with torch.autocast(batch.token_ids.device.type, dtype=dtype(), enabled=dtype() != torch.float32):
            states = self.model(input_ids=batch.token_ids).last_hidden_state[batch.read]
        logits = self.projector(states.float()) @ self.get_buffer("items").T
        return F.cross_entropy(logits, batch.targets)


def train_flops(config: PretrainedConfig, length: int, r: int = int(LORA["r"])) -> float:
    """FLOPs per token of a history of this many tokens: 4 per frozen weight, 6 per weight of LoRA, and attention.

    A frozen weight takes no gradient: 2 FLOPs forward, 2 backward. Attention is causal: scores and sums over half of
    the pairs, 2 · 2 · length / 2 · width forward and twice that backward. What is saved by reading the last layer at
    the ends of items alone is not subtracted, so that FLOPs per second of all rows compare as their tokens do.
    """
    width, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    head = getattr(config, "head_dim", None) or width // heads
    own, shared = heads * head, config.num_key_value_heads * head
    products = [(width, own), (width, shared), (width, shared), (own, width)]
    products += [(width, config.intermediate_size)] * 2 + [(config.intermediate_size, width)]
    frozen, trained = sum(a * b for a, b in products), sum(r * (a + b) for a, b in products)
    return float(layers * (4 * frozen + 6 * trained + 6 * length * own))


def synchronize() -> None:
    """Wait until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(step: Callable[[], object], *, warm_up: int, repeats: int) -> float:
    """The median time of several calls, after some that do not count."""
    times = []
    for call in range(warm_up + repeats):
        synchronize()
        started = time.perf_counter()
        step()
        synchronize()
        if call >= warm_up:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def trainer_step(model: nn.Module) -> Callable[[Batch], None]:
    """Forward, backward, and a step of AdamW on what is trained."""
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()

    return step
