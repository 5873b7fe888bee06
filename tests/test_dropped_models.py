"""A language model that made a run's vectors and was dropped is part of what the run is."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from helpers import CONFIGS, Anyo, MakeData, fit, prepare, refused, weights

from anyo_lightning.encoders.adapted import AdaptedTextEncoders
from anyo_lightning.encoders.ids import IdEncoders
from anyo_lightning.encoders.text import TextEncoders
from anyo_lightning.errors import InputError
from anyo_lightning.llm.language_model import LLM
from anyo_lightning.models.e4srec import E4SRec
from anyo_lightning.models.sracl import SRACL
from anyo_lightning.models.unisrec import UniSRec
from anyo_lightning.runs import RunFolder

PLACES = {"unisrec": "model.encoders.backbone.name", "sracl_paper": "model.semantics.name"}


@pytest.mark.parametrize("config", PLACES)
def test_a_run_is_not_resumed_with_another_language_model(
    config: str,
    anyo: Anyo,
    capsys: pytest.CaptureFixture[str],
    small: list[str],
    tiny_llm: str,
    make_tiny_llm: Callable[..., str],
    tmp_path: Path,
) -> None:
    """Whose vectors nothing else in the checkpoint names; the same one elsewhere is no other."""
    run, option = RunFolder(tmp_path / "run"), f"--{PLACES[config]}"
    words = [f"--config={CONFIGS / config}.yaml", *small, "--data.batch_tokens=200", "--model.encoders.dim=8"]
    anyo("fit", *words, f"{option}={tiny_llm}", f"--run={run.path}")
    before = run.config_file.read_bytes()
    another = make_tiny_llm("another-llm", seed=1)
    more = "--trainer.max_epochs=2"
    for stage in ("fit", "test"):
        sentence = refused(capsys, anyo, stage, f"--run={run.path}", more, f"{option}={another}")
        assert f"Expected {option[2:]} {tiny_llm}, with which" in sentence
    assert run.config_file.read_bytes() == before
    moved = tmp_path / Path(tiny_llm).name
    moved.symlink_to(tiny_llm)
    anyo("fit", f"--run={run.path}", more, f"{option}={moved}")
    changed = yaml.safe_load(run.config_file.read_text())["model"]["init_args"]
    place = changed["semantics"] if config == "sracl_paper" else changed["encoders"]["init_args"]["backbone"]
    assert place["init_args"]["name"] == str(moved)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"name": "another-llm"}, "name another-llm"),
        ({"layers": 1}, "layers 1"),
        ({"revision": "main"}, "revision main"),
        ({"pooling": "last"}, "pooling last"),
        ({"max_item_tokens": 7}, "max_item_tokens 7"),
    ],
)
def test_what_made_frozen_vectors_is_compared(
    change: dict[str, object], word: str, tiny_llm: str, make_data: MakeData, tmp_path: Path
) -> None:
    """Wherever a checkpoint is loaded, in Python, too, and without the language model at hand."""
    fit(UniSRec(AdaptedTextEncoders(LLM(tiny_llm), dim=8)), make_data(), tmp_path, epochs=1)
    data = {name: change[name] for name in change.keys() & {"max_item_tokens"}}
    pooling = {name: change[name] for name in change.keys() & {"pooling"}}
    llm = {"name": "gone/tiny-llm"} | {n: v for n, v in change.items() if n not in data | pooling}
    model = UniSRec(AdaptedTextEncoders(LLM(**llm), dim=8, **pooling))  # type: ignore[arg-type]
    model.restore_from(RunFolder(tmp_path).best_checkpoint)
    with pytest.raises(InputError, match=rf"with which the checkpoint was trained, got .*{word.split()[-1]}"):
        fit(model, make_data(**data), tmp_path / "again", ckpt_path=RunFolder(tmp_path).best_checkpoint)


def test_text_vectors_are_those_of_as_many_tokens(tiny_llm: str, make_data: MakeData, tmp_path: Path) -> None:
    """Also where histories read these vectors alone, so that batches carry no tokens."""

    def make() -> E4SRec:
        return E4SRec(TextEncoders(LLM(tiny_llm, dtype="float32"), dim=8, reads="vectors"))

    fit(make(), make_data(), tmp_path, epochs=1)
    with pytest.raises(InputError, match=r"Expected data.max_item_tokens 48, with which .* got 7"):
        fit(make(), make_data(max_item_tokens=7), tmp_path / "b", ckpt_path=RunFolder(tmp_path).best_checkpoint)


def test_semantics_are_those_of_the_training(
    tiny_llm: str, make_tiny_llm: Callable[..., str], make_data: MakeData, tmp_path: Path
) -> None:
    """Only where it is resumed: recommendation, and a run that starts from its weights, need none of them."""

    def make(name: str, **options: Path) -> SRACL:
        semantics = LLM(name, dtype="float32")
        return SRACL(IdEncoders(dim=8, heads=1), semantics=semantics, bank=False, **options)

    another = make_tiny_llm("other-semantics", seed=1)
    fit(make(tiny_llm), make_data(), tmp_path, epochs=1)
    best = RunFolder(tmp_path).best_checkpoint
    with pytest.raises(InputError, match=r"Expected model.semantics name=tiny-llm .* got name=other-semantics"):
        fit(make(another), make_data(), tmp_path / "again", ckpt_path=best)
    started = prepare(make(another, init_from=tmp_path), make_data()).state_dict()
    assert all((started[name] == weight).all() for name, weight in weights(best).items())


def test_an_added_option_at_its_default_is_no_change(
    anyo: Anyo, small: list[str], small_llm: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run whose configuration and checkpoint lack options of today is tested; at other values it is refused."""
    run = RunFolder(tmp_path / "run")
    anyo("fit", f"--config={CONFIGS / 'e4srec_vectors.yaml'}", *small, *small_llm, f"--run={run.path}")
    config = yaml.safe_load(run.config_file.read_text())
    model = config["model"]["init_args"]
    for options, name in (
        (model, "alignment"),
        (model, "temperature"),
        (model["encoders"]["init_args"], "unit_length"),
    ):
        del options[name]
    run.config_file.write_text(yaml.safe_dump(config))
    for path in (run.best_checkpoint, run.last_checkpoint):
        content = torch.load(path, weights_only=False)
        del content["anyo_lightning"]["settings"]["model.encoders.unit_length"]
        torch.save(content, path)
    anyo("test", f"--run={run.path}")
    sentence = refused(capsys, anyo, "test", f"--run={run.path}", "--model.alignment=0.5")
    assert "Expected model.alignment null, with which" in sentence


def test_checkpoints_of_earlier_versions_are_loaded(tiny_llm: str, make_data: MakeData, tmp_path: Path) -> None:
    """Which name nothing that made their vectors."""
    fit(UniSRec(AdaptedTextEncoders(LLM(tiny_llm), dim=8)), make_data(), tmp_path, epochs=1)
    best = RunFolder(tmp_path).best_checkpoint
    content = torch.load(best, weights_only=True)
    assert content["anyo_lightning"].pop("frozen")["model.encoders.backbone.name"] == "tiny-llm"
    torch.save(content, best)
    fit(UniSRec(AdaptedTextEncoders(LLM(tiny_llm), dim=8)), make_data(), tmp_path / "again", ckpt_path=best)
