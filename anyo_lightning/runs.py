"""What a run folder holds, and the one reader and writer of it.

    config.yaml          the whole configuration, as LightningCLI read it
    changes.csv          what was changed when the run was resumed, and at which step
    curves.csv           step, targets, tokens, seconds and every logged metric
    checkpoints/         best.ckpt, last.ckpt
    metrics.json         figures with intervals, split, protocol, cost, environment: a run with it is finished
    predictions.parquet  rank, list and history of every test row
    catalogue.parquet    item ids and texts
    probes.json          figures under probes, where `anyo test --probe` was asked for them
    queries.parquet      the query vector of every test row, where `anyo predict` was asked for them
    teacher.safetensors  lists at all training boundaries and item vectors, where `anyo predict --teach` was asked
    index_fidelity.html  approximate indexes against exact search, where `anyo index` was asked for them

Files are written under a temporary name and renamed, so that a reader never sees half of one.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import yaml
from filelock import FileLock, Timeout

from anyo_lightning.disk import renamed_to, write_json
from anyo_lightning.errors import InputError

METRICS_KEYS = ("variant", "seed", "split", "protocol", "metrics", "slices", "cost", "environment")
RUN_OPTIONS = ("init_from", "item_vectors_from", "distil_from", "teacher", "runs")  # of models: folders of other runs
LINEAGE = "lineage"  # a further key of metrics.json and of checkpoints: of the runs that were read, by these options
PROBES_KEYS = ("split", "seed", "users", "reads_titles", "figures", "memory")
VERSION = re.compile(r"version_(\d+)")


class RunFolder:
    """One run on disk; building this object touches nothing."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.made: list[Path] = []  # the folders that were made for it, the innermost first
        self.config_file = self.path / "config.yaml"
        self.changes_file = self.path / "changes.csv"
        self.curves_file = self.path / "curves.csv"
        self.metrics_file = self.path / "metrics.json"
        self.predictions_file = self.path / "predictions.parquet"
        self.catalogue_file = self.path / "catalogue.parquet"
        self.probes_file = self.path / "probes.json"
        self.queries_file = self.path / "queries.parquet"
        self.teacher_file = self.path / "teacher.safetensors"
        self.index_page_file = self.path / "index_fidelity.html"
        self.logger_ids_file = self.path / "loggers.json"
        self.checkpoints = self.path / "checkpoints"
        self.best_checkpoint = self.checkpoints / "best.ckpt"
        self.last_checkpoint = self.checkpoints / "last.ckpt"

    @classmethod
    def new(cls, root: str | Path, name: str) -> "RunFolder":
        """The next free `root/name/version_<n>`, made at once so that a second process gets another one."""
        parent = Path(root) / name
        version = 1 + max((cls(child).version for child in parent.glob("version_*")), default=-1)
        while True:
            folder = cls(parent / f"version_{version}")
            folder.made = _missing(folder.path)
            try:
                folder.path.mkdir(parents=True)
            except FileExistsError:
                version += 1
            else:
                return folder

    def remove(self) -> None:
        """Delete the folder with all that is in it, and those above it that were made for it and are empty."""
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):
            for parent in self.made[1:]:
                parent.rmdir()

    @contextlib.contextmanager
    def claimed(self, option: str = "--run") -> Iterator[bool]:
        """Hold the folder, so that no second process writes there; the system frees it in any case.

        Args:
            option: What has named it, for the sentences.

        Yields:
            Whether it was made now.

        Raises:
            InputError: When another run is writing there.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"Expected {option} to name a folder, got the file {self.path}")
        self.made = self.made or _missing(self.path)
        try:
            self.path.mkdir(parents=True)
            made = True
        except FileExistsError:
            made = False
        except OSError as error:
            raise InputError(f"Expected {option} to name a folder that can be made, got {self.path}: {error}") from None
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise InputError(f"Run folder {self.path} is in use by another run; choose another {option}") from None
        try:
            yield made
        finally:
            lock.release()

    @property
    def finished(self) -> bool:
        """Whether the run has been tested."""
        return self.metrics_file.is_file()

    @property
    def variant_folder(self) -> Path:
        """The folder that holds the versions: `runs/sasrec` for `runs/sasrec/version_3`, otherwise the run's own."""
        path = self.path.resolve()
        return path.parent if VERSION.fullmatch(path.name) else path

    @property
    def variant(self) -> str:
        """What the folder calls the variant: `sasrec` for `runs/sasrec/version_3`, otherwise the folder's own name."""
        return self.variant_folder.name

    @property
    def version(self) -> int:
        """The n of `version_<n>`, 0 where the folder is named otherwise."""
        match = VERSION.fullmatch(self.path.resolve().name)
        return int(match[1]) if match else 0

    def read_config(self) -> dict[str, Any]:
        """The content of config.yaml.

        Raises:
            InputError: There is none, or it cannot be read as one.
        """
        try:
            config = yaml.safe_load(self.config_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"Expected a run folder, got {self.path}, which has no config.yaml") from None
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise InputError(f"Expected {self.config_file} to be YAML, got: {' '.join(str(error).split())}") from None
        if not isinstance(config, dict):
            raise InputError(f"Expected {self.config_file} to describe a run, got no configuration in it")
        return config

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Write metrics.json; its keys are `METRICS_KEYS`, and `LINEAGE` where other runs were read."""
        assert tuple(name for name in metrics if name != LINEAGE) == METRICS_KEYS, (
            f"Expected the keys {METRICS_KEYS}, got {tuple(metrics)}"
        )
        with renamed_to(self.metrics_file) as temporary:
            write_json(temporary, metrics)

    def read_metrics(self) -> dict[str, Any]:
        """The content of metrics.json.

        Raises:
            InputError: There is none, or it cannot be read as one.
        """
        try:
            metrics = json.loads(self.metrics_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"Expected {self.path} to be a tested run with a metrics.json, found none") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"Expected {self.metrics_file} to be JSON, got: {error}") from None
        missing = [key for key in METRICS_KEYS if not isinstance(metrics, dict) or key not in metrics]
        if missing:
            raise InputError(f"Expected {self.metrics_file} to have {', '.join(missing)}; found it without")
        return dict(metrics)

    def write_probes(self, probes: dict[str, Any]) -> None:
        """Write probes.json; its keys are `PROBES_KEYS`."""
        assert tuple(probes) == PROBES_KEYS, f"Expected the keys {PROBES_KEYS}, got {tuple(probes)}"
        with renamed_to(self.probes_file) as temporary:
            write_json(temporary, probes)

    def read_probes(self) -> dict[str, Any] | None:
        """The content of probes.json; None where the run has not been probed.

        Raises:
            InputError: It cannot be read as one.
        """
        if not self.probes_file.is_file():
            return None
        try:
            probes = json.loads(self.probes_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"Expected {self.probes_file} to be JSON, got: {error}") from None
        if not isinstance(probes, dict) or not set(PROBES_KEYS) <= set(probes):
            raise InputError(f"Expected {self.probes_file} to have {', '.join(PROBES_KEYS)}; found it without")
        return probes

    def write_predictions(self, predictions: pl.DataFrame) -> None:
        """Write predictions.parquet: one line per (user, target)."""
        with renamed_to(self.predictions_file) as temporary:
            predictions.write_parquet(temporary)

    def read_predictions(self, columns: Sequence[str] | None = None, *, optional: Sequence[str] = ()) -> pl.DataFrame:
        """The content of predictions.parquet, or some of its columns.

        Args:
            columns: Those to read; None reads all.
            optional: Those to read where they are there: runs of an earlier version have fewer.

        Raises:
            InputError: There is none, or it cannot be read as one.
        """
        return _read_parquet(self.predictions_file, columns, optional)

    def write_catalogue(self, catalogue: pl.DataFrame) -> None:
        """Write catalogue.parquet: `item_id` and `text`, in the order of the item indices."""
        with renamed_to(self.catalogue_file) as temporary:
            catalogue.write_parquet(temporary)

    def write_curves(self, curves: pl.DataFrame) -> None:
        """Write curves.csv: one line for each time that something was logged."""
        with renamed_to(self.curves_file) as temporary:
            curves.write_csv(temporary)

    def read_curves(self) -> pl.DataFrame | None:
        """The content of curves.csv; None where nothing was trained.

        Raises:
            InputError: It cannot be read as one.
        """
        if not self.curves_file.is_file():
            return None
        try:
            return pl.read_csv(self.curves_file, infer_schema_length=None, glob=False)
        except pl.exceptions.PolarsError as error:
            raise InputError(
                f"Expected {self.curves_file} to be a CSV file of ours, got: {_first_line(error)}"
            ) from None

    def add_changes(self, changes: Sequence[tuple[int, str, Any, Any]]) -> None:
        """Add to changes.csv: the step at which an option changed, its name, and its value before and after."""
        if not changes:
            return
        names = ("step", "option", "before", "after")
        rows = pl.DataFrame(
            [tuple(map(str, row)) for row in changes], schema=dict.fromkeys(names, pl.String), orient="row"
        )
        if self.changes_file.is_file():
            rows = pl.concat([pl.read_csv(self.changes_file, infer_schema=False, glob=False), rows])
        with renamed_to(self.changes_file) as temporary:
            rows.write_csv(temporary)

    def write_logger_ids(self, ids: dict[str, str]) -> None:
        """Write loggers.json: by which id each logger's server knows the run."""
        with renamed_to(self.logger_ids_file) as temporary:
            write_json(temporary, ids)

    def read_logger_ids(self) -> dict[str, str]:
        """Read loggers.json; nothing where it is not there.

        Raises:
            InputError: It is not JSON.
        """
        if not self.logger_ids_file.is_file():
            return {}
        try:
            return dict(json.loads(self.logger_ids_file.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise InputError(f"Expected {self.logger_ids_file} to be JSON of ours, got: {error}") from None

    def queries_rows(self) -> int:
        """Rows of queries.parquet; 0 where there is none."""
        return len(_read_parquet(self.queries_file, ["user_id"])) if self.queries_file.is_file() else 0

    def write_queries(self, queries: pl.DataFrame) -> None:
        """Write queries.parquet: `user_id` and `query`, one line per test row."""
        with renamed_to(self.queries_file) as temporary:
            queries.write_parquet(temporary)

    def read_catalogue(self) -> pl.DataFrame:
        """The content of catalogue.parquet.

        Raises:
            InputError: There is none, or it cannot be read as one.
        """
        return _read_parquet(self.catalogue_file)


def named_places(option: str, value: Any) -> dict[str, Any]:
    """What one of `RUN_OPTIONS` names, by the option; of a list each by its number before it, as in `0.runs`."""
    return (
        {f"{number}.{option}": place for number, place in enumerate(value)}
        if isinstance(value, list)
        else {option: value}
    )


def named_run(place: str | Path) -> RunFolder:
    """The run that an option names by its folder, or by the file in it that is read (`Student.teacher`)."""
    path = Path(place)
    return RunFolder(path.parent if path.suffix == ".safetensors" else path)


def _missing(path: Path) -> list[Path]:
    """The folders that will be made for one, the innermost first."""
    return [folder for folder in (path, *path.parents) if not folder.exists()]


def _read_parquet(path: Path, columns: Sequence[str] | None = None, optional: Sequence[str] = ()) -> pl.DataFrame:
    try:
        table = pl.scan_parquet(path, glob=False)
        if columns is not None:
            there = table.collect_schema().names()
            table = table.select(*columns, *(name for name in optional if name in there))
        return table.collect()
    except FileNotFoundError:
        raise InputError(f"Expected a tested run with {path}, found no such file") from None
    except pl.exceptions.PolarsError as error:
        raise InputError(f"Expected {path} to be a Parquet file of ours, got: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
