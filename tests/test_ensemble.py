"""An ensemble of finished runs: its scores are the sum of their logits, and everything else works as for one run."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers import CONFIGS, Anyo, MakeData, prepare, refused

from anyo_lightning.encoders.text import TextEncoders
from anyo_lightning.errors import InputError
from anyo_lightning.llm.language_model import LLM
from anyo_lightning.models.csft import CSFT
from anyo_lightning.models.ensemble import Ensemble
from anyo_lightning.models.restored_run import restore_run
from anyo_lightning.runs import RunFolder

ITEMS = 20  # read of a history


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs are kept that the tests of this module share."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def runs(anyo: Anyo, small: list[str], small_llm: list[str], trained: Path) -> dict[str, Path]:
    """Ids; vectors of texts, with a learned temperature; frozen texts with a given one; and the counts."""
    options = {
        "sasrec": ["--model.encoders.dim=8", "--model.encoders.heads=1"],
        "e4srec_vectors": [*small_llm, "--model.encoders.unit_length=true", "--model.temperature=0.1"],
        "unisrec": [*small_llm[:2], "--model.encoders.dim=8", "--model.encoders.heads=1"],
        "popularity": [],
    }
    for name, given in options.items():
        if not RunFolder(trained / name).finished:
            config = f"--config={CONFIGS / name}.yaml"
            anyo("fit", config, *small, *given, f"--data.max_items={ITEMS}", f"--run={trained / name}")
    return {name: trained / name for name in options}


def test_scores_are_the_weighted_sum_of_the_runs_logits(runs: dict[str, Path], make_data: MakeData) -> None:
    """Inner products of each run by itself, over its temperature, at every boundary of batches of training windows."""
    data = make_data(max_items=ITEMS)
    weights = {"sasrec": 1.0, "e4srec_vectors": 0.5, "unisrec": 2.0, "popularity": -0.25}
    ensemble = prepare(Ensemble(list(runs.values()), weights=list(weights.values())), data).eval()
    dataset = data.train_dataloader().dataset
    batch = dataset[list(range(0, len(dataset), 3))]
    rows, columns = batch.target_places
    assert len(rows) > 2 * len(batch.user)
    prefixes = [batch.item_ids[row, : column + 1].numpy() for row, column in zip(rows, columns, strict=True)]
    expected = torch.zeros(len(rows), data.split.catalogue_size)
    for name, folder in runs.items():
        member = restore_run(folder, device=torch.device("cpu"))
        with member.as_evaluated(), torch.no_grad():
            states = torch.cat([member.model.encode_histories([prefix]) for prefix in prefixes]).float()
            logits = states @ member.model.encode_catalogue().T
        scale = {"unisrec": 1 / 0.07, "popularity": 1.0, "sasrec": 1.0}.get(name)
        if name == "e4srec_vectors":
            assert member.model.temperature is not None
            scale = 1 / float(member.model.temperature())
            assert 9 < scale < 11
        expected += weights[name] * scale * logits
    found = ensemble(batch) @ ensemble.encode_catalogue().T
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3 * float(expected.std()))
    torch.testing.assert_close(ensemble.encode_items(torch.tensor([3, 1])), ensemble.encode_catalogue()[[3, 1]])


def test_a_run_with_itself_ranks_as_the_run(
    anyo: Anyo, small: list[str], runs: dict[str, Path], tmp_path: Path
) -> None:
    """The command line tests it, and its ledger is of both runs."""
    options = [f"--model.runs=[{runs['sasrec']}, {runs['sasrec']}]", "--model.weights=[0.5, 0.25]"]
    anyo("fit", f"--config={CONFIGS / 'ensemble.yaml'}", *small, *options, f"--run={tmp_path / 'twice'}")
    found, alone = RunFolder(tmp_path / "twice"), RunFolder(runs["sasrec"])
    columns = ["user_id", "target_item_id", "rank"]
    assert found.read_predictions(columns).equals(alone.read_predictions(columns))
    cost, own = found.read_metrics()["cost"], alone.read_metrics()["cost"]
    lineage = found.read_metrics()["lineage"]
    assert {name: run["run"] for name, run in lineage.items()} == dict.fromkeys(
        ["0.runs", "1.runs"], str(runs["sasrec"])
    )
    for name in ("train_seconds", "tokens", "targets", "flops", "trainable_parameters"):
        assert cost[name] == 2 * own[name] > 0


def test_popularity_is_taken_away(anyo: Anyo, small: list[str], runs: dict[str, Path], tmp_path: Path) -> None:
    """The more of it is taken, the rarer are the items in the lists."""
    split = restore_run(runs["popularity"], device=torch.device("cpu")).data.split
    counts = dict(zip(map(str, split.item_ids), split.training_counts(), strict=True))
    both = f"--model.runs=[{runs['sasrec']}, {runs['popularity']}]"
    listed = {}
    for weight in (-3.0, -0.5, 0.5):
        folder = tmp_path / str(weight)
        config = f"--config={CONFIGS / 'ensemble.yaml'}"
        anyo("fit", config, *small, both, f"--model.weights=[1, {weight}]", f"--run={folder}")
        lists = RunFolder(folder).read_predictions(["top_item_ids"])["top_item_ids"].to_list()
        listed[weight] = sum(int(counts[str(item)]) for items in lists for item in items[:3])
    assert listed[-3.0] < listed[-0.5] < listed[0.5]


def test_it_serves_as_one_run(
    anyo: Anyo, small: list[str], runs: dict[str, Path], tmp_path: Path, make_data: MakeData
) -> None:
    """Its lists for a typed history, its test under another protocol, and what it teaches a student."""
    folder = tmp_path / "ensemble"
    both = f"--model.runs=[{runs['sasrec']}, {runs['unisrec']}]"
    anyo("fit", f"--config={CONFIGS / 'ensemble.yaml'}", *small, both, f"--run={folder}")
    split = make_data().split
    printed = anyo("recommend", "--run", folder, "--user", split.user_ids[0], "--k", "3")
    assert sum(text in printed for text in split.item_texts) >= 3
    anyo("test", f"--run={folder}", f"--output={tmp_path / 'masked'}", "--metrics.mask_history=true")
    assert RunFolder(tmp_path / "masked").read_metrics()["protocol"]["history_masked"]
    anyo("predict", f"--run={folder}", "--teach=4")
    assert RunFolder(folder).teacher_file.is_file()


def test_what_is_refused(
    anyo: Anyo,
    small: list[str],
    runs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In one sentence each, before anything is ranked."""
    config = f"--config={CONFIGS / 'ensemble.yaml'}"

    def sentence(*options: str, names: tuple[object, ...] = (runs["sasrec"], runs["unisrec"])) -> str:
        listed = f"--model.runs=[{', '.join(map(str, names))}]"
        return refused(capsys, anyo, "fit", config, *small, listed, *options, f"--run={tmp_path / 'refused'}")

    assert "at least two runs, got 1" in sentence(names=(runs["sasrec"],))
    assert "2 finite numbers other than zero, got [1.0]" in sentence("--model.weights=[1]")
    assert "2 finite numbers other than zero, got [1.0, 0.0]" in sentence("--model.weights=[1,0]")
    assert "2 finite numbers other than zero, got [inf, 1.0]" in sentence("--model.weights=[.inf,1]")
    assert "2 finite numbers other than zero, got [1.0, nan]" in sentence("--model.weights=[1,.nan]")
    assert "of model.weights to be positive, got [-1.0, -2.0]" in sentence("--model.weights=[-1,-2]")
    assert f"at least {ITEMS}, which" in sentence(f"--data.max_items={ITEMS - 1}")
    assert "on the same split" in sentence("--data.ties=shuffle")
    assert str(tmp_path / "nowhere") in sentence(names=(runs["sasrec"], tmp_path / "nowhere"))
    anyo("fit", f"--config={CONFIGS / 'markov.yaml'}", *small, f"--run={tmp_path / 'markov'}")
    assert "whose are sparse" in sentence(names=(runs["sasrec"], tmp_path / "markov"))
    shutil.copytree(runs["sasrec"], tmp_path / "untrained")
    shutil.rmtree(tmp_path / "untrained" / "checkpoints")
    assert "untrained" in sentence(names=(runs["sasrec"], tmp_path / "untrained"))
    RunFolder(tmp_path / "untrained").metrics_file.unlink()
    assert "tested runs, got" in sentence(names=(runs["sasrec"], tmp_path / "untrained"))
    anyo("fit", config, *small, f"--model.runs=[{runs['sasrec']}, {runs['unisrec']}]", f"--run={tmp_path / 'both'}")
    assert "no ensembles" in sentence(names=(runs["sasrec"], tmp_path / "both"))
    with pytest.raises(InputError, match="trained to rank items, got one of CSFT"):
        CSFT(TextEncoders(LLM("tiny"))).logit_scale()


def test_its_results_are_of_its_runs_as_they_were(
    anyo: Anyo,
    small: list[str],
    runs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Other runs, weights or texts do not take their place, in a test, a prediction or a recommendation."""
    member, folder = tmp_path / "here" / "sasrec", tmp_path / "ensemble"
    shutil.copytree(runs["sasrec"], member)
    both = [f"--config={CONFIGS / 'ensemble.yaml'}", *small, f"--model.runs=[{member}, {runs['unisrec']}]"]
    anyo("fit", *both, f"--run={folder}")
    before = RunFolder(folder).metrics_file.read_text()
    others = f"--model.runs=[{runs['e4srec_vectors']}, {runs['unisrec']}]"
    assert "model.runs" in refused(capsys, anyo, "test", f"--run={folder}", others)
    texts = ["--data.template={title}, again", f"--output={tmp_path / 'texts'}"]
    assert "whose runs read their own" in refused(capsys, anyo, "test", f"--run={folder}", *texts)
    assert "which is made of several" in refused(capsys, anyo, "test", f"--run={folder}", "--probe")
    shutil.rmtree(member)
    options = ["--model.encoders.dim=8", "--model.encoders.heads=1", f"--data.max_items={ITEMS}"]
    other_seed = ["--seed_everything=1", f"--run={member}"]
    anyo("fit", f"--config={CONFIGS / 'sasrec.yaml'}", *small, *options, *other_seed)
    for command in ("test", "predict", "validate"):
        assert "with which" in refused(capsys, anyo, command, f"--run={folder}")
    assert "with which" in refused(capsys, anyo, "recommend", f"--run={folder}", "--user=1")
    assert RunFolder(folder).metrics_file.read_text() == before
    anyo("fit", *both, f"--run={tmp_path / 'again'}")
