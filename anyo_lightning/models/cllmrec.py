"""CLLMRec: next-item loss, and a contrastive loss between two views of each history, some of them written by an LLM."""

import hashlib
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from anyo_lightning.checkpoint_io import METADATA
from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.encoders.items import FrozenTextItems
from anyo_lightning.encoders.text import TextEncoders
from anyo_lightning.errors import InputError
from anyo_lightning.internals import trainer_of
from anyo_lightning.models.base import RetrievalModule
from anyo_lightning.models.contrast import contrast_views, same_history
from anyo_lightning.views import operators
from anyo_lightning.views.neighbours import nearest
from anyo_lightning.views.prompts import Kind
from anyo_lightning.views.written import TokenisedView, WrittenViews

ViewOf = Literal["original", "rewrite", "summarise", "importance", "crop", "mask", "reorder", "substitute"]


class CLLMRec(RetrievalModule):
    """Full softmax over the catalogue at every boundary, plus λ times InfoNCE between two views of each history.

    With `z` the projected and normalised states of the two views of the N histories of a batch, 2N in all, `z_j` the
    other view of `z_i`'s history and F(i) the views that are no negatives of i (the positive stays in the sum),

        L = L_next + λ · -1/2N Σ_i log( exp(z_i·z_j/τ) / Σ_{k not in F(i)} exp(z_i·z_k/τ) ).

    A view gives one state per history: the last supervised one. F(i) holds i itself and, as false negatives, views of
    the same user, with the same target, of the same items, or with the same text written about them.

    The two views are any of: `original`, `rewrite` and `summarise` (texts that an LLM has written once, before
    training: `anyo augment`), `importance` (the history without its least important items), `crop`, `mask`, `reorder`
    and `substitute`. `original` is the state that the next-item loss uses anyway: no second pass.

    A written view is used for a state only when at least half of the items that it was written from are in the state's
    history and the state's target is not among them. Of several, the one that shares the most items with the history is
    taken. If none may be used, the history itself is read a second time, with another dropout (as SimCSE does);
    `train/fallback_summarise` and `train/fallback_rewrite` are the shares of these. Histories should be longer than the
    part that a view is written from (`anyo augment --max_items`), or many find none. A written text is read like an
    item's, ending in the separator; with `reads: both` no item's vector is added to it, only the bias that all items
    share.

    `importance`: an item's score is the cosine of its text vector (the frozen LLM's hidden states, pooled and whitened)
    with the sum of those of the history's other items. Whitening removes what all items share, so that this sum is
    what sets the user apart from the catalogue, and an item that points elsewhere says little about the user.

    How this differs from the paper: it is a composite, as its users describe it. The paper takes importance scores of
    the positions of an *id* sequence from an LLM; by a third party's account its positive view drops the least
    important quarter and its negative view the most important one. The paper's equations could not be read, so none
    is quoted here and our importance score is our own. The released code trains a plain LRURec: its contrastive
    branch is never given to the optimizer. Crop, mask and reorder are those of CL4SRec, substitute is that of CoSeRec.

    Args:
        encoders: How histories and items are encoded; `TextEncoders`, and with written views ones that read texts.
        views: The two views of each history.
        views_from: Parquet file that `anyo augment --output` wrote; None takes the one in the cache.
        weight: λ; with 0 no view is made or read.
        temperature: τ of the contrastive loss.
        projection_head: Put a two-layer perceptron between states and contrastive loss.
        mask_false_negatives: Whether F(i) holds more than i itself.
        crop_share: What `crop` keeps.
        mask_share: What `mask` hides.
        reorder_share: What `reorder` shuffles.
        substitute_share: What `substitute` replaces.
        importance_share: What `importance` drops.
        neighbours: Similar items among which `substitute` draws.
        training: What `RetrievalModule` takes.

    Reference: Lu et al., CLLMRec (IJCAI 2025, doi 10.24963/ijcai.2025/351); Xie et al., CL4SRec (arXiv 2010.14395);
    Liu et al., CoSeRec (arXiv 2108.06479); Gao et al., SimCSE (arXiv 2104.08821).
    """

    encoders: TextEncoders
    item_encoder: FrozenTextItems
    similar: np.ndarray

    def __init__(
        self,
        encoders: TextEncoders,
        *,
        views: tuple[ViewOf, ViewOf] = ("original", "summarise"),
        views_from: Path | None = None,
        weight: float = 0.1,
        temperature: float = 0.1,
        projection_head: bool = False,
        mask_false_negatives: bool = True,
        crop_share: float = 0.6,
        mask_share: float = 0.3,
        reorder_share: float = 0.6,
        substitute_share: float = 0.2,
        importance_share: float = 0.25,
        neighbours: int = 10,
        **training: Any,
    ) -> None:
        super().__init__(encoders, **training)
        self.views, self.views_from, self.neighbours = views, views_from, neighbours
        self.weight, self.temperature = weight, temperature
        self.projection_head, self.mask_false_negatives = projection_head, mask_false_negatives
        self.shares = {
            "crop": crop_share,
            "mask": mask_share,
            "reorder": reorder_share,
            "substitute": substitute_share,
            "importance": importance_share,
        }
        self.head: nn.Module = nn.Identity()
        self._written: dict[Kind, WrittenViews] = {}
        self.views_cost: dict[str, float] = {}  # of the views trained with

    def build(self, data: RecDataModule) -> None:
        """The head and the similar items, if a view needs them."""
        if self.weight and data.tokens is None and self._written_kinds:
            raise InputError(
                "Expected model.encoders.reads texts or both with views that an LLM has written, got vectors with "
                f"model.views {self.views}"
            )
        for name, share in self.shares.items():
            if not 0 <= share <= 1:
                raise InputError(f"Expected model.{name}_share between 0 and 1, got {share}")
        if self.weight and self.projection_head:
            dim = self.encoders.dim
            self.head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        if self.weight and "substitute" in self.views:
            trained = self.training_items.numpy()
            self.similar = nearest(self.item_encoder.vectors, trained, k=min(self.neighbours, len(trained) - 1))

    def loss(
        self, states: Float[Tensor, "targets dim"], batch: HistoryBatch
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Full softmax over the items that occur in training, plus λ times the contrastive loss."""
        next_item = self.next_item_loss(states, batch)
        if not self.weight:
            return next_item, {}
        contrastive, parts = self.contrastive_loss(states, batch)
        return next_item + self.weight * contrastive, {"next_item": next_item, "contrastive": contrastive, **parts}

    @property
    def reads_in_loss(self) -> bool:
        """The views of the histories."""
        return bool(self.weight)

    def contrastive_loss(
        self, states: Float[Tensor, "targets dim"], batch: HistoryBatch
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """InfoNCE over the 2N views of a batch's N histories, and the shares of histories that fell back."""
        random = np.random.default_rng(int(torch.randint(2**31, ())))
        histories = batch.histories()
        identities, views, parts = [same_history(batch), same_items(batch)], [], {}
        for position, view in enumerate(self.views):
            if view in get_args(Kind):
                found = self._find_written(cast(Kind, view), histories, batch)
                parts[f"fallback_{view}"] = states.new_tensor(found.count(None) / max(len(histories), 1))
                identities.append(same_text(found, batch.user))
                encoded = self._encode_written(found, histories)
            elif view == "original" and "original" not in self.views[:position]:
                encoded = states[batch.last_states]
            else:
                encoded = self._encode_made(view, histories, random)
            views.append(F.normalize(self.head(encoded), dim=1))
        loss = contrast_views(
            *views,
            identities=torch.cat(identities, dim=1) if self.mask_false_negatives else None,
            temperature=self.temperature,
        )
        return self.global_mean(loss, len(histories)), parts

    def on_fit_start(self) -> None:
        """Read the written views before the first step, so that a missing file costs no time."""
        costs = [self._read(kind).cost for kind in self._written_kinds]
        if costs and all(costs):
            self.views_cost = {f"views_{name}": sum(cost[name] for cost in costs) for name in costs[0]}

    def cost(self) -> dict[str, float]:
        """Also what it cost to have an LLM write the views that the run has trained with."""
        return super().cost() | self.views_cost

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which written views the run has trained with, and what they cost."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[METADATA]["views"] = {kind: written.digest for kind, written in self._written.items()}
        checkpoint[METADATA]["views_cost"] = self.views_cost

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over what the views cost; refuse to resume training with other views."""
        super().on_load_checkpoint(checkpoint)
        self.views_cost = checkpoint[METADATA].get("views_cost", {})  # missing in checkpoints of earlier versions
        trainer = trainer_of(self)
        if trainer is not None and trainer.state.fn == "fit":
            found = checkpoint[METADATA]["views"]
            if found != (own := {kind: self._read(kind).digest for kind in self._written_kinds}):
                raise InputError(
                    f"Expected the views that the run has trained with, {found}, got {own}: choose another --run"
                )

    @property
    def _written_kinds(self) -> list[Kind]:
        """The kinds of written views that the loss reads."""
        return [kind for kind in get_args(Kind) if self.weight and kind in self.views]

    def _read(self, kind: Kind) -> WrittenViews:
        """The written views of a kind, read once."""
        if kind not in self._written:
            reader = self.encoders.backbone
            self._written[kind] = WrittenViews.read(self.views_from, kind=kind, data=self.data, reader=reader)
        return self._written[kind]

    def _encode_made(
        self, view: str, histories: list[np.ndarray], random: np.random.Generator
    ) -> Float[Tensor, "histories dim"]:
        """The states of histories under an operator, or as they are."""
        if view == "original":
            return self.encode_histories(histories)
        if view == "mask":
            hidden = [operators.mask(items, share=self.shares["mask"], random=random) for items in histories]
            return self.encode_histories(histories, hidden=hidden)
        return self.encode_histories([self._augmented(view, items, random) for items in histories])

    def _augmented(self, view: str, items: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """The items of a view."""
        share = self.shares[view]
        if view == "importance":
            return operators.importance(items, share=share, scores=self.importance_scores(items))
        if view == "substitute":
            return operators.substitute(items, share=share, similar=self.similar, random=random)
        operator = operators.crop if view == "crop" else operators.reorder
        return operator(items, share=share, random=random)

    def importance_scores(self, items: np.ndarray) -> np.ndarray:
        """(items,) the cosine of each item's whitened text vector with the sum of the other items' vectors."""
        vectors = self.item_encoder.vectors[torch.from_numpy(items).long().to(self.device)].float()
        scores: np.ndarray = F.cosine_similarity(vectors, vectors.sum(0) - vectors, dim=1).cpu().numpy()
        return scores

    def _find_written(self, kind: Kind, histories: list[np.ndarray], batch: HistoryBatch) -> list[TokenisedView | None]:
        """What an LLM has written about each history, or None if that may not be used."""
        written, targets = self._read(kind), batch.targets[batch.last_states]
        rows = zip(batch.user.tolist(), histories, targets.tolist(), strict=True)
        return [written.find(user, items, target) for user, items, target in rows]

    def _encode_written(
        self, views: list[TokenisedView | None], histories: list[np.ndarray]
    ) -> Float[Tensor, "histories dim"]:
        """The states of written views, and of the histories themselves for those without one."""
        texts = [view for view in views if view is not None]
        passes: list[tuple[list[np.ndarray], dict[str, Any]]] = []  # two: a summary is much shorter than a history
        if texts:
            hidden = [np.ones(len(view.spans), dtype=bool) for view in texts]
            options = {"hidden": hidden, "spans": [view.spans for view in texts]}
            passes.append(([view.items[: len(view.spans)] for view in texts], options))
        if len(texts) < len(views) or not views:  # without histories: one pass, without states
            passes.append(([items for items, view in zip(histories, views, strict=True) if view is None], {}))
        encoded = [self.encode_histories(items, **options) for items, options in self.as_many_passes(passes)]
        missing = torch.tensor([view is None for view in views], device=encoded[0].device)
        return torch.cat(encoded)[missing.long().argsort(stable=True).argsort()]


def same_items(batch: HistoryBatch) -> Int[Tensor, "histories 1"]:
    """A number for each history that two have in common when they read the same items."""
    numbers = torch.tensor([_number(items) for items in batch.histories()], dtype=torch.long)
    return numbers[:, None].to(batch.user.device, non_blocking=True)


def same_text(views: list[TokenisedView | None], user: Int[Tensor, " histories"]) -> Int[Tensor, "histories 1"]:
    """A number for each history that two have in common when the same was written about them.

    A small model writes some sentences often. A history without a view gets its user's number, below zero.
    """
    numbers = [
        -1 - own if view is None else _number(np.concatenate(view.spans))
        for view, own in zip(views, user.tolist(), strict=True)
    ]
    return torch.tensor(numbers, dtype=torch.long)[:, None].to(user.device)


def _number(values: np.ndarray) -> int:
    """63 bits of a hash of an array: the same on all processes."""
    digest = hashlib.blake2b(values.astype(np.int64).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
