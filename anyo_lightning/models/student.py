"""A student: SASRec that learns from the data and from what a finished run would recommend at each boundary."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.data.lessons import read_lessons, training_boundaries
from anyo_lightning.encoders.base import Encoders
from anyo_lightning.errors import InputError
from anyo_lightning.internals import trainer_of
from anyo_lightning.losses import full_softmax
from anyo_lightning.models.base import RetrievalModule
from anyo_lightning.models.checks import check_positive, check_weights


class Student(RetrievalModule):
    """Next item + distillation · the teacher's lists + alignment · the teacher's item vectors.

    With s the state at a boundary, v the student's item vectors, t the teacher's and i_1 … i_k its list there:

    - lists: `-Σ_r w_r log softmax(s·v)_{i_r}` over all training items, `w_r = exp(-r / λ) / Σ_q exp(-q / λ)`;
    - vectors: `1 - cos(W t_i, v_i)`, the mean over training items, W trained and used for nothing else.

    Both weights zero are SASRec. Only ranks count, so that a teacher's scores may have any scale. The list is found by
    user and position: with `data.shuffle_ties` the teacher has read file order, so that what it read may differ from
    what the student reads in the items of one timestamp. Nothing of the teacher is needed once the student is trained.

    Of DLLM2Rec's three weights of a list's items this has the one by position; those by the teacher's confidence and by
    agreement with the student are left out, its sigmoid per item is a softmax over all, and item vectors are drawn
    to the teacher's instead of being made of them.

    Args:
        encoders: How histories and items are encoded: `IdEncoders` for SASRec.
        teacher: Run folder in which `anyo predict --run TEACHER --teach 20` has written lists and vectors, or the file.
        distillation: Weight of the lists' term; 0 leaves it out.
        alignment: Weight of the item vectors' term; 0 leaves it out.
        list_scale: λ, in ranks: how fast weights fall along a list.
        training: What else `RetrievalModule` takes.

    Raises:
        InputError: When a weight is negative, or λ not positive.

    Reference: Cui et al., DLLM2Rec, RecSys 2024 (arXiv 2405.00338); Tang and Wang, Ranking Distillation, KDD 2018
        (arXiv 1809.07428), for weights by position.
    """

    number_of_boundary: Tensor
    teacher_items: Tensor
    teacher_vectors: Tensor

    def __init__(
        self,
        encoders: Encoders,
        *,
        teacher: Path,
        distillation: float = 1.0,
        alignment: float = 1.0,
        list_scale: float = 5.0,
        **training: Any,
    ) -> None:
        super().__init__(encoders, **training)
        check_weights(distillation=distillation, alignment=alignment)
        check_positive(list_scale=list_scale)
        self.teacher, self.list_scale = teacher, list_scale
        self.distillation, self.alignment = distillation, alignment

    def make_encoders(self, data: RecDataModule, saved: Mapping[str, Tensor] | None) -> tuple[nn.Module, nn.Module]:
        """The encoders, and what the teacher says unless a trained student is only evaluated."""
        history_encoder, item_encoder = super().make_encoders(data, saved)
        trainer = trainer_of(self)
        if (self.distillation or self.alignment) and (saved is None or (trainer and trainer.state.fn == "fit")):
            self.read_teacher(data)
        if self.alignment:
            width = (self.teacher_vectors if saved is None else saved["teacher_map.weight"]).shape[1]
            assert self.encoders is not None
            dim = self.encoders.width("model.alignment")
            self.teacher_map = nn.Linear(width, dim, bias=False)
        return history_encoder, item_encoder

    def read_teacher(self, data: RecDataModule) -> None:
        """Keep the teacher's lists, as places among the training items, and its vectors of those.

        Raises:
            InputError: As `read_lessons`, or the lists are not of this split's boundaries.
        """
        lessons, boundaries = read_lessons(self.teacher, split=data.split), training_boundaries(data.split)
        if len(lessons.items) != len(boundaries):
            raise InputError(f"Expected {self.teacher} to have {len(boundaries)} lists, got {len(lessons.items)}")
        number = torch.full((len(data.split.items),), -1)
        number[torch.from_numpy(boundaries)] = torch.arange(len(boundaries))
        place = torch.cat([self.position_in_training, torch.tensor([-1])])  # -1, no item, stays -1
        self.register_buffer("number_of_boundary", number, persistent=False)
        self.register_buffer("teacher_items", place[lessons.items.long()].int(), persistent=False)
        self.register_buffer("teacher_vectors", lessons.vectors[self.training_items].float(), persistent=False)

    def loss(
        self, states: Float[Tensor, "targets dim"], batch: HistoryBatch
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The next-item loss and the two terms, each of which is logged."""
        vectors, targets = self.training_vectors(), self.position_in_training[batch.targets]
        next_item = full_softmax(states, vectors, targets)
        total, parts = self.global_mean(next_item, len(states)), {}
        if self.distillation:
            # -Σ w log softmax(s·v) is the next-item loss with Σ w v_i in the target's place: no second softmax.
            listed = self.mean_vectors(self.lists_of(batch), vectors, targets)
            further = (states * (vectors[targets] - listed)).sum() / max(len(states), 1)
            parts["lists"] = self.global_mean(next_item + further, len(states))
            total = total + self.distillation * parts["lists"]
        if self.alignment:  # the same on all processes
            parts["vectors"] = self.teacher_distance(vectors)
            total = total + self.alignment * parts["vectors"]
        return total, parts

    def teacher_distance(self, vectors: Float[Tensor, "training_items dim"]) -> Float[Tensor, ""]:
        """`1 - cos(W t_i, v_i)`, the mean over training items."""
        return 1 - F.cosine_similarity(self.teacher_map(self.teacher_vectors), vectors).mean()

    def lists_of(self, batch: HistoryBatch) -> Int[Tensor, "targets k"]:
        """The teacher's list at each supervised boundary, as places among the training items; -1 where it ends."""
        assert batch.start is not None
        rows, columns = batch.target_places
        return self.teacher_items[self.number_of_boundary[batch.start[rows] + columns]].long()

    def mean_vectors(
        self,
        lists: Int[Tensor, "targets k"],
        vectors: Float[Tensor, "training_items dim"],
        targets: Int[Tensor, " targets"],
    ) -> Float[Tensor, "targets dim"]:
        """`Σ_r w_r v_{i_r}`; the target's own vector where a list is empty, since the user has had all other items."""
        there = lists >= 0
        ranks = torch.arange(lists.shape[1], device=lists.device)
        weights = torch.where(there, (-ranks / self.list_scale).exp(), 0.0)
        weights = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        found = F.embedding_bag(lists.clamp(min=0), vectors, mode="sum", per_sample_weights=weights)
        return torch.where(there[:, :1], found, vectors[targets])
