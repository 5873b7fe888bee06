"""LLaRA and its pre-training over a tiny language model, for the tests of both."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from helpers import LORA, MakeData, prepare, tiny
from helpers import fit as fit_without_clipping
from torch import nn

from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.encoders.live import LiveTextEncoders
from anyo_lightning.models.base import RetrievalModule
from anyo_lightning.models.llara import LLaRA, sample_targets
from anyo_lightning.models.llara_pretrain import LLaRAPretrain

ENCODERS = inspect.signature(LiveTextEncoders).parameters
Make = Callable[..., Any]
fit = partial(fit_without_clipping, gradient_clip_val=1.0)


def maker(tiny_llm: str) -> Make:
    """LLaRA, or its pre-training, over the tiny LLM; a setting goes to the encoders where they have it."""

    def build(kind: type[RetrievalModule] = LLaRA, lora: dict[str, Any] | None = LORA, **settings: Any) -> Any:
        own = {"dim": 16, "dropout": 0.0} if kind is LLaRA else {"dim": None, "whiten": False}
        own |= {name: settings.pop(name) for name in ENCODERS.keys() & settings.keys()}
        encoders = LiveTextEncoders(tiny(tiny_llm, lora=lora), **own)
        return kind(encoders, **({"optimizer": partial(torch.optim.AdamW, lr=1e-2)} | settings))

    return build


def builder(make: Make, make_data: MakeData) -> Make:
    """The same on the data, with LoRA away from zero, in evaluation mode."""

    def build(kind: type[RetrievalModule] = LLaRA, data: dict[str, Any] | None = None, **settings: Any) -> Any:
        torch.manual_seed(0)
        module = prepare(make(kind, **settings), make_data(**(of_kind(kind) | (data or {}))))
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        return module.eval()

    return build


def of_kind(kind: type[RetrievalModule]) -> dict[str, Any]:
    """What the pre-training asks of the data."""
    return {"supervision": "last"} if kind is LLaRAPretrain else {}


def batch_of(module: RetrievalModule, seed: int = 0) -> HistoryBatch:
    """The first training batch, with two random targets per history."""
    torch.manual_seed(seed)
    return sample_targets(next(iter(module.data.train_dataloader())), 2)
