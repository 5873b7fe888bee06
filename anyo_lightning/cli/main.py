"""The command line `anyo`: which command, and what is said of a mistake. The commands are in `cli/commands.py`."""

import importlib
import importlib.metadata
import logging
import os
import sys
import warnings
from argparse import ArgumentError  # jsonargparse's own errors, too
from typing import NoReturn

from anyo_lightning.errors import InputError, argument_sentence

STAGES = {  # LightningCLI's
    "fit": "train a variant, then test its best checkpoint",
    "validate": "validate a run's best checkpoint",
    "test": "test a run's best checkpoint and write its results",
    "predict": "write the query vectors of a run's test users",
}
COMMANDS = {
    "recommend": "print or write a run's top lists",
    "export": "write a run for transformers, sentence-transformers, FAISS and numpy",
    "compare": "compare runs in a table",
    "index": "compare approximate indexes with exact search",
    "data": "print what was read and how it is split",
    "augment": "let an LLM write views of the histories",
    "serve": "answer requests for recommendations, and show a page for them",
    "sweep": "search a variant's settings by Optuna",
    "completion": "print a shell's completion of commands and options",
}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a user's mistake ends it with one line and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        _print_help()
        return
    if arguments[0] == "--version":
        print(f"anyo-lightning {importlib.metadata.version('anyo-lightning')}")
        return
    _quiet()
    if (here := os.getcwd()) not in sys.path:  # for a yaml's `class_path: my_package.Mine`
        sys.path.append(here)
    command, *options = arguments
    try:
        # Imported here: what a command needs takes seconds, and `--help` needs none of it.
        if command in STAGES:
            importlib.import_module("anyo_lightning.cli.lightning").run_lightning(arguments)
        elif command in COMMANDS:
            getattr(importlib.import_module("anyo_lightning.cli.commands"), command)(options)
        else:
            raise InputError(f"Expected a command among {', '.join(STAGES | COMMANDS)}, got {command!r}")
    except InputError as error:
        _refuse(" ".join(str(error).split()))
    except ArgumentError as error:
        _refuse(argument_sentence(error))
    except OSError as error:
        _refuse(f"Expected files and folders that can be used, got: {error}")


def _refuse(sentence: str) -> NoReturn:
    print(f"anyo: error: {sentence}", file=sys.stderr)
    sys.exit(2)


def _print_help() -> None:
    print("usage: anyo COMMAND [options]\n\nLLMs as encoders, nearest-neighbour search as the recommender.\n")
    for name, meaning in (STAGES | COMMANDS).items():
        print(f"  {name:<12}{meaning}")
    print("\nOptions of a command: anyo COMMAND --help. Which version this is: anyo --version")


def _quiet() -> None:
    """Silence what tells a user nothing: Lightning's tips and the DataLoader's advice on workers."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Each new shape of a matrix product on a CPU is a compiled kernel of about 1 MB; by default 1,024 are kept.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's calls, not ours
    # Of the two modules that tell: Lightning sets the level of what is above them when it is imported.
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # misses a kernel that we do not use
    for message in (
        ".*does not have many workers.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*smaller than the logging.*",
        ".*recommended to use .self.log.*sync_dist=True.*",  # ours are the same on all processes
        ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run's
        ".*The dirpath has changed.*",  # of last.ckpt, which knows its folder
        ".*callbacks used to create the checkpoint need to be provided.*",  # a test needs no cost ledger
        ".*MLFlow only allows .* special characters.*",  # ndcg@10 is ndcg10 there
    ):
        warnings.filterwarnings("ignore", message=message)
