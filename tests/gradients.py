"""Gradients of every variant's loss on one global batch, by any number of processes; run by test_distributed.py.

Of two rows, one or two of three processes have none: with them the batch is read in parts, too.

python tests/gradients.py RANK PROCESSES FOLDER LLM INTERACTIONS ITEMS [sharded]

With `sharded` each process holds its share of the LLM's frozen weights.
"""

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import prepare, save_as_run, tiny
from torch.distributed.tensor import DTensor

from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.data.lessons import Lessons, training_boundaries, write_lessons
from anyo_lightning.encoders.adapted import AdaptedTextEncoders
from anyo_lightning.encoders.hierarchical import HierarchicalEncoders
from anyo_lightning.encoders.ids import IdEncoders
from anyo_lightning.encoders.live import LiveTextEncoders
from anyo_lightning.encoders.text import TextEncoders
from anyo_lightning.encoders.text_start import TextStartEncoders
from anyo_lightning.llm.backbone import Backbone
from anyo_lightning.models.anyo import Anyo
from anyo_lightning.models.base import RetrievalModule
from anyo_lightning.models.cllmrec import CLLMRec
from anyo_lightning.models.e4srec import E4SRec
from anyo_lightning.models.llara import LLaRA
from anyo_lightning.models.llara_pretrain import LLaRAPretrain
from anyo_lightning.models.sasrec import SASRec
from anyo_lightning.models.sracl import SRACL
from anyo_lightning.models.student import Student
from anyo_lightning.models.unisrec import UniSRec

FEW = 2  # windows of a batch of which a third process has no share
ROWS = 11  # windows in the global batch: processes get unequal numbers of histories and of targets


def variants(folder: str, *, sharded: bool) -> dict[str, Callable[[], RetrievalModule]]:
    """All trained variants, without dropout; what is drawn at random is drawn alike."""
    llm = tiny(folder, layers=3, sharded=sharded)
    texts = partial(TextEncoders, llm, dim=16, dropout=0.0, input_dropout=0.0)
    # Not whitened: of 16 items' states in 32 dimensions that is a factor of 30, of rounding as well.
    live = partial(LiveTextEncoders, llm, dim=16, dropout=0.0, whiten=False)
    ids = IdEncoders(dim=16, dropout=0.0)
    frozen = tiny(folder, layers=3, sharded=sharded, lora=None)
    still = {"dropout": 0.0, "adaptor_dropout": 0.0, "adaptor_noise": False}
    swap = partial(SRACL, share=1.0, neighbours=1, alpha=1.0, beta=1.0)  # each item has one possible substitute
    return {
        "SASRec": partial(SASRec, ids),
        "SASRec without own items": partial(SASRec, ids, mask_history=True),
        "Anyo without own items": partial(Anyo, texts(), negatives=9, mask_history=True),
        "SASRec of RecBole": partial(SASRec, IdEncoders(dim=16, dropout=0.0, body="recbole", positions="end")),
        "SASRec on texts": partial(SASRec, TextStartEncoders(frozen, dim=16, frozen=8, dropout=0.0)),
        "Student": partial(Student, ids),
        "UniSRec": partial(UniSRec, AdaptedTextEncoders(frozen, dim=16, ids=True, **still)),
        "Anyo": partial(Anyo, texts(), negatives=9),
        "E4SRec": partial(E4SRec, texts(id_residual=True)),
        "E4SRec of cosines, taught": partial(
            E4SRec, texts(reads="vectors", unit_length=True), temperature=0.1, distil_from=Path(), alignment=1.0
        ),
        "CLLMRec": partial(CLLMRec, texts(), views=("original", "importance"), weight=1.0),
        "CLLMRec without original": partial(CLLMRec, texts(), views=("importance", "importance"), projection_head=True),
        "CLLMRec weighted": partial(
            CLLMRec, texts(), views=("without_least", "without_most"), weight=1.0, negative_weight=0.5
        ),
        "SRACL on ids, neighbours encoded": partial(swap, ids, semantics=llm, bank=False),
        "SRACL on text, neighbours encoded": partial(swap, texts(), bank=False),
        "SRACL on text, bank": partial(swap, texts(), bank=True),
        "CLLMRec at a few boundaries": partial(CLLMRec, texts(), views=("original", "importance"), anchors=5),
        "SRACL at a few boundaries": partial(swap, ids, semantics=llm, anchors=5),
        "LLaRA": partial(LLaRA, live(), hard_negatives=3, mined_negatives=3, popularity_correction=True),
        "LLaRA over the catalogue": partial(LLaRA, live(), keys="catalogue"),
        "LLaRA with a temperature": partial(LLaRA, live(), learn_temperature=True),
        "HLLM": partial(
            LLaRA, HierarchicalEncoders(llm, item_backbone=llm, dim=16, whiten=False, dropout=0.0, input_dropout=0.0)
        ),
        "LLaRA pre-training": partial(LLaRAPretrain, live(dim=None)),
    }


def check_shares(backbone: Backbone, processes: int) -> None:
    """This process holds about its share of each layer's frozen weights, and the trained ones whole."""
    names = [name for name, _ in backbone.named_parameters() if ".layers." in name]
    assert names
    for name in names:
        weight = backbone.get_parameter(name)
        assert isinstance(weight, DTensor) != weight.requires_grad, name
        if isinstance(weight, DTensor):
            assert len(weight.to_local()) <= -(-len(weight) // processes), name
    *_, first, second = backbone.model.layers

    def keeps_its_share(*_: object) -> None:
        assert all(isinstance(weight, DTensor) for weight in first.parameters() if not weight.requires_grad)

    second.register_forward_pre_hook(keeps_its_share)  # in the forward pass, and where it is computed again


def gradients(
    model: RetrievalModule, rank: int, processes: int, *, rows: int, held: int | None
) -> dict[str, torch.Tensor]:
    """The mean over processes of each parameter's gradient: what DDP gives the optimizer.

    Args:
        model: Built on its data.
        rank: This process.
        processes: Their number.
        rows: Windows of the global batch.
        held: `data.micro_batch_tokens`.
    """
    model.data.held_tokens = held
    batch = model.data.train_dataloader().dataset[list(range(rows))[rank::processes]]
    torch.manual_seed(1)
    model.shared_random.manual_seed(1)
    model.train().zero_grad(set_to_none=True)
    if isinstance(model, LLaRAPretrain):
        model.log_dict = lambda *_, **__: None  # type: ignore[method-assign]
        loss = model.training_step(batch, 0)
    else:
        loss, _ = model.loss(model(batch).float(), batch)
    loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if processes > 1:
                dist.all_reduce(gradient)
                gradient /= processes
            found[name] = gradient
    total = loss.detach().clone()
    if processes > 1:
        dist.all_reduce(total)
    return {"loss": total / processes, **found}


def teacher(folder: Path, data: RecDataModule) -> Path:
    """Random lists of all items, and random vectors."""
    data.setup("fit")
    items, random = data.split.catalogue_size, torch.Generator().manual_seed(0)
    scores = torch.rand(len(training_boundaries(data.split)), items, generator=random).sort(descending=True)
    lessons = Lessons(scores.indices.int(), scores.values, torch.randn(items, 5, generator=random))
    write_lessons(folder / "lists.safetensors", lessons, split=data.split)
    return folder / "lists.safetensors"


def built(
    make: Callable[[], RetrievalModule], files: tuple[Path, Path], processes: int = 1, *, sharded: bool = False
) -> RetrievalModule:
    """A variant on the data set, with its bank filled and its negatives mined."""
    kind = getattr(make, "func", type(None))
    last = issubclass(kind, LLaRAPretrain)
    data = RecDataModule(
        interactions=files[0],
        items=files[1],
        supervision="last" if last else "all",
        max_items=12,
        max_tokens=200,
        overlap=0 if getattr(make, "keywords", {}).get("negative_weight") else 0.5,
        batch_tokens=60,
    )
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        if kind is Student:
            make = partial(make, teacher=teacher(Path(folder), data))
        elif "distil_from" in getattr(make, "keywords", {}):
            sasrec = prepare(SASRec(IdEncoders(dim=8, dropout=0.0)), data)
            make = partial(make, distil_from=save_as_run(sasrec, Path(folder) / "sasrec"))
            torch.manual_seed(0)
        model = prepare(make(), data)
    if sharded:
        for backbone in model.backbones:
            check_shares(backbone, processes)
    model.train()
    if isinstance(model, SRACL) and model.bank:
        model.refresh_bank()
    if isinstance(model, LLaRA) and model.hard_negatives:
        model.mine()
    return model


def main() -> None:
    """Write the gradients of all variants."""
    sharded = sys.argv[7:] == ["sharded"]
    rank, processes, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=processes)
    found = {}
    for name, make in variants(sys.argv[4], sharded=sharded).items():
        model = built(make, (Path(sys.argv[5]), Path(sys.argv[6])), processes, sharded=sharded)
        for rows, held in ((ROWS, None), (ROWS, 60), (FEW, None), (FEW, 60)):
            found[f"{name}, {rows} rows, parts of {held}"] = gradients(
                model, rank, processes, rows=rows, held=held if processes > 1 else None
            )
    if rank == 0:
        torch.save(found, folder / f"gradients-{processes}{'-sharded' * sharded}.pt")


if __name__ == "__main__":
    main()
