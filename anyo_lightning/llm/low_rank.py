"""LoRA's forward and backward pass without passes over whole states: its products are added into the base's.

peft computes `x Wᵀ + s·(x Aᵀ) Bᵀ` as two results, a multiplication by s and an addition, and the backward pass mirrors
each: six element-wise passes over all states for each adapted layer. Here (sB is scaled once, being small)

    y  = x Wᵀ + b,   h = x Aᵀ,     y  += h (sB)ᵀ
    g  = dy (sB),    dx = dy W,    dx += g A,    dA = gᵀ x,   d(sB) = dyᵀ h,

where `+=` is one product that accumulates in place (`addmm_`). Equal to peft's up to rounding; a sum in bfloat16 is
rounded once less. What it does not cover is left to
peft: see `adapter_of`.
"""

from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from anyo_lightning.internals import has_hooks

QUANTISED = "peft.tuners.lora.bnb"  # cannot be imported without bitsandbytes


class AdaptedProduct(torch.autograd.Function):
    """`x Wᵀ + b + (x Aᵀ)(sB)ᵀ` for frozen W and b."""

    @staticmethod
    def forward(
        x: Float[Tensor, "rows in"],
        weight: Float[Tensor, "out in"],
        bias: Float[Tensor, " out"] | None,
        down: Float[Tensor, "rank in"],
        up: Float[Tensor, "out rank"],
    ) -> tuple[Float[Tensor, "rows out"], Float[Tensor, "rows rank"]]:
        """Also gives `x Aᵀ`, for the backward pass alone."""
        y = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
        h = torch.mm(x, down.t())
        return y.addmm_(h, up.t()), h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep the input and its low-rank product."""
        x, weight, _, down, up = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, down, up, output[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        """Gradients of x, A and sB."""
        if dy is None:
            return None, None, None, None, None
        x, weight, down, up, h = ctx.saved_tensors
        g = torch.mm(dy, up)
        dx = torch.mm(dy, weight).addmm_(g, down) if ctx.needs_input_grad[0] else None
        return dx, None, None, torch.mm(g.t(), x), torch.mm(dy.t(), h)


class AddedProduct(torch.autograd.Function):
    """`y += (x Aᵀ)(sB)ᵀ`, for a base layer that is more than a product (quantised, with hooks)."""

    @staticmethod
    def forward(
        y: Float[Tensor, "rows out"],
        x: Float[Tensor, "rows in"],
        down: Float[Tensor, "rank in"],
        up: Float[Tensor, "out rank"],
    ) -> tuple[Float[Tensor, "rows out"], Float[Tensor, "rows rank"]]:
        """Also gives `x Aᵀ`, for the backward pass alone."""
        h = torch.mm(x, down.t())
        return torch.addmm(y, h, up.t()), h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keep the input and its low-rank product."""
        _, x, down, up = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, down, up, output[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        """Gradients of y, x, A and sB."""
        if dy is None:
            return None, None, None, None
        x, down, up, h = ctx.saved_tensors
        g = torch.mm(dy, up)
        dx = torch.mm(g, down) if ctx.needs_input_grad[1] else None
        return dy, dx, torch.mm(g.t(), x), torch.mm(dy.t(), h)


class Adapted(nn.Module):
    """Put before peft's class of an adapted linear layer: another way to compute the same. Made by `adapt`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The adapted layer's output."""
        layer: Any = self
        adapter = None if args or kwargs else adapter_of(layer)
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        base = layer.base_layer
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        down = layer.lora_A[adapter].weight.to(dtype)
        up = (layer.lora_B[adapter].weight * layer.scaling[adapter]).to(dtype)
        states = x.to(dtype).flatten(0, -2)
        if _is_product(base, dtype):
            found, _ = AdaptedProduct.apply(  # type: ignore[no-untyped-call]
                states, base.weight, base.bias, down, up
            )
        else:
            output = base(x).to(dtype).flatten(0, -2)
            found, _ = AddedProduct.apply(output, states, down, up)  # type: ignore[no-untyped-call]
        return found.view(*x.shape[:-1], found.shape[-1])


def adapt(model: nn.Module) -> None:
    """Let a model's LoRA layers be computed so, in place; their weights and names stay.

    Args:
        model: With LoRA injected by peft.
    """
    for module in model.modules():
        kind: Any = type(module)
        if kind is LoraLinear or kind.__module__ == QUANTISED:
            module.__class__ = _adapted(kind)


def adapter_of(layer: Any) -> str | None:
    """The one adapter of peft's layer that is plain LoRA at work; None where peft's own forward has to run.

    That is: adapters disabled or merged, several active, variants such as DoRA, a bias of LoRA, dropout that acts.

    Args:
        layer: peft's.
    """
    if layer.disable_adapters or layer.merged:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or active[0] in layer.lora_variant or layer.lora_bias[active[0]]:
        return None
    name: str = active[0]
    acts = layer.training and not isinstance(layer.lora_dropout[name], nn.Identity)
    return None if acts else name


def _is_product(base: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a base layer is a frozen product and nothing else: no hooks, no quantised weight."""
    return (
        type(base) is nn.Linear and base.weight.dtype == dtype and not base.weight.requires_grad and not has_hooks(base)
    )


@cache
def _adapted(kind: Any) -> Any:
    return type(kind.__name__, (Adapted, kind), {})
