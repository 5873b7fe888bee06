"""`RetrievalModule`: what all variants share. A variant chooses a history encoder, an item encoder and a loss."""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from anyo_lightning import distributed
from anyo_lightning.checkpoint_io import METADATA
from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.errors import InputError
from anyo_lightning.hardware import peak_memory_gib
from anyo_lightning.llm.backbone import Backbone, load_tokenizer
from anyo_lightning.llm.evaluation_mode import evaluating
from anyo_lightning.llm.selfcheck import self_check
from anyo_lightning.models import identity
from anyo_lightning.models.schedule import learning_rate_schedule

T = TypeVar("T")
BackboneCallable = Callable[[], Backbone]
CATALOGUE_BLOCK = 1024  # items that one process encodes at a time


class RetrievalModule(LightningModule):
    """Scores are inner products: `state · item vector`. Subclasses say in `build` where both come from.

    The constructor keeps settings only; `configure_model` builds once the data are known, so that parsing a command
    line loads nothing. Without a Trainer, call `build(datamodule)`.

    Args:
        optimizer: Makes the optimizer from parameter groups.
        learning_rates: Learning rates of parameters by the start of their name, such as
            `{"history_encoder.backbone": 1e-3}`; all others take the optimizer's own.
        warmup: Share of the steps over which learning rates rise from zero.
        decay: Whether they then fall to zero by a cosine, or stay.
        init_from: Run folder whose best weights this run starts from.
    """

    history_encoder: nn.Module
    item_encoder: nn.Module
    trained = True  # False: counted when the data are known, with nothing to fit and no checkpoint
    starts_from: tuple[str, ...] = ()  # other classes whose runs `init_from` may name; what those lack starts afresh
    starts_afresh: tuple[str, ...] = ()  # state that `init_from` does not take over, whether the run has it or not

    def __init__(
        self,
        *,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        learning_rates: dict[str, float] | None = None,
        warmup: float = 0.05,
        decay: bool = True,
        init_from: Path | None = None,
    ) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.learning_rates = learning_rates or {}
        self.warmup, self.decay = warmup, decay
        self.init_from = init_from
        self.built = False
        self.restored: dict[str, Tensor] | None = None  # weights of the checkpoint that is about to be loaded
        self.reads_text = False
        self.seen = {"tokens": 0, "targets": 0}  # in training, on this process
        self.shared_random = torch.Generator()
        self.register_buffer("training_items", torch.empty(0, dtype=torch.long), persistent=False)
        self.register_buffer("position_in_training", torch.empty(0, dtype=torch.long), persistent=False)

    def build(self, data: RecDataModule) -> None:
        """Set `history_encoder` and `item_encoder` from the data; called once."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is built")

    def loss(
        self, states: Float[Tensor, "targets dim"], batch: HistoryBatch
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The loss of a batch's states, each mean in it a `global_mean`, and its parts to log."""
        raise NotImplementedError(f"{type(self).__name__} is not trained")

    def configure_model(self) -> None:
        """Build once, when the data are known (Lightning calls this after `setup`, possibly more than once)."""
        data: RecDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        if not self.built:
            self.prepare(data)
        elif self.backbone is not None and self.reads_text:
            _give_tokens(self.backbone, data)  # another data module than the one it was built on

    def prepare(self, data: RecDataModule) -> None:
        """Build on data whose `setup` has run; what `configure_model` does under a Trainer.

        All but the LLM is made on the CPU, also where Lightning makes a GPU the default device around this; Lightning
        moves it afterwards. The LLM is put on the Trainer's device at once: it may have the catalogue to encode.
        """
        with torch.device("cpu"):
            self.build_all(data)

    def build_all(self, data: RecDataModule) -> None:
        """What `prepare` does, whatever the default device."""
        started = time.perf_counter()
        trained = torch.from_numpy(data.split.training_counts() > 0)
        self.training_items = trained.nonzero()[:, 0]
        self.position_in_training = torch.full((len(trained),), -1).masked_scatter(trained, torch.arange(len(trained)))
        self.catalogue = identity.describe_catalogue(data.split)
        self.data = data
        self.build(data)
        if self.restored is None:
            self.initialise()
        self.restored = None  # Lightning loads the checkpoint itself
        self.built = True
        # What DDP need not send: frozen weights, and buffers, which are the same on all processes and may be large.
        self._ddp_params_and_buffers_to_ignore = identity.frozen_keys(self) | dict(self.named_buffers()).keys()
        self.build_seconds = time.perf_counter() - started

    def initialise(self) -> None:
        """Make the weights that training starts from; left out where a checkpoint will take their place."""
        if self.init_from is not None:
            identity.start_from(self, self.init_from)

    def load_backbone(self, make: BackboneCallable, data: RecDataModule, *, reads_text: bool) -> Backbone:
        """Load the LLM, check it, and let the data module carry its tokens.

        Args:
            make: Loads the LLM.
            data: The data module, set up.
            reads_text: Whether histories are read as text.

        Raises:
            InputError: When the LLM cannot be loaded or fails the self-check.
        """
        backbone = make().place(self.build_device)
        self_check(backbone, load_tokenizer(*backbone.source))
        if reads_text:
            _give_tokens(backbone, data)
        self.reads_text = reads_text
        return backbone

    @property
    def build_device(self) -> torch.device:
        """Where LLMs are put while the model is built."""
        return torch.device("cpu") if self._trainer is None else self.trainer.strategy.root_device

    @property
    def backbone(self) -> Backbone | None:
        """The LLM inside the encoders, if there is one."""
        return next((module for module in self.modules() if isinstance(module, Backbone)), None)

    def forward(self, batch: HistoryBatch) -> Float[Tensor, "targets dim"]:
        """The states at the supervised boundaries of a batch."""
        states: Tensor = self.history_encoder(batch)
        return states

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
            hidden: For each history, True at the items whose identity is hidden from the encoder.
            spans: For each history, the tokens that are read in the place of each item's own, separator included.
        """
        batch = self.data.collate(histories, hidden=hidden, spans=spans).to(self.device)
        if torch.is_grad_enabled():  # else these are not trained on: states for a bank, or to mine by
            self.seen["tokens"] += batch.token_count
        states: Tensor = self(batch)
        return states.float()

    def as_many_passes(self, parts: Sequence[T], *, spare: T | None = None) -> list[T]:
        """What the LLM is to read, pass by pass; where it is sharded with repeats, for as many passes on all processes.

        Args:
            parts: One a pass.
            spare: What is read by a process without any; the states of repeats and of this are to be left out.
        """
        if self.backbone is None or not self.backbone.sharded:
            return list(parts)
        return distributed.as_many(parts or [spare], self.device)  # type: ignore[list-item]

    def on_train_batch_start(self, batch: HistoryBatch, batch_idx: int) -> None:
        """Seed each step from seed, epoch, step and rank: a resumed run draws what an uninterrupted one draws.

        `shared_random` is the same on all processes: for what they must draw alike, such as shared negatives.
        """
        key = [int(os.environ.get("PL_GLOBAL_SEED", 0)), self.current_epoch, batch_idx]
        torch.manual_seed(int(np.random.SeedSequence([*key, self.global_rank]).generate_state(1)[0]))
        self.shared_random.manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))

    def training_step(self, batch: HistoryBatch, batch_idx: int) -> Tensor:
        """The loss, as the mean over the batch's targets."""
        states = self(batch)
        with torch.autocast(self.device.type, enabled=False):
            loss, parts = self.loss(states.float(), batch)
        targets = len(states)
        self.seen["tokens"] += batch.token_count
        self.seen["targets"] += targets
        logged = {"train/loss": loss, **{f"train/{name}": value for name, value in parts.items()}}
        self.log_dict(logged, batch_size=targets, prog_bar=True)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the norm of each group's gradient, before it is clipped."""
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
        total = distributed.sum_over_ranks(count, self.device)
        return mean * (count * distributed.world_size() / max(total, 1))

    def training_vectors(self) -> Float[Tensor, "training_items dim"]:
        """The vectors over which losses range: of the items that occur in training."""
        return self.encode_items(self.training_items)

    def training_targets(self, batch: HistoryBatch) -> Int[Tensor, " targets"]:
        """The rows of the batch's targets in `training_vectors()`."""
        return self.position_in_training[batch.targets]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Parameter groups by `learning_rates`, warm-up, cosine."""
        starts = sorted(self.learning_rates, key=len, reverse=True)  # the longest that fits
        groups: dict[str, list[nn.Parameter]] = {start: [] for start in (*starts, "")}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups[next(start for start in groups if name.startswith(start))].append(parameter)
        if unused := [start for start in starts if not groups[start]]:
            raise InputError(
                f"Expected learning_rates for starts of trained parameters' names, got {', '.join(unused)}"
            )
        optimizer = self.optimizer(
            [
                {"params": parameters, "name": start or "others"}
                | ({"lr": self.learning_rates[start]} if start else {})
                for start, parameters in groups.items()
                if parameters
            ]
        )
        steps = int(self.trainer.estimated_stepping_batches)
        # Counting has made a loader, before the checkpoint says where in the epoch to go on: let the loop make it anew.
        self.trainer.fit_loop._combined_loader = None
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, learning_rate_schedule(steps, warmup=self.warmup, decay=self.decay)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def cost(self) -> dict[str, float]:
        """What the run trains, for the cost ledger."""
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.parameters())
        counting: dict[str, float] = {}
        if not self.trained:
            counting = {"tokens": 0, "targets": 0, "train_seconds": self.build_seconds}
            counting["peak_memory_gib"] = peak_memory_gib()
        built = {"build_seconds": self.build_seconds}  # embedding the catalogue, where the cache lacks it, and the like
        return {"trainable_parameters": trained, "parameters": total, **built, **counting}

    def seen_by_all(self) -> dict[str, float]:
        """The tokens and targets that all processes have trained on; a collective."""
        return {name: distributed.sum_over_ranks(count, self.device) for name, count in self.seen.items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the backbone's frozen weights out and write down what they were."""
        frozen = identity.frozen_keys(self)
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in frozen}
        checkpoint[METADATA] = identity.describe(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another model, backbone, catalogue or split."""
        identity.check(self, checkpoint)
        seen = checkpoint[METADATA]["seen"]
        self.seen = {name: count if self.global_rank == 0 else 0 for name, count in seen.items()}

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True, assign: bool = False) -> Any:  # type: ignore[override]
        """Load weights; only the backbone's frozen ones may be missing, and they must be."""
        try:
            result = super().load_state_dict(state_dict, strict=False, assign=assign)
        except RuntimeError as error:  # torch's own sentence about sizes that differ
            raise InputError(f"Expected a checkpoint of a model of the same sizes, got: {error}") from error
        identity.check_keys(self, result)
        return result


def _give_tokens(backbone: Backbone, data: RecDataModule) -> None:
    """Let the data module's batches carry the backbone's tokens."""
    name = f"{backbone.identity['name']} {backbone.identity['revision']}"
    data.read_as_text(load_tokenizer(*backbone.source), identity=name)
