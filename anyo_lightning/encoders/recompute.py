"""Gradient caching: a pass through an encoder that keeps no activations."""

from collections.abc import Callable

from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed(encode: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`encode(*inputs)` without keeping its activations: the backward pass computes them again, dropout and all.

    Gradient caching is this for each part of a batch: first representations of all parts without activations, then the
    loss's gradient with respect to them, then part by part the activations and the gradient of the weights. Autograd
    does it in one backward pass, last part first, so that clipping and DDP's one reduction per step stay Lightning's
    own, and gradients are those of the direct pass, in-batch negatives included.

    Args:
        encode: Draws nothing but from torch's generators, whose state is restored for the second pass.
        inputs: At least one tensor of the device on which `encode` computes: torch restores the state of a GPU's
            generator only where one of these lies there, and dropout would otherwise differ between the two passes.

    Reference: Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup (arXiv 2101.06983).
    """
    states: Tensor = checkpoint(encode, *inputs, use_reentrant=False)
    return states
