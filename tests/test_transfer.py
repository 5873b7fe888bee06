"""A run on other data: tested as it is (zero-shot), or as the start of another run."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from helpers import CONFIGS, Anyo, MakeData, Model, fit, prepare, refused, tiny, trainer_for, validated, weights
from torch import Tensor

from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.encoders.adapted import AdaptedTextEncoders
from anyo_lightning.encoders.ids import IdEncoders
from anyo_lightning.encoders.live import LiveTextEncoders
from anyo_lightning.encoders.text import TextEncoders
from anyo_lightning.encoders.text_start import TextStartEncoders
from anyo_lightning.encoders.vectors import VectorEncoders
from anyo_lightning.encoders.whitening import whitening
from anyo_lightning.errors import InputError
from anyo_lightning.llm.language_model import LLM
from anyo_lightning.llm.text_vectors import frozen_vectors
from anyo_lightning.models.base import RetrievalModule
from anyo_lightning.models.csft import CSFT
from anyo_lightning.models.e4srec import E4SRec
from anyo_lightning.models.llara import LLaRA
from anyo_lightning.models.sasrec import SASRec
from anyo_lightning.models.transfer import Transfer
from anyo_lightning.models.unisrec import UniSRec
from anyo_lightning.runs import RunFolder

OTHERS = ["Alien", "Brazil", "Casablanca", "Diva", "Eraserhead", "Fargo", "Gilda", "Heat", "Ikiru", "Jaws", "Kes", "M"]


def write(folder: Path, items: dict[str, str], *, users: int = 30, seed: int = 1) -> list[str]:
    """A data set of these items, in noisy loops through them; the options that name it."""
    folder.mkdir(parents=True)
    random, ids, rows = np.random.default_rng(seed), list(items), ["user_id,item_id,timestamp"]
    for user in range(users):
        item = int(random.integers(len(ids)))
        for moment in range(int(random.integers(6, 16))):
            rows.append(f"v{user},{ids[item]},{moment}")
            item = (item + 1) % len(ids) if random.random() < 0.8 else int(random.integers(len(ids)))
    (folder / "interactions.csv").write_text("\n".join(rows) + "\n")
    named = [f'{item},"{title}"' for item, title in items.items()]
    (folder / "items.csv").write_text("\n".join(["item_id,title", *named]) + "\n")
    return [f"--data.interactions={folder / 'interactions.csv'}", f"--data.items={folder / 'items.csv'}"]


def in_another_order(data: tuple[Path, Path], folder: Path) -> list[str]:
    """The same data set with its catalogue the other way round."""
    folder.mkdir(parents=True)
    head, *items = data[1].read_text().splitlines()
    (folder / "items.csv").write_text("\n".join([head, *items[::-1]]) + "\n")
    return [f"--data.interactions={data[0]}", f"--data.items={folder / 'items.csv'}"]


def files(words: Sequence[str]) -> dict[str, Path]:
    """The same for a data module."""
    return {word.partition("=")[0].removeprefix("--data."): Path(word.partition("=")[2]) for word in words}


CASES = ["sasrec", "unisrec", "unisrec_ids", "e4srec_hybrid", "e4srec_both", "e4srec_known", "e4srec_paper"]
CASES += ["llara", "csft"]
TEXT = [case for case in CASES if case not in ("sasrec", "e4srec_paper", "e4srec_known")]


@pytest.fixture
def make(tiny_llm: str, make_data: MakeData, tmp_path: Path) -> Callable[..., RetrievalModule]:
    """Makes a small model; those that read a SASRec run's vectors train one first, on the data given."""

    def model(case: str, *, source: Path | None = None, **options: Path) -> RetrievalModule:
        llm, frozen = tiny(tiny_llm), LLM(tiny_llm, dtype="float32")
        if case == "sasrec":
            return SASRec(IdEncoders(dim=8, heads=1, tied=False), **options)
        if case.startswith("unisrec"):
            return UniSRec(AdaptedTextEncoders(frozen, dim=8, experts=2, ids=case == "unisrec_ids"), **options)
        if case == "llara":
            return LLaRA(LiveTextEncoders(llm, dim=8), hard_negatives=1, mined_negatives=2, **options)
        if case == "csft":
            return CSFT(LiveTextEncoders(llm, dim=None, whiten=False), **options)
        if case == "e4srec_paper":
            assert source is not None
            return E4SRec(VectorEncoders(llm, item_vectors_from=source, dim=8), **options)
        reads = "both" if case == "e4srec_both" else "vectors"
        return E4SRec(
            TextEncoders(llm, reads=reads, dim=8, id_residual=True, item_vectors_from=source),  # type: ignore[arg-type]
            **options,
        )

    return model


def source_for(case: str, data: RecDataModule, folder: Path) -> Path | None:
    """A SASRec run on these data, for the cases that read one's vectors."""
    if case not in ("e4srec_known", "e4srec_paper"):
        return None
    fit(SASRec(IdEncoders(dim=8, heads=1)), data, folder, epochs=1)
    return folder


def trained(model: Model, data: RecDataModule, folder: Path) -> dict[str, Tensor]:
    """Its weights after an epoch at a high rate, in a run folder with the files that a test writes."""
    model.optimizer = lambda parameters: torch.optim.Adam(parameters, lr=0.02)
    trainer = fit(model, data, folder, epochs=1)
    run = RunFolder(folder)
    metrics = next(c for c in trainer.callbacks if hasattr(c, "masks_history"))  # type: ignore[attr-defined]
    metrics.folder = run.path
    trainer.test(model, data, ckpt_path=run.best_checkpoint, verbose=False)
    return weights(run.best_checkpoint)


def of_items(name: str, value: Tensor) -> bool:
    """Whether a weight has a row for each of the tiny data's 16 items."""
    return value.ndim > 0 and len(value) == 16 and ".backbone." not in name


def figures_on(model: RetrievalModule, data: RecDataModule, checkpoint: Path) -> dict[str, float]:
    """Figures of a checkpoint on data that may be others."""
    model.restore_from(checkpoint, other_data=True)
    return validated(model, data, checkpoint)


@pytest.mark.parametrize("case", CASES)
def test_another_order_of_the_catalogue_changes_nothing(
    case: str, make: Callable[..., RetrievalModule], make_data: MakeData, tiny_data: tuple[Path, Path], tmp_path: Path
) -> None:
    """Each item keeps its rows, its vectors and its rank; a run that starts from the weights has them, too."""
    source = source_for(case, make_data(), tmp_path / "source")
    saved = trained(make(case, source=source), make_data(), tmp_path / "run")
    best = RunFolder(tmp_path / "run").best_checkpoint
    other = files(in_another_order(tiny_data, tmp_path / "other"))
    plain = validated(make(case, source=source), make_data(), best)
    model = make(case, source=source and tmp_path / "gone")
    found = figures_on(model, make_data(**other), best)
    for name in ("val/ndcg@10", "val/hr@5", "val/mrr@20", "val/popularity@10"):
        assert found[name] == pytest.approx(plain[name], abs=1e-6), name
    assert model.transfer is not None
    state = {name: value for name, value in model.state_dict().items() if name in saved}
    started = make(case, init_from=tmp_path / "run", source=source_for(case, make_data(**other), tmp_path / "again"))
    for here in (state, prepare(started, make_data(**other)).state_dict()):
        for name, value in saved.items():
            if name == "mined" or (here is not state and name.endswith((".known", ".item_vectors"))):
                continue
            expected = value.flip(0) if of_items(name, value) else value
            torch.testing.assert_close(here[name], expected, atol=1e-3, rtol=1e-3, msg=name)


@pytest.mark.parametrize("case", TEXT)
def test_a_catalogue_that_was_never_seen(
    case: str,
    make: Callable[..., RetrievalModule],
    make_data: MakeData,
    tiny_llm: str,
    titles: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Its figures are those of the run's weights over the texts at hand, put together here by hand; ids say nothing."""
    saved = trained(make(case), make_data(), tmp_path / "run")
    best = RunFolder(tmp_path / "run").best_checkpoint
    names = files(write(tmp_path / "new", {f"m{i}": title for i, title in enumerate(OTHERS)}))
    capsys.readouterr()
    found = figures_on(make(case), make_data(**names), best)
    said = capsys.readouterr().out
    assert "0 of 12 items are known there by id and text (12 share an id with another text there)" in said
    assert ("take over their rows" in said) == ("hybrid" in case or "both" in case or "ids" in case)
    model = prepare(make(case), make_data(**names))
    state = model.state_dict()
    own = {"mined", *(name for name, value in saved.items() if of_items(name, value))}
    if "item_encoder.vectors" in own or "item_encoder.0.vectors" in own:
        llm = LLM(tiny_llm, dtype="float32").load()
        here, there = (frozen_vectors(llm, texts, pooling="mean", max_tokens=48) for texts in (OTHERS, titles))
        expected_vectors = ((here.double() - here.double().mean(0)) @ whitening(there)[1]).float()
    with torch.no_grad():
        for name, value in saved.items():
            if name.endswith((".vectors", "injection.item_vectors")):
                state[name].copy_(expected_vectors)
            elif name not in own:
                state[name].copy_(value)
            elif name.endswith("trained"):
                state[name].zero_()
    expected = evaluated(model, make_data(**names), tmp_path / "by_hand")
    for name in ("val/ndcg@10", "val/hr@5", "val/mrr@20"):
        assert found[name] == pytest.approx(expected[name], abs=1e-6), name


def evaluated(model: RetrievalModule, data: RecDataModule, folder: Path) -> dict[str, float]:
    """The figures of a model as it is."""
    (figures,) = trainer_for(folder).validate(model, data, verbose=False)
    return dict(figures)


@pytest.fixture
def run(anyo: Anyo, small: list[str], small_llm: list[str], tmp_path: Path) -> Callable[..., RunFolder]:
    """Trains a small run of a configuration through the command line."""

    def train(config: str, *words: str, folder: str = "run") -> RunFolder:
        llm = [] if config in ("sasrec", "markov") else small_llm
        dim = [] if config == "markov" else ["--model.encoders.dim=8", "--data.batch_tokens=300", "--data.max_items=20"]
        anyo("fit", f"--config={CONFIGS / config}.yaml", *small, *llm, *dim, *words, f"--run={tmp_path / folder}")
        return RunFolder(tmp_path / folder)

    return train


def test_a_run_is_tested_on_other_data(
    anyo: Anyo, capsys: pytest.CaptureFixture[str], run: Callable[..., RunFolder], tmp_path: Path
) -> None:
    """Results stand in a folder of their own, of the other split, are called zero-shot, and make a row there."""
    trained, output = run("e4srec_hybrid"), RunFolder(tmp_path / "other" / "e4srec")
    before = trained.metrics_file.read_bytes()
    words = write(tmp_path / "new", {f"n{i}": title for i, title in enumerate(OTHERS)})
    said = anyo("test", f"--run={trained.path}", f"--output={output.path}", *words)
    assert "0 of 12 items are known there by id and text; they take over their rows, the others start afresh" in said
    found = output.read_metrics()
    assert found["variant"] == "run, zero-shot"
    assert found["split"]["counts"]["users"] == 30
    assert found["split"]["fingerprint"] != trained.read_metrics()["split"]["fingerprint"]
    for name in ("train_seconds", "trainable_parameters"):
        assert found["cost"][name] == trained.read_metrics()["cost"][name]
    assert yaml.safe_load(output.config_file.read_text())["data"]["interactions"] == words[0].partition("=")[2]
    assert output.read_catalogue()["text"].to_list() == OTHERS
    assert trained.metrics_file.read_bytes() == before
    floor = run("markov", *words, folder="markov")
    assert "run, zero-shot" in anyo("compare", output.path, floor.path)
    assert "Expected runs of one split" in refused(capsys, anyo, "compare", output.path, trained.path)


@pytest.mark.parametrize("config", ["sasrec", "e4srec_hybrid"])
def test_a_run_is_tested_on_its_own_split_under_other_texts(
    config: str, anyo: Anyo, capsys: pytest.CaptureFixture[str], run: Callable[..., RunFolder], tmp_path: Path
) -> None:
    """That is no zero-shot test: users and items are those trained on, and each keeps its row; ids read no text."""
    trained, output = run(config), RunFolder(tmp_path / "other")
    said = anyo("test", f"--run={trained.path}", f"--output={output.path}", "--data.template=the film {title}")
    assert "the split is the same, its items' texts are others" in said
    found, own = output.read_metrics(), trained.read_metrics()
    assert found["variant"] == "run, other texts"
    assert found["split"] == own["split"]
    assert output.read_catalogue()["text"].str.starts_with("the film ").all()
    same = found["metrics"]["test/ndcg@10"] == own["metrics"]["test/ndcg@10"]
    assert same == (config == "sasrec")
    shown = anyo("compare", output.path, trained.path)
    assert "run, other texts" in shown


def test_a_start_on_the_same_split_under_other_texts(tiny_llm: str, make_data: MakeData, tmp_path: Path) -> None:
    """All rows of items are taken over, and vectors of texts are made again."""
    llm = LLM(tiny_llm, layers=2, dtype="float32")
    first = trained(UniSRec(AdaptedTextEncoders(llm, dim=8, ids=True)), make_data(max_items=20), tmp_path / "run")
    model = UniSRec(AdaptedTextEncoders(llm, dim=8, ids=True), init_from=tmp_path / "run")
    state = prepare(model, make_data(max_items=20, template="the film {title}")).state_dict()
    others = [key for key, value in first.items() if not torch.allclose(state[key], value)]
    assert others
    assert all(key.endswith(".vectors") for key in others)


def test_a_width_that_is_the_number_of_items(make_data: MakeData, tiny_llm: str, tmp_path: Path) -> None:
    """Is no row per item, in another catalogue as in another split of the same one."""
    encoders = TextEncoders(tiny(tiny_llm), dim=16)
    trained(E4SRec(encoders), make_data(), tmp_path / "run")
    best = RunFolder(tmp_path / "run").best_checkpoint
    names = files(write(tmp_path / "new", {f"n{i}": title for i, title in enumerate(OTHERS)}))
    for data in (make_data(**names), make_data(template="the film {title}")):
        assert data is not None
        assert figures_on(E4SRec(encoders), data, best)["val/ndcg@10"] > 0
    (tmp_path / "run" / "predictions.parquet").unlink()
    other = make_data(strategy="ratio", ratios=(0.2, 0.2))
    assert prepare(E4SRec(encoders, init_from=tmp_path / "run"), other).transfer is None


def test_what_cannot_be_tested_elsewhere(
    anyo: Anyo,
    capsys: pytest.CaptureFixture[str],
    run: Callable[..., RunFolder],
    tiny_data: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    """Ids on items that they do not know, the interactions trained on, a floor, another reading: no folder is made."""
    ids, floor = run("sasrec"), run("markov", folder="floor")
    new, output = write(tmp_path / "new", {f"n{i}": title for i, title in enumerate(OTHERS)}), tmp_path / "a" / "output"
    mistakes = [
        (ids, new, "knows by id and text, since it reads ids alone, got none among 12"),
        (ids, ["--data.strategy=ratio", "--data.ratios=[0.2,0.3]"], "has not been trained on, got"),
        (ids, ["--data.strategy=global_time", "--data.quantiles=[0.3,0.6]"], "has not been trained on, got"),
        (floor, new, "is counted on, got split"),
        (ids, [*new, "--data.max_items=7"], "Expected data.max_items 20, with which"),
        (ids, ["--data.interactions=nowhere.csv"], "nowhere.csv"),
    ]
    for trained, words, sentence in mistakes:
        assert sentence in refused(capsys, anyo, "test", f"--run={trained.path}", f"--output={output}", *words), words
    assert not output.parent.exists()
    other = in_another_order(tiny_data, tmp_path / "order")
    shown = anyo("test", f"--run={ids.path}", f"--output={output}", *other)
    assert "16 of 16 items are known there by id and text" in shown
    metrics = [RunFolder(folder).read_metrics()["metrics"]["test/ndcg@10"] for folder in (ids.path, output)]
    assert metrics[0]["value"] == pytest.approx(metrics[1]["value"], abs=1e-6)
    assert RunFolder(output).read_metrics()["variant"] == "run, other data"
    ids.catalogue_file.write_bytes(RunFolder(output).catalogue_file.read_bytes())
    again = f"--output={tmp_path / 'b'}"
    assert "to be that of the checkpoint" in refused(capsys, anyo, "test", f"--run={ids.path}", again, *new)
    ids.catalogue_file.unlink()
    assert "found no such file" in refused(capsys, anyo, "test", f"--run={ids.path}", again, *new)


def test_leaks_are_seen_under_other_texts_and_of_untested_users(
    anyo: Anyo, capsys: pytest.CaptureFixture[str], run: Callable[..., RunFolder], tmp_path: Path
) -> None:
    """The interactions of a run under other titles are its own; of users without a test row nobody knows."""
    texts = {f"n{number}": f"{OTHERS[number % 12]} {number}" for number in range(60)}
    words, output = write(tmp_path / "new", texts, users=150), f"--output={tmp_path / 'output'}"
    trained = run("e4srec_hybrid", *words, folder="all")
    (tmp_path / "others.csv").write_text(
        "item_id,title\n" + "".join(f"{item},the {text} film\n" for item, text in texts.items())
    )
    under = [words[0], f"--data.items={tmp_path / 'others.csv'}", "--data.strategy=ratio", "--data.ratios=[0.2,0.3]"]
    assert "has not been trained on, got" in refused(capsys, anyo, "test", f"--run={trained.path}", output, *under)
    early = run("e4srec_hybrid", *words, "--data.strategy=global_time", "--data.quantiles=[0.4,0.7]", folder="early")
    late = ["--data.strategy=leave_one_out"]
    sentence = refused(capsys, anyo, "test", f"--run={early.path}", output, *late)
    assert "a run with a test row of each user" in sentence or "has not been trained on, got" in sentence


@pytest.mark.filterwarnings("ignore:.*items have no text")
def test_items_without_texts_are_the_same_in_no_other_data(make_data: MakeData, tmp_path: Path) -> None:
    """Two data sets that count items from 1 and name none of them know nothing of each other."""
    data = []
    for name, count in (("a", 14), ("b", 15)):
        write(tmp_path / name, {str(number): "" for number in range(1, count)})
        data.append(make_data(interactions=tmp_path / name / "interactions.csv", items=None, template=None))
    folder = RunFolder(tmp_path / "run")
    trainer = fit(SASRec(IdEncoders(dim=8, heads=1)), data[0], folder.path, epochs=1)
    folder.write_catalogue(pl.DataFrame({"item_id": data[0].split.item_ids.tolist(), "text": data[0].split.item_texts}))
    prepare(SASRec(IdEncoders(dim=8, heads=1)), data[1])
    checkpoint = torch.load(folder.best_checkpoint, weights_only=True)
    found = Transfer.of(folder.path, checkpoint, data[1].split, IdEncoders(dim=8, heads=1))
    assert trainer.lightning_module is not None
    assert found is not None
    assert not len(found.here)
    assert found.namesakes > 10


def test_unknown_items_of_a_table_from_texts_start_from_their_own(
    tiny_llm: str, make_data: MakeData, tmp_path: Path
) -> None:
    """Not from the row that stands in their place in the run."""
    encoders = TextStartEncoders(tiny(tiny_llm, lora=None), dim=8)
    for name, titles in (("a", OTHERS[:10]), ("b", OTHERS[2:])):
        write(tmp_path / name, {title: title for title in titles})
    given = [
        make_data(
            **files(
                [
                    f"--data.interactions={tmp_path / n / 'interactions.csv'}",
                    f"--data.items={tmp_path / n / 'items.csv'}",
                ]
            )
        )
        for n in "ab"
    ]
    folder = RunFolder(tmp_path / "run")
    trained = fit(SASRec(encoders), given[0], folder.path, epochs=1).lightning_module.item_encoder.embedding.weight
    folder.write_catalogue(
        pl.DataFrame({"item_id": given[0].split.item_ids.tolist(), "text": given[0].split.item_texts})
    )
    checkpoint = torch.load(folder.best_checkpoint, weights_only=True)
    start = prepare(SASRec(encoders), given[1]).item_encoder.embedding.weight.detach().clone()
    transfer = Transfer.of(folder.path, checkpoint, given[1].split, encoders)
    assert transfer is not None
    built = encoders.build(
        given[1], device=torch.device("cpu"), saved=transfer.to_build_with(checkpoint["state_dict"], {})
    )
    unknown = [number for number in range(given[1].split.catalogue_size) if number not in transfer.here.tolist()]
    assert unknown
    torch.testing.assert_close(built[1].embedding.weight[unknown], start[unknown])
    assert trained.shape[1] == 8


def test_a_run_says_whose_weights_it_started_from(anyo: Anyo, run: Callable[..., RunFolder], tmp_path: Path) -> None:
    """And whose those are; a run that resumes or is tested again keeps it, also when the other run is gone."""
    first = run("sasrec", folder="first")
    second, third = (
        run("sasrec", f"--model.init_from={tmp_path / start}", folder=folder)
        for start, folder in (("first", "second"), ("second", "third"))
    )
    assert "lineage" not in first.read_metrics()
    split = first.read_metrics()["split"]["fingerprint"]
    found, origin = (run.read_metrics()["lineage"]["init_from"] for run in (third, second))
    assert found["lineage"] == {"init_from": origin}
    assert origin.pop("weights") != found["weights"]
    settings = origin.pop("settings")
    assert settings["data.max_items"] == 20
    assert settings["split"] == split
    assert origin == {"run": str(first.path), "variant": "first", "model": "SASRec", "split": split, "lineage": {}}
    second.remove()
    anyo("test", f"--run={third.path}", "--trainer.enable_progress_bar=false")
    assert third.read_metrics()["lineage"] == {"init_from": found}
    run("sasrec", f"--model.init_from={second.path}", "--trainer.max_epochs=2", folder="third")
    assert third.read_metrics()["lineage"] == {"init_from": found}


def test_a_start_from_a_catalogue_that_is_known_in_part(
    anyo: Anyo, run: Callable[..., RunFolder], titles: list[str], tmp_path: Path
) -> None:
    """Rows of items whose id and text are known are the run's, to the bit, all others fresh; it then trains."""
    first = run("sasrec")
    items = {f"m{i}": titles[i] for i in (3, 1, 8)} | {f"m{i}": OTHERS[i] for i in (4, 5)} | {"x": "Nosferatu"}
    words = write(tmp_path / "new", items)
    second = run("sasrec", *words, f"--model.init_from={first.path}", "--trainer.limit_train_batches=1", folder="next")
    assert second.finished
    names = files(words)
    data = RecDataModule(max_items=20, batch_tokens=300, template="{title}", **names)  # type: ignore[arg-type]
    fresh, started = (
        prepare(SASRec(IdEncoders(dim=8), **start), data).state_dict() for start in ({}, {"init_from": first.path})
    )
    saved, places = weights(first.best_checkpoint), {item: i for i, item in enumerate(data.split.item_ids.tolist())}
    table = "item_encoder.embedding.weight"
    for item in ("m3", "m1", "m8"):
        assert torch.equal(started[table][places[item]], saved[table][int(item[1:])]), item
    for item in ("m4", "m5", "x"):
        assert not torch.isclose(started[table][places[item]], saved[table], atol=1e-4).all(1).any(), item
    assert all(
        torch.equal(started[name], saved[name]) for name in saved.keys() - {table, table.replace("item_", "history_")}
    )
    assert fresh.keys() == started.keys()


def test_a_start_on_another_split_of_the_same_catalogue(
    capsys: pytest.CaptureFixture[str], tiny_llm: str, make_data: MakeData, tmp_path: Path
) -> None:
    """All rows are taken over, and items that either has trained on have one."""
    llm = LLM(tiny_llm, layers=2, dtype="float32")
    first = trained(UniSRec(AdaptedTextEncoders(llm, dim=8, ids=True)), make_data(max_items=20), tmp_path / "run")
    model = UniSRec(AdaptedTextEncoders(llm, dim=8, ids=True), init_from=tmp_path / "run")
    state = prepare(model, make_data(strategy="ratio", ratios=(0.2, 0.2), max_items=20)).state_dict()
    said = capsys.readouterr().out
    assert "16 of 16 items are known there" in said
    assert "Not free of leaks: " in said
    for key, value in first.items():
        torch.testing.assert_close(state[key], value, msg=key)


def test_encoders_that_name_no_rows_are_refused(make_data: MakeData, tmp_path: Path) -> None:
    """Rather than giving an item another one's row."""

    class Unnamed(IdEncoders):
        item_rows = ()

    trained(SASRec(Unnamed(dim=8, heads=1)), make_data(), tmp_path / "run")
    names = files(write(tmp_path / "new", {f"m{i}": title for i, title in enumerate(OTHERS)}))
    with pytest.raises(InputError, match=r"has a row per item, in item_rows, .* got Unnamed"):
        prepare(SASRec(Unnamed(dim=8, heads=1), init_from=tmp_path / "run"), make_data(**names))


def test_text_vectors_of_another_language_model_are_refused(
    tiny_llm: str, make_tiny_llm: Callable[..., str], make_data: MakeData, tmp_path: Path
) -> None:
    """A run that names nothing of what made its vectors is found out by the vectors of its own catalogue."""
    trained(UniSRec(AdaptedTextEncoders(LLM(tiny_llm), dim=8)), make_data(), tmp_path / "run")
    best = RunFolder(tmp_path / "run").best_checkpoint
    content = torch.load(best, weights_only=True)
    del content["anyo_lightning"]["frozen"]
    torch.save(content, best)
    names = files(write(tmp_path / "new", {f"m{i}": title for i, title in enumerate(OTHERS)}))
    model = UniSRec(AdaptedTextEncoders(LLM(make_tiny_llm("unlike", seed=3)), dim=8))
    with pytest.raises(InputError, match="Expected the language model that made the run's text vectors"):
        figures_on(model, make_data(**names), best)
