"""RePlay's SasRec on our split: its own model, loss (softmax over all items), optimiser, loaders and metrics.

RePlay reads one row of a Parquet file as one history. Training histories are cut into rows of `length` + 1 items, each
of which begins with the last item of the one before, so that each item but a user's first is a target once per epoch.
"""

import tempfile
from pathlib import Path

import lightning
import pandas as pd
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from replay.data import FeatureHint, FeatureSource, FeatureType
from replay.data.nn import ParquetModule, TensorFeatureInfo, TensorFeatureSource, TensorSchema
from replay.nn.lightning import LightningModule
from replay.nn.lightning.callback import ComputeMetricsCallback, PandasTopItemsCallback
from replay.nn.lightning.optimizer import OptimizerFactory
from replay.nn.lightning.postprocessor import SeenItemsFilter
from replay.nn.sequential import SasRec
from replay.nn.transform.template import make_default_sasrec_transforms
from split import LENGTH, Split, parser, read_split, write_lists


def write_rows(split: Split, length: int, folder: Path) -> tuple[pd.Index, int]:
    """Write train, validate and predict.parquet; items are numbers of those that occur in training.

    Returns:
        The items, and the length of the longest history.
    """
    items = pd.Index(sorted(split.train["item_id"].unique()))

    def histories(interactions: pd.DataFrame) -> pd.Series:
        numbers = interactions.assign(item=items.get_indexer(interactions["item_id"]))
        return numbers[numbers["item"] >= 0].groupby("user_id", sort=False)["item"].agg(list)

    train, known, targets = histories(split.train), histories(split.known), histories(split.validation)
    rows = [
        (user, history[start : start + length + 1])
        for user, history in train.items()
        for start in range(0, len(history) - 1, length)
    ]
    pd.DataFrame(rows, columns=["user_id", "item_id"]).to_parquet(folder / "train.parquet")
    validated = train[targets.index]
    for name, users, read in (("validate", validated, validated), ("predict", known, known)):
        table = pd.DataFrame({"user_id": users.index, "item_id": read.to_list(), "seen_ids": read.to_list()})
        if name == "validate":
            table["ground_truth"] = targets.to_list()
        table.to_parquet(folder / f"{name}.parquet")
    return items, int(known.map(len).max())


def main() -> None:
    """Train, take the best epoch, write lists."""
    options = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    lightning.seed_everything(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder, split = Path(temporary), read_split(options.split)
        items, longest = write_rows(split, options.length, folder)
        schema = TensorSchema(
            TensorFeatureInfo(
                "item_id",
                is_seq=True,
                feature_type=FeatureType.CATEGORICAL,
                embedding_dim=options.width,
                padding_value=len(items),
                cardinality=len(items),
                feature_hint=FeatureHint.ITEM_ID,
                feature_sources=[TensorFeatureSource(FeatureSource.INTERACTIONS, "item_id")],
            )
        )
        read = {"shape": options.length, "padding": len(items)}
        known = {"user_id": {}, "item_id": read, "seen_ids": {"shape": longest, "padding": -1}}
        data = ParquetModule(
            batch_size=64,
            metadata={
                "train": {"user_id": {}, "item_id": read | {"shape": options.length + 1}},
                "validate": known | {"ground_truth": {"shape": 1, "padding": -1}},
                "predict": known,
            },
            transforms=make_default_sasrec_transforms(schema),
            train_path=str(folder / "train.parquet"),
            validate_path=str(folder / "validate.parquet"),
            predict_path=str(folder / "predict.parquet"),
        )
        model = SasRec.from_params(
            schema,
            embedding_dim=options.width,
            num_heads=options.heads,
            num_blocks=2,
            max_sequence_length=options.length,
            dropout=0.2,
            hidden_dim=4 * options.width,
        )
        unseen = SeenItemsFilter(len(items))
        lists = PandasTopItemsCallback(LENGTH, "user_id", "item_id", "score", postprocessors=[unseen])
        best = ModelCheckpoint(folder, monitor="ndcg@10", mode="max")
        trainer = lightning.Trainer(
            max_epochs=options.epochs,
            check_val_every_n_epoch=options.every,
            callbacks=[
                ComputeMetricsCallback(["ndcg"], [10], postprocessors=[unseen]),
                best,
                EarlyStopping("ndcg@10", mode="max", patience=options.patience),
                lists,
            ],
            accelerator="cpu",
            logger=False,
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = LightningModule(model, optimizer_factory=OptimizerFactory(learning_rate=1e-3))
        trainer.fit(module, data)
        print(f"best: {best.best_model_score:.4f} ({Path(best.best_model_path).name})")
        module.load_state_dict(torch.load(best.best_model_path, weights_only=False)["state_dict"])
        trainer.predict(module, data, return_predictions=False)
    found = lists.get_result()
    found["item_id"] = items[found["item_id"].astype(int)]
    found = found[found["user_id"].isin(split.test_users) & (found["score"] > -torch.inf)]
    write_lists(found, options.lists)


if __name__ == "__main__":
    main()
