"""A frozen LLM that no single GPU holds: each process keeps its share of a layer and gathers it while it computes.

This is FSDP2 (`fully_shard`) for the frozen weights alone, beside Lightning's DDP for the trained ones. Neither of
Lightning's own sharding strategies serves LoRA better:

- `FSDPStrategy` is FSDP1 around the whole module. It refuses CPUs, where our tests run, and gathers trained weights
  only in the module's `forward`, while our losses read items and projectors outside of it.
- `ModelParallelStrategy` leaves the sharding to the module. A parameter that the module does not shard gets no reduced
  gradient; its checkpoints gather the frozen weights, only to leave them out again, and bypass `CheckpointIO` (no
  atomic write) and `load_state_dict` (no check of what is missing); its mesh needs the number of GPUs in the yaml.

With LoRA the frozen weights are what does not fit. Trained weights, their gradients and the optimizer's state stay
whole on every GPU: clipping, checkpoints, resuming (also on another number of processes) and the index are those of
DDP. The numbers are bit-identical to DDP's if both recompute activations or neither does, since a gathered weight is
the weight. (The exception is dropout after a pass that `as_many` repeated, which draws from the process's random
state.)

All processes must call such an LLM equally often, training or not: `distributed.as_many`.

Reference: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from anyo_lightning import distributed
from anyo_lightning.errors import InputError
from anyo_lightning.internals import keep_share_only


def shard_layers(model: nn.Module, device: torch.device) -> None:
    """Keep this process's share of the frozen weights of each transformer layer on a device, in place.

    The model may be on the CPU: one whole layer at a time is on the device. Token embeddings and the last norm stay
    whole, since they are read outside of the model's forward pass, too.

    Args:
        model: A transformers model; what is trained (LoRA) is left alone.
        device: The device of this process.

    Raises:
        InputError: When the model has no layers that transformers marks as such.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise InputError(f"Expected a model of transformer layers to shard, got {type(model).__name__} without them")
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    whole = set(model.parameters())
    for layer in layers:
        frozen = {parameter for parameter in layer.parameters() if not parameter.requires_grad}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=set(layer.parameters()) - frozen)
        layer.register_forward_hook(_give_back)
        whole -= frozen
    fully_shard(model, mesh=mesh, ignored_params=whole)  # the root: it lets a layer be gathered while another computes


def _give_back(layer: nn.Module, *_: Any) -> None:
    """Keep only the share after a pass that is computed again as a whole (gradient caching: `recompute.recomputed`).

    In the backward pass FSDP2 takes each forward for the one just before the layer's own backward (gradient
    checkpointing), and leaves the weights gathered: those of all layers at once, where whole passes are recomputed.
    """
    assert isinstance(layer, FSDPModule)
    keep_share_only(layer)
