"""The small commands. Each parses the words after its name by its parser and calls what does the work."""

from pathlib import Path

from jsonargparse import ArgumentParser


def recommend(arguments: list[str]) -> None:
    """`anyo recommend`."""
    from anyo_lightning.cli.recommend_lists import recommend_lists

    recommend_lists(**recommend_parser().parse_args(arguments).as_dict())


def recommend_parser() -> ArgumentParser:
    """The options of `anyo recommend`."""
    from anyo_lightning.cli.recommend_lists import recommend_lists

    parser = _parser("recommend", "Top lists of finished runs, for users, typed titles, histories in a file, or items.")
    parser.add_argument(
        "--run",
        nargs="+",
        action="extend",
        type=Path,
        required=True,
        help="Run folders of finished runs; the lists of several are shown side by side.",
    )
    parser.add_argument("--user", nargs="+", type=str, help="Users of the run's data: their whole histories are read.")
    parser.add_function_arguments(recommend_lists, skip={"run", "user"})
    return parser


def export(arguments: list[str]) -> None:
    """`anyo export`."""
    from anyo_lightning.serving.export import export as export_run

    export_run(**export_parser().parse_args(arguments).as_dict())


def export_parser() -> ArgumentParser:
    """The options of `anyo export`."""
    from anyo_lightning.serving.export import export as export_run

    parser = _parser("export", "Write a finished run for transformers, peft, sentence-transformers, FAISS and numpy.")
    parser.add_argument("--run", type=Path, required=True, help="Run folder of a finished run.")
    parser.add_argument("--output", type=Path, required=True, help="Folder to write; one that exists is refused.")
    parser.add_function_arguments(export_run, skip={"run", "output"})
    return parser


def compare(arguments: list[str]) -> None:
    """`anyo compare`."""
    from anyo_lightning.compare.table import compare as compare_runs

    compare_runs(**compare_parser().parse_args(arguments).as_dict())


def compare_parser() -> ArgumentParser:
    """The options of `anyo compare`."""
    from anyo_lightning.compare.table import compare as compare_runs

    parser = _parser("compare", "Compare runs in a table.")
    parser.add_argument("runs", nargs="+", type=Path, help="Run folders, or folders of run folders.")
    parser.add_argument(
        "--foreign",
        action="append",
        metavar="NAME=FILE",
        help="Another system's top-k lists for the same split: CSV, Parquet, JSON lines or a TREC run; repeatable.",
    )
    parser.add_function_arguments(compare_runs, skip={"runs", "foreign"})
    return parser


def index(arguments: list[str]) -> None:
    """`anyo index`."""
    from anyo_lightning.cli.measure_indexes import measure_indexes

    measure_indexes(**index_parser().parse_args(arguments).as_dict())


def index_parser() -> ArgumentParser:
    """The options of `anyo index`."""
    from anyo_lightning.cli.measure_indexes import FACTORIES, measure_indexes

    parser = _parser("index", "Compare approximate indexes with exact search.")
    parser.add_argument("--run", type=Path, required=True, help="Run folder of a finished run.")
    parser.add_argument(
        "--factories",
        nargs="+",
        type=str,
        help=f"FAISS factory strings; by default {' '.join(FACTORIES)}, as far as there are items for their cells.",
    )
    parser.add_function_arguments(measure_indexes, skip={"run", "factories"})
    return parser


def data(arguments: list[str]) -> None:
    """`anyo data`."""
    from anyo_lightning.cli.describe_data import describe_data
    from anyo_lightning.data.datamodule import RecDataModule

    parser = data_parser()
    settings = parser.instantiate_classes(parser.parse_args(arguments))
    tokenizer, output = settings.pop("tokenizer"), settings.pop("output")
    describe_data(RecDataModule(**settings), tokenizer=tokenizer, output=output)


def data_parser() -> ArgumentParser:
    """The options of `anyo data`."""
    from anyo_lightning.data.datamodule import RecDataModule

    parser = _parser("data", "Print what was read and how it is split.")
    parser.add_class_arguments(RecDataModule)
    parser.add_argument("--tokenizer", default="smollm2-135m-instruct", help="The LLM whose tokens are counted.")
    parser.add_argument(
        "--output", type=Path | None, default=None, help="Folder for the split: CSV, Parquet, TREC qrels."
    )
    return parser


def augment(arguments: list[str]) -> None:
    """`anyo augment`."""
    from anyo_lightning.views.write import augment as write_views

    parser = augment_parser()
    write_views(**parser.instantiate_classes(parser.parse_args(arguments)).as_dict())


def augment_parser() -> ArgumentParser:
    """The options of `anyo augment`."""
    from anyo_lightning.data.datamodule import RecDataModule
    from anyo_lightning.views.write import augment as write_views

    parser = _parser("augment", "Let an LLM write views of the histories.")
    parser.add_class_arguments(RecDataModule, "data")
    parser.add_argument("--dry-run", action="store_true", help="Print prompts and token counts, ask nothing.")
    parser.add_function_arguments(write_views, skip={"data", "dry_run"})
    return parser


def serve(arguments: list[str]) -> None:
    """`anyo serve`."""
    from anyo_lightning.cli.serve_runs import serve_runs

    serve_runs(**serve_parser().parse_args(arguments).as_dict())


def serve_parser() -> ArgumentParser:
    """The options of `anyo serve`."""
    from anyo_lightning.cli.serve_runs import serve_runs

    parser = _parser("serve", "Answer requests for recommendations, and show a page for them.")
    parser.add_argument(
        "--run", nargs="+", action="extend", type=Path, required=True, help="Run folders of finished runs."
    )
    parser.add_function_arguments(serve_runs, skip={"run"})
    return parser


def sweep(arguments: list[str]) -> None:
    """`anyo sweep`, whose words after `--` are those of `anyo fit`."""
    from anyo_lightning.cli.sweep import sweep as search

    cut = arguments.index("--") if "--" in arguments else len(arguments)
    search(**sweep_parser().parse_args(arguments[:cut]).as_dict(), options=arguments[cut + 1 :])


def sweep_parser() -> ArgumentParser:
    """The options of `anyo sweep` before its `--`."""
    from anyo_lightning.cli.sweep import sweep as search

    parser = _parser("sweep", "Search a variant's settings; further options of anyo fit follow after --.")
    parser.add_argument("config", type=Path, help="The variant's configuration.")
    parser.add_argument("--space", type=Path, required=True, help="Yaml file: choices or limits for each option.")
    parser.add_argument("--run", type=Path, required=True, help="Folder of the sweep.")
    parser.add_function_arguments(search, skip={"config", "space", "run", "options"})
    return parser


def completion(arguments: list[str]) -> None:
    """`anyo completion`."""
    from anyo_lightning.cli.completion import print_completion

    print_completion(**completion_parser().parse_args(arguments).as_dict())


def completion_parser() -> ArgumentParser:
    """The options of `anyo completion`."""
    parser = _parser("completion", "Print a shell's completion of commands and options: source <(anyo completion).")
    parser.add_argument("shell", nargs="?", choices=["bash", "zsh", "tcsh"], default="bash", help="For which shell.")
    return parser


def _parser(name: str, description: str) -> ArgumentParser:
    return ArgumentParser(prog=f"anyo {name}", description=description, exit_on_error=False)
