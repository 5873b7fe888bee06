"""What options of models are refused with, by their names."""

from anyo_lightning.errors import InputError


def check_positive(**values: float | None) -> None:
    """Refuse options that are not above 0; None is not given.

    Args:
        values: By the options' names, without `model.`.

    Raises:
        InputError: Naming the first.
    """
    for name, value in values.items():
        if value is not None and not value > 0:
            raise InputError(f"Expected model.{name} to be positive, got {value}")


def check_weights(**values: float) -> None:
    """Refuse weights of terms of a loss below 0, which would turn a term round.

    Args:
        values: By the options' names, without `model.`.

    Raises:
        InputError: Naming the first.
    """
    for name, value in values.items():
        if not value >= 0:
            raise InputError(f"Expected model.{name} to be at least 0, got {value}")
