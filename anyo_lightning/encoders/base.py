"""`Encoders`: how a model encodes histories and items, chosen in one place."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.data.tokens import ItemTokenStore
from anyo_lightning.defaults import constructor_defaults
from anyo_lightning.errors import InputError
from anyo_lightning.llm.language_model import LLM
from anyo_lightning.runs import RUN_OPTIONS

Side = Literal["histories", "items"]
LANGUAGE_MODEL = "history_encoder.backbone."  # where a history encoder that reads texts holds it, in a model's names


class Encoders(ABC):
    """The two encoders of a model, as settings: the constructor loads and makes nothing.

    - The history encoder is an `nn.Module` that takes a `HistoryBatch` and gives the states at its supervised
      boundaries, in the order of `batch.targets`: (targets, dim).
    - The item encoder is an `nn.Module` that takes item ids and gives one vector per item: (items, dim). Their inner
      product with a state is the score.

    Language models are `Backbone`s anywhere inside the two: each is left out of checkpoints and named in their
    identity. A part that holds items' texts, or vectors of them, names the attribute in `HoldsTexts.texts_in`.
    """

    unit_length = False  # whether states and item vectors have length 1, so that a loss needs a temperature
    texts: frozenset[Side]  # the sides on which items' texts are read, as tokens or as vectors: what probes shuffle

    # Weights with a row per item, by the model's names (`fnmatch`), for catalogues other than the one trained on:
    item_rows: tuple[str, ...] = ()  # an item's own, trained
    run_rows: tuple[str, ...] = ()  # frozen, of another run
    text_rows: tuple[str, ...] = ()  # frozen, of the items' texts

    trains_only: tuple[str, ...] = ("dropout", "input_dropout", *RUN_OPTIONS)

    def width(self, option: str) -> int:
        """Of states and item vectors, the setting `dim`, for an option that needs it before anything is encoded.

        Raises:
            InputError: There is none; the width is a language model's.
        """
        dim: int | None = getattr(self, "dim", None)
        if dim is None:
            raise InputError(f"Expected encoders with a width, model.encoders.dim, with {option}, got none")
        return dim

    def settings(self) -> dict[str, str]:
        """What decides the encoders' function beside their weights, for checkpoints: all but `trains_only`.

        Raises:
            InputError: An attribute is neither plain nor an `LLM`: name it in `trains_only`, or override this.
        """
        return {name: self._plain(name, value) for name, value in vars(self).items() if name not in self.trains_only}

    def default_settings(self) -> dict[str, str]:
        """What those of `settings` that have a default are by default, by the options' full names."""
        plain = str | int | float | Path | None
        given = {name: value for name, value in constructor_defaults(type(self)).items() if isinstance(value, plain)}
        return {f"model.encoders.{name}": self._plain(name, value) for name, value in given.items()}

    def frozen_settings(self, data: RecDataModule) -> dict[str, str]:
        """What decided the frozen vectors in a checkpoint that nothing else in it names, by the options' full names."""
        return {}

    def _plain(self, name: str, value: object) -> str:
        """A value as the same text in every process."""
        if value is None or isinstance(value, str | int | float | Path):
            return str(value)
        if isinstance(value, LLM):
            return f"lora {value.lora_settings}"
        if isinstance(value, list | tuple):
            return f"[{', '.join(self._plain(name, inner) for inner in value)}]"
        raise InputError(
            f"Expected plain settings or LLMs in {type(self).__name__}, got {type(value).__name__} as {name}: name it "
            "in trains_only, or override settings()"
        )

    def item_tokens(self, data: RecDataModule) -> ItemTokenStore | None:
        """The tokens that batches carry, for histories read as text; None for histories of ids or vectors."""
        return None

    def row_tokens(self, data: RecDataModule) -> int:
        """Tokens of prompts and response markers that are read with each history; they count in a batch's budget."""
        return 0

    @abstractmethod
    def build(
        self, data: RecDataModule, *, device: torch.device, saved: Mapping[str, Tensor] | None = None
    ) -> tuple[nn.Module, nn.Module]:
        """Make the history encoder and the item encoder.

        Args:
            data: The data module, set up.
            device: Where language models go; everything else is made on the CPU and moved by Lightning.
            saved: The weights of the checkpoint that is about to be loaded, by the model's names: what they hold need
                not be computed or read from elsewhere. Or, where the model starts from a run that has fine-tuned the
                language model, its trained weights alone (`language_model_in`).
        """

    def read_items(
        self,
        texts: Sequence[str],
        read: Sequence[str],
        *,
        data: RecDataModule,
        history_encoder: nn.Module,
        item_encoder: nn.Module,
        device: torch.device,
    ) -> "ItemsByText":
        """What the parts of built encoders need to know of items outside of the catalogue, given by their texts.

        Args:
            texts: The items' texts.
            read: The same items' texts as histories read them (`data.texts_read`).
            data: The data module that the encoders were built on.
            history_encoder: As `build` made it, with trained weights.
            item_encoder: As `build` made it, with trained weights.
            device: Where language models go.

        Raises:
            InputError: When items are not known by their texts.
        """
        raise InputError(
            f"Expected a run whose items are read as texts to add items by their texts, got {type(self).__name__}, "
            "which know an item only by its interactions"
        )


def language_model_in(saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trained weights of the history encoder's language model, by the language model's names.

    Args:
        saved: Weights by a model's names.
    """
    return {key.removeprefix(LANGUAGE_MODEL): saved[key] for key in saved if key.startswith(LANGUAGE_MODEL)}


def check_dropout(**shares: float) -> None:
    """Refuse shares of dropout outside [0, 1).

    Args:
        shares: By the options' names.

    Raises:
        InputError: Naming the option.
    """
    for name, share in shares.items():
        if not 0 <= share < 1:
            raise InputError(f"Expected model.encoders.{name} in [0, 1), got {share}")


def check_sizes(*, dim: int | None, heads: int = 1, pooled_tokens: int = 0, **others: int | None) -> None:
    """Refuse sizes that are not positive or do not fit.

    Args:
        dim: Width of states; None is not given.
        heads: Attention heads of a transformer.
        pooled_tokens: Tokens added after a text; none are, with 0.
        others: Further sizes, by the options' names.

    Raises:
        InputError: Naming the option; `dim` must be a multiple of `heads`.
    """
    for name, value in {"dim": dim, "heads": heads, **others}.items():
        if value is not None and value < 1:
            raise InputError(f"Expected model.encoders.{name} to be positive, got {value}")
    if pooled_tokens < 0:
        raise InputError(f"Expected model.encoders.pooled_tokens to be at least 0, got {pooled_tokens}")
    if dim is not None and dim % heads:
        raise InputError(f"Expected model.encoders.dim to be a multiple of model.encoders.heads, got {dim} and {heads}")


def settings_of_dropped(backbone: LLM, data: RecDataModule) -> dict[str, str]:
    """What decided the vectors of a language model that is gone after the build, by the options' full names.

    Args:
        backbone: The language model.
        data: Whose items' texts it has read, cut at a length.
    """
    llm = {f"model.encoders.backbone.{name}": value for name, value in backbone.frozen_settings.items()}
    return llm | {"data.max_item_tokens": str(data.max_item_tokens)}


def check_frozen(backbone: LLM) -> None:
    """Refuse LoRA on a language model that is read before training only.

    Raises:
        InputError: The backbone has LoRA.
    """
    if backbone.options.get("lora") is not None:
        raise InputError("Expected model.encoders.backbone without lora, since its vectors are frozen, got lora")


@runtime_checkable
class HoldsTexts(Protocol):
    """A part of an encoder that holds items' texts (an `ItemTokenStore`) or vectors of them (a tensor)."""

    texts_in: str | None  # the attribute that holds them, one entry per item; None: no texts


@dataclass(frozen=True, eq=False)
class ItemsByText:
    """Items outside of the catalogue, as encoders read them.

    Attributes:
        count: How many.
        history_tokens: Their tokens for histories, where those are read as text.
        item_tokens: Their tokens for an item encoder that reads texts in each call.
        vectors: Frozen vectors of their texts, made as the catalogue's were.
    """

    count: int
    history_tokens: ItemTokenStore | None = None
    item_tokens: ItemTokenStore | None = None
    vectors: Float[Tensor, "items width"] | None = None


@runtime_checkable
class TakesItems(Protocol):
    """A part of an encoder that holds something of each item, and can hold it of items outside of the catalogue."""

    def add_items(self, items: ItemsByText) -> None:
        """Take further items, behind those that there are: to encode them, not to train on."""
        ...


@runtime_checkable
class CountsTokens(Protocol):
    """An `nn.Module` that reads tokens of items in each step: those that it reads with gradients are counted."""

    def token_count(self, item_ids: Int[Tensor, " items"]) -> int:
        """Tokens that are read to encode these items."""
        ...


@runtime_checkable
class CountsHistoryTokens(Protocol):
    """A history encoder that reads other tokens of a batch than `batch.token_count` says."""

    def tokens_read(self, batch: HistoryBatch, cut: Sequence[np.ndarray] | None = None) -> int:
        """Tokens that are read of a batch, where it is read in parts of these rows; by default in one."""
        ...
