"""`BuiltModule`: a LightningModule that is built when its data are known, and restored from what it has trained."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from anyo_lightning import checkpoint_io, distributed
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.data.tokens import ItemTokenStore
from anyo_lightning.encoders.base import CountsTokens, Encoders
from anyo_lightning.errors import InputError
from anyo_lightning.hardware import peak_memory_gib
from anyo_lightning.internals import keep_from_ddp, trainer_of
from anyo_lightning.lineage import noted_in
from anyo_lightning.llm.backbone import Backbone
from anyo_lightning.llm.quantisation import parameter_count
from anyo_lightning.models import identity
from anyo_lightning.models.transfer import Transfer
from anyo_lightning.runs import LINEAGE, RUN_OPTIONS, named_places


@dataclass
class Seen:
    """What has been trained on, on this process."""

    tokens: int = 0  # items, where no text is read
    targets: int = 0


class BuiltModule(LightningModule):
    """Encoders over a catalogue, what they were built on and what a checkpoint holds of them.

    The constructor keeps settings only; `configure_model` builds once the data are known, so that parsing a command
    line loads nothing. Without a Trainer, call `data.read_for(model)` and `model.prepare(data)`.

    Args:
        encoders: How histories and items are encoded; None where the class makes its own in `make_encoders`.
        init_from: Run folder whose best weights this run starts from.
    """

    history_encoder: nn.Module
    item_encoder: nn.Module
    data: RecDataModule
    trained = True  # False: counted when the data are known, with nothing to fit and no checkpoint
    starts_from: tuple[str, ...] = ()  # other classes whose runs `init_from` may name; what those lack starts afresh
    starts_alike: tuple[str, ...] = ()  # settings in which such a run must agree, or its weights would read other texts
    starts_afresh: tuple[str, ...] = ()  # state that `init_from` does not take over, whether the run has it or not

    def __init__(self, encoders: Encoders | None, *, init_from: Path | None) -> None:
        super().__init__()
        self.encoders, self.init_from = encoders, init_from
        self.built = False
        self._saved_in: Path | None = None
        self._other_data = False
        self.transfer: Transfer | None = None  # where a run is tested on other data than its own
        self.lineage: dict[str, Any] = {}  # of the runs that it has read, by their options: what they were then
        self.seen = Seen()
        self.register_buffer("training_items", torch.empty(0, dtype=torch.long), persistent=False)
        self.register_buffer("position_in_training", torch.empty(0, dtype=torch.long), persistent=False)

    def item_tokens(self, data: RecDataModule) -> ItemTokenStore | None:
        """The tokens that the data module's batches carry for this module."""
        return None if self.encoders is None else self.encoders.item_tokens(data)

    def row_tokens(self, data: RecDataModule) -> int:
        """Tokens that are read of each history beside its items."""
        return 0 if self.encoders is None else self.encoders.row_tokens(data)

    def make_encoders(self, data: RecDataModule, saved: Mapping[str, Tensor] | None) -> tuple[nn.Module, nn.Module]:
        """The history encoder and the item encoder, as `Encoders.build` makes them.

        Raises:
            InputError: There are no encoders in the settings.
        """
        if self.encoders is None:
            raise InputError(f"Expected model.encoders for {type(self).__name__}, got none")
        return self.encoders.build(data, device=self.build_device, saved=saved)

    def build(self, data: RecDataModule) -> None:
        """Make what the loss needs beside the encoders, which are there; called once."""

    def configure_model(self) -> None:
        """Build once, when the data are known (Lightning calls this after `setup`, possibly more than once).

        Raises:
            InputError: There is no data module, or it is of another catalogue or split than the one it was built on.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if data is None:
            raise InputError(f"Expected a data module for {type(self).__name__}, got loaders alone")
        if not self.built:
            path, self._saved_in = self._saved_in, None
            weights = None
            if path is not None:
                checkpoint = checkpoint_io.load(path)
                weights = checkpoint["state_dict"]
                if self._other_data:
                    self.transfer = Transfer.of(path.parent.parent, checkpoint, data.split, self.encoders)
                if self.transfer is not None:
                    self.transfer.check_testable()
                    weights = self.transfer.to_build_with(weights, self._language_model_to_start_with(data) or {})
            self.prepare(data, saved=weights)
            return
        for what, own, given in (
            ("catalogue and split", self.catalogue, checkpoint_io.describe_catalogue(data.split)),
            ("settings", self.data.settings(), data.settings()),
        ):
            if own != given:
                raise InputError(f"Expected data of the {what} that the model was built on, {own}, got {given}")
        self.data = data

    def restore_from(self, path: Path, *, other_data: bool = False) -> None:
        """Say, before the model is built, that the weights of this checkpoint will be loaded into it.

        What it holds is then neither initialised nor read from elsewhere: a trained run needs no folder that it started
        from. Give the same path to the Trainer.

        Args:
            path: The checkpoint, in its run folder.
            other_data: Whether it may be tested on data of another catalogue or split (`Transfer`).
        """
        self._saved_in, self._other_data = path, other_data

    def _language_model_to_start_with(self, data: RecDataModule) -> dict[str, Tensor] | None:
        """The language model's trained weights of a run of `CSFT` that `init_from` names."""
        if self.init_from is None:
            return None
        self.data = data
        return identity.fine_tuned_language_model(
            self.init_from, model=type(self).__name__, settings=self.function_settings
        )

    def prepare(self, data: RecDataModule, *, saved: Mapping[str, Tensor] | None = None) -> None:
        """Build on data whose `setup` has run; what `configure_model` does under a Trainer.

        All but language models is made on the CPU, also where Lightning makes a GPU the default device around this;
        Lightning moves it afterwards. Language models are put on the Trainer's device at once: they may have the
        catalogue to encode.

        Args:
            data: The data module.
            saved: The weights that will be loaded next, by the caller: what they replace is not initialised.
        """
        with torch.device("cpu"):
            self.prepare_on_default_device(data, saved)

    def prepare_on_default_device(self, data: RecDataModule, saved: Mapping[str, Tensor] | None) -> None:
        """What `prepare` does, whatever the default device."""
        started = time.perf_counter()
        trained = torch.from_numpy(data.split.training_counts() > 0)
        self.training_items = trained.nonzero()[:, 0]
        self.position_in_training = torch.full((len(trained),), -1).masked_scatter(trained, torch.arange(len(trained)))
        self.catalogue = checkpoint_io.describe_catalogue(data.split)
        self.data = data
        self.reading = data.view()  # what this module reads, whatever others that share the data module do
        known = self._language_model_to_start_with(data) if saved is None else saved
        read = data if self.transfer is None else data.view(trained_texts=self.transfer.trained_texts)
        self.history_encoder, self.item_encoder = self.make_encoders(read, known)
        self.build(data)
        for part in self.modules():
            if isinstance(part, CountsTokens):
                part.register_forward_pre_hook(self._count_items)
        self.identity()  # refuses settings that no checkpoint can hold
        if saved is None:
            self.initialise()
            self.lineage = {name: checkpoint_io.describe_run(place) for name, place in self.runs_read().items()}
        self.built = True
        # What DDP need not send: frozen weights, and buffers, which are the same on all processes and may be large.
        keep_from_ddp(self, identity.frozen_keys(self) | dict(self.named_buffers()).keys())
        self.build_seconds = time.perf_counter() - started

    def initialise(self) -> None:
        """Make the weights that training starts from; left out where a checkpoint will replace them.

        A subclass that measures something once measures it under these weights.
        """
        if self.init_from is not None:
            self._start_from(self.init_from)

    def runs_read(self) -> dict[str, Path]:
        """The runs that the model's and the encoders' options name, by these, as far as they are there."""
        options = {**({} if self.encoders is None else vars(self.encoders)), **vars(self)}
        named = [item for name in RUN_OPTIONS for item in named_places(name, options.get(name)).items()]
        return {name: Path(at) for name, at in named if isinstance(at, str | Path) and Path(at).exists()}

    def _start_from(self, folder: Path) -> None:
        """Take another run's weights over, and say which where it is of other items."""
        checkpoint = checkpoint_io.read(folder)
        transfer = Transfer.of(folder, checkpoint, self.data.split, self.encoders)
        same = {"data.titles_only"} if self.data.texts_read == self.data.split.item_texts else set()
        weights = identity.weights_to_start_from(
            self,
            checkpoint,
            expected=self.identity(),
            defaults=self.default_settings,
            other_classes=self.starts_from,
            alike=set(self.starts_alike) - same,  # a title may be all that there is of a text
            starts_afresh=self.starts_afresh,
            transfer=transfer,
        )
        self.load_state_dict(weights)
        if transfer is not None:
            transfer.say(weights)

    def _count_items(self, encoder: Any, inputs: tuple[Tensor, ...]) -> None:
        if self.training and torch.is_grad_enabled():
            self.seen.tokens += encoder.token_count(inputs[0])

    @property
    def build_device(self) -> torch.device:
        """Where language models are put while the model is built."""
        trainer = trainer_of(self)
        return torch.device("cpu") if trainer is None else trainer.strategy.root_device

    @property
    def function_settings(self) -> dict[str, str]:
        """What decides the model's function beside its weights, by the options' names."""
        encoders = {} if self.encoders is None else self.encoders.settings()
        return {f"model.encoders.{name}": value for name, value in encoders.items()} | {
            f"data.{name}": value for name, value in self.data.settings().items()
        }

    @property
    def default_settings(self) -> dict[str, str]:
        """What those of `function_settings` that have a default are by default."""
        return {} if self.encoders is None else self.encoders.default_settings()

    def identity(self) -> dict[str, Any]:
        """What must agree where a checkpoint of this module is loaded."""
        frozen = {} if self.encoders is None else self.encoders.frozen_settings(self.data)
        return identity.identify(self, self.catalogue, self.function_settings, frozen)

    @property
    def backbones(self) -> list[Backbone]:
        """The language models inside the encoders, each once: none, one or several."""
        return identity.language_models(self)

    def cost(self) -> dict[str, float]:
        """What the run trains, for the cost ledger."""
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        total = parameter_count(self)
        counting: dict[str, float] = {}
        if not self.trained:
            counting = {"tokens": 0, "targets": 0, "train_seconds": self.build_seconds}
            counting["peak_memory_gib"] = peak_memory_gib()
        built = {"build_seconds": self.build_seconds}  # such as embedding the catalogue, if the cache lacks it
        return {"trainable_parameters": trained, "parameters": total, **built, **counting}

    def seen_by_all(self) -> dict[str, float]:
        """The tokens and targets that all processes have trained on; a collective."""
        return {name: distributed.sum_over_ranks(count, self.device) for name, count in vars(self.seen).items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the language models' frozen weights out and write down what they were."""
        frozen = identity.frozen_keys(self)
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in frozen}
        checkpoint[checkpoint_io.METADATA] = {
            **self.identity(),
            "seen": self.seen_by_all(),
            LINEAGE: self.lineage,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another model, backbone, catalogue or split, unless it may be tested on others."""
        identity.check(
            self.identity(), checkpoint, defaults=self.default_settings, other_data=self.transfer is not None
        )
        if self.transfer is not None:
            own = {name: value for name, value in self.state_dict().items() if name not in identity.frozen_keys(self)}
            weights = self.transfer.weights(
                checkpoint["state_dict"], own, starts_afresh=self.starts_afresh, tested=True
            )
            checkpoint["state_dict"] = weights
            self.transfer.say(weights)
        metadata = checkpoint[checkpoint_io.METADATA]
        self.lineage, seen = noted_in(metadata), metadata["seen"]
        self.seen = Seen(**seen) if self.global_rank == 0 else Seen()

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True, assign: bool = False) -> Any:  # type: ignore[override]
        """Load weights; only the language models' frozen ones may be missing, and they must be.

        Raises:
            InputError: Other weights are missing or left over, or sizes differ.
        """
        try:
            result = super().load_state_dict(state_dict, strict=False, assign=assign)
        except RuntimeError as error:  # torch's own sentence about sizes that differ
            raise InputError(f"Expected a checkpoint of a model of the same sizes, got: {error}") from error
        identity.check_keys(identity.frozen_keys(self), set(state_dict), result)
        return result
