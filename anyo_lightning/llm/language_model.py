"""`LLM`: which language model, and how to load it: what a configuration's `backbone` says."""

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase

from anyo_lightning.data.tokens import ItemTokenStore
from anyo_lightning.disk import cache_folder
from anyo_lightning.errors import InputError
from anyo_lightning.hardware import fast_dtype
from anyo_lightning.llm.aliases import load_tokenizer, locate
from anyo_lightning.llm.backbone import Backbone
from anyo_lightning.llm.selfcheck import self_check


class LLM:
    """A pre-trained language model by name; nothing is loaded before `load`.

    Args:
        name: Alias (`smollm2-135m-instruct`, `all-minilm-l6-v2`), local folder, or Hugging Face hub id.
        revision: Branch, tag or commit of a hub id.
        options: What else `Backbone` takes.
    """

    def __init__(self, name: str = "smollm2-135m-instruct", *, revision: str | None = None, **options: Any) -> None:
        inspect.signature(Backbone).bind(name, **options)  # a name that it lacks is a TypeError here, not in `load`
        self.name, self.revision = name, revision
        self.options = options  # alone on its line, where jsonargparse finds whose options these are

    def load(self, device: torch.device | str = "cpu") -> Backbone:
        """Load the model onto a device and check it.

        Args:
            device: Where its weights go (of a sharded model, this process's share).

        Raises:
            InputError: When the model cannot be loaded or fails the self-check.
        """
        backbone = Backbone(self.name, revision=self.revision, **self.options)
        backbone.place(torch.device(device))
        self_check(backbone, self.tokenizer)
        return backbone

    @property
    def lora_settings(self) -> str:
        """LoRA as it decides the model's function: the options that are not peft's own, but for those of training."""
        lora = self.options.get("lora")
        if lora is None:
            return "null"
        config = lora if isinstance(lora, LoraConfig) else LoraConfig(**lora)
        usual = LoraConfig().to_dict() | {name: getattr(config, name) for name in ("lora_dropout", "init_lora_weights")}
        kept = {name: value for name, value in config.to_dict().items() if value != usual.get(name)}
        return json.dumps(kept, sort_keys=True, default=sorted)

    @property
    def frozen_settings(self) -> dict[str, str]:
        """What decides the frozen model's states, by the options' names, without looking for it: a folder by its own.

        For models whose vectors are kept and that are dropped, so that no `Backbone.identity` says what they were.
        """
        given = {"dtype": "auto", "attention": "auto", "layers": None, "quantization_config": None} | self.options
        names = ("layers", "dtype", "attention", "quantization_config")
        dtype = fast_dtype() if given["dtype"] == "auto" else given["dtype"]
        found = {"name": Path(self.name).name, "revision": self.revision} | {name: given[name] for name in names}
        return {name: str(value) for name, value in (found | {"dtype": dtype}).items()}

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer; loads no weights."""
        return load_tokenizer(self.name, self.revision)

    def tokens(self, text: str) -> list[int]:
        """The token ids of a text, without special tokens; empty for an empty text."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def item_tokens(self, texts: Sequence[str], *, max_tokens: int) -> ItemTokenStore:
        """The tokens of the catalogue's texts, from the cache or tokenised now.

        Each item's text ends in the tokenizer's end-of-sequence (or separator) token: there the state is taken.

        Args:
            texts: One per item.
            max_tokens: Most tokens of an item, its separator included.

        Raises:
            InputError: When the tokenizer has neither an end-of-sequence nor a separator token.
        """
        tokenizer, location = self.tokenizer, locate(self.name, self.revision)
        separator = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        if separator is None:
            raise InputError(
                f"Expected an end-of-sequence or separator token in the tokenizer of {location.name}, got none"
            )
        return ItemTokenStore.build(
            texts,
            lambda some: tokenizer(some, add_special_tokens=False)["input_ids"],
            separator=separator,
            max_tokens=max_tokens,
            folder=cache_folder() / "tokens",
            identity=f"{location.name} {location.content or location.revision}",
        )
