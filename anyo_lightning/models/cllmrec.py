"""CLLMRec: next-item loss, and a contrastive loss between two views of each history, some of them written by an LLM."""

from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from anyo_lightning import distributed
from anyo_lightning.checkpoint_io import METADATA
from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.encoders.items import FrozenTextItems
from anyo_lightning.encoders.text import TextEncoders
from anyo_lightning.errors import InputError
from anyo_lightning.internals import trainer_of
from anyo_lightning.models.base import RetrievalModule
from anyo_lightning.models.checks import check_positive, check_weights
from anyo_lightning.models.contrast import (
    boundary_identities,
    contrast_views,
    contrast_weighted,
    prefixes,
    same_content,
    sampled,
    sizes_before,
)
from anyo_lightning.views.made import PRUNED_BY_STATES, made
from anyo_lightning.views.neighbours import nearest
from anyo_lightning.views.prompts import Kind
from anyo_lightning.views.written import TokenisedView, WrittenViews

ViewOf = Literal[
    "original", "rewrite", "summarise", "importance", "without_least", "without_most",
    "crop", "mask", "reorder", "substitute",
]  # fmt: skip


class CLLMRec(RetrievalModule):
    """Full softmax over the catalogue at every boundary, plus λ times InfoNCE between two views of the histories there.

    With `z` the projected and normalised states of the two views at N of a step's boundaries, 2N in all, `z_j` the
    other view of `z_i`'s history and F(i) the views that are no negatives of i (the positive stays in the sum),

        L = L_next + λ · -1/2N Σ_i log( exp(z_i·z_j/τ) / Σ_{k not in F(i)} exp(z_i·z_k/τ) ).

    The N are `anchors`, drawn from all supervised boundaries of a step: some hundreds, so that a state weighs in this
    mean about what it weighs in L_next, times λ. The history before a boundary is what its window holds, without the
    boundary's target. F(i) holds i itself and, as false negatives, views of the same user, with the same target, of the
    same items, or with the same text written about them.

    The two views are any of: `original`, `rewrite` and `summarise` (texts that an LLM has written once, before
    training: `anyo augment`), `importance` (the history without its least important items), `without_least` and
    `without_most` (below), `crop`, `mask`, `reorder` and `substitute`. `original` is the state that the next-item loss
    uses anyway: no second pass. A written view is read once for all anchors of a step that use it. Of all others each
    anchor is a reading of its own, half a window long on average: where texts are read, ask for fewer.

    A written view is used at a boundary only when at least half of the items that it was written from are in the
    history and the boundary's target is not among them. Of several, the one that shares the most items with the
    history is taken. An anchor for which none may be used is left out: `train/anchors` counts those that are not.
    Windows should be longer than the part that a view is written from (`anyo augment --max_items`), or many find none.
    A written text is read like an item's, ending in the separator; with `reads: both` no item's vector is added to it,
    only the bias that all items share.

    `importance`: an item's score is the cosine of its text vector (the frozen LLM's hidden states, pooled and whitened)
    with the sum of those of the history's other items. Whitening removes what all items share, so that this sum is
    what sets the user apart from the catalogue, and an item that points elsewhere says little about the user.

    What a third party takes for the paper's equations (unchecked: the paper's own could not be read), as
    `cllmrec_importance.yaml`: `views: [without_least, without_most]` and `negative_weight: 0.5`. An item's score is
    `γ_i = 1/d Σ_j |h_ij| + .5 · 1/H Σ_h A_ii`; the positive view p drops the quarter of the history with the lowest γ,
    the negative view n that with the highest, and with cosines s

        L = .5 · L_next + .5 · -1/N Σ_i log( e^{s(p_i,n_i)/τ} / (e^{s(p_i,n_i)/τ} + Σ_{j≠i} e^{w·s(p_i,n_j)/τ}) ),

    w = .5, τ = .1, which is λ = 1 here. So the negative view is pulled to the positive one. Of γ only the first term is
    here, with h_i the state at item i from which the next item is predicted, d its width: it costs nothing. A_ii is the
    weight with which item i attends to itself, the mean over heads, and is left out: fused attention never has it, and
    without fusing, a layer would hold all weights of all heads. Attention is causal, so that γ_i knows no later item.
    F(i) is kept, since several anchors may be of one user (`mask_false_negatives: false` and one boundary per user are
    the third party's). The paper's scores come from an LLM that reads ids; here it reads texts or their vectors.

    How this differs from the paper beyond that: it is a composite, as its users describe it. The released code trains a
    plain LRURec: its contrastive branch is never given to the optimizer. Crop, mask and reorder are those of CL4SRec,
    substitute is that of CoSeRec without the boundary's target.

    Args:
        encoders: How histories and items are encoded; `TextEncoders`, and with written views ones that read texts.
        views: The two views of each history.
        views_from: Parquet file that `anyo augment --output` wrote; None takes the one in the cache.
        anchors: Boundaries of a step that are contrasted, over all processes, drawn at random.
        weight: λ; with 0 no view is made or read.
        temperature: τ of the contrastive loss.
        negative_weight: w: contrast first views with second ones, negatives weighted so; None contrasts all 2N views.
        projection_head: Put a two-layer perceptron between states and contrastive loss.
        mask_false_negatives: Whether F(i) holds more than i itself.
        crop_share: What `crop` keeps.
        mask_share: What `mask` hides.
        reorder_share: What `reorder` shuffles.
        substitute_share: What `substitute` replaces.
        importance_share: What `importance`, `without_least` and `without_most` drop.
        neighbours: Similar items among which `substitute` draws.
        training: What `RetrievalModule` takes.

    Reference: Lu et al., CLLMRec (IJCAI 2025, doi 10.24963/ijcai.2025/351); Xie et al., CL4SRec (arXiv 2010.14395);
    Liu et al., CoSeRec (arXiv 2108.06479).
    """

    encoders: TextEncoders
    item_encoder: FrozenTextItems
    masks = True

    def __init__(
        self,
        encoders: TextEncoders,
        *,
        views: tuple[ViewOf, ViewOf] = ("original", "summarise"),
        views_from: Path | None = None,
        anchors: int = 256,
        weight: float = 0.1,
        temperature: float = 0.1,
        negative_weight: float | None = None,
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
        self.anchors, self.weight, self.temperature = anchors, weight, temperature
        self.negative_weight = negative_weight
        self.projection_head, self.mask_false_negatives = projection_head, mask_false_negatives
        self.shares = {
            "crop": crop_share,
            "mask": mask_share,
            "reorder": reorder_share,
            "substitute": substitute_share,
            "importance": importance_share,
        }
        self.head: nn.Module = nn.Identity()
        self.similar: np.ndarray | None = None
        self._written: dict[Kind, WrittenViews] = {}
        self.views_cost: dict[str, float] = {}  # of the views trained with

    def build(self, data: RecDataModule) -> None:
        """The head and the similar items, if a view needs them.

        Raises:
            InputError: A setting is out of range, or the views need what the data or the encoders do not give.
        """
        check_positive(anchors=self.anchors, temperature=self.temperature, neighbours=self.neighbours)
        check_weights(weight=self.weight, negative_weight=self.negative_weight or 0)
        if self.weight and set(self.views) & set(PRUNED_BY_STATES) and (data.supervision != "all" or data.overlap):
            raise InputError(
                f"Expected data.supervision all and data.overlap 0 with model.views {self.views}, for a state at each "
                f"item, got {data.supervision} and {data.overlap}"
            )
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
        """The contrast of the two views at the anchors, and how many there are."""
        random = np.random.default_rng(int(torch.randint(2**31, ())))
        rows, written = self.find_anchors(batch)
        histories, targets = prefixes(batch, rows), batch.on_cpu.targets[rows.cpu()].tolist()
        identities, views = [boundary_identities(batch)[rows], same_content(histories).to(self.device)], []
        for position, view in enumerate(self.views):
            if view in get_args(Kind):
                found = written[cast(Kind, view)]
                texts = [np.concatenate(text.spans) for text in found]  # a small model writes some sentences often
                identities.append(same_content(texts).to(self.device))
                encoded = self.encode_written(found)
            elif view == "original" and "original" not in self.views[:position]:
                encoded = states[rows]
            else:
                items, hidden = made(
                    view,
                    histories,
                    share=self.shares.get("importance" if view in PRUNED_BY_STATES else view, 0.0),
                    targets=targets,
                    similar=self.similar,
                    scores=self.scores_of(view, histories, states, batch, rows),
                    random=random,
                )
                encoded = self.encode_in_batches(items, budget=self.data.batch_tokens, hidden=hidden)
            views.append(F.normalize(self.head(encoded), dim=1))
        options: dict[str, Any] = {
            "identities": torch.cat(identities, dim=1) if self.mask_false_negatives else None,
            "temperature": self.temperature,
        }
        if self.negative_weight is None:
            loss = contrast_views(*views, **options)
        else:
            loss = contrast_weighted(*views, **options, weight=self.negative_weight)
        return self.global_mean(loss, len(rows)), {"anchors": states.new_tensor(len(rows) * distributed.world_size())}

    def find_anchors(self, batch: HistoryBatch) -> tuple[Int[Tensor, " anchors"], dict[Kind, list[TokenisedView]]]:
        """Boundaries at random, those without a written view left out, and the written views of each kind."""
        drawn = sampled(batch, torch.arange(len(batch.targets)), self.anchors, random=self.shared_random)
        here = batch.on_cpu
        users, targets = here.user[here.target_places[0]][drawn].tolist(), here.targets[drawn].tolist()
        asked = list(zip(users, prefixes(batch, drawn), targets, strict=True))
        found = {kind: [self._read(kind).find(*one) for one in asked] for kind in self._written_kinds}
        usable = [row for row in range(len(asked)) if all(views[row] is not None for views in found.values())]
        written = {kind: [cast(TokenisedView, views[row]) for row in usable] for kind, views in found.items()}
        return drawn[torch.tensor(usable, dtype=torch.long)].to(batch.user.device), written

    def on_fit_start(self) -> None:
        """Read the written views before the first step, so that a missing file costs no time."""
        super().on_fit_start()
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
        checkpoint[METADATA]["anchors"] = self.anchors

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over what the views cost; refuse to resume training with other views."""
        super().on_load_checkpoint(checkpoint)
        self.views_cost = checkpoint[METADATA].get("views_cost", {})  # missing in checkpoints of earlier versions
        trainer = trainer_of(self)
        if trainer is not None and trainer.state.fn == "fit":
            if self.weight and "anchors" not in checkpoint[METADATA]:
                raise InputError(
                    "Expected a run that has contrasted boundaries, got an earlier one, which contrasted one "
                    "state per history: choose another --run"
                )
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

    def scores_of(
        self,
        view: str,
        histories: list[np.ndarray],
        states: Float[Tensor, "targets dim"],
        batch: HistoryBatch,
        rows: Int[Tensor, " anchors"],
    ) -> list[np.ndarray] | None:
        """The importance of each item of the histories before these boundaries, for views that are pruned by it."""
        if view == "importance":
            return list(map(self.importance_scores, histories))
        return sizes_before(states, batch, rows) if view in PRUNED_BY_STATES else None

    def importance_scores(self, items: np.ndarray) -> np.ndarray:
        """(items,) the cosine of each item's whitened text vector with the sum of the other items' vectors."""
        vectors = self.item_encoder.vectors[torch.from_numpy(items).long().to(self.device)].float()
        scores: np.ndarray = F.cosine_similarity(vectors, vectors.sum(0) - vectors, dim=1).cpu().numpy()
        return scores

    def encode_written(self, views: list[TokenisedView]) -> Float[Tensor, "views dim"]:
        """The states of written views, each distinct one read once."""
        by_id = {id(view): view for view in views}
        distinct, places = list(by_id.values()), {key: place for place, key in enumerate(by_id)}
        hidden = [np.ones(len(view.spans), dtype=bool) for view in distinct]
        items = [view.items[: len(view.spans)] for view in distinct]
        encoded = self.encode_histories(items, hidden=hidden, spans=[view.spans for view in distinct])
        return encoded[torch.tensor([places[id(view)] for view in views], dtype=torch.long, device=encoded.device)]
