"""`RetrievalModule`: what all variants share. A variant chooses its loss; a configuration chooses its encoders."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from anyo_lightning import distributed
from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.encoders.base import Encoders
from anyo_lightning.errors import InputError
from anyo_lightning.evaluation.callback import RetrievalMetrics
from anyo_lightning.internals import forget_counted_loader
from anyo_lightning.losses import full_softmax
from anyo_lightning.models.encoding import EncodingModule
from anyo_lightning.models.fitting import find_held_tokens
from anyo_lightning.models.measuring import measure_whitening
from anyo_lightning.models.schedule import learning_rate_schedule, parameter_groups


class RetrievalModule(EncodingModule):
    """Scores are inner products: `state · item vector`. Encoders say where both come from, a subclass its `loss`.

    Args:
        encoders: How histories and items are encoded; None where the class makes its own in `make_encoders`.
        optimizer: Makes the optimizer from parameter groups.
        learning_rates: Learning rates of parameters by the start of their name, such as
            `{"history_encoder.backbone": 1e-3}`; all others take the optimizer's own.
        warmup: Share of the steps over which learning rates rise from zero.
        decay: Whether they then fall to zero by a cosine, or stay.
        mask_history: Leave all items that a user has in training, earlier and later ones, out of the softmax, but for
            the target. For evaluations that leave a history out of the ranking.
        init_from: Run folder whose best weights this run starts from; of a run of `CSFT` it takes the language model's
            LoRA, with which frozen item vectors are then read, too.

    Raises:
        InputError: When encoders of unit length meet a class without a temperature, or histories are to be masked in
            a loss that knows no mask.
    """

    # Whether encoders may give cosines, all but equal in a softmax: the loss has a temperature, or reads none.
    cosines = False
    masks = False  # whether the loss takes `mask_history`: `next_item_loss` does

    def __init__(
        self,
        encoders: Encoders | None = None,
        *,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        learning_rates: dict[str, float] | None = None,
        warmup: float = 0.05,
        decay: bool = True,
        mask_history: bool = False,
        init_from: Path | None = None,
    ) -> None:
        super().__init__(encoders, init_from=init_from)
        if encoders is not None and encoders.unit_length and not self.cosines:
            raise InputError(
                "Expected a model with a temperature for encoders of unit length, such as E4SRec, got "
                f"{type(self).__name__}"
            )
        if mask_history and not self.masks:
            raise InputError(
                "Expected model.mask_history with Anyo, CLLMRec, E4SRec, SASRec, SRACL, UniSRec or a class with `masks "
                f"= True`, as one may have whose loss is next_item_loss, got it for {type(self).__name__}"
            )
        if not 0 <= warmup <= 1:
            raise InputError(f"Expected model.warmup, a share of the steps, between 0 and 1, got {warmup}")
        self.mask_history = mask_history
        self.optimizer = optimizer
        self.learning_rates = learning_rates or {}
        self.warmup, self.decay = warmup, decay
        self.history_masked: bool | None = None  # in a test without a Trainer; None: as metrics do by default
        self.held: Tensor | None = None  # what `data.micro_batch_tokens auto` has found, to be logged
        self.shared_random = torch.Generator()

    def initialise(self) -> None:
        """Make the weights that training starts from, and measure under them what encoders measure once.

        What a run that they come from has measured is taken over.
        """
        super().initialise()
        measure_whitening(self)

    def loss(
        self, states: Float[Tensor, "targets dim"], batch: HistoryBatch
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The loss of a batch's states, each mean in it a `global_mean`, and its parts to log: `next_item_loss`."""
        return self.next_item_loss(states, batch), {}

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

    def on_fit_start(self) -> None:
        """Refuse a loss that leaves out what the evaluation ranks.

        Raises:
            InputError: For `mask_history` without `metrics.mask_history`.
        """
        evaluated = [one for one in self.trainer.callbacks if isinstance(one, RetrievalMetrics)]  # type: ignore[attr-defined]
        if self.mask_history and not all(one.masks_history(self.data.split) for one in evaluated):
            raise InputError(
                "Expected metrics.mask_history true with model.mask_history: the loss would leave out what the "
                "evaluation ranks"
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
        self.log_shares(logged)
        return self.weighted(loss, targets)

    def log_shares(self, shares: dict[str, Tensor]) -> None:
        """Log the means over all processes of what is a `global_mean` in each of them, or the same in all."""
        means = distributed.mean_over_ranks(torch.stack([share.detach().float() for share in shares.values()]))
        self.log_dict(dict(zip(shares, means, strict=True)), prog_bar=True, batch_size=1)

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

    def logit_scale(self) -> float:
        """What the loss multiplies inner products by before its softmax over items: 1/τ where it has a temperature.

        Raises:
            InputError: The loss has no such softmax.
        """
        return 1.0

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

    def next_item_loss(
        self,
        states: Float[Tensor, "targets dim"],
        batch: HistoryBatch,
        *,
        vectors: Float[Tensor, "training_items dim"] | None = None,
    ) -> Float[Tensor, ""]:
        """The full softmax over all items that occur in training, as a `global_mean` over the batch's targets.

        Args:
            states: At the batch's targets.
            batch: Its histories.
            vectors: `training_vectors`, where they are known.
        """
        targets = self.position_in_training[batch.targets]
        vectors = self.training_vectors() if vectors is None else vectors
        excluded = None
        if self.mask_history:
            excluded = self.owned(batch.on_cpu.user, self.training_items), batch.target_places[0]
        return self.global_mean(full_softmax(states, vectors, targets, excluded=excluded), len(states))

    def owned(self, user: Int[Tensor, " batch"], items: Int[Tensor, " items"]) -> Bool[Tensor, "batch items"]:
        """Whether each user has each of these items in training."""
        place = np.full(self.catalogue["items"], -1)
        place[items.cpu().numpy()] = np.arange(len(items))
        owned = np.zeros((len(user), len(items)), dtype=bool)
        for row, one in enumerate(user.tolist()):
            found = place[self.data.split.training_history(one)]
            owned[row, found[found >= 0]] = True
        return torch.from_numpy(owned).to(items.device)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Parameter groups by `learning_rates`, warm-up, cosine."""
        optimizer = self.optimizer(parameter_groups(self, self.learning_rates))
        steps = int(self.trainer.estimated_stepping_batches)
        forget_counted_loader(self.trainer)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, learning_rate_schedule(steps, warmup=self.warmup, decay=self.decay)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
