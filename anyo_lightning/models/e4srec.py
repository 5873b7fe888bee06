"""E4SRec: the LLM reads a history, its last hidden state meets all items in a full softmax."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from anyo_lightning.checkpoint_io import METADATA
from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.encoders.base import Encoders
from anyo_lightning.errors import InputError
from anyo_lightning.internals import trainer_of
from anyo_lightning.models.base import RetrievalModule
from anyo_lightning.models.checks import check_weights
from anyo_lightning.models.distillation import WEIGHTS, Distillation, read_teacher
from anyo_lightning.models.temperature import Temperature, check_temperature


class E4SRec(RetrievalModule):
    """Full softmax cross-entropy over the catalogue (eq. 6), with LoRA: the loss that all modules have by default.

    As its users describe it, the LLM reads the items' *texts*, and items are vectors of their frozen text embedding:
    `TextEncoders` (`e4srec.yaml`; with `id_residual` `e4srec_hybrid.yaml`; with `reads: vectors` it reads each item's
    text vector in one position, `e4srec_vectors.yaml`). With `VectorEncoders` it is what the paper and its code do
    (`e4srec_paper.yaml`): ids only, frozen SASRec item vectors through a linear layer (eq. 3) between a prompt and a
    response marker, a free linear head over all items (eq. 5), no text at all. What differs from the code in all of
    them: every target is supervised once, the empty history is no sample, and pads never lie between instruction and
    items.

    Two additions, which the paper does not have: cosines, `exp(cos(state, item) / τ)` in the softmax, and a SASRec run
    as a teacher (`Distillation`).

    Args:
        encoders: How histories and items are encoded.
        temperature: Start of a learned τ, with encoders of unit length; None: inner products as they are.
        distil_from: Run folder of a finished SASRec on the same split, whose states and item vectors are two more terms
            of the loss. A trained run no longer needs the folder.
        distillation: Weight of the term of the teacher's states; 0 leaves it out.
        alignment: Weight of the term of its item vectors; 0 leaves it out.
        training: What else `RetrievalModule` takes.

    Raises:
        InputError: When a temperature comes without encoders of unit length or these without it, it is not between
            0.01 and 1, or a weight is negative.

    Reference: Li et al., E4SRec (arXiv 2312.02443); for τ Radford et al., CLIP (arXiv 2103.00020).
    """

    cosines = True
    masks = True
    starts_afresh = (*WEIGHTS, "temperature.log_ratio")

    def __init__(
        self,
        encoders: Encoders,
        *,
        temperature: float | None = None,
        distil_from: Path | None = None,
        distillation: float = 1.0,
        alignment: float = 0.01,
        **training: Any,
    ) -> None:
        super().__init__(encoders, **training)
        if (temperature is not None) != encoders.unit_length:
            given = "null" if temperature is None else temperature
            raise InputError(
                f"Expected model.temperature where model.encoders.unit_length is true, and there alone, got {given} "
                f"with {str(encoders.unit_length).lower()}"
            )
        if temperature is not None:
            check_temperature(temperature)
        check_weights(distillation=distillation, alignment=alignment)
        self.start, self.distil_from = temperature, distil_from
        self.weights = {"states": distillation, "items": alignment} if distil_from is not None else {}
        self.distillation: Distillation | None = None
        self.temperature: Temperature | None = None
        self.taught_by: str | None = None  # digest of the teacher of the training so far

    def make_encoders(self, data: RecDataModule, saved: Mapping[str, Tensor] | None) -> tuple[nn.Module, nn.Module]:
        """The encoders, and the teacher unless a trained model is only evaluated."""
        history_encoder, item_encoder = super().make_encoders(data, saved)
        if self.distil_from is not None and any(self.weights.values()):
            trainer, maps = trainer_of(self), [saved[name] for name in WEIGHTS if saved and name in saved]
            teacher, width = None, len(maps[0]) if maps else 0
            if not maps or (trainer is not None and trainer.state.fn == "fit"):
                teacher = read_teacher(self.distil_from, data)
                width = teacher.width
            assert self.encoders is not None
            dim = self.encoders.width("model.distil_from")
            used = {name: weight > 0 for name, weight in self.weights.items()}
            self.distillation = Distillation(dim, width, teacher=teacher, **used)
        return history_encoder, item_encoder

    def build(self, data: RecDataModule) -> None:
        """A learned temperature."""
        if self.start is not None:
            self.temperature = Temperature(self.start)

    def logit_scale(self) -> float:
        """1/τ of cosines."""
        return 1.0 if self.temperature is None else 1 / self.temperature().item()

    def loss(
        self, states: Float[Tensor, "targets dim"], batch: HistoryBatch
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The full softmax and the teacher's terms; each of these is logged, and so is the temperature."""
        vectors, targets = self.training_vectors(), self.position_in_training[batch.targets]
        scaled, parts = states, {}
        if self.temperature is not None:
            temperature = self.temperature()
            scaled, parts["temperature"] = states / temperature, temperature.detach()
        total = self.next_item_loss(scaled, batch, vectors=vectors)
        if self.distillation is not None:
            terms = self.distillation(states, vectors.index_select(0, targets), batch, targets)
            for name, term in terms.items():
                parts[f"teacher_{name}"] = self.global_mean(term, len(states))
                total = total + self.weights[name] * parts[f"teacher_{name}"]
        return total, parts

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which teacher the run has trained with."""
        super().on_save_checkpoint(checkpoint)
        if self.distillation is not None:
            teacher = self.distillation.teacher
            checkpoint[METADATA]["teacher"] = self.taught_by if teacher is None else teacher.digest

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume with another teacher."""
        super().on_load_checkpoint(checkpoint)
        self.taught_by = checkpoint[METADATA].get("teacher")
        teacher = None if self.distillation is None else self.distillation.teacher
        if teacher is not None and self.taught_by is not None and teacher.digest != self.taught_by:
            raise InputError(
                f"Expected model.distil_from to name the run that has taught so far, got {self.distil_from}, whose "
                "weights are others: choose another --run"
            )

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """Step, and take the temperature back to where it makes sense."""
        super().optimizer_step(*arguments, **options)
        if self.temperature is not None:
            self.temperature.clip()
