"""The command line `anyo`: LightningCLI's fit, validate, test and predict, and the small commands."""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import NoReturn

import numpy as np
from jsonargparse import ArgumentError, ArgumentParser
from rich.console import Console
from rich.progress import track

from anyo_lightning.cli.lightning import STAGES, run_lightning
from anyo_lightning.cli.restore import restore
from anyo_lightning.compare.render import Format, write_out
from anyo_lightning.compare.table import compare
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.data.splits import Stage
from anyo_lightning.data.summary import print_summary, summarise, write_parquet
from anyo_lightning.errors import InputError, argument_sentence
from anyo_lightning.fidelity.index_page import as_page
from anyo_lightning.fidelity.index_table import FidelityTable, as_rich, as_text
from anyo_lightning.fidelity.measure import measure
from anyo_lightning.llm.backbone import load_tokenizer
from anyo_lightning.runs import RunFolder
from anyo_lightning.views.write import augment

FACTORIES = ["Flat", "SQ8", "HNSW32", "IVF64,Flat:nprobe=1", "IVF64,Flat:nprobe=4", "IVF64,Flat:nprobe=16"]


def data(dataset: RecDataModule, *, tokenizer: str, output: Path | None) -> None:
    """Print what was read and how it is split; write it as Parquet."""
    source = dataset.read()
    dataset.setup("fit")
    load = load_tokenizer(tokenizer)

    def count_tokens(texts: list[str]) -> np.ndarray:
        return np.array([len(ids) + 1 for ids in load(texts, add_special_tokens=False)["input_ids"]])  # + separator

    print_summary(summarise(dataset.split, source, count_tokens, dataset.max_tokens))
    if output is not None:
        write_parquet(dataset.split, output)


def index(
    run: Path,
    *,
    factories: list[str],
    stage: Stage = "test",
    k: int = 10,
    format: Format = "rich",  # noqa: A002
    output: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Say what approximate indexes lose against exact search on a finished run's queries, and what they save.

    Args:
        run: Run folder; its best checkpoint gives states and vectors, as in `anyo test`.
        factories: FAISS factory strings, search parameters after a colon: `IVF64,Flat:nprobe=8`, `HNSW32:efSearch=64`.
        stage: Whose queries are searched.
        k: Length of the lists, and the cutoff of recall and NDCG.
        format: `rich` for the terminal, `markdown`, `latex`, `csv` or `json`.
        output: File for the table instead of the terminal.
        plot: File for a page with recall against queries a second; by default index_fidelity.html in the run folder.

    Raises:
        InputError: The run cannot be restored, k is not positive, or a factory string is unknown to FAISS or does not
            fit the run's vectors.
    """
    if k < 1:
        raise InputError(f"Expected k to be positive, got {k}")
    found = restore(run, stage=stage)
    indexes = measure(
        factories,
        split=found.split,
        queries=found.queries,
        rows=found.rows,
        query_vectors=found.query_vectors,
        vectors=found.vectors,
        k=k,
        mask_history=found.mask_history,
    )
    bar = track(indexes, "Measuring indexes", len(factories), console=Console(stderr=True), transient=True)
    items, dim = found.vectors.shape
    table = FidelityTable(
        variant=RunFolder(run).variant,
        stage=stage,
        rows=len(found.rows),
        items=items,
        dim=dim,
        history_masked=found.mask_history,
        k=k,
        indexes=tuple(bar),
    )
    plot = RunFolder(run).index_page_file if plot is None else plot
    write_out(as_page(table), plot)
    if output is None and format == "rich" and sys.stdout.isatty():
        console = Console()
        console.print(as_rich(table, width=console.width))
    else:
        write_out(as_text(table, format), output)
    print(f"Plot: {plot}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a user's mistake ends it with one line and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    _quiet()
    try:
        if arguments and arguments[0] in STAGES:
            run_lightning(arguments)
        else:
            _run_small_command(arguments or ["--help"])
    except InputError as error:
        _refuse(" ".join(str(error).split()))
    except ArgumentError as error:
        _refuse(argument_sentence(error))


def _refuse(sentence: str) -> NoReturn:
    print(f"anyo: error: {sentence}", file=sys.stderr)
    sys.exit(2)


def _run_small_command(arguments: list[str]) -> None:
    parser = ArgumentParser(
        prog="anyo", description="LLMs as encoders, nearest-neighbour search as the recommender.", exit_on_error=False
    )
    commands = parser.add_subcommands(required=True)
    for name in STAGES:
        commands.add_subcommand(name, ArgumentParser(), help=f"LightningCLI's {name}: anyo {name} --help")
    comparison = ArgumentParser(description="Compare runs in a table.", exit_on_error=False)
    comparison.add_argument("runs", nargs="+", type=Path, help="Run folders, or folders of run folders.")
    comparison.add_function_arguments(compare, skip={"runs"})
    commands.add_subcommand("compare", comparison, help="compare runs in a table")
    fidelity = ArgumentParser(description="Approximate indexes against exact search.", exit_on_error=False)
    fidelity.add_argument("--run", type=Path, required=True, help="Run folder, finished.")
    fidelity.add_argument("--factories", nargs="+", type=str, default=FACTORIES, help="FAISS factory strings.")
    fidelity.add_function_arguments(index, skip={"run", "factories"})
    commands.add_subcommand("index", fidelity, help="compare approximate indexes with exact search")
    summary = ArgumentParser(description="Print what was read and how it is split.", exit_on_error=False)
    summary.add_class_arguments(RecDataModule)
    summary.add_argument("--tokenizer", default="smollm2-135m-instruct", help="The LLM whose tokens are counted.")
    summary.add_argument("--output", type=Path | None, default=None, help="Folder for the normalised Parquet files.")
    commands.add_subcommand("data", summary, help="print what was read and how it is split")
    augmentation = ArgumentParser(description="Let an LLM write views of the histories.", exit_on_error=False)
    augmentation.add_class_arguments(RecDataModule, "data")
    augmentation.add_argument("--dry-run", action="store_true", help="Print prompts and token counts, ask nothing.")
    augmentation.add_function_arguments(augment, skip={"data", "dry_run"})
    commands.add_subcommand("augment", augmentation, help="let an LLM write views of the histories")
    settings = parser.parse_args(arguments)
    chosen = settings[settings.subcommand]
    if settings.subcommand == "compare":
        compare(**chosen.as_dict())
    elif settings.subcommand == "index":
        index(**chosen.as_dict())
    elif settings.subcommand == "augment":
        augment(**augmentation.instantiate_classes(chosen).as_dict())
    else:
        chosen = summary.instantiate_classes(chosen)
        tokenizer, output = chosen.pop("tokenizer"), chosen.pop("output")
        data(RecDataModule(**chosen), tokenizer=tokenizer, output=output)


def _quiet() -> None:
    """Silence what tells a user nothing: Lightning's tips and the DataLoader's advice on workers."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Each new shape of a matrix product on a CPU is a compiled kernel of about 1 MB; by default 1,024 are kept.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's calls, not ours
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*smaller than the logging.*",
        ".*recommended to use .self.log.*sync_dist=True.*",  # ours are the same on all processes
        ".*callbacks used to create the checkpoint need to be provided.*",  # a test needs no cost ledger
    ):
        warnings.filterwarnings("ignore", message=message)


if __name__ == "__main__":
    main()
