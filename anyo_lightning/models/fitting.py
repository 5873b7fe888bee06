"""`data.micro_batch_tokens auto`: how many tokens of a step fit into memory, tried before training starts."""

import gc
from typing import TYPE_CHECKING

import torch

from anyo_lightning import distributed
from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.data.sampler import TokenBudgetBatches
from anyo_lightning.errors import InputError
from anyo_lightning.hardware import is_out_of_memory

if TYPE_CHECKING:
    from anyo_lightning.models.base import RetrievalModule

RESERVE = 0.1  # of a GPU's memory is left alone in the trial: for the loss, and for what fragmentation takes
BYTES_TO_COME = 12  # per trained parameter, which the trial does not use: its gradient and Adam's two moments


def find_held_tokens(module: "RetrievalModule") -> int:
    """The most padded tokens of a step that every process can keep the activations of.

    The process's largest share of an epoch's steps is encoded and differentiated, in parts of half as many tokens each
    time that memory runs out. DDP takes no part in this, nothing is drawn from the generators, and no gradient stays.
    All processes then take the least that any has found, so that they make the same passes.

    Args:
        module: Built, on its device, in training mode.

    Raises:
        InputError: Not even one history fits, on any process; or a backbone is sharded, whose processes must make the
            same passes also while they try.
    """
    if any(backbone.sharded for backbone in module.backbones):
        raise InputError("Expected data.micro_batch_tokens as a number where a backbone is sharded, got auto")
    data = module.data
    batch = data.largest_share().to(module.device)
    rows, longest = len(batch.user), int(batch.lengths.max(initial=1))
    held = max(rows * longest, data.batch_tokens)
    while not _fits(module, batch, held):
        if held <= longest or rows <= 1:
            held = 0
            break
        held = min(held, rows * longest) // 2
    if 0 < held < data.batch_tokens:  # no more than the largest part that was tried
        parts = TokenBudgetBatches(batch.lengths, budget=held, seed=None).batches()
        held = max(len(part) * int(batch.lengths[part].max()) for part in parts)
    least = int(distributed.gather_rows(torch.tensor([held], device=module.device)).min())
    if not least:
        raise InputError(
            f"Out of memory with one history of {longest} tokens: lower data.max_tokens or data.max_items, or set "
            "model.encoders.backbone.gradient_checkpointing"
        )
    if least < data.batch_tokens:
        module.trainer.print(f"Reading steps in parts of at most {least:,} padded tokens, which fit into memory")
    return least


def _fits(module: "RetrievalModule", batch: "HistoryBatch", held: int) -> bool:
    """Whether a step's histories can be encoded and differentiated in such parts, and memory be left."""
    before, module.data.held_tokens = module.data.held_tokens, held
    try:
        _try(module, batch)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        fits = False
    else:
        fits = True
    module.data.held_tokens = before
    gc.collect()  # what the trial has left: the error's frames are gone only here
    if module.device.type == "cuda":
        torch.cuda.empty_cache()
    return fits


def _try(module: "RetrievalModule", batch: HistoryBatch) -> None:
    device = module.device
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    gpus, reserve = [], None
    if device.type == "cuda":
        gpus = [device]
        size = int(RESERVE * torch.cuda.get_device_properties(device).total_memory)
        size += BYTES_TO_COME * sum(parameter.numel() for parameter in trained)
        reserve = torch.empty(size, dtype=torch.uint8, device=device)
    with torch.random.fork_rng(gpus):
        with module.trainer.precision_plugin.train_step_context():
            states = module.states_of_step(batch).float().sum()
        torch.autograd.grad(states, trained, allow_unused=True)
    del reserve
