"""UniSRec: text vectors through an adaptor and SASRec's transformer, trained by a softmax over cosines."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.encoders.adapted import AdaptedTextEncoders
from anyo_lightning.models.base import RetrievalModule
from anyo_lightning.models.checks import check_positive


class UniSRec(RetrievalModule):
    """Full softmax over `cos(state, item vector) / τ`: the text peer that trains no language model.

    Args:
        encoders: `AdaptedTextEncoders`, whose states and item vectors have unit length.
        temperature: τ.
        training: What else `RetrievalModule` takes.

    Raises:
        InputError: When the temperature is not positive.

    Reference: Hou et al., KDD 2022 (arXiv 2206.05941), section 2.4 (fine-tuning on one domain, without pre-training).
    """

    cosines = True
    masks = True

    def __init__(self, encoders: AdaptedTextEncoders, *, temperature: float = 0.07, **training: Any) -> None:
        super().__init__(encoders, **training)
        check_positive(temperature=temperature)
        self.temperature = temperature

    def logit_scale(self) -> float:
        """1/τ."""
        return 1 / self.temperature

    def loss(
        self, states: Float[Tensor, "targets dim"], batch: HistoryBatch
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The full softmax at temperature τ."""
        return self.next_item_loss(states / self.temperature, batch), {}
