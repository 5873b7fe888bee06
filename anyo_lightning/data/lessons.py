"""What a run teaches a `Student`: its list at every training boundary, and its item vectors, in one file.

A boundary is a place within a user's training sequence: what was read so far, and a training item that follows. No
target of validation or test, and no history that holds one, is read. `anyo predict --teach K` writes the file.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from anyo_lightning.data.splits import Split
from anyo_lightning.disk import renamed_to
from anyo_lightning.errors import InputError
from anyo_lightning.runs import RunFolder

COMMAND = "anyo predict --run TEACHER --teach 20"


@dataclass(frozen=True, eq=False)
class Lessons:
    """A teacher's lists and vectors.

    Attributes:
        items: For each of `training_boundaries`, the teacher's best items, best first; -1 where it has no more.
        scores: Their scores, -inf where there is no item.
        vectors: The vectors of all items.
    """

    items: Int[Tensor, "boundaries k"]
    scores: Float[Tensor, "boundaries k"]
    vectors: Float[Tensor, "catalogue dim"]


def training_boundaries(split: Split) -> Int64[np.ndarray, " boundaries"]:
    """The positions in `split.items` after which the same user has another training item, ascending."""
    user = split.user_of_interaction
    return np.flatnonzero((user[1:] == user[:-1]) & (split.stages[1:] == 0))


def write_lessons(file: Path, lessons: Lessons, *, split: Split) -> None:
    """Write them, with the fingerprint of their split."""
    with renamed_to(file) as temporary:
        save_file({n: t.contiguous() for n, t in vars(lessons).items()}, temporary, {"split": split.fingerprint})


def read_lessons(path: Path, *, split: Split) -> Lessons:
    """Read them, on the CPU.

    Args:
        path: Run folder of the teacher, or the file.
        split: The student's.

    Raises:
        InputError: There is no such file, it cannot be read, or it is of another split.
    """
    file = RunFolder(path).teacher_file if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"Expected model.teacher to be a run with what `{COMMAND}` writes, got no file {file}")
    try:
        with safe_open(file, "pt") as content:
            found = (content.metadata() or {}).get("split")
            if found != split.fingerprint:
                raise InputError(f"Expected {file} to be of a run on split {split.fingerprint}, got {found}")
            return Lessons(*(content.get_tensor(name) for name in ("items", "scores", "vectors")))
    except SafetensorError as error:
        raise InputError(f"Expected {file} to be what `{COMMAND}` writes, got: {error}") from error
