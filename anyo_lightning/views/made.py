"""Views that are made of the items of histories: one of the operators, over all histories of a step."""

from functools import partial

import numpy as np

from anyo_lightning.views import operators

PRUNED_BY_STATES = ("without_least", "without_most")


def made(
    view: str,
    histories: list[np.ndarray],
    *,
    share: float,
    targets: list[int],
    similar: np.ndarray | None,
    scores: list[np.ndarray] | None,
    random: np.random.Generator,
) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
    """The items of a view of each history, and with `mask` which of them are hidden.

    Args:
        view: `original`, `crop`, `mask`, `reorder`, `substitute`, `importance`, or one of `PRUNED_BY_STATES`.
        histories: Items, oldest first.
        share: What the operator keeps, hides, moves, replaces or drops.
        targets: The item that follows each history.
        similar: The most similar items of each item, for `substitute`.
        scores: The importance of each history's items, for the views that are pruned by it.
        random: Source of randomness.
    """
    if view == "original":
        return histories, None
    if view == "mask":
        return histories, [operators.mask(items, share=share, random=random) for items in histories]
    if view == "substitute":
        assert similar is not None, "similar items for substitute"
        substitute = partial(operators.substitute, share=share, similar=similar, random=random)
        return [substitute(items, target=target) for items, target in zip(histories, targets, strict=True)], None
    if view in ("importance", *PRUNED_BY_STATES):
        assert scores is not None, f"scores for {view}"
        sign = -1 if view == "without_most" else 1
        pairs = zip(histories, scores, strict=True)
        return [operators.importance(items, share=share, scores=sign * own) for items, own in pairs], None
    operator = {"crop": operators.crop, "reorder": operators.reorder}[view]
    return [operator(items, share=share, random=random) for items in histories], None
