"""A training step asks the device for no number that the CPU would wait for, except for what is logged."""

import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradients import variants
from helpers import MakeData, prepare, tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.encoders.text import TextEncoders
from anyo_lightning.models.base import RetrievalModule
from anyo_lightning.models.e4srec import E4SRec

WAITS = ("nonzero", "_local_scalar_dense", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal")
# A sample that is drawn on the CPU, and what transformers asks in each pass: whether rows are packed sequences.
KNOWN = ("systematic_sample", "find_packed_sequence_indices")
NAMES = ["SASRec", "SASRec of RecBole", "SASRec on texts", "UniSRec", "Anyo", "E4SRec", "E4SRec of vectors"]
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")


class Waits(TorchDispatchMode):
    """Collects the operations that make a CPU wait for a GPU: whose result's size, or value, only the GPU knows."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        masks = name in INDEXED and [i for i in args[1] if isinstance(i, Tensor) and i.dtype == torch.bool]
        if name in WAITS or masks or (name == "repeat_interleave" and "output_size" not in (kwargs or {})):
            frames = [f for f in traceback.extract_stack()[:-1] if "/torch/" not in f.filename]
            self.found.append(f"{name} in {frames[-1].name}")
        return func(*args, **(kwargs or {}))


def step(model: RetrievalModule, batch: HistoryBatch) -> None:
    """A training step and its backward pass."""
    model.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
    model.training_step(batch, 0).backward()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("held", [None, 300])
def test_a_step_does_not_wait(name: str, held: int | None, tiny_llm: str, make_data: MakeData) -> None:
    """Also read in parts. A CPU never waits: the operations that would are counted."""
    model = prepare(models(tiny_llm)[name](), make_data(micro_batch_tokens=held))
    model.train()
    batch = model.data.train_dataloader().dataset[list(range(8))].to("cpu")
    with Waits() as waits:
        step(model, batch)
    assert not [found for found in waits.found if not found.endswith(KNOWN)]
    with Waits() as waits:
        batch.target_ids[batch.target_mask].unique()
    assert len(waits.found) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_a_step_does_not_wait_for_a_gpu(
    name: str, tiny_llm: str, make_data: MakeData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's own check, after a first step that may allocate; what transformers asks is left out."""
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda _: None)
    model = prepare(models(tiny_llm)[name](), make_data()).to("cuda")
    model.train()
    batch = model.data.train_dataloader().dataset[list(range(8))]
    step(model, batch.pin_memory().to("cuda"))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, batch.pin_memory().to("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def models(folder: str) -> dict[str, Callable[[], RetrievalModule]]:
    """The variants of gradients.py, and one that reads items' vectors."""
    llm = tiny(folder, layers=2)
    return variants(folder, sharded=False) | {
        "E4SRec of vectors": lambda: E4SRec(TextEncoders(llm, reads="vectors", dim=16))
    }
