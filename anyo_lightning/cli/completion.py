"""`anyo completion`: the script by which a shell completes commands and options, made by shtab from the parsers."""

from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

from lightning.pytorch.cli import LightningArgumentParser

from anyo_lightning.cli import commands
from anyo_lightning.cli.lightning import AnyoCLI, run_lightning
from anyo_lightning.cli.main import COMMANDS
from anyo_lightning.errors import InputError

Shell = Literal["bash", "zsh", "tcsh"]


class _AllCommands(LightningArgumentParser):
    """The stages' parser with the other commands beside the stages."""

    def add_subcommands(self, required: bool = True, dest: str = "subcommand", **options: Any) -> Any:
        found = super().add_subcommands(required=required, dest=dest, **options)
        for name in COMMANDS:
            found.add_subcommand(name, getattr(commands, f"{name}_parser")())
        return found


class _Completion(AnyoCLI):
    """A command line that prints its completion script instead of parsing."""

    def __init__(self, *, shell: Shell, **settings: Any) -> None:
        self.shell = shell
        super().__init__(**settings)

    def init_parser(self, **options: Any) -> LightningArgumentParser:
        return _AllCommands(**options)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        print(parser.get_completion_script(f"shtab-{self.shell}"))
        raise SystemExit


def print_completion(shell: Shell = "bash") -> None:
    """Print the completion script of `anyo`, for `source <(anyo completion bash)`.

    Args:
        shell: For which shell.

    Raises:
        InputError: shtab is not installed, or jsonargparse is older than it takes.
    """
    if find_spec("shtab") is None or not hasattr(LightningArgumentParser, "get_completion_script"):
        raise InputError("Expected shtab and jsonargparse 4.53 for completion, got neither or one: pip install both")
    run_lightning([], cli=partial(_Completion, shell=shell))
