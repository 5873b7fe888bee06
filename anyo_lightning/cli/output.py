"""`anyo test --run RUN --output FOLDER`: a run's weights tested otherwise, as results in a folder of their own."""

from pathlib import Path

from jsonargparse import Namespace

from anyo_lightning import checkpoint_io
from anyo_lightning.data.splits import Split
from anyo_lightning.errors import InputError
from anyo_lightning.runs import RunFolder


def output_folder(config: Namespace, *, stage: str, probing: bool) -> RunFolder | None:
    """The folder that `--output` names; None without it, where results are the run's.

    Args:
        config: The stage's configuration.
        stage: `fit`, `validate`, `test` or `predict`.
        probing: Whether probes are asked for.

    Raises:
        InputError: The option is given elsewhere than with a test of a run's own checkpoint, or the folder has a run
            or results in it.
    """
    if config.output is None:
        return None
    if stage != "test" or probing:
        raise InputError(f"Expected --output with test and without --probe, got it with {stage}")
    if config.run is None:
        raise InputError("Expected --run beside --output, the run whose weights are tested, got none")
    run, output = RunFolder(config.run), RunFolder(config.output)
    if not (run.best_checkpoint.is_file() or run.finished):
        raise InputError(f"Expected --run with a checkpoint or results, got {run.path} without")
    if output.finished or output.curves_file.exists() or output.checkpoints.exists():
        raise InputError(f"Expected --output to name a folder without a run or results in it, got {output.path}")
    named = config.get("ckpt_path")
    if named not in (None, "best", "last") and Path(named).resolve().parent != run.checkpoints.resolve():
        raise InputError(f"Expected --ckpt_path in {run.checkpoints} with --output, got {named}")
    return output


def check_counted(run: RunFolder, split: Split, *, with_texts: bool = False) -> None:
    """Refuse to count a floor on other data under the name of a run that was counted on its own.

    Args:
        run: The floor's run folder.
        split: The split of the data at hand.
        with_texts: Whether it is an ensemble, of runs that read their own texts whatever these are.

    Raises:
        InputError: It is another one, or with other texts.
    """
    checkpoint_io.check_counted(run, split)
    if with_texts and run.read_catalogue()["text"].to_list() != list(split.item_texts):
        raise InputError(
            f"Expected the texts of {run.path}, whose runs read their own, got others: test these runs with --output, "
            "then fit an ensemble"
        )


def check_no_output(folder: Path | None) -> None:
    """Refuse to train where another run's weights have been tested.

    Args:
        folder: What `--run` names.

    Raises:
        InputError: It has such results.
    """
    if folder is None or not (run := RunFolder(folder)).finished or run.best_checkpoint.is_file():
        return
    weights = run.read_metrics()["protocol"].get("weights")
    if weights is not None:
        raise InputError(f"Expected --run with a folder to train in, got {run.path}, which has a test of {weights}")
