"""`Distillation`: a finished SASRec run's states and item vectors as two more terms of a loss (after LLM-SRec, LLMEmb).

The teacher reads the same batch, frozen and without dropout. It is part of no checkpoint and of nothing that is trained
or sent between processes: a trained run does not need it.
"""

import hashlib
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from anyo_lightning.checkpoint_io import METADATA
from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.encoders.id_history import IdHistory
from anyo_lightning.encoders.vectors import read_on
from anyo_lightning.errors import InputError
from anyo_lightning.losses import full_softmax

ALIGNMENT_TEMPERATURE = 2.0  # LLMEmb's
WEIGHTS = ("distillation.state_map.weight", "distillation.state_map.bias", "distillation.item_map.weight")


class Teacher:
    """A run's history encoder and item vectors; not a module, so that no module that has it holds its weights.

    Args:
        history: The encoder, trained.
        vectors: Item vectors over which the alignment ranges.
    """

    def __init__(self, history: IdHistory, vectors: Float[Tensor, "training_items width"]) -> None:
        self.history, self.vectors = history.requires_grad_(False).eval(), F.normalize(vectors, dim=-1)
        self.width = vectors.shape[1]
        weights = [self.vectors, *self.history.state_dict().values()]
        self.digest = hashlib.sha256(b"".join(weight.numpy().tobytes() for weight in weights)).hexdigest()[:16]

    @torch.no_grad()
    def states(self, batch: HistoryBatch) -> Float[Tensor, "targets width"]:
        """The states at the supervised boundaries of a batch, on its device."""
        self.history = self.history.to(batch.item_ids.device)
        states: Tensor = self.history(batch)
        return states.float()


class Distillation(nn.Module):
    """Two terms, with a target's state s and item vector v, the teacher's t and u, and trained maps W and b, M.

    - states: `|W s + b - t|² / width`, the mean over targets;
    - items: `-log(exp(cos(M v, u_y) / τ) / Σ_j exp(cos(M v, u_j) / τ))`, the mean over targets y, j over all training
      items, τ = 2.

    The student is mapped to the teacher and not the reverse: a map of the teacher could make the states' term small by
    mapping everything to one point. LLM-SRec maps both to a third space, and keeps states apart by a further term.

    Args:
        dim: Width of the student's states and item vectors.
        width: Width of the teacher's.
        teacher: None where nothing is trained.
        states: Whether there is the states' term.
        items: Whether there is the items' term.

    Reference: Kim et al., LLM-SRec, KDD 2025 (arXiv 2502.13909); Liu et al., LLMEmb, AAAI 2025 (arXiv 2409.19925).
    """

    def __init__(
        self, dim: int, width: int, *, teacher: Teacher | None, states: bool = True, items: bool = True
    ) -> None:
        super().__init__()
        self.teacher = teacher
        self.state_map = nn.Linear(dim, width) if states else None
        self.item_map = nn.Linear(dim, width, bias=False) if items else None

    def forward(
        self,
        states: Float[Tensor, "targets dim"],
        vectors: Float[Tensor, "targets dim"],
        batch: HistoryBatch,
        targets: Int[Tensor, " targets"],
    ) -> dict[str, Float[Tensor, ""]]:
        """The terms that there are, by the names of their weights; 0 (with zero gradients) without targets.

        Args:
            states: The student's states.
            vectors: Its vectors of the targets.
            batch: What both have read.
            targets: The targets' places among the training items.
        """
        assert self.teacher is not None
        terms = {}
        if self.state_map is not None:
            mapped = self.state_map(states)
            terms["states"] = F.mse_loss(mapped, self.teacher.states(batch)) if len(states) else mapped.sum()
        if self.item_map is not None:
            self.teacher.vectors = self.teacher.vectors.to(vectors.device)
            mapped = F.normalize(self.item_map(vectors), dim=-1)
            terms["items"] = full_softmax(mapped / ALIGNMENT_TEMPERATURE, self.teacher.vectors, targets)
        return terms


def read_teacher(folder: Path, data: RecDataModule) -> Teacher:
    """A finished run of `SASRec` or `Student` on ids, on the CPU.

    Args:
        folder: Its run folder.
        data: The student's data, set up.

    Raises:
        InputError: The run is of another split, or of another kind, or reads shorter histories than the student.
    """
    checkpoint = read_on(folder, data.split)
    settings, weights = checkpoint[METADATA]["settings"], checkpoint["state_dict"]
    table, position = (weights.get(f"history_encoder.{name}") for name in ("embedding.weight", "position"))
    vectors = weights.get("item_encoder.embedding.weight")
    if table is None or position is None or vectors is None:
        model = checkpoint[METADATA]["model"]
        raise InputError(f"Expected model.distil_from to name a run of SASRec whose table is all trained, got {model}")
    if len(position) < data.max_items:
        raise InputError(
            f"Expected data.max_items at most {len(position)}, of which {folder} reads as many, got {data.max_items}"
        )
    layers, heads, body, positions = (settings[f"model.encoders.{n}"] for n in ("layers", "heads", "body", "positions"))
    history = IdHistory(
        nn.Embedding(*table.shape),
        dim=table.shape[1],
        max_items=len(position),
        layers=int(layers),
        heads=int(heads),
        dropout=0.0,
        body=body,
        positions=positions,
    )
    prefix = "history_encoder."
    history.load_state_dict({n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)})
    trained = torch.from_numpy(data.split.training_counts() > 0)
    return Teacher(history, vectors[trained].float())
