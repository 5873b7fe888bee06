"""Lightning's Trainer with types that a command line can tell apart."""

from typing import Any

from lightning.pytorch import Trainer


class AnyoTrainer(Trainer):
    """Lightning's own: `1` is one batch and `1.0` all of them.

    Lightning writes `Optional[Union[int, float]]`, for which typing's cache gives `float` first when another library
    has asked for that order before; a union of types has no such cache.
    """

    def __init__(
        self,
        *,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        overfit_batches: int | float = 0.0,
        val_check_interval: int | float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            limit_test_batches=limit_test_batches,
            limit_predict_batches=limit_predict_batches,
            overfit_batches=overfit_batches,
            val_check_interval=val_check_interval,
            **options,
        )
