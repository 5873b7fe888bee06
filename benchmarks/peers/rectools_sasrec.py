"""RecTools' SASRec on our split: its own model, loss (softmax over all items), optimiser and loaders.

RecTools trains on the last `length` + 1 items of each user. Its validation loss is of the last item; the epoch is
chosen by NDCG@10 of it here, as for our runs, through a callback as its guide to advanced training has one.
"""

import tempfile
from typing import Any

import pandas as pd
import torch
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel
from rectools.models.nn.transformers.utils import leave_one_out_mask
from split import LENGTH, parser, read_split, write_lists


class ValidationNDCG(Callback):
    """NDCG@10 of the validation items among all, without those that were read; index 0 is padding."""

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the epoch before."""
        self.values: list[torch.Tensor] = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Rank a batch."""
        target = outputs["logits"].gather(1, batch["y"])
        scores = outputs["logits"].scatter(1, batch["x"], -torch.inf)
        scores[:, 0] = -torch.inf
        rank = 1 + (scores > target).sum(1)
        self.values.append(torch.where(rank <= 10, 1 / torch.log2(1 + rank), 0.0))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the mean."""
        mean = torch.cat(self.values).mean()
        pl_module.log("val_ndcg", mean)
        print(f"epoch {trainer.current_epoch}: validation NDCG@10 {mean:.4f}", flush=True)


def main() -> None:
    """Train, take the best epoch, write lists."""
    options = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    seed_everything(options.seed)
    split = read_split(options.split)
    interactions = split.known.rename(columns={"user_id": Columns.User, "item_id": Columns.Item})
    interactions[Columns.Weight] = 1
    interactions[Columns.Datetime] = pd.to_datetime(interactions["position"], unit="s")
    dataset = Dataset.construct(interactions[Columns.Interactions])
    with tempfile.TemporaryDirectory() as folder:

        def trainer() -> Trainer:
            best = ModelCheckpoint(folder, monitor="val_ndcg", mode="max", save_weights_only=True)
            stopping = EarlyStopping("val_ndcg", mode="max", patience=options.patience)
            return Trainer(
                max_epochs=options.epochs,
                check_val_every_n_epoch=options.every,
                callbacks=[ValidationNDCG(), best, stopping],
                accelerator="cpu",
                logger=False,
                num_sanity_val_steps=0,
                enable_progress_bar=False,
                enable_model_summary=False,
            )

        model = SASRecModel(
            n_blocks=2,
            n_heads=options.heads,
            n_factors=options.width,
            dropout_rate=0.2,
            session_max_len=options.length,
            loss="softmax",
            lr=1e-3,
            batch_size=64,
            get_val_mask_func=leave_one_out_mask,
            get_trainer_func=trainer,
        )
        model.fit(dataset)
        best = model.fit_trainer.checkpoint_callback
        print(f"best: {best.best_model_score:.4f} ({best.best_model_path.rpartition('/')[2]})")
        model.load_weights_from_checkpoint(best.best_model_path)
    lists = model.recommend(users=split.test_users, dataset=dataset, k=LENGTH, filter_viewed=True)
    write_lists(
        lists.rename(columns={Columns.User: "user_id", Columns.Item: "item_id", Columns.Score: "score"}), options.lists
    )


if __name__ == "__main__":
    main()
