"""What README and docs promise: examples run, links lead somewhere, figures are those of benchmarks, commands parse."""

import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import notebook_cells
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor, nn
from torch.utils.data import DataLoader

from anyo_lightning import RetrievalMetrics
from anyo_lightning.cli import commands
from anyo_lightning.cli.lightning import AnyoCLI, run_lightning
from anyo_lightning.cli.main import COMMANDS, STAGES, main
from anyo_lightning.data.sources import Columns, read_files
from anyo_lightning.data.splits import Queries, Stage, make_split
from anyo_lightning.errors import InputError
from anyo_lightning.runs import RunFolder

PROJECT = Path(__file__).parents[1]
README, JAPANESE = ((PROJECT / name).read_text() for name in ("README.md", "README.ja.md"))
DOCS = sorted(PROJECT.glob("docs/*.md"))
assert len(DOCS) > 10
COMMAND = re.compile(rf"(?:\banyo|-m anyo_lightning) (?:{'|'.join(STAGES | COMMANDS)}) .*")
# What stands for something of the reader's own.
PLACES = {
    "$s": "0",
    "$v": "markov",
    "$B": "beauty",
    "$run": "sasrec",
    "$overlay": "demo",
    "TEACHER": "runs/mine",
    "NAME.yaml": "sasrec.yaml",
}


class ParsedError(InputError):
    """The words were parsed; nothing was run."""


class ParsingCLI(AnyoCLI):
    """The real command line up to the point where it has parsed its words."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse and stop."""
        super().parse_arguments(parser, args)
        raise ParsedError


def block(section: str, language: str, *, text: str = README) -> str:
    """The only code block of a language in a section of a page."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", text.split(f"\n## {section}\n")[1].split("\n## ")[0], re.DOTALL)
    return found


def written_commands(file: Path) -> list[str]:
    """The commands in a file's code lines, comments and backticks, one per line, without what a shell does of them."""
    text = file.read_text().replace("\\\n#", " ").replace("\\\n", " ")
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [*re.findall(r"^(?:    |\t|#).*", text, re.MULTILINE), *fenced]
    code = text if file.suffix == ".sh" else "\n".join(lines)
    inline = re.findall(r"`(anyo [^`]+)`", " ".join(text.split())) if file.suffix == ".md" else []
    return [match.group() for line in [*code.splitlines(), *inline] if (match := COMMAND.search(line))]


def all_commands() -> list[str]:
    """The commands of all files that show some, and of the Makefile as make would run them."""
    files = [PROJECT / "README.md", *DOCS, *PROJECT.glob("benchmarks/*.md"), *PROJECT.rglob("configs/**/*.yaml")]
    counts = {file: written_commands(file) for file in files}
    assert sum(bool(counts[page]) for page in DOCS) > 10
    assert all(counts[file] for file in PROJECT.glob("configs/*.yaml")), "a configuration without its command"
    assert len(counts[PROJECT / "README.md"]) > 15
    cells = "\n".join(notebook_cells(PROJECT / "docs" / "quickstart.ipynb"))
    shown = [match.group() for match in COMMAND.finditer(cells)]
    assert len(shown) > 3
    make = ["make", "--dry-run", "--always-make", "BEAUTY=beauty", "demo-rows", "rows", "beauty"]
    dry = subprocess.run(make, cwd=PROJECT, capture_output=True, text=True, check=True).stdout.replace("\\\n", " ")
    rows = [match.group() for match in COMMAND.finditer(dry)]
    assert len(rows) > 15
    found = {command for part in (*counts.values(), shown, rows) for command in part}
    for name, value in PLACES.items():
        found = {command.replace(name, value) for command in found}
    return sorted(found)


def words_of(command: str) -> list[str]:
    """The words behind `anyo` or `python -m anyo_lightning`, up to the end of the shell's command."""
    lexer = shlex.shlex(command.removeprefix("-m "), posix=True, punctuation_chars=";|&>")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in lexer:
        if word[0] in ";|&>(":
            break
        words.append(word)
    return words[1:]


PAGES = [PROJECT / "README.md", PROJECT / "README.ja.md", *DOCS, *PROJECT.glob("benchmarks/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_links_lead_somewhere(page: Path) -> None:
    """To files that are there, and to headings that they have."""
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        if not link.startswith("https://") and not (target.exists() and (not heading or heading in headings(target))):
            dead.append(link)
    assert dead == []


def results(text: str) -> dict[str, str]:
    """The blocks of results of a page, by name."""
    block = r"<!-- results of (\w+): made by a command, do not edit -->\n(.*?)<!-- end of results -->"
    return dict(re.findall(block, text, re.DOTALL))


@pytest.mark.parametrize("text", [README, JAPANESE], ids=["en", "ja"])
def test_results_are_those_that_were_made(text: str) -> None:
    """Each block of results is that of its page in benchmarks, to the letter, and has at most ten rows."""
    found = results(text)
    assert list(found) == ["demo", "ml1m"]
    for name, block in found.items():
        assert results((PROJECT / "benchmarks" / f"{name}.md").read_text()) == {name: block}
        assert "\n| sasrec " in block
        assert len(re.findall(r"^\|", block, re.MULTILINE)) <= 2 + 10  # with head and rule
    outside = re.sub(r"(hr|ndcg)@10", "", text, flags=re.IGNORECASE)
    assert "@" not in outside  # no figure at another cutoff


def typed(text: str) -> list[str]:
    """What is typed in the indented code of a page's sections, without comments; of a tree the names alone."""
    lines = re.findall(r"^    (.*\S.*)", text.split("\n## ", 1)[1], re.MULTILINE)
    return [re.split(r"\s{2,}", line.strip())[0] for line in lines if not line.lstrip().startswith("#")]


def test_the_readmes_say_the_same() -> None:
    """Both have the same commands, code, sections, links and variants, and each leads to the other."""
    assert len(typed(README)) > 50
    assert typed(README) == typed(JAPANESE)
    code = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
    assert code.findall(README) == code.findall(JAPANESE)
    assert len(re.findall(r"^#", README, re.MULTILINE)) == len(re.findall(r"^#", JAPANESE, re.MULTILINE))
    rows = re.compile(r"^\| \[.*?\| .*? \|", re.MULTILINE)  # the variants' pages and configurations
    assert len(rows.findall(README)) > 8
    assert rows.findall(README) == rows.findall(JAPANESE)
    english, japanese = (set(re.findall(r"\]\(([^)#]+)\)", text)) for text in (README, JAPANESE))
    assert english - japanese == {"README.ja.md"}
    assert japanese - english == {"README.md"}


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    found = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def figures_cited() -> list[tuple[str, str, Path]]:
    """The rows of figures in docs: the page, the row, and the file in benchmarks that its last cell names."""
    row = re.compile(r"^\|.*\| \[[\w.]+\]\((\.\./benchmarks/\w+\.md)\) \|$", re.MULTILINE)
    return [
        (page.name, found.group(), page.parent / found[1]) for page in DOCS for found in row.finditer(page.read_text())
    ]


def holds(text: str, row: str) -> bool:
    """Whether a table line or paragraph of a text has a row's figures, in order, and the name in its first cell."""
    number = re.compile(r"[+-]?\.\d{2,}")
    figures = number.findall(row)
    named = re.match(r"\| `([^`]+)`", row)
    table = re.compile(r"^\|.*", re.MULTILINE)
    for part in (*table.findall(text), *table.sub("", text).split("\n\n")):
        there = iter(number.findall(part))
        if figures and (named is None or named[1] in part) and all(figure in there for figure in figures):
            return True
    return False


def test_figures_are_those_of_the_benchmarks() -> None:
    """Each row of figures in docs stands in the file that it names, as it is there."""
    cited = figures_cited()
    assert len(cited) > 20
    assert [(page, row) for page, row, file in cited if not holds(file.read_text(), row)] == []


def test_a_stale_figure_is_found() -> None:
    """The test above can fail: for another figure, another name, and a row without figures."""
    text = "| sasrec | .226 ±.027 | +.015 ±.017 |\n| markov | .199 ±.025 | base |\n"
    assert holds(text, "| `sasrec`, here | .226 ±.027 |")
    assert not holds(text, "| `sasrec` | .227 ±.027 |")
    assert not holds(text, "| `sasrec` | .027 ±.226 |")
    assert not holds(text, "| `markov` | .226 ±.027 |")
    assert not holds(text, "| `sasrec` | -.015 |")
    assert not holds(text, "| `sasrec` | |")


def test_each_configuration_has_a_page() -> None:
    """The pages of the variants link to all files that train one."""
    linked = {link for page in DOCS for link in re.findall(r"\]\(\.\./configs/(\w+)\.yaml\)", page.read_text())}
    assert linked == {file.stem for file in PROJECT.glob("configs/*.yaml")}


def test_what_the_readme_names_exists() -> None:
    """Its tests and the folders of its tree are there."""
    assert len(re.findall(r"\]\([^)]+\)", README)) > 10
    tests = "".join(file.read_text() for file in (PROJECT / "tests").glob("test_*.py"))
    written = README + "".join(page.read_text() for page in DOCS)
    assert [name for name in re.findall(r"`(test_\w+)`", written) if f"def {name}(" not in tests] == []
    tree = re.search(r"\n    anyo_lightning/\n((?:      .*\n)+)", README)
    assert tree is not None
    named = {line.split()[0].rstrip("/") for line in tree[1].splitlines()}
    folders = {path.name for path in (PROJECT / "anyo_lightning").iterdir() if (path / "__init__.py").is_file()}
    assert folders <= named <= {path.name for path in (PROJECT / "anyo_lightning").iterdir()}


@pytest.mark.parametrize("command", all_commands())
def test_commands_parse(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command's options exist, and its files are where it says."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(PROJECT / "configs")
    tested = re.findall(r"\btest --run (runs/beauty/\w+)", command)
    for name in ("runs/mine", "runs/probes/sasrec", *tested):  # of finished runs
        RunFolder(Path(name)).path.mkdir(parents=True)
        shutil.copy(PROJECT / "configs" / "sasrec.yaml", RunFolder(Path(name)).config_file)
    (tmp_path / "mine.yaml").write_text(block("Add a variant", "yaml").replace("mine.InBatch", "Anyo"))
    name, *options = words_of(command)
    if name in STAGES:
        with pytest.raises(ParsedError):
            run_lightning([name, *options], cli=ParsingCLI)
    else:
        getattr(commands, f"{name}_parser")().parse_args(options)


def test_a_command_with_an_unknown_option_is_found() -> None:
    """The test above can fail: an option of an older version is refused."""
    words = words_of('anyo fit -c configs/sasrec.yaml --model.dropout 0.1 --metrics.variant "a b"; done')
    assert words[-1] == "a b"
    words[words.index("-c") + 1] = str(PROJECT / "configs" / "sasrec.yaml")
    with pytest.raises(Exception, match="dropout"):
        run_lightning(words, cli=ParsingCLI)


def test_a_variant_is_a_model_and_a_yaml(
    tiny_data: tuple[Path, Path], tiny_llm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README's two files train a step and end with a tested run folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "mine.py").write_text(block("Add a variant", "python"))
    (tmp_path / "mine.yaml").write_text(block("Add a variant", "yaml"))
    small = [f"--data.interactions={tiny_data[0]}", f"--data.items={tiny_data[1]}", "--data.max_tokens=300"]
    small += [f"--model.encoders.backbone.name={tiny_llm}", "--model.encoders.backbone.layers=2"]
    small += ["--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.limit_train_batches=1"]
    main(["fit", "-c", "mine.yaml", *small])
    metrics = RunFolder(tmp_path / "runs" / "mine" / "version_0").read_metrics()
    assert metrics["variant"] == "mine"
    assert 0 <= metrics["metrics"]["test/ndcg@10"]["value"] <= 1
    assert metrics["cost"]["targets"] > 0
    monkeypatch.delitem(sys.modules, "mine")


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_python_in_ten_lines(
    page: str,
    tiny_data: tuple[Path, Path],
    tiny_llm: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The script trains and ranks, and leaves the working directory empty; in docs another one recommends then."""
    monkeypatch.chdir(tmp_path)
    text = (PROJECT / page).read_text()
    script = block("Python" if page == "README.md" else "Train and test", "python", text=text)
    assert len([line for line in script.splitlines() if line]) <= 10
    files = f'interactions=Path("{tiny_data[0]}"), items=Path("{tiny_data[1]}")'
    for shown, tiny in {
        'source="ml-100k"': files,
        '"smollm2-135m-instruct"': f'"{tiny_llm}"',
        "logger=False": 'logger=False, enable_progress_bar=False, accelerator="cpu"',
        "from lightning": "from pathlib import Path\nfrom lightning",
    }.items():
        assert script.count(shown) == 1
        script = script.replace(shown, tiny)
    names: dict[str, Any] = {}
    exec(compile(script, page, "exec"), names)
    assert 0 <= float(capsys.readouterr().out.split()[-1]) <= 1
    assert names["model"].seen.targets > 0
    if page == "docs/python.md":
        exec(compile(block("Recommend with a trained model", "python", text=text), page, "exec"), names)
        assert [len(row) for row in names["titles"]] == [5, 5]
        assert not np.isin(names["items"][0], names["histories"][0]).any()
    assert list(tmp_path.iterdir()) == []


class OwnData(LightningDataModule):
    """A data module of one's own: (row, last item, next item), row -1 in training."""

    def __init__(self, interactions: Path, items: Path) -> None:
        super().__init__()
        self.files = interactions, items

    def setup(self, stage: str) -> None:
        """Read and split."""
        self.split = make_split(read_files(*self.files, columns=Columns()))

    def queries(self, stage: Stage) -> Queries:
        """The rows to rank."""
        return self.split.queries(stage)

    def rows(self, stage: Stage) -> DataLoader[Any]:
        """Each row's last item and its target."""
        queries = self.queries(stage)
        rows = range(len(queries))
        return DataLoader([(r, int(queries.history(r)[-1]), int(queries.target[r])) for r in rows], batch_size=8)

    def train_dataloader(self) -> DataLoader[Any]:
        """Pairs of an item and the next one."""
        histories = map(self.split.training_history, range(self.split.users))
        pairs = [(-1, int(a), int(b)) for items in histories for a, b in pairwise(items)]
        return DataLoader(pairs, batch_size=16, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation's rows."""
        return self.rows("validation")

    def test_dataloader(self) -> DataLoader[Any]:
        """The test's rows."""
        return self.rows("test")


class OwnModule(LightningModule):
    """A LightningModule of one's own: the next item from the last one."""

    def configure_model(self) -> None:
        """Two tables, once the catalogue is known."""
        if not hasattr(self, "query"):
            items = self.trainer.datamodule.split.catalogue_size  # type: ignore[attr-defined]
            self.query, self.item = nn.Embedding(items, 16), nn.Embedding(items, 16)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The full softmax."""
        _, last, target = batch
        return nn.functional.cross_entropy(self.query(last) @ self.item.weight.T, target)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        """What `RetrievalMetrics` ranks."""
        return {"row": batch[0], "query": self.query(batch[1])}

    test_step = validation_step

    def encode_catalogue(self) -> Tensor:
        """One vector per item."""
        return self.item.weight

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-1)


def test_metrics_rank_modules_of_ones_own(tiny_data: tuple[Path, Path]) -> None:
    """`RetrievalMetrics` needs two steps, `encode_catalogue`, `split` and `queries`; loops are learned from pairs."""
    torch.manual_seed(0)
    trainer = Trainer(
        max_epochs=5,
        callbacks=[RetrievalMetrics(mask_history=False)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    model, data = OwnModule(), OwnData(*tiny_data)
    trainer.fit(model, data)
    assert float(trainer.callback_metrics["val/hr@5"]) > 0.5  # chance .31: 5 of 16 items
    assert trainer.test(model, data, verbose=False)[0]["test/hr@5"] > 0.5
