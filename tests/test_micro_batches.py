"""A step read in parts: the same gradients, within the memory that there is, on any number of processes."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradients import FEW, ROWS, built, gradients, variants
from helpers import MakeData, fit, prepare, tiny
from torch import Tensor

from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.data.loader import ResumableLoader
from anyo_lightning.encoders.ids import IdEncoders
from anyo_lightning.encoders.text import TextEncoders
from anyo_lightning.errors import InputError
from anyo_lightning.models.e4srec import E4SRec
from anyo_lightning.models.sasrec import SASRec

NAMES = variants("unused", sharded=False)


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_any_size_give_the_same_gradients(name: str, tiny_llm: str, tiny_data: tuple[Path, Path]) -> None:
    """Of every variant's loss, in-batch contrasts included, to 1e-5 of each weight's largest gradient."""
    model = built(variants(tiny_llm, sharded=False)[name], tiny_data)
    for rows in (ROWS, FEW):
        whole = gradients(model, 0, 1, rows=rows, held=None)
        largest = max(float(gradient.abs().max()) for key, gradient in whole.items() if key != "loss")
        assert largest > 1e-3 or rows == FEW  # of two users, all items of the step may be each one's own
        for held in (1, 100, 400, 10**6):
            parts = gradients(model, 0, 1, rows=rows, held=held)
            for key, expected in whole.items():
                difference = float((parts[key] - expected).abs().max())
                assert difference <= 1e-5 * float(expected.abs().max()) + 2e-6 * largest, f"{held} {key} {difference}"


def test_the_last_part_alone_keeps_its_activations(tiny_llm: str, make_data: MakeData) -> None:
    """Every other one is read twice; where the loss reads more, all are."""
    model = prepare(E4SRec(TextEncoders(tiny(tiny_llm), dim=16)), make_data())
    model.train()
    batch = model.data.train_dataloader().dataset[list(range(8))]
    model.data.held_tokens = int(batch.lengths.max()) * 2
    sizes: list[int] = []
    model.backbones[0].model.register_forward_hook(lambda _, __, output: sizes.append(output[0].shape[:2].numel()))
    states = model(batch)
    forward = len(sizes)
    assert forward >= 3
    states.sum().backward()
    assert len(sizes) == 2 * forward - 1
    assert max(sizes) <= model.data.held_tokens


def fits_at_most(tokens: int) -> Callable[..., None]:
    """A hook of a language model that cannot hold more. No CPU has so exact a limit: memory is the only part played."""

    def check(_: object, __: object, options: dict[str, Any]) -> None:
        inputs = options.get("input_ids") if options.get("input_ids") is not None else options["inputs_embeds"]
        if torch.is_grad_enabled() and inputs.shape[:2].numel() > tokens:
            raise torch.OutOfMemoryError(f"{inputs.shape[:2].numel()} tokens")

    return check


class Narrow(E4SRec):
    """Trains where so many tokens fit."""

    most = 900

    def build(self, data: RecDataModule) -> None:
        """The limit."""
        self.backbones[0].model.register_forward_pre_hook(fits_at_most(self.most), with_kwargs=True)


def test_auto_finds_what_fits_and_changes_no_step(
    tiny_llm: str, make_data: MakeData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights of a run that has the memory; the value is found before the first step, said and logged."""

    def trained(kind: type[E4SRec], folder: str, **data: Any) -> tuple[E4SRec, dict[str, Tensor]]:
        torch.manual_seed(0)
        encoders = TextEncoders(tiny(tiny_llm), dim=16, dropout=0.0, input_dropout=0.0)
        model = kind(encoders, optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1))  # Adam would enlarge rounding
        fitted = fit(model, make_data(**data), tmp_path / folder, epochs=1)
        return model, dict(fitted.logged_metrics)

    whole, _ = trained(E4SRec, "whole")
    parts, logged = trained(Narrow, "parts", micro_batch_tokens="auto")
    held = parts.data.held_tokens
    assert held is not None
    assert Narrow.most / 3 < held <= Narrow.most
    assert logged["train/micro_batch_tokens"] == held
    assert capsys.readouterr().out.count(f"in parts of at most {held} padded tokens") == 1
    for (name, expected), (_, found) in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5, msg=name)


def test_auto_reads_everything_at_once_where_it_fits(make_data: MakeData, tmp_path: Path) -> None:
    """Whole shares, of any epoch."""
    model = SASRec(IdEncoders(dim=16))
    fit(model, make_data(micro_batch_tokens="auto", batch_tokens=100), tmp_path, epochs=1)
    assert model.data.held_tokens == 100


def test_one_history_that_does_not_fit_is_refused(tiny_llm: str, make_data: MakeData, tmp_path: Path) -> None:
    """One sentence with its length and what to turn."""

    class Tiny(Narrow):
        most = 10

    with pytest.raises(InputError, match=r"Out of memory with one history of \d+ tokens: lower data\.max_tokens"):
        fit(Tiny(TextEncoders(tiny(tiny_llm), dim=16)), make_data(micro_batch_tokens="auto"), tmp_path)


def test_auto_is_refused_for_a_sharded_backbone(tiny_llm: str, make_data: MakeData) -> None:
    """Sharded backbones cannot try: their processes must make the same passes."""
    llm = tiny(tiny_llm)
    model = prepare(E4SRec(TextEncoders(llm, dim=16)), make_data(micro_batch_tokens="auto"))
    model.backbones[0].sharded = True
    with pytest.raises(InputError, match="micro_batch_tokens as a number"):
        model.on_train_start()


def test_an_epoch_resumes_on_another_number_of_processes(make_data: MakeData) -> None:
    """What three processes have trained on, one leaves out."""
    data = make_data(batch_tokens=60)
    loader = data.train_dataloader()
    assert isinstance(loader, ResumableLoader)
    batches = loader.batches
    three = [type(batches)(batches.lengths, budget=60, seed=0, rank=rank, world_size=3) for rank in range(3)]
    before = [row for shard in three for rows in list(shard)[:2] for row in rows]
    resumable = ResumableLoader(loader.dataset, three[0], consumed=lambda: 2)
    loader.load_state_dict(resumable.state_dict())
    after = [row for rows in batches for row in rows]
    assert sorted(before + after) == list(range(len(batches.lengths)))
    assert after


def test_workers_do_not_copy_the_tokens(tiny_llm: str, make_data: MakeData) -> None:
    """A pickled dataset says where the memory-mapped tokens lie, and reads the same from there."""
    data = make_data()
    prepare(E4SRec(TextEncoders(tiny(tiny_llm), dim=16)), data)
    dataset = data.train_dataloader().dataset
    sent = pickle.dumps(dataset)
    assert dataset.tokens.token_ids.tobytes() not in sent
    again = pickle.loads(sent)
    assert isinstance(again.tokens.token_ids, np.memmap)
    assert torch.equal(again[[1, 2]].token_ids, dataset[[1, 2]].token_ids)
    other = pickle.loads(pickle.dumps(dataset.tokens.of_items(np.array([3, 1]))))
    assert np.array_equal(other.span(1), dataset.tokens.span(1))


def test_a_moved_batch_forgets_its_first_self_when_it_is_changed(make_data: MakeData) -> None:
    """What is asked of the CPU is never that of another batch."""
    batch: HistoryBatch = make_data().train_dataloader().dataset[[0, 1]].to("cpu")
    none = replace(batch, target_mask=torch.zeros_like(batch.target_mask))
    assert len(batch.targets)
    assert not len(none.targets)


def test_the_largest_share_of_mixed_lengths(tiny_llm: str, make_data: MakeData) -> None:
    """What `auto` tries is the step with the most padded tokens, also where batches are of random histories."""
    data = make_data(group_by_length=False, batch_tokens=900)
    prepare(E4SRec(TextEncoders(tiny(tiny_llm), dim=8)), data)

    def padded(batch: HistoryBatch) -> int:
        return len(batch.user) * int(batch.lengths.max())

    assert padded(data.largest_share()) == max(padded(batch) for batch in data.train_dataloader())
