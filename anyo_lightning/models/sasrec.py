"""SASRec: the id baseline that must be beaten."""

from anyo_lightning.models.base import RetrievalModule


class SASRec(RetrievalModule):
    """A small causal transformer over item ids, `IdEncoders`, trained by the full softmax at every position.

    The paper trains by binary cross-entropy with one negative; the full softmax is far better and is what current
    comparisons call SASRec.

    Args:
        encoders: How histories and items are encoded.
        training: What else `RetrievalModule` takes.

    Reference: Kang and McAuley, ICDM 2018 (arXiv 1808.09781); Klenitskiy and Vasilev, RecSys 2023 (arXiv 2309.07602).
    """

    masks = True
