"""LLaRA: the dual encoder. One LLM reads histories and items, and both are trained to meet."""

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from anyo_lightning import distributed
from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.data.splits import MISSING
from anyo_lightning.encoders.hierarchical import HierarchicalEncoders
from anyo_lightning.encoders.live import LiveTextEncoders, LiveTextItems
from anyo_lightning.errors import InputError
from anyo_lightning.evaluation.index import ItemIndex
from anyo_lightning.llm.evaluation_mode import evaluating
from anyo_lightning.losses import full_softmax, info_nce
from anyo_lightning.models.base import RetrievalModule
from anyo_lightning.models.checks import check_positive
from anyo_lightning.models.temperature import Temperature, check_temperature

Keys = Literal["batch", "catalogue"]


class LLaRA(RetrievalModule):
    """InfoNCE between the EOS states of histories and of items, both from one LLM with LoRA, at unit length.

    Negatives are all items of the step: the targets of all its histories and mined hard negatives, each distinct item
    encoded once. Items that a user has in training are none of his negatives. Hard negatives are the top of the
    catalogue for the user's last training state, without his training items, mined again every `refresh_epochs` epochs;
    the first epochs have in-batch negatives only. If a step's targets hold a large part of the catalogue, as on
    MovieLens-100K, most hard negatives are among them anyway. With logQ an in-batch item counts once in expectation,
    as in the full softmax, and an item that is only mined counts once when it is drawn, so at most twice in all.

    With `keys: catalogue` the loss is the full softmax of cosines over all items that occur in training, `full_softmax`
    of `state / τ`, all supervised boundaries and no mask: E4SRec with a live item tower. All items are encoded in every
    step, each process its share. A single pass keeps its activations; if the share needs several (`LiveTextItems`), or
    `data.micro_batch_tokens` is set, none are kept, so that memory grows by the items' vectors alone. It needs no
    mining, no correction for popularity and no choice of boundaries, but a small catalogue, or a large batch: the
    titles of MovieLens-100K are 16,000 tokens.

    What differs from the paper and its code:

    - Their query is a text with the NEXT prompt and one positive: that is `data.supervision: last`. With `all`, the
      default, one pass over a history gives the state at each item's EOS, without a prompt, and `targets_per_history`
      of them, drawn again in each step, are supervised, since each costs an encoded item.
    - They compare raw states. Here each side is whitened, since the raw EOS states of all texts point in nearly one
      direction, and then projected: by one linear map for both, or with `hidden` items by a perceptron of their own,
      which may put an item where its users are rather than where its words are (`dim: null` and `whiten: false` are
      the paper's).
    - Their temperature is 0.01. While states say little, the quickest way to lower the loss at so low a temperature is
      to make all vectors equal, and training stays there for long; 0.1 is the default here.
    - The paper pools EOS, its code the mean of 8 added tokens: `pooled_tokens: 8`.
    - Their 15 hard negatives per query come from a fixed list; here they are mined from the model itself.
    - They do not correct in-batch negatives for popularity; `popularity_correction: false` is theirs.

    Args:
        encoders: The dual encoder, or an item LLM under a user LLM (HLLM).
        keys: The items over which the loss ranges: those of the `batch`, or the whole `catalogue`, with which
            `targets_per_history`, masking and correction say nothing, and hard negatives are refused.
        targets_per_history: Boundaries of each history that a step supervises.
        temperature: τ, or its start if it is learned.
        learn_temperature: Whether τ is trained; it stays between 0.01 and 1 (`Temperature`).
        mask_false_negatives: Leave the items that a user has in training out of his negatives.
        popularity_correction: Subtract from each in-batch negative's score the log of its chance to be one (logQ).
        hard_negatives: Mined negatives that each history adds to a step.
        mined_negatives: Length of each user's list of mined negatives.
        refresh_epochs: Epochs between minings.
        training: What `RetrievalModule` takes.

    Reference: Li et al., Llama2Vec (ACL 2024, arXiv 2312.15503), its fine-tuning.
    """

    encoders: LiveTextEncoders | HierarchicalEncoders
    item_encoder: LiveTextItems
    cosines = True
    starts_from = ("LLaRAPretrain",)
    starts_alike = (
        *(f"model.encoders.{name}" for name in ("backbone", "self_prompt", "pooled_tokens")),
        *("data.titles_only", "data.max_item_tokens"),
    )
    starts_afresh = ("mined",)

    def __init__(
        self,
        encoders: LiveTextEncoders | HierarchicalEncoders,
        *,
        keys: Keys = "batch",
        targets_per_history: int = 16,
        temperature: float = 0.1,
        learn_temperature: bool = False,
        mask_false_negatives: bool = True,
        popularity_correction: bool = True,
        hard_negatives: int = 0,
        mined_negatives: int = 50,
        refresh_epochs: int = 1,
        **training: Any,
    ) -> None:
        super().__init__(encoders, **training)
        check_positive(temperature=temperature, targets_per_history=targets_per_history, refresh_epochs=refresh_epochs)
        if learn_temperature:
            check_temperature(temperature)
        if not 0 <= hard_negatives <= mined_negatives:
            raise InputError(
                f"Expected model.hard_negatives between 0 and model.mined_negatives ({mined_negatives}), got "
                f"{hard_negatives}"
            )
        if keys == "catalogue" and hard_negatives:
            raise InputError(f"Expected model.hard_negatives 0 with model.keys catalogue, got {hard_negatives}")
        self.keys, self.targets_per_history = keys, targets_per_history
        self.temperature, self.learn_temperature = temperature, learn_temperature
        self.mask_false_negatives, self.popularity_correction = mask_false_negatives, popularity_correction
        self.hard_negatives, self.mined_negatives = hard_negatives, mined_negatives
        self.refresh_epochs = refresh_epochs
        self._validated: Tensor | None = None

    def build(self, data: RecDataModule) -> None:
        """A learned temperature, and an empty list of mined negatives for each user.

        Raises:
            InputError: Nothing would be trained.
        """
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise InputError(
                "Expected model.encoders.backbone.lora, model.encoders.pooled_tokens or model.encoders.dim to give "
                "something to train, got none of them"
            )
        if self.learn_temperature:
            self.learned_temperature = Temperature(self.temperature)
        if self.hard_negatives:
            self.register_buffer("mined", torch.full((data.split.users, self.mined_negatives), MISSING))
        counts = torch.from_numpy(data.split.training_counts())
        self.register_buffer("shares", counts / counts.sum(), persistent=False)

    @property
    def reads_in_loss(self) -> bool:
        """Yes: the items of the step."""
        return True

    def training_step(self, batch: HistoryBatch, batch_idx: int) -> Tensor:
        """The loss of a random choice of boundaries; of all of them where that costs no further items."""
        if self.keys == "catalogue":
            return super().training_step(batch, batch_idx)
        sampled = sample_targets(batch.on_cpu, self.targets_per_history)
        return super().training_step(sampled.to(self.device), batch_idx)

    def loss(
        self, states: Float[Tensor, "targets dim"], batch: HistoryBatch
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """InfoNCE over the distinct items of the step on all processes, or the full softmax over all items."""
        temperature = self.current_temperature()
        logged = {"temperature": temperature.detach()} if self.learn_temperature else {}
        if self.keys == "catalogue":
            vectors = self.encode_shares(self.training_items)
            loss = full_softmax(states / temperature, vectors, self.position_in_training[batch.targets])
            return self.global_mean(loss, len(states)), logged
        targets = distributed.gather_rows(batch.targets)
        mined = distributed.gather_rows(self.sample_mined(batch.user))
        items = torch.unique(torch.cat([targets, mined]))
        vectors = self.encode_shares(items)
        excluded = None
        if self.mask_false_negatives:
            history = batch.target_places[0]
            excluded = self.owned(batch.on_cpu.user, items)[history]
        loss = info_nce(
            states,
            vectors,
            torch.searchsorted(items, batch.targets),
            temperature=temperature,
            excluded=excluded,
            log_expected=self.log_chances(items, targets) if self.popularity_correction else None,
        )
        return self.global_mean(loss, len(states)), logged

    def encode_shares(self, items: Int[Tensor, " items"]) -> Float[Tensor, "items dim"]:
        """The vectors of ascending, distinct items, of which each process encodes its share, with gradients."""
        own = items[distributed.rank() :: distributed.world_size()]
        # With fewer items than processes, one has none: it gives no rows, but the same graph and the same collectives.
        encoded = self.encode_items(own) if len(own) else self.encode_items(items[:1])[:0]
        vectors = distributed.gather_rows(encoded, with_gradient=True)
        return vectors[distributed.gather_rows(own).argsort()]

    def on_train_batch_start(self, batch: HistoryBatch, batch_idx: int) -> None:
        """Item vectors encoded before this step are outdated after it."""
        self._validated = None
        super().on_train_batch_start(batch, batch_idx)

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """Step, and take a learned temperature back to where it makes sense."""
        super().optimizer_step(*arguments, **options)
        if self.learn_temperature:
            self.learned_temperature.clip()

    def on_train_epoch_end(self) -> None:
        """Mine hard negatives, before checkpoints are written."""
        if self.hard_negatives and (self.current_epoch + 1) % self.refresh_epochs == 0:
            self.mine()

    def encode_catalogue(self) -> Float[Tensor, "catalogue dim"]:
        """The vectors of all items, encoded now; mining at the end of the epoch takes those of its validation."""
        self._validated = super().encode_catalogue()
        return self._validated

    def logit_scale(self) -> float:
        """1/τ."""
        return 1 / self.current_temperature().item()

    def current_temperature(self) -> Float[Tensor, ""]:
        """τ."""
        if self.learn_temperature:
            learned: Tensor = self.learned_temperature()
            return learned
        return torch.tensor(self.temperature, device=self.device)

    def log_chances(self, items: Int[Tensor, " items"], targets: Int[Tensor, " targets"]) -> Float[Tensor, " items"]:
        """Log of the chance `1 - (1 - p)^n` that one of n targets is the item, p its share of training interactions.

        Items that were mined alone are not corrected: they are there for their score, not their frequency.
        """
        chances = -torch.expm1(len(targets) * torch.log1p(-self.get_buffer("shares")[items].double()))
        return chances.log().float().masked_fill(~torch.isin(items, targets), 0)

    def sample_mined(self, user: Int[Tensor, " batch"]) -> Int[Tensor, " negatives"]:
        """`hard_negatives` of each user's list, at random; fewer where the list is shorter."""
        if not self.hard_negatives:
            return user.new_empty(0)
        lists = self.get_buffer("mined")[user]
        if bool((lists == MISSING).all()):  # before the first mining nothing is drawn
            return user.new_empty(0)
        chosen = lists.gather(1, torch.rand(lists.shape, device=lists.device).topk(self.hard_negatives).indices)
        return chosen[chosen != MISSING]

    def mine(self) -> None:
        """Fill each user's list with the best items that he does not have, by his last training state.

        The state has read the training history without its last item, the target. Validation and test items are not
        known here, and may be mined.
        """
        split = self.data.split
        histories = [split.training_history(user) for user in range(split.users)]
        users = np.array([user for user, items in enumerate(histories) if len(items) > 1])
        users = users[distributed.rank() :: distributed.world_size()]
        read = [histories[user][:-1] for user in users]
        with evaluating(self):
            vectors = self.encode_catalogue() if self._validated is None else self._validated
            states = self.encode_in_batches(read, budget=self.data.evaluation_batch_tokens)
        index = ItemIndex(vectors[self.training_items].cpu().numpy())
        position = self.position_in_training.cpu().numpy()
        own = [np.unique(position[histories[user]]) for user in users]
        found, _ = index.search(states.cpu().numpy(), self.mined_negatives, own)
        items = self.training_items[torch.from_numpy(found).clamp(min=0).to(self.device)]
        lists = items.masked_fill(torch.from_numpy(found == MISSING).to(self.device), MISSING)
        everyone = distributed.gather_rows(torch.from_numpy(users).to(self.device))
        self.get_buffer("mined")[everyone] = distributed.gather_rows(lists)


def sample_targets(batch: HistoryBatch, count: int) -> HistoryBatch:
    """The same batch with at most `count` of each history's supervised boundaries, at random."""
    keys = torch.rand(batch.target_mask.shape, device=batch.target_mask.device).masked_fill(~batch.target_mask, -1)
    chosen = keys.topk(min(count, keys.shape[1]), dim=1).indices
    return replace(batch, target_mask=batch.target_mask & torch.zeros_like(batch.target_mask).scatter(1, chosen, True))
