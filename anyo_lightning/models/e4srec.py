"""E4SRec: the LLM reads a history, its last hidden state meets all items in a full softmax."""

from anyo_lightning.models.base import RetrievalModule


class E4SRec(RetrievalModule):
    """Full softmax cross-entropy over the catalogue (eq. 6), with LoRA: the loss that all modules have by default.

    As its users describe it, the LLM reads the items' *texts*, and items are vectors of their frozen text embedding:
    `TextEncoders` (`e4srec.yaml`; with `id_residual` `e4srec_hybrid.yaml`; with `reads: vectors` it reads each item's
    text vector in one position, `e4srec_vectors.yaml`). With `VectorEncoders` it is what the paper and its code do
    (`e4srec_paper.yaml`): ids only, frozen SASRec item vectors through a linear layer (eq. 3) between a prompt and a
    response marker, a free linear head over all items (eq. 5), no text at all. What differs from the code in all of
    them: every target is supervised once, the empty history is no sample, and pads never lie between instruction and
    items.

    Args:
        encoders: How histories and items are encoded.
        training: What else `RetrievalModule` takes.

    Reference: Li et al., E4SRec (arXiv 2312.02443).
    """
