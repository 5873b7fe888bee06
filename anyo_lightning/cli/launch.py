"""How the processes of one run find each other's choices: the only place that reads a launcher's environment.

Lightning's own launcher, torchrun and SLURM start the same command several times and tell each process who it is by
environment variables; there is no other channel before the processes are connected. A run folder that the first
process has just made is therefore passed to those that it starts by a variable of ours, beside Lightning's.
"""

import os
from pathlib import Path

FOLDER_OF_LAUNCHER = "ANYO_RUN_FOLDER"


def rank() -> int:
    """The number of this process, as torchrun, SLURM or Lightning's own launcher say it; 0 is the first of all."""
    if "RANK" in os.environ:
        return int(os.environ["RANK"])
    if int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        return int(os.environ.get("SLURM_PROCID", 0))
    return int(os.environ.get("NODE_RANK", 0)) or int(os.environ.get("LOCAL_RANK", 0))


def started_by_launcher() -> bool:
    """Whether Lightning's launcher or torchrun has started this process."""
    return int(os.environ.get("LOCAL_RANK", 0)) > 0 or "TORCHELASTIC_RUN_ID" in os.environ


def several_tasks() -> bool:
    """Whether SLURM has started several processes."""
    return int(os.environ.get("SLURM_NTASKS", 1)) > 1


def pass_folder_on(folder: Path) -> None:
    """Tell the processes that this one will start which run folder it has made."""
    os.environ[FOLDER_OF_LAUNCHER] = str(folder)


def folder_of_starter() -> Path | None:
    """The run folder that the process which started this one has made, if it has."""
    folder = os.environ.get(FOLDER_OF_LAUNCHER)
    return Path(folder) if folder and started_by_launcher() else None
