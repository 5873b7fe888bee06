"""`RetrievalMetrics`: builds the index and ranks the whole catalogue in every validation epoch and in the test.

The module gives one query vector per row and, when asked, the vectors of all items. Everything else is here: the index,
the history mask, ranks, figures. What is logged (`val/ndcg@10` …) is what ModelCheckpoint and EarlyStopping monitor;
the test also writes the run folder's metrics.json, predictions.parquet and catalogue.parquet.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from anyo_lightning import distributed
from anyo_lightning.data.splits import Queries, Split, Stage
from anyo_lightning.environment import environment
from anyo_lightning.errors import InputError
from anyo_lightning.evaluation import shown
from anyo_lightning.evaluation.evaluation import Evaluation
from anyo_lightning.evaluation.index import ItemIndex, check_factory, dense_for_index
from anyo_lightning.evaluation.metrics import EXTRA, Extra
from anyo_lightning.evaluation.ranking import block_rows, distinct_rows, excluded_items, rank
from anyo_lightning.evaluation.scores import check_finite, dense_rows
from anyo_lightning.evaluation.tested import training_cost, write_results
from anyo_lightning.runs import RunFolder


class EncodesCatalogue(Protocol):
    """What the callback needs of a LightningModule beside `validation_step` and `test_step`."""

    def encode_catalogue(self) -> Float[Tensor, "catalogue dim"]:
        """The vectors of all items, in the order of the catalogue; sparse (COO) where the queries are.

        Sparse queries are scored without an index, unless one is asked for that is not exact.
        """
        ...


class HasQueries(Protocol):
    """What the callback needs of a LightningDataModule beside its loaders; `RecDataModule` is one."""

    @property
    def split(self) -> Split:
        """Users, catalogue and training counts, as `make_split` gives them; there after `setup`."""
        ...

    def queries(self, stage: Stage) -> Queries:
        """The rows that are ranked in a stage, as `Split.queries` gives them."""
        ...


class RetrievalMetrics(Callback):
    """Logs full-ranking metrics of `validation_step` and `test_step`, which return `{"row": …, "query": …}`.

    `row` is the number of each row in the data module's `queries(stage)`, `query` its vector. Rows that a sampler
    repeats count once, and so does a target that a user has twice. Any LightningModule that is as `EncodesCatalogue`
    says, and any LightningDataModule that is as `HasQueries` says, will do.
    """

    def __init__(
        self,
        *,
        cutoffs: Sequence[int] = (5, 10, 20),
        mask_history: bool | None = None,
        index: str = "Flat",
        top_k: int = 20,
        extra: Sequence[Extra] = (),
        variant: str | None = None,
        folder: Path | None = None,
        weights_of: Path | None = None,
        seed: int | None = None,
    ) -> None:
        """Keep the settings.

        Args:
            cutoffs: The k of hr@k, recall@k, ndcg@k, mrr@k, coverage@k, gini@k and popularity@k.
            mask_history: Whether the items of the history are left out of ranks and lists; a target that is in the
                history stays, and would be a certain hit for whoever knows the history. None masks histories unless
                some validation or test target repeats an item of its own history.
            index: FAISS factory string, with search parameters after a colon (`IVF64,Flat:nprobe=8`). Anything but
                `Flat` also logs its recall against exact search and what it costs in NDCG; ranks are exact in either
                case.
            top_k: Length of the lists in predictions.parquet, at least the largest cutoff.
            extra: Figures to add: `precision`, `map` (mean average precision), `novelty` (mean self-information of what
                is recommended, in bits), `ild` (intra-list diversity: mean cosine distance of a list's items by the
                model's vectors) and `serendipity` (targets found that the most popular items lack), each at every
                cutoff; `precision` and `map` in slices, too.
            variant: Name of the variant in metrics.json; by default what the run folder is called.
            folder: Run folder, where the test writes metrics.json, predictions.parquet and catalogue.parquet; None
                writes nothing. The command line gives it.
            weights_of: Run folder whose weights are tested, where that is not `folder`: its name and its training's
                costs are those of the results. The command line gives it.
            seed: Of the run, for metrics.json. The command line gives it.

        Raises:
            InputError: A cutoff or `top_k` is not positive, there is no cutoff, a name in `extra` is unknown, or FAISS
                cannot read `index`.
        """
        if not cutoffs or min(cutoffs) < 1:
            raise InputError(f"Expected cutoffs to be one or more positive integers, got {list(cutoffs)}")
        if top_k < 1:
            raise InputError(f"Expected top_k to be positive, got {top_k}")
        if unknown := [name for name in extra if name not in EXTRA]:
            raise InputError(f"Expected extra to be among {', '.join(EXTRA)}, got {unknown[0]!r}")
        check_factory(index)
        self.cutoffs = tuple(sorted(set(cutoffs)))
        self.mask_history = mask_history
        self.index = index
        self.extra = tuple(extra)
        self.top_k = max(top_k, *self.cutoffs)
        self.variant, self.folder, self.weights_of, self.seed = variant, folder, weights_of, seed
        self.collected: list[Evaluation] | None = None  # a probe's tests, instead of the run folder's results
        self._said = False
        self._rows: list[Tensor] = []
        self._queries: list[Tensor] = []
        self._started = 0.0
        self._environment: dict[str, Any] = {}
        self._trained_in: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be ranked; note the environment now: the checkout may change while this process trains.

        Raises:
            InputError: The module has no `encode_catalogue`, or the data module no `split` and `queries`.
        """
        if trainer.datamodule is None:  # type: ignore[attr-defined]
            raise InputError("Expected a data module for RetrievalMetrics, got loaders alone")
        for part, name in ((pl_module, "encode_catalogue"), (trainer.datamodule, "queries")):  # type: ignore[attr-defined]
            if not hasattr(part, name):
                raise InputError(f"Expected {type(part).__name__} to have {name} for RetrievalMetrics, found none")
        self._environment = environment()
        if stage == "fit":
            self._trained_in = self._environment
        split = trainer.datamodule.split  # type: ignore[attr-defined]
        self.history_masked = self.masks_history(split)
        if self.mask_history is None and not self.history_masked and not self._said and trainer.is_global_zero:
            self._said = True
            twice = sum(split.repeated_targets(of, at_once=True) for of in ("validation", "test"))
            hint = (
                f"; {twice:,} of them at one timestamp, as rows that are there twice: data.duplicates first keeps one"
            )
            print(
                f"Histories are not masked, since {split.repeated_targets('validation'):,} validation and "
                f"{split.repeated_targets('test'):,} test targets repeat an item of their own history: "
                f"metrics.mask_history true masks them all the same{hint if twice else ''}",
                file=sys.stderr,
            )

    def masks_history(self, split: Split) -> bool:
        """Whether the items of histories are left out on this split: as `mask_history` says, or by its rule."""
        if self.mask_history is not None:
            return self.mask_history
        return not (split.repeated_targets("validation") or split.repeated_targets("test"))

    def state_dict(self) -> dict[str, Any]:
        """The environment of the training, for tests elsewhere."""
        return {"trained_in": self._trained_in}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it over, unless training continues here."""
        self._trained_in = self._trained_in or state_dict["trained_in"]

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the queries of the epoch before."""
        self._start()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the batch's queries."""
        if not trainer.sanity_checking:
            self._collect(outputs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rank and log `val/…`."""
        if not trainer.sanity_checking and self._rows:
            self._evaluate(trainer, pl_module, "validation")

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget earlier queries."""
        self._start()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the batch's queries."""
        self._collect(outputs)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rank, log `test/…` and write the run folder's results."""
        if self._rows:
            self._evaluate(trainer, pl_module, "test")

    def _start(self) -> None:
        self._rows, self._queries = [], []
        self._started = time.perf_counter()

    def _collect(self, outputs: Any) -> None:
        self._rows.append(outputs["row"].detach().cpu())
        self._queries.append(outputs["query"].detach().float().cpu())

    def _evaluate(self, trainer: Trainer, module: LightningModule, stage: Stage) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        histories = time.perf_counter() - self._started
        evaluation, vectors, cost = self._rank(
            data.split, stage, data.queries(stage), cast(EncodesCatalogue, module), trainer.strategy.root_device
        )
        prefix = "val/" if stage == "validation" else "test/"
        figures = evaluation.means(prefix)
        seconds = time.perf_counter() - self._started
        in_bar = f"{prefix}ndcg@{10 if 10 in self.cutoffs else self.cutoffs[-1]}"
        for name, value in {**figures, f"{prefix}seconds": seconds}.items():
            module.log(name, value, prog_bar=name == in_bar)
        if self.collected is not None:
            self.collected.append(evaluation)
        elif trainer.is_global_zero:
            shown.log_recommendations(
                trainer.loggers, evaluation, tag=f"{prefix}recommendations", step=trainer.global_step
            )
            if stage == "test":
                cost |= {"history_encode_seconds": histories, "evaluation_seconds": seconds}
                if self.folder is not None:
                    self._write(trainer, module, evaluation, cost)
                shown.log_items(trainer.loggers, vectors, data.split.item_texts, data.split.training_counts())

    def _rank(
        self, split: Split, stage: Stage, queries: Queries, module: EncodesCatalogue, device: torch.device
    ) -> tuple[Evaluation, Tensor, dict[str, float]]:
        """Rank the collected rows, each (user, target) once; also all items' vectors, and what serving them costs."""
        all_rows, all_queries = (
            distributed.gather_rows(torch.cat(parts).to(device)).cpu() for parts in (self._rows, self._queries)
        )
        first = distinct_rows(all_rows.numpy(), queries.user, queries.target)
        rows, query_vectors = all_rows.numpy()[first], all_queries.index_select(0, torch.from_numpy(first))
        self._rows, self._queries = [], []
        started = time.perf_counter()
        vectors = module.encode_catalogue().detach().float()
        cost = {"catalogue_encode_seconds": time.perf_counter() - started}
        check_finite("item", vectors, split.item_ids)
        check_finite("query", query_vectors, split.user_ids[queries.user[rows]])
        target, history = queries.target[rows], queries.history if self.history_masked else None
        index = None
        if self.index != "Flat" or not query_vectors.is_sparse:
            index = ItemIndex(dense_for_index(vectors), factory=self.index)
        ranking = rank(rows, query_vectors, vectors, target, index=index, k=self.top_k, history=history, device=device)
        if index is not None:
            if index.exact and stage == "test":  # the lists came from the scores: how fast would it have been?
                few = slice(0, min(len(rows), block_rows(len(vectors))))
                excluded = None if history is None else excluded_items(rows[few], target[few], history)
                index.search(dense_rows(query_vectors, few), min(self.top_k, len(vectors)), excluded)
            cost |= {"index_build_seconds": index.build_seconds, "queries_per_second": index.queries_per_second}
        exact = index is None or index.exact
        evaluation = Evaluation(
            split, queries, rows, ranking, self.cutoffs, exact, self.extra, vectors, self.history_masked
        )
        return evaluation, vectors, cost

    def _write(
        self, trainer: Trainer, module: LightningModule, evaluation: Evaluation, serving: dict[str, float]
    ) -> None:
        assert self.folder is not None
        run, trained = RunFolder(self.folder), RunFolder(self.weights_of or self.folder)
        item_tokens = getattr(trainer.datamodule, "item_token_counts", None)  # type: ignore[attr-defined]
        training = training_cost(trained, elsewhere=self.weights_of is not None)
        cost: dict[str, Any] = {**getattr(module, "cost", dict)(), **training, **serving}
        name, transfer = self.variant or trained.variant, getattr(module, "transfer", None)
        written = write_results(
            run,
            evaluation,
            item_tokens,
            cost,
            variant=name if transfer is None else f"{name}, {transfer.name}",
            seed=self.seed,
            protocol={
                "history_masked": self.history_masked,
                "index": self.index,
                **({} if self.weights_of is None else {"weights": str(self.weights_of)}),
            },
            environment={"training": self._trained_in or self._environment, "testing": self._environment},
            lineage=getattr(module, "lineage", None),
        )
        if written is not None:
            shown.log_results(trainer.loggers, written, step=trainer.global_step)
