"""The notebook: it holds no outputs, and its cells run from top to bottom on the debug overlay."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import CONFIGS, notebook_cells

PROJECT = CONFIGS.parent
NOTEBOOK = PROJECT / "docs" / "quickstart.ipynb"
SHORT = {
    "overlays/demo.yaml": "overlays/debug.yaml",
    "--trainer.max_epochs 10": "-c configs/overlays/debug.yaml",
}


def test_the_notebook_holds_no_outputs() -> None:
    """They would be somebody's of some day."""
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 5
    assert [cell for cell in cells if cell["outputs"] or cell["execution_count"]] == []


@pytest.mark.real
@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    """As in Jupyter, started in the notebook's own folder, with the package installed: `!` is a shell's command."""
    script = "import subprocess\n" + "\n".join(notebook_cells(NOTEBOOK))
    for shown, short in SHORT.items():
        assert script.count(shown) == 1
        script = script.replace(shown, short)
    run = r"\1subprocess.run(r'''\2''', shell=True, check=True)"
    script = re.sub(r"^( *)!(.*)$", run, script, flags=re.MULTILINE)
    script += '\nlists = recommender.recommend([["new1"]], k=3)\nassert len(lists) == 3, lists'
    (tmp_path / "docs").mkdir()
    (tmp_path / "configs").symlink_to(PROJECT / "configs")
    environment = {
        **os.environ,
        "ANYO_CACHE": os.environ["ANYO_TEST_CACHE"],
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(PROJECT),
    }
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path / "docs", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = set(re.findall(r"^(\w+) +1 +\.\d+", done.stdout, re.MULTILINE))  # of the table: name, seeds, HR@10
    assert rows == {"markov", "sasrec", "llm"}, done.stdout[-3000:]
