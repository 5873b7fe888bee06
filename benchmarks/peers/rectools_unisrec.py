"""RecTools' UniSRec on our split: frozen text vectors, its PCA adaptor, its transformer, softmax over all items.

Its `fit` takes no validation data (`patience` watches the training loss), so that the number of epochs is the best on
validation of a quarter, half and all of `epochs`, each trained from the start.
"""

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import seed_everything
from rectools.fast_transformers import UniSRecModel
from split import LENGTH, Split, parser, read_split, write_lists


def recommend(model: UniSRecModel, known: pd.DataFrame, users: list[int]) -> pd.DataFrame:
    """The first `LENGTH` items that are not in a user's history."""
    histories = known[known["user_id"].isin(users)].groupby("user_id", sort=False)["item_id"].agg(list)
    most = min(LENGTH + int(histories.map(len).max()), len(model.item_id_mapping))
    tables = []
    for start in range(0, len(histories), 256):
        rows = histories.iloc[start : start + 256]
        read = torch.zeros(len(rows), model.session_max_len, dtype=torch.long)
        for row, items in enumerate(rows):
            numbers = model.map_item_ids(torch.tensor(items))
            numbers = numbers[numbers > 0][-model.session_max_len :]
            read[row, model.session_max_len - len(numbers) :] = numbers
        scores, found = model.predict_topk(read, most)
        for user, seen, item, score in zip(rows.index, rows, found.numpy(), scores.numpy(), strict=True):
            kept = ~np.isin(item, seen)
            tables.append(
                pd.DataFrame({"user_id": user, "item_id": item[kept][:LENGTH], "score": score[kept][:LENGTH]})
            )
    return pd.concat(tables)


def validation_ndcg(model: UniSRecModel, split: Split) -> float:
    """NDCG@10 of the validation items after the training histories."""
    lists = recommend(model, split.train, split.validation["user_id"].tolist())
    lists["rank"] = lists.groupby("user_id").cumcount() + 1
    found = lists[lists["rank"] <= 10].merge(split.validation, on=["user_id", "item_id"])
    return float((1 / np.log2(1 + found["rank"])).sum() / len(split.validation))


def main() -> None:
    """Train for several numbers of epochs, take the best, write lists."""
    options = parser(__doc__)
    options.add_argument("--vectors", required=True, help="file of text_vectors.py")
    given = options.parse_args()
    torch.set_num_threads(1)
    split = read_split(given.split)
    vectors = torch.from_numpy(np.load(given.vectors))
    trained = [torch.tensor(split.train[name].to_numpy()) for name in ("user_id", "item_id", "position")]
    best, best_ndcg = None, -1.0
    for epochs in (given.epochs // 4, given.epochs // 2, given.epochs):
        seed_everything(given.seed)
        model = UniSRecModel(
            vectors,
            n_factors=given.width,
            n_blocks=2,
            n_heads=given.heads,
            session_max_len=given.length,
            dropout=0.2,
            ffn_type="linear_gelu",
            ffn_expansion=4,
            epochs=epochs,
            lr=1e-3,
            batch_size=64,
            device="cpu",
        )
        model.fit(*trained)
        ndcg = validation_ndcg(model, split)
        print(f"{epochs} epochs: validation NDCG@10 {ndcg:.4f}", flush=True)
        if ndcg > best_ndcg:
            best, best_ndcg = model, ndcg
    write_lists(recommend(best, split.known, split.test_users), given.lists)


if __name__ == "__main__":
    main()
