"""All that we use of private parts of torch, Lightning and transformers, and of what their versions call differently.

Each with its reason, and with what happens where it is missing; a later version may move any.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor, nn


def trainer_of(module: "LightningModule") -> "Trainer | None":
    """The Trainer that a module is attached to, if any: the public property raises where there is none.

    Lightning sets the attribute in the module's constructor: without it a module could not be asked before it trains.
    """
    trainer: Trainer | None = module._trainer
    return trainer


def keep_from_ddp(module: "nn.Module", names: Iterable[str]) -> None:
    """Let DDP neither send nor reduce these parameters and buffers: frozen weights may be gigabytes.

    The attribute is what `DistributedDataParallel._set_params_and_buffers_to_ignore_for_model` sets; torch documents
    no other way. Without it DDP would broadcast frozen weights once, and buffers in each step.
    """
    module._ddp_params_and_buffers_to_ignore = set(names)  # type: ignore[assignment]


def forget_counted_loader(trainer: "Trainer") -> None:
    """Let the training loop make its loader again.

    `estimated_stepping_batches` has made one before the checkpoint said where in the epoch to resume; the loop would
    keep it. Without the attribute a run resumed within an epoch would train on that epoch's first batches again.
    """
    trainer.fit_loop._combined_loader = None


def training_continues(trainer: "Trainer") -> bool:
    """Whether, at the end of a batch, training just continues: no validation follows, no gradient waits for its step.

    Lightning decides both in private methods of its loop, and offers no hook between them. Without these a run would
    stop at its first batch with an AttributeError.
    """
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return not (trainer.is_last_batch or loop._should_check_val_fx(fetcher) or loop._should_accumulate())


def keep_share_only(layer: Any) -> None:
    """Free the gathered weights of an FSDP2 layer, except where its own backward pass is about to use them.

    `FSDPModule.reshard` is public, but whether the backward pass is under way is not: the state itself says so only
    when that pass has ended. Older versions of torch have one group of weights per layer, later ones a list of them;
    one without either would stop a sharded run at its first pass with an AttributeError.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    state = layer._get_fsdp_state()
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    for group in filter(None, groups):
        if group._training_state != TrainingState.PRE_BACKWARD:
            group.reshard()


@contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """Let peft believe that bitsandbytes is not installed, within, unless something has imported it.

    peft imports it wherever it is installed, for itself and again for each LoRA, although it needs it for quantised
    weights alone; whoever loads such has imported it by then. It takes more than a second, and prints that a kernel is
    missing. None in `sys.modules` is how Python marks what cannot be imported; what peft has noted meanwhile, it is
    asked to forget. Versions that note it elsewhere would refuse LoRA on quantised weights, which a test would say.
    """
    if "bitsandbytes" in sys.modules:
        yield
        return
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["bitsandbytes"]
        noted = sys.modules.get("peft.import_utils")
        for name in ("is_bnb_available", "is_bnb_4bit_available"):
            getattr(getattr(noted, name, None), "cache_clear", lambda: None)()


def keep_packed_weights(model: "nn.Module") -> None:
    """Let bitsandbytes leave 4-bit weights as they were loaded.

    On CPUs with AVX512-BF16 its layers pack their weights anew at the first pass in evaluation mode, with scales
    rounded to bfloat16; `state_dict` packs them back and rounds again or, without double quantisation, leaves the
    scales in another order. A run's frozen weights would then depend on when it was validated and saved. Layers
    decide by this attribute of theirs; versions without it do not pack.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def attention_of(model: Any) -> str:
    """The attention that transformers has chosen for a model; there is a public setter, and no public reader.

    Without it no backbone would load.
    """
    name: str = model.config._attn_implementation
    return name


def recompute_activations(model: Any) -> None:
    """Let a transformers model compute activations again in the backward pass instead of keeping them.

    Versions before 5.23 have `gradient_checkpointing_enable`, which later ones deprecate for another name.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.disable_input_require_grads()  # only the re-entrant kind needs gradients at the input


def recomputes_activations(model: Any) -> bool:
    """Whether it does so, whoever asked for it; the names differ as above."""
    kinds = ("is_activation_checkpointing", "is_gradient_checkpointing")
    return bool(getattr(model, next(name for name in kinds if hasattr(type(model), name))))


def has_hooks(module: "nn.Module") -> bool:
    """Whether calling a module does more than its `forward`; where torch names these otherwise, every call is one."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name, True) for name in names)


def apply_liger(model: Any) -> None:
    """Put Liger's norms, rotary embedding and SwiGLU into a loaded model, and leave its forward pass alone.

    transformers itself calls this function of liger-kernel's, which is private in name; of families that it does not
    know it changes nothing. It also replaces classes and functions in transformers' module for the model's family:
    these are put back, so that a model that is made later, perhaps for a CPU, is transformers' own. The rotary
    embedding is a function that both find there: it takes Liger's kernel for tensors on a GPU. Where liger-kernel lacks
    the function, its import fails, and says so.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    family = sys.modules[type(model).__module__]
    before = dict(vars(family))
    options = {"rope": True, "rms_norm": True, "swiglu": True}
    _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False, **options)
    for name, own in before.items():
        replaced = getattr(family, name)
        if replaced is not own:
            both = own if isinstance(own, ByDevice) else ByDevice(replaced, own)
            setattr(family, name, both if name == "apply_rotary_pos_emb" else own)


class ByDevice:
    """One function for tensors on a GPU, and another for those elsewhere."""

    def __init__(self, on_gpu: Callable[..., Any], elsewhere: Callable[..., Any]) -> None:
        self.on_gpu, self.elsewhere = on_gpu, elsewhere

    def __call__(self, first: "Tensor", *args: Any, **kwargs: Any) -> Any:
        """What the function of the first tensor's device gives."""
        return (self.on_gpu if first.is_cuda else self.elsewhere)(first, *args, **kwargs)


@contextmanager
def outside_of_counting() -> Iterator[None]:
    """Leave torch's dispatch modes, such as the counter of FLOPs, for what is made within.

    A mode that sees how a subclass of tensors is made keeps torch from making it. Where torch names its private
    context otherwise, the mode stays, and attention after a shared prefix cannot be counted on a GPU.
    """
    from torch.utils import _python_dispatch

    leave = getattr(_python_dispatch, "_disable_current_modes", nullcontext)
    with leave():
        yield


def cpu_has_bfloat16() -> bool:
    """Whether this CPU's own instructions multiply in bfloat16.

    Torch 2.10 and older lack the public `get_capabilities`; their private functions know x86 alone, so that an ARM CPU
    counts as one without.
    """
    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()  # its names differ between x86 and ARM
        return any(map(found.get, ("avx512_bf16", "amx_bf16", "bf16")))
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def leave_sigterm_to_the_run(worker: int, *, run: int) -> None:
    """Let only its run end a loader's worker by SIGTERM, where Linux can tell who sent it.

    What ends a run (Slurm, `timeout`) often signals all of its processes, but the run still takes a last step, for
    which it needs its workers. When Python exits, it ends the workers that are left by SIGTERM, and waits for them.
    `os._exit` has a private name, but is documented; a thread has no other way to end its process without an error,
    which torch would report to the run.

    Args:
        worker: The number of the worker.
        run: The run's process id.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != run:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
