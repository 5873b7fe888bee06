"""The package as a library: a plain Trainer in ten lines, without our command line and its run folders."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning import Trainer

import anyo_lightning
from anyo_lightning import LLM, E4SRec, Encoders, IdEncoders, RecDataModule, RetrievalMetrics, SASRec, TextEncoders
from anyo_lightning.models.base import RetrievalModule


@pytest.mark.parametrize(
    ("kind", "encoders"),
    [(E4SRec, lambda llm: TextEncoders(LLM(llm, layers=1), dim=16)), (SASRec, lambda _: IdEncoders(dim=16))],
)
def test_a_plain_trainer_fits_validates_and_tests(
    kind: type[RetrievalModule],
    encoders: Callable[[str], Encoders],
    tiny_llm: str,
    tiny_data: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It logs figures; beside Lightning's own folder of logs and checkpoints nothing is written."""
    monkeypatch.chdir(tmp_path)
    interactions, items = tiny_data
    data = RecDataModule(interactions=interactions, items=items, max_items=20)
    model = kind(encoders(tiny_llm))
    trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=[RetrievalMetrics()], enable_progress_bar=False)
    trainer.fit(model, data)
    (validated,) = trainer.validate(model, data)
    (tested,) = trainer.test(model, data)
    assert 0 <= validated["val/ndcg@10"] <= 1
    assert 0 <= tested["test/ndcg@10"] <= 1
    (queries,) = trainer.predict(model, data)
    assert torch.equal(queries["row"].sort().values, torch.arange(40))
    assert {entry.name for entry in tmp_path.iterdir()} == {"lightning_logs"}
    ours = {"metrics.json", "predictions.parquet", "catalogue.parquet", "curves.csv", "queries.parquet"}
    assert not ours & {file.name for file in tmp_path.rglob("*")}


def test_every_public_name_is_there() -> None:
    """Each is what its module calls it, and a wrong name is Python's own error."""
    assert len(anyo_lightning.__all__) > 15
    for name in anyo_lightning.__all__:
        assert getattr(anyo_lightning, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        anyo_lightning.Nothing  # noqa: B018
