"""`RetrievalMetrics` in a real Trainer: an encoder whose ranks are known, checkpoints, early stopping, results."""

import math
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from anyo_lightning.data.splits import Queries, Split
from anyo_lightning.errors import InputError
from anyo_lightning.evaluation.callback import RetrievalMetrics
from anyo_lightning.evaluation.index import ItemIndex
from anyo_lightning.evaluation.ranking import block_rows, rank
from anyo_lightning.evaluation.slices import (
    GROUPS,
    HISTORY_BANDS,
    TOKEN_BANDS,
    WORD_BANDS,
    band,
    popularity_band,
    popularity_bounds,
    slice_masks,
)
from anyo_lightning.runs import METRICS_KEYS, RunFolder

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")
USERS, CATALOGUE = 6, 30


def make_split(histories: list[list[int]], validation: list[list[int]], test: list[list[int]], catalogue: int) -> Split:
    """A split with these items for each user and stage."""
    stages = [[0] * len(h) + [1] * len(v) + [2] * len(t) for h, v, t in zip(histories, validation, test, strict=True)]
    items = [h + v + t for h, v, t in zip(histories, validation, test, strict=True)]
    interactions = sum(map(len, items))
    return Split(
        name="known",
        strategy="leave_one_out",
        ties="file_order",
        user_ids=np.array([f"u{user}" for user in range(len(items))], dtype=object),
        item_ids=np.array([f"i{item}" for item in range(catalogue)], dtype=object),
        item_texts=[f"Item {item}" for item in range(catalogue)],
        offsets=np.cumsum([0, *map(len, items)]),
        items=np.array([item for of_user in items for item in of_user], dtype=np.int32),
        stages=np.array([stage for of_user in stages for stage in of_user], dtype=np.int8),
        tied=np.arange(interactions) % 3 == 0,
        timestamps=np.arange(interactions),
        fingerprint="0123456789abcdef",
    )


def leave_one_out() -> Split:
    """Six users with three training items each, item 20 + user for validation and 10 + user for the test."""
    histories = [[user, user + 1, user + 2] for user in range(USERS)]
    return make_split(histories, [[20 + u] for u in range(USERS)], [[10 + u] for u in range(USERS)], CATALOGUE)


class Rows(LightningDataModule):
    """Gives the numbers of the rows, in a given order."""

    def __init__(self, split: Split, *, batch: int = 4, order: list[int] | None = None) -> None:
        super().__init__()
        self.split, self.batch, self.order = split, batch, order

    def queries(self, stage: Literal["validation", "test"]) -> Queries:
        """The stage's rows."""
        return self.split.queries(stage)

    def rows(self, stage: Literal["validation", "test"]) -> DataLoader[Any]:
        """The loader of a stage."""
        return DataLoader(self.order or list(range(len(self.queries(stage)))), batch_size=self.batch)  # type: ignore[arg-type]

    def train_dataloader(self) -> DataLoader[Any]:
        """Two steps per epoch."""
        return DataLoader([0, 1])  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation rows."""
        return self.rows("validation")

    def test_dataloader(self) -> DataLoader[Any]:
        """Test rows."""
        return self.rows("test")


class Known(LightningModule):
    """Item vectors are one-hot, so that a query's entries are the scores; a target's rank is what `ranks` says.

    `ranks[epoch]` holds one rank per validation row; the test uses the ranks of the epoch whose weights are loaded.
    """

    def __init__(self, split: Split, ranks: list[list[int]]) -> None:
        super().__init__()
        self.split, self.ranks = split, ranks
        self.weight = nn.Parameter(torch.zeros(1))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.long))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """A loss that moves the one weight."""
        self.epoch.fill_(self.current_epoch)
        return (self.weight - 1).pow(2).sum()

    def scores(self, row: int, stage: Literal["validation", "test"]) -> Tensor:
        """The history on top (it must be masked), then as many other items as the rank says, then the target."""
        queries = self.split.queries(stage)
        target, history = int(queries.target[row]), set(queries.history(row).tolist()) - {int(queries.target[row])}
        others = [item for item in range(self.split.catalogue_size) if item != target and item not in history]
        before = self.ranks[int(self.epoch)][row] - 1
        order = [*sorted(history), *others[:before], target, *others[before:]]
        scores = torch.empty(self.split.catalogue_size)
        scores[order] = -torch.arange(len(order)).float()  # all scores are zero or below
        return scores

    def validation_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """Known queries."""
        return {"row": batch, "query": torch.stack([self.scores(int(row), "validation") for row in batch])}

    def test_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """Known queries."""
        return {"row": batch, "query": torch.stack([self.scores(int(row), "test") for row in batch])}

    def encode_catalogue(self) -> Tensor:
        """One-hot vectors."""
        return torch.eye(self.split.catalogue_size)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Anything that steps."""
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def cost(self) -> dict[str, int]:
        """As `RetrievalModule` gives it."""
        return {"trainable_parameters": 1}


class Table(Known):
    """Query and item vectors are random rows of tables."""

    def __init__(self, split: Split, dim: int = 24, rows: int = 700) -> None:
        super().__init__(split, [])
        generator = torch.Generator().manual_seed(3)
        self.query_table = torch.randn(rows, dim, generator=generator)
        self.item_table = torch.randn(split.catalogue_size, dim, generator=generator)

    def validation_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """Rows of the table."""
        return {"row": batch, "query": self.query_table[batch]}

    def test_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """Rows of the table."""
        return self.validation_step(batch, batch_idx)

    def encode_catalogue(self) -> Tensor:
        """The other table."""
        return self.item_table


def make_trainer(folder: Path, *callbacks: Any, epochs: int = 1, sanity: int = 0) -> Trainer:
    """A quiet Trainer on the CPU."""
    return Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        num_sanity_val_steps=sanity,
        callbacks=list(callbacks),
    )


def logged(
    split: Split, module: LightningModule, folder: Path, data: Rows | None = None, **settings: Any
) -> dict[str, float]:
    """What a validation logs, except its seconds."""
    trainer = make_trainer(folder, RetrievalMetrics(**settings))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (figures,) = trainer.validate(module, datamodule=data or Rows(split), verbose=False)
    assert figures.pop("val/seconds") > 0
    return dict(figures)


def test_known_ranks_give_known_figures(tmp_path: Path) -> None:
    """Ranks 1, 2, 5, 6, 10, 27 although the history scores highest and all scores are ≤ 0."""
    split = leave_one_out()
    figures = logged(split, Known(split, [[1, 2, 5, 6, 10, 27]]), tmp_path, cutoffs=[1, 5, 10])
    gains = [1 / math.log2(1 + rank) for rank in (1, 2, 5, 6, 10)]
    assert figures["val/hr@1"] == pytest.approx(1 / 6)
    assert figures["val/hr@5"] == figures["val/recall@5"] == pytest.approx(3 / 6)
    assert figures["val/ndcg@5"] == pytest.approx(sum(gains[:3]) / 6)
    assert figures["val/ndcg@10"] == pytest.approx(sum(gains) / 6)
    assert figures["val/mrr@10"] == pytest.approx((1 + 1 / 2 + 1 / 5 + 1 / 6 + 1 / 10) / 6)
    assert {f"val/{name}@10" for name in ("coverage", "gini", "popularity")} <= figures.keys()


def test_history_is_masked_only_on_request(tmp_path: Path) -> None:
    """Three history items score above every target: rank 1 becomes rank 4."""
    split = leave_one_out()
    figures = logged(split, Known(split, [[1] * USERS]), tmp_path, cutoffs=[3, 4], mask_history=False)
    assert figures["val/hr@3"] == 0
    assert figures["val/hr@4"] == 1


def test_a_target_in_the_history_is_not_masked(tmp_path: Path) -> None:
    """Users who come back to their first item can be hit; the rest of the history is masked where that is asked for."""
    split = make_split([[0, 1, 2]] * 4, [[0]] * 4, [[1]] * 4, CATALOGUE)
    figures = logged(split, Known(split, [[1, 2, 3, 4]]), tmp_path, cutoffs=[2], top_k=30, mask_history=True)
    assert figures["val/hr@2"] == 0.5


def test_callback_drives_model_checkpoint_and_early_stopping(tmp_path: Path) -> None:
    """Ranks are best in epoch 2 of 8: training stops after two worse ones, and the best weights are epoch 2's."""
    split = leave_one_out()
    ranks = [[9] * 6, [5] * 6, [1, 1, 1, 2, 2, 2], [3] * 6, [4] * 6, [1] * 6, [1] * 6, [1] * 6]
    module = Known(split, ranks)
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", "best", monitor="val/ndcg@10", mode="max")
    stopping = EarlyStopping("val/ndcg@10", mode="max", patience=2)
    trainer = make_trainer(tmp_path, RetrievalMetrics(), checkpoint, stopping, epochs=8, sanity=2)
    trainer.fit(module, datamodule=Rows(split))
    assert trainer.current_epoch == 5
    assert checkpoint.best_model_score is not None
    assert checkpoint.best_model_score.item() == pytest.approx((1 + 1 / math.log2(3)) / 2)
    assert torch.load(checkpoint.best_model_path)["state_dict"]["epoch"] == 2
    (figures,) = trainer.test(module, datamodule=Rows(split), ckpt_path="best", verbose=False)
    assert figures["test/mrr@10"] == pytest.approx(0.75)


def test_sanity_check_logs_nothing(tmp_path: Path) -> None:
    """The sanity check sees two batches of untrained queries; no figure may come of it."""
    split = leave_one_out()
    metrics = RetrievalMetrics()
    seen: list[int] = []
    metrics._evaluate = lambda *_: seen.append(len(metrics._rows))  # type: ignore[method-assign]
    make_trainer(tmp_path, metrics, epochs=1, sanity=2).fit(Known(split, [[1] * 6]), datamodule=Rows(split, batch=2))
    assert seen == [3]


def many_rows() -> Split:
    """700 users over 900 items: three blocks of rows."""
    generator = np.random.default_rng(0)
    histories = [generator.integers(900, size=generator.integers(1, 60)).tolist() for _ in range(700)]
    return make_split(histories, [[u] for u in range(700)], [[899 - u] for u in range(700)], 900)


@pytest.mark.parametrize("index", ["Flat", "HNSW8"])
def test_figures_do_not_depend_on_batches_their_order_or_repeats(tmp_path: Path, index: str) -> None:
    """Batches of 7, of 700 and shuffled rows with 23 repeats give bit-identical figures."""
    split = many_rows()
    shuffled = np.random.default_rng(1).permutation(700).tolist()
    variations = [
        Rows(split, batch=7),
        Rows(split, batch=700),
        Rows(split, batch=64, order=shuffled + shuffled[:23]),
    ]
    figures = [logged(split, Table(split), tmp_path, data, index=index) for data in variations]
    assert figures[0] == figures[1] == figures[2]


def test_an_approximate_index_logs_its_recall_and_cost_and_leaves_ranks_exact(tmp_path: Path) -> None:
    """One cell in eight is searched: recall is low, NDCG is lost, but hr and ndcg are those of the exact index."""
    split = many_rows()
    exact = logged(split, Table(split), tmp_path)
    rough = logged(split, Table(split), tmp_path, index="IVF8,Flat")
    assert 0.1 < rough.pop("val/index_recall@10") < 0.9
    assert rough.pop("val/index_ndcg_cost@10") > 0
    assert not any("index" in name for name in exact)
    for name in ("hr", "recall", "ndcg", "mrr"):
        assert rough[f"val/{name}@10"] == exact[f"val/{name}@10"]


def test_several_targets_of_a_user_count_by_user_and_repeated_targets_once(tmp_path: Path) -> None:
    """User 0 has targets at ranks 1 and 9 and the first one twice; user 1 one target at rank 9."""
    split = make_split([[0], [1]], [[20, 21, 20], [22]], [[23], [24]], CATALOGUE)
    figures = logged(split, Known(split, [[1, 9, 1, 9]]), tmp_path, cutoffs=[5])
    assert figures["val/recall@5"] == pytest.approx((1 / 2 + 0) / 2)
    assert figures["val/hr@5"] == pytest.approx(1 / 2)
    assert figures["val/ndcg@5"] == pytest.approx((1 / (1 + 1 / math.log2(3)) + 0) / 2)


def test_test_writes_the_run_folder(tmp_path: Path) -> None:
    """metrics.json, predictions and catalogue hold what was ranked, and the figures are those logged."""
    split = leave_one_out()
    run = RunFolder(tmp_path / "known" / "version_0")
    metrics = RetrievalMetrics(cutoffs=[5, 10], top_k=4, folder=run.path, seed=7)
    trainer = make_trainer(run.path, metrics)
    (figures,) = trainer.test(Known(split, [[1, 2, 5, 6, 10, 22]]), datamodule=Rows(split), verbose=False)
    content = run.read_metrics()
    assert tuple(content) == METRICS_KEYS
    assert (content["variant"], content["seed"]) == ("known", 7)
    assert content["split"]["fingerprint"] == split.fingerprint
    assert content["split"]["counts"]["users"] == USERS
    protocol = {"cutoffs": [5, 10], "history_masked": True, "index": "Flat", "rows": USERS, "repeated_targets": 0}
    assert content["protocol"] == protocol
    assert content["cost"]["trainable_parameters"] == 1
    assert content["cost"]["evaluation_seconds"] > 0
    for name, figure in content["metrics"].items():
        assert figure["value"] == pytest.approx(figures[name], rel=1e-6)
        assert figure["low"] is None or figure["low"] <= figure["value"] <= figure["high"]
    predictions = run.read_predictions()
    assert predictions["user_id"].to_list() == [f"u{user}" for user in range(USERS)]
    assert predictions["target_item_id"].to_list() == [f"i{10 + user}" for user in range(USERS)]
    assert predictions["rank"].to_list() == [1, 2, 5, 6, 10, 22]
    assert predictions["history_item_ids"][1].to_list() == ["i1", "i2", "i3", "i21"]
    assert predictions["history_length"].to_list() == [4] * USERS
    assert predictions["target_count"].to_list() == split.training_counts()[10:16].tolist()
    assert predictions["target_tokens"].null_count() == predictions["target_tokens_band"].null_count() == USERS
    bands = predictions.select("target_popularity", "history_band", "target_words_band")
    assert bands.unique().rows() == [("unseen", "1-20", "1-4")]
    for row, (items, scores) in enumerate(zip(predictions["top_item_ids"], predictions["top_scores"], strict=True)):
        assert len(items) == len(scores) == 10
        assert (f"i{10 + row}" in items) == (predictions["rank"][row] <= 10)
        assert not set(items) & set(predictions["history_item_ids"][row])
    assert run.read_catalogue()["text"].to_list() == split.item_texts
    unseen = content["slices"]["target popularity"]["unseen"]
    assert unseen["rows"] == unseen["users"] == USERS
    assert unseen["metrics"]["test/hr@5"]["value"] == 0.5


def test_nothing_is_written_where_no_folder_is_given(tmp_path: Path) -> None:
    """Figures are logged all the same."""
    split = leave_one_out()
    trainer = make_trainer(tmp_path, RetrievalMetrics())
    (figures,) = trainer.test(Known(split, [[1] * USERS]), datamodule=Rows(split), verbose=False)
    assert figures["test/hr@10"] == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["item", "query"])
def test_vectors_that_are_not_finite_are_refused(tmp_path: Path, what: str) -> None:
    """One NaN in a vector is named with its item or user, not ranked."""
    split = many_rows()
    module = Table(split)
    (module.item_table if what == "item" else module.query_table)[5, 0] = torch.nan
    name = "i5" if what == "item" else "u5"
    with pytest.raises(InputError, match=rf"Expected finite {what} vectors, got 1 of \d+ .*'{name}'"):
        logged(split, module, tmp_path)


@pytest.mark.parametrize("settings", [{"cutoffs": []}, {"cutoffs": [0, 5]}, {"top_k": 0}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    """No cutoff, a cutoff of zero, lists of no items."""
    with pytest.raises(InputError, match=r"Expected (cutoffs|top_k)"):
        RetrievalMetrics(**settings)


def test_blocks_hold_at_most_64_million_scores() -> None:
    """256 rows for small catalogues, fewer for large ones, never none."""
    assert block_rows(1349) == block_rows(2**18) == 256
    assert block_rows(2**20) == 64
    assert block_rows(2**30) == 1


def test_ranks_of_tied_vectors_are_in_the_middle() -> None:
    """All items alike: every rank is the middle of the items that compete."""
    vectors = torch.ones(11, 4)
    index = ItemIndex(vectors.numpy())
    history = np.array([0, 0, 1, 5])
    ranking = rank(
        np.arange(3),
        torch.ones(3, 4),
        vectors,
        np.array([2, 5, 9]),
        index=index,
        k=20,
        history=lambda row: history,
    )
    assert ranking.ranks.tolist() == [4.5, 5, 4.5]  # 8 compete, and 9 where the target is in the history
    assert (ranking.top_items >= 0).sum(axis=1).tolist() == [8, 9, 8]


def test_slices_part_the_rows() -> None:
    """Each group's masks hold each row once; the head is the fifth with most interactions, the tail half the items."""
    counts = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    assert popularity_bounds(counts) == (9, 5)
    rows = pl.DataFrame(
        {
            "target_popularity": popularity_band(np.arange(11), counts),
            "history_band": band(np.array([1, 20, 21, 50, 51, 100, 101, 200, 201, 500, 3]), HISTORY_BANDS),
            "target_tied": np.arange(11) < 4,
            "target_words_band": band(np.arange(11) + 1, WORD_BANDS),
            "target_tokens_band": band(np.arange(11) * 4, TOKEN_BANDS),
        }
    )
    masks = slice_masks(rows)
    assert list(masks) == list(GROUPS)
    for group in masks.values():
        assert (sum(mask.astype(int) for mask in group.values()) == 1).all()
    popularity = {name: np.flatnonzero(mask).tolist() for name, mask in masks["target popularity"].items()}
    assert popularity == {"head": [9, 10], "middle": [6, 7, 8], "tail": [1, 2, 3, 4, 5], "unseen": [0]}
    lengths = {name: int(mask.sum()) for name, mask in masks["history length"].items()}
    assert lengths == {"1-20": 3, "21-50": 2, "51-100": 2, "101-200": 2, "over 200": 2}
    assert list(masks["target words"]) == ["1-4", "5-8", "9-16"]
    assert list(masks["target tokens"]) == ["1-8", "9-16", "17-32", "over 32"]
    assert list(slice_masks(rows.drop("history_band"))) == [group for group in GROUPS if group != "history length"]
