"""`anyo export`: other libraries open the folder, with the run's own lists and scores; what is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyo_lightning import Recommender
from anyo_lightning.serving.export import export

Runs = Callable[..., Path]
READ = {
    "e4srec": (),
    "e4srec_hybrid": (),
    "e4srec_vectors": (),
    "anyo": ("--model.encoders.reads=texts",),
    "llara": (),
}


def run_script(folder: Path, history: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the lines of the card leave behind, for another history than the card's."""
    monkeypatch.chdir(folder)
    script = block(folder, "from transformers")
    script, count = re.subn(r"history = \".\", \[.*?\]", f'history = ".", {json.dumps(history)}', script)
    assert count == 1
    names: dict[str, Any] = {}
    exec(compile(script, "README.md", "exec"), names)
    return names


def block(folder: Path, word: str) -> str:
    """The card's only Python block with a word in it."""
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    (found,) = [one for one in blocks if word in one]
    return str(found)


def assert_scores_of_the_run(folder: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For two users the same ten items, with scores equal to 1e-5."""
    recommender = Recommender.load(run, device="cpu")
    for user in recommender.data.split.user_ids[[3, 7]].tolist():
        history = recommender.history(user)
        names = run_script(folder, history, monkeypatch)
        own = recommender.recommend([history], k=10)
        order = np.argsort(-names["scores"], kind="stable")[: len(own)]
        assert [recommender.item_ids[place] for place in order] == own["item_id"].to_list()
        np.testing.assert_allclose(names["scores"][order], own["score"].to_numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", READ)
def test_the_cards_lines_give_the_runs_lists(
    name: str, run_of: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(name, *READ[name])
    export(run, tmp_path / "out", device="cpu")
    assert_scores_of_the_run(tmp_path / "out", run, monkeypatch)
