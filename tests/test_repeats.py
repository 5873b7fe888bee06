"""Targets that the user already had: masked histories would make them certain hits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyo_lightning.cli.main import main
from anyo_lightning.cli.restore import restore
from anyo_lightning.compare.table import compare
from anyo_lightning.compare.variants import read_variants
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.data.summary import summarise
from anyo_lightning.errors import InputError
from anyo_lightning.models import floors, transitions
from anyo_lightning.runs import RunFolder

USERS, ITEMS = 12, 30
Histories = list[list[int]]
Fit = Callable[..., RunFolder]


def write(folder: Path, histories: Histories) -> tuple[Path, Path]:
    """The files of these items for each user."""
    lines = [f"u{user},i{item},{time}" for user, own in enumerate(histories) for time, item in enumerate(own)]
    files = folder / "interactions.csv", folder / "items.csv"
    files[0].write_text("\n".join(["user_id,item_id,timestamp", *lines]) + "\n")
    files[1].write_text("\n".join(["item_id,title", *(f"i{item},Item {item}" for item in range(ITEMS))]) + "\n")
    return files


def of_items(histories: Histories, folder: Path, **settings: Any) -> RecDataModule:
    """A data module of these items for each user, set up."""
    interactions, items = write(folder, histories)
    data = RecDataModule(interactions=interactions, items=items, k_core=0, **settings)
    data.setup("fit")
    return data


def repeating(*, validation: int = 0, test: int = 0) -> Histories:
    """Six different items for each user, but so many users come back to their first item."""
    items = [[(user + step) % ITEMS for step in range(6)] for user in range(USERS)]
    for user in range(validation):
        items[user][4] = items[user][0]
    for user in range(test):
        items[user][5] = items[user][0]
    return items


@pytest.fixture
def fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fit:
    """Fit and test a model on given histories, by the real command line."""

    def run(histories: Histories, *options: str, folder: str = "run") -> RunFolder:
        (interactions, items), path = write(tmp_path, histories), tmp_path / folder
        data = (f"--data.interactions={interactions}", f"--data.items={items}", "--data.k_core=0")
        quiet = ("--trainer.enable_progress_bar=false", "--trainer.logger=false", "--trainer.accelerator=cpu")
        words = ["fit", f"--run={path}", *data, *options, *quiet]
        monkeypatch.setattr("sys.argv", ["anyo", *words])
        main(words)
        return RunFolder(path)

    return run


@pytest.fixture
def tuning_masks(monkeypatch: pytest.MonkeyPatch) -> set[bool]:
    """Whether the ranks by which a Markov floor is tuned leave the histories out."""
    masks, found = set(), transitions.sparse_mid_ranks

    def sparse_mid_ranks(*given: Any) -> np.ndarray:
        masks.add(given[-1] is not None)
        return found(*given)

    monkeypatch.setattr(transitions, "sparse_mid_ranks", sparse_mid_ranks)
    return masks


@pytest.mark.parametrize(
    "settings",
    [{}, {"strategy": "ratio", "ratios": (0.2, 0.3)}, {"strategy": "global_time"}],
    ids=["leave one out", "ratio", "global time"],
)
def test_repeated_targets_equal_a_loop(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Also with several targets per user, and users without history."""
    random = np.random.default_rng(0)
    split = of_items(
        [random.integers(8, size=random.integers(3, 12)).tolist() for _ in range(40)], tmp_path, **settings
    ).split
    for stage in ("validation", "test"):
        queries = split.queries(stage)
        repeats = [queries.target[row] in queries.history(row) for row in range(len(queries))]
        assert 0 < split.repeated_targets(stage) == sum(repeats) < len(queries)


def test_summary_says_the_share_of_repeated_targets(tmp_path: Path) -> None:
    """Only where there are any."""
    data = of_items(repeating(test=3), tmp_path)
    split = summarise(data.split, data.read())["split"]
    assert split["repeated test targets"] == "3 (25.0%)"
    assert "repeated validation targets" not in split


@pytest.mark.parametrize(
    ("validation", "test", "asked", "masked"),
    [
        (0, 0, "null", True),
        (3, 0, "null", False),
        (0, 3, "null", False),
        (0, 3, "true", True),
        (0, 0, "false", False),
    ],
)
def test_histories_are_masked_unless_targets_repeat(
    fit: Fit, validation: int, test: int, asked: str, masked: bool
) -> None:
    """By default; true and false are obeyed. metrics.json and a restored run know what was done."""
    run = fit(repeating(validation=validation, test=test), "--model=Popularity", f"--metrics.mask_history={asked}")
    protocol = run.read_metrics()["protocol"]
    assert protocol["history_masked"] is masked
    assert protocol["repeated_targets"] == test
    assert restore(run.path).history_masked is masked


def test_the_choice_is_said_once(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    """In one sentence on stderr, though the callback is set up for the training and for the test."""
    options = ("--model=SASRec", "--model.encoders=IdEncoders", "--model.encoders.dim=8", "--trainer.max_epochs=1")
    fit(repeating(validation=2, test=3), *options)
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "metrics.mask_history" in line]
    assert "2 validation and 3 test targets" in said
    assert "data.duplicates" not in said
    fit(repeating(), *options, folder="other")
    assert "metrics.mask_history" not in capsys.readouterr().err


def test_rows_that_are_there_twice_are_told_from_repeated_targets(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One row at the end of two users' histories twice: data.duplicates first is named, and then all is masked."""
    histories = repeating(validation=1)
    interactions, _ = write(tmp_path, histories)
    last = [line for line in interactions.read_text().splitlines() if line.startswith(("u3,", "u7,"))][5::6]
    assert len(last) == 2
    files = [f"--data.interactions={tmp_path / 'twice.csv'}", "--model=Popularity"]
    (tmp_path / "twice.csv").write_text(interactions.read_text() + "\n".join(last) + "\n")
    fit(histories, *files)
    said = capsys.readouterr().err
    assert "1 validation and 2 test targets" in said
    assert "masks them all the same; 2 of them at one timestamp" in said
    assert "data.duplicates first keeps one" in said
    fit(histories, *files, "--data.duplicates=first", folder="once")
    assert "data.duplicates" not in capsys.readouterr().err


@pytest.mark.parametrize(("repeated", "masked"), [(0, True), (1, False)])
def test_a_floor_without_a_trainer_is_tuned_by_the_same_rule(
    tmp_path: Path, tuning_masks: set[bool], repeated: int, masked: bool
) -> None:
    """Masked where no target repeats."""
    floors.Markov(tuned=True).prepare(of_items(repeating(test=repeated), tmp_path))
    assert tuning_masks == {masked}


@pytest.mark.parametrize(("asked", "masked"), [("true", True), ("false", False), ("null", True)])
def test_a_floor_is_tuned_under_the_protocol_that_it_is_tested_with(
    fit: Fit, tuning_masks: set[bool], asked: str, masked: bool
) -> None:
    """The run's own `metrics.mask_history`."""
    fit(repeating(), "--model=Markov", "--model.tuned=true", f"--metrics.mask_history={asked}")
    assert tuning_masks == {masked}


def test_a_run_of_before_compares_with_one_of_today(fit: Fit, tmp_path: Path) -> None:
    """Its metrics.json does not say how many targets repeat; one with another mask is refused."""
    asked = {"old": "true", "new": "null", "other": "false"}
    old, new, other = (
        fit(repeating(), "--model=Popularity", f"--metrics.mask_history={value}", folder=f"{name}/version_0")
        for name, value in asked.items()
    )
    content = old.read_metrics()
    del content["protocol"]["repeated_targets"]
    old.metrics_file.write_text(json.dumps(content))
    compare([old.path, new.path], output=tmp_path / "table.md", format="markdown")
    assert len(read_variants([old.path, new.path])[0]) == 2
    with pytest.raises(InputError, match="one protocol"):
        read_variants([new.path, other.path])


def test_seeds_of_a_variant_may_say_one_protocol_in_two_ways(fit: Fit) -> None:
    """`true` and, where no target repeats, the default."""
    options = ("--model=Popularity", "--data.seed=0")
    runs = [
        fit(
            repeating(),
            *options,
            f"--seed_everything={seed}",
            f"--metrics.mask_history={asked}",
            folder=f"p/version_{seed}",
        )
        for seed, asked in enumerate(("true", "null"))
    ]
    (variant,) = read_variants([run.path for run in runs])[0]
    assert len(variant.runs) == 2
