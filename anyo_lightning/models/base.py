"""`RetrievalModule`: what all variants share. A variant chooses its loss; a configuration chooses its encoders."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from anyo_lightning import checkpoint_io, distributed
from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.data.sampler import TokenBudgetBatches
from anyo_lightning.data.tokens import ItemTokenStore
from anyo_lightning.encoders.base import CountsTokens, Encoders, SharesTokens
from anyo_lightning.errors import InputError
from anyo_lightning.hardware import peak_memory_gib
from anyo_lightning.internals import forget_counted_loader, keep_from_ddp, trainer_of
from anyo_lightning.llm.backbone import Backbone
from anyo_lightning.llm.evaluation_mode import evaluating
from anyo_lightning.llm.quantisation import parameter_count
from anyo_lightning.losses import full_softmax
from anyo_lightning.models import identity
from anyo_lightning.models.fitting import find_held_tokens
from anyo_lightning.models.measuring import measure_whitening
from anyo_lightning.models.parts import ONE_ITEM, states_in_parts
from anyo_lightning.models.schedule import learning_rate_schedule, parameter_groups
from anyo_lightning.models.transfer import Transfer
from anyo_lightning.runs import STARTED_FROM

T = TypeVar("T")
CATALOGUE_BLOCK = 1024  # items that one process encodes at a time


@dataclass
class Seen:
    """What has been trained on, on this process."""

    tokens: int = 0  # items, where no text is read
    targets: int = 0


class RetrievalModule(LightningModule):
    """Scores are inner products: `state · item vector`. Encoders say where both come from, a subclass its `loss`.

    The constructor keeps settings only; `configure_model` builds once the data are known, so that parsing a command
    line loads nothing. Without a Trainer, call `data.read_for(model)` and `model.prepare(data)`.

    Args:
        encoders: How histories and items are encoded; None where the class makes its own in `make_encoders`.
        optimizer: Makes the optimizer from parameter groups.
        learning_rates: Learning rates of parameters by the start of their name, such as
            `{"history_encoder.backbone": 1e-3}`; all others take the optimizer's own.
        warmup: Share of the steps over which learning rates rise from zero.
        decay: Whether they then fall to zero by a cosine, or stay.
        init_from: Run folder whose best weights this run starts from; of a run of `CSFT` it takes the language model's
            LoRA, with which frozen item vectors are then read, too.

    Raises:
        InputError: When encoders of unit length meet a class without a temperature.
    """

    history_encoder: nn.Module
    item_encoder: nn.Module
    data: RecDataModule
    trained = True  # False: counted when the data are known, with nothing to fit and no checkpoint
    cosines = False  # whether the loss has a temperature, without which cosines would be all but equal in a softmax
    starts_from: tuple[str, ...] = ()  # other classes whose runs `init_from` may name; what those lack starts afresh
    starts_afresh: tuple[str, ...] = ()  # state that `init_from` does not take over, whether the run has it or not

    def __init__(
        self,
        encoders: Encoders | None = None,
        *,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        learning_rates: dict[str, float] | None = None,
        warmup: float = 0.05,
        decay: bool = True,
        init_from: Path | None = None,
    ) -> None:
        super().__init__()
        if encoders is not None and encoders.unit_length and not self.cosines:
            raise InputError(
                "Expected a model with a temperature for encoders of unit length, such as E4SRec, got "
                f"{type(self).__name__}"
            )
        self.encoders = encoders
        self.optimizer = optimizer
        self.learning_rates = learning_rates or {}
        self.warmup, self.decay = warmup, decay
        self.init_from = init_from
        self.built = False
        self.history_masked: bool | None = None  # in a test without a Trainer; None: as metrics do by default
        self._saved_in: Path | None = None
        self._other_data = False
        self.transfer: Transfer | None = None  # where a run is tested on other data than its own
        self.started_from: dict[str, Any] | None = None  # what `init_from` was when training began
        self.seen = Seen()
        self.held: Tensor | None = None  # what `data.micro_batch_tokens auto` has found, to be logged
        self.shared_random = torch.Generator()
        self.register_buffer("training_items", torch.empty(0, dtype=torch.long), persistent=False)
        self.register_buffer("position_in_training", torch.empty(0, dtype=torch.long), persistent=False)

    def item_tokens(self, data: RecDataModule) -> ItemTokenStore | None:
        """The tokens that the data module's batches carry for this module."""
        return None if self.encoders is None else self.encoders.item_tokens(data)

    def row_tokens(self, data: RecDataModule) -> int:
        """Tokens that are read of each history beside its items."""
        return 0 if self.encoders is None else self.encoders.row_tokens(data)

    def make_encoders(self, data: RecDataModule, saved: Mapping[str, Tensor] | None) -> tuple[nn.Module, nn.Module]:
        """The history encoder and the item encoder, as `Encoders.build` makes them."""
        if self.encoders is None:
            raise InputError(f"Expected model.encoders for {type(self).__name__}, got none")
        return self.encoders.build(data, device=self.build_device, saved=saved)

    def build(self, data: RecDataModule) -> None:
        """Make what the loss needs beside the encoders, which are there; called once."""

    def loss(
        self, states: Float[Tensor, "targets dim"], batch: HistoryBatch
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The loss of a batch's states, each mean in it a `global_mean`, and its parts to log: `next_item_loss`."""
        return self.next_item_loss(states, batch), {}

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
        self.built = True
        # What DDP need not send: frozen weights, and buffers, which are the same on all processes and may be large.
        keep_from_ddp(self, identity.frozen_keys(self) | dict(self.named_buffers()).keys())
        self.build_seconds = time.perf_counter() - started

    def initialise(self) -> None:
        """Make the weights that training starts from; left out where a checkpoint will replace them.

        What encoders measure once is measured under these weights, unless a run that they come from has.
        """
        if self.init_from is not None:
            self._start_from(self.init_from)
        measure_whitening(self)

    def _start_from(self, folder: Path) -> None:
        """Take another run's weights over, and say which where it is of other items."""
        checkpoint = checkpoint_io.read(folder)
        transfer = Transfer.of(folder, checkpoint, self.data.split, self.encoders)
        weights = identity.weights_to_start_from(
            self,
            checkpoint,
            expected=self.identity(),
            defaults=self.default_settings,
            other_classes=self.starts_from,
            starts_afresh=self.starts_afresh,
            transfer=transfer,
        )
        self.load_state_dict(weights)
        self.started_from = checkpoint_io.describe_run(folder, checkpoint)
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

    def forward(self, batch: HistoryBatch) -> Float[Tensor, "targets dim"]:
        """The states at the supervised boundaries of a batch; what is read with gradients is counted."""
        if self.training and torch.is_grad_enabled():
            encoder, saved = self.history_encoder, 0
            if isinstance(encoder, SharesTokens):
                saved = encoder.tokens_saved(batch, passes=max(len(self._cut(batch)), 1))
            self.seen.tokens += batch.token_count - saved
        return self.encode_batch(batch)

    @property
    def reads_in_loss(self) -> bool:
        """Whether the loss has encoders read more, so that no part of a batch may keep its activations until then."""
        return False

    def encode_batch(self, batch: HistoryBatch) -> Float[Tensor, "targets dim"]:
        """What `forward` does, without counting: in training, in parts of at most `data.held_tokens`."""
        held = self.data.held_tokens if self.training and torch.is_grad_enabled() else None
        if held is None and len(batch.user):
            states: Tensor = self.history_encoder(batch)
            return states
        return states_in_parts(self, batch, self._cut(batch) if len(batch.user) else [], whole=held is None)

    def _cut(self, batch: HistoryBatch) -> list[np.ndarray]:
        """The rows of each part in which a batch is read in training."""
        held = self.data.held_tokens
        if held is None:
            return [np.arange(len(batch.user))]
        return TokenBudgetBatches(batch.lengths, budget=held, seed=None).batches()

    def states_of_step(self, batch: HistoryBatch) -> Float[Tensor, "states ..."]:
        """What a step encodes of a batch before its loss: by this `data.micro_batch_tokens auto` measures memory."""
        return self.encode_batch(batch)

    def encode_histories(
        self,
        histories: Sequence[np.ndarray],
        *,
        hidden: Sequence[np.ndarray] | None = None,
        spans: Sequence[Sequence[np.ndarray]] | None = None,
    ) -> Float[Tensor, "histories dim"]:
        """The last state of any histories, float32; what contrastive terms compare.

        Args:
            histories: Item ids of each history, oldest first, at least one; the latest whole items that fit are read.
                There may be none.
            hidden: For each history, True at the items whose identity is hidden from the encoder.
            spans: For each history, the tokens that are read instead of each item's own, separator included.
        """
        if len(histories):
            batch = self.reading.collate(histories, hidden=hidden, spans=spans)
        else:
            batch = self.reading.collate(ONE_ITEM).of_rows(np.empty(0, dtype=np.int64))
        states: Tensor = self(batch.to(self.device))
        return states.float()

    def encode_in_batches(
        self, histories: Sequence[np.ndarray], *, budget: int, hidden: Sequence[np.ndarray] | None = None
    ) -> Float[Tensor, "histories dim"]:
        """`encode_histories` in batches of similar length, as many passes on all processes where an LLM is sharded.

        Args:
            histories: Item ids of each history, oldest first, at least one; there may be none.
            budget: Most padded tokens (items, where no text is read) of a batch, prompts counted.
            hidden: For each history, True at the items whose identity is hidden from the encoder.
        """
        tokens = self.reading.item_token_counts
        most = self.data.max_items if tokens is None else self.data.max_tokens
        lengths = np.array(
            [len(items) if tokens is None else int(tokens[items].sum()) for items in histories], dtype=int
        )
        rows = np.minimum(np.array(lengths, dtype=np.int64), most) + self.reading.row_tokens
        batches = TokenBudgetBatches(rows, budget=budget, seed=None).batches()
        parts = [
            ([histories[row] for row in batch], None if hidden is None else [hidden[row] for row in batch])
            for batch in batches
        ]
        passes = self.as_many_passes(parts, spare=(ONE_ITEM, None))
        if not passes:
            return self.encode_items(self.training_items[:0])
        places = np.argsort(np.concatenate([np.empty(0, dtype=np.int64), *batches]))
        encoded = torch.cat([self.encode_histories(items, hidden=hides) for items, hides in passes])
        return encoded.index_select(0, torch.from_numpy(places).to(self.device))

    def as_many_passes(self, parts: Sequence[T], *, spare: T | None = None) -> list[T]:
        """What is to be read, pass by pass; where an LLM is sharded with repeats, for as many passes on all processes.

        Args:
            parts: One per pass.
            spare: What is read by a process without any; the states of repeats and of this are to be left out.
        """
        if not any(backbone.sharded for backbone in self.backbones):
            return list(parts)
        return distributed.as_many(parts or [spare], self.device)  # type: ignore[list-item]

    def setup(self, stage: str) -> None:
        """Refuse what would make a step another one (Lightning calls this before anything is built).

        Raises:
            InputError: For `trainer.accumulate_grad_batches`.
        """
        if stage == "fit" and self.trainer.accumulate_grad_batches != 1:
            raise InputError(
                f"Expected trainer.accumulate_grad_batches 1, got {self.trainer.accumulate_grad_batches}: raise "
                "data.batch_tokens for larger steps, and set data.micro_batch_tokens to the part that fits into memory"
            )

    def on_train_start(self) -> None:
        """Find how much of a step fits into memory, where that is asked for."""
        if self.data.micro_batch_tokens == "auto":
            self.data.held_tokens = find_held_tokens(self)
            self.held = torch.tensor(float(self.data.held_tokens), device=self.device)

    def on_train_batch_start(self, batch: HistoryBatch, batch_idx: int) -> None:
        """Seed each step from the data's seed, epoch, step and rank: a resumed run draws what another would have drawn.

        `shared_random` is the same on all processes: for what they must draw alike, such as shared negatives.
        """
        key = [self.data.seed, self.current_epoch, batch_idx]
        torch.manual_seed(int(np.random.SeedSequence([*key, self.global_rank]).generate_state(1)[0]))
        self.shared_random.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
        if self.held is not None:
            self.log("train/micro_batch_tokens", self.held)

    def training_step(self, batch: HistoryBatch, batch_idx: int) -> Tensor:
        """The mean loss over the batch's targets, which is logged, `weighted`."""
        states = self(batch)
        with torch.autocast(self.device.type, enabled=False):
            loss, parts = self.loss(states.float(), batch)
        targets = len(states)
        self.seen.targets += targets
        logged = {"train/loss": loss, **{f"train/{name}": value for name, value in parts.items()}}
        self.log_dict(logged, batch_size=max(targets, 1), prog_bar=True)
        return self.weighted(loss, targets)

    def weighted(self, loss: Float[Tensor, ""], targets: int) -> Float[Tensor, ""]:
        """A batch's mean loss times what makes each target of an epoch weigh the same, with `data.supervision last`.

        Computes `loss · T / mean T`, where T is the number of targets of the batch on all processes, since a batch of
        short rows then holds many times as many as one of long rows.

        Args:
            loss: A `global_mean`.
            targets: The number of this process's targets.
        """
        mean = self.data.targets_per_batch
        if mean is None:
            return loss
        return loss * (distributed.total_of(targets, self.device) / mean).to(loss.dtype)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log each group's gradient norm, before it is clipped."""
        for group in optimizer.param_groups:
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            self.log(f"grad_norm/{group['name']}", torch.nn.utils.get_total_norm(gradients))

    def validation_step(self, batch: HistoryBatch, batch_idx: int) -> dict[str, Tensor]:
        """The queries of a batch; `RetrievalMetrics` ranks them."""
        return {"row": batch.row, "query": self(batch).float()}

    def test_step(self, batch: HistoryBatch, batch_idx: int) -> dict[str, Tensor]:
        """The queries of a batch; `RetrievalMetrics` ranks them."""
        return self.validation_step(batch, batch_idx)

    def predict_step(self, batch: HistoryBatch, batch_idx: int) -> dict[str, Tensor]:
        """The queries of a batch."""
        return self.validation_step(batch, batch_idx)

    def encode_catalogue(self) -> Float[Tensor, "catalogue dim"]:
        """The vectors of all items, in evaluation mode, float32.

        The catalogue is cut into blocks that do not depend on the number of processes; each block is encoded by one
        process, and all get the same vectors.
        """
        ids = torch.arange(self.catalogue["items"], device=self.device)
        own = torch.split(ids, CATALOGUE_BLOCK)[distributed.rank() :: distributed.world_size()]
        blocks = self.as_many_passes(own or (ids[:1],))  # without a block of its own: no rows, but of the others' width
        with evaluating(self), torch.autocast(self.device.type, enabled=False):
            vectors = torch.cat([self.encode_items(block) for block in blocks])[: sum(map(len, own))]
        found = distributed.gather_rows(torch.cat([ids[:0], *own]))
        return distributed.gather_rows(vectors)[found.argsort()]

    def encode_items(self, item_ids: Int[Tensor, " items"]) -> Float[Tensor, "items dim"]:
        """The vectors by which these items are ranked, float32."""
        vectors: Tensor = self.item_encoder(item_ids)
        return vectors.float()

    def global_mean(self, mean: Float[Tensor, ""], count: int) -> Float[Tensor, ""]:
        """This process's share of a mean over all processes, for gradients that DDP averages.

        Computes `mean · count · processes / Σ count`: the mean over processes of these is the mean over all that the
        processes counted, so that gradients equal those of one process with the same global batch.

        Args:
            mean: Of a loss over what this process counted.
            count: How many that were: targets, or histories.
        """
        if distributed.world_size() == 1:
            return mean
        counts = distributed.total_of(count, self.device)
        return mean * (count * distributed.world_size() / counts.clamp(min=1)).to(mean.dtype)

    def training_vectors(self) -> Float[Tensor, "training_items dim"]:
        """The vectors over which losses range: of the items that occur in training."""
        return self.encode_items(self.training_items)

    def next_item_loss(self, states: Float[Tensor, "targets dim"], batch: HistoryBatch) -> Float[Tensor, ""]:
        """The full softmax over all items that occur in training, as a `global_mean` over the batch's targets."""
        targets = self.position_in_training[batch.targets]
        loss = full_softmax(states, self.training_vectors(), targets)
        return self.global_mean(loss, len(states))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Parameter groups by `learning_rates`, warm-up, cosine."""
        optimizer = self.optimizer(parameter_groups(self, self.learning_rates))
        steps = int(self.trainer.estimated_stepping_batches)
        forget_counted_loader(self.trainer)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, learning_rate_schedule(steps, warmup=self.warmup, decay=self.decay)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

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
            STARTED_FROM: self.started_from,
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
        self.started_from, seen = metadata.get(STARTED_FROM), metadata["seen"]
        self.seen = Seen(**seen) if self.global_rank == 0 else Seen()

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True, assign: bool = False) -> Any:  # type: ignore[override]
        """Load weights; only the language models' frozen ones may be missing, and they must be."""
        try:
            result = super().load_state_dict(state_dict, strict=False, assign=assign)
        except RuntimeError as error:  # torch's own sentence about sizes that differ
            raise InputError(f"Expected a checkpoint of a model of the same sizes, got: {error}") from error
        identity.check_keys(identity.frozen_keys(self), set(state_dict), result)
        return result
