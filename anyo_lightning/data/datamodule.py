"""One DataModule for every variant: source, split, windows, batches."""

import copy
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from anyo_lightning.data.batches import HistoryBatch, HistoryDataset
from anyo_lightning.data.history_reader import HistoryReader, ReadsPrompts, ReadsTokens
from anyo_lightning.data.item_texts import TrainedTexts, title_texts
from anyo_lightning.data.loader import ResumableLoader
from anyo_lightning.data.sampler import TokenBudgetBatches
from anyo_lightning.data.sources import NAMES, Columns, Source, load_source, read_files
from anyo_lightning.data.splits import Queries, Split, make_split
from anyo_lightning.data.tokens import ItemTokenStore
from anyo_lightning.data.windows import Supervision, with_shuffled_ties
from anyo_lightning.errors import InputError
from anyo_lightning.internals import leave_sigterm_to_the_run


class RecDataModule(LightningDataModule):
    """Histories of a data set, in token-budget batches, for training, validation, test and prediction.

    Args:
        source: Named data set (`ml-100k`, `ml-1m`) or folder in a published form; not with `interactions`.
        interactions: The user's own file of interactions (CSV, TSV, Parquet, JSON; also .gz, .zip).
        items: The user's own catalogue file.
        columns: Names of the columns of these two files, or their positions; in Python also as a dictionary.
        titles_only: Read histories by the first field of the template alone, the title: fewer tokens.
        supervision: `all` trains every item boundary of a window in one pass, `last` one prefix per sample.
        max_items: Most items of a history that are read.
        overlap: Share of a training window that the next one reads again, as context: less is cheaper.
        shuffle_ties: In each epoch, put training items of one timestamp into another random order: an augmentation,
            since their true order is not known.
        random_cuts: Cut the windows of long histories elsewhere in each epoch: an augmentation.
        max_tokens: Most tokens of a history that are read, where items are read as text.
        max_item_tokens: Most tokens of one item's text, its separator included.
        group_by_length: Train on batches of rows of similar length, which pads little; otherwise on random rows, as
            many per batch as would fit if all were as long as the longest: the literature's batches of one size.
        batch_tokens: Most padded tokens of one optimiser step over all processes (items, where no text is read),
            prompts counted. More of them are fewer steps: with Adam, multiply learning rates by the square root of the
            factor (Malladi et al., arXiv 2205.10287), with SGD by the factor itself (Goyal et al., arXiv 1706.02677).
        micro_batch_tokens: Most padded tokens of a step that a process keeps activations of; what exceeds it is read
            in parts, all but one of which are computed again in the backward pass. This changes no gradient. `auto`
            finds the most that fits into memory before training starts; None keeps everything.
        evaluation_batch_tokens: Most padded tokens of a batch in validation, test and prediction.
        seed: Seed of batches, shuffled ties and cuts, and of what a module draws in each step; on the command line that
            of `seed_everything` where none is given.
        num_workers: Processes that assemble batches; 0 is fast enough for most.
        **split: Options of `make_split`.
    """

    def __init__(
        self,
        *,
        source: str = "ml-100k",
        interactions: Path | str | None = None,
        items: Path | str | None = None,
        columns: Columns = Columns(),  # noqa: B008 - frozen
        titles_only: bool = False,
        supervision: Supervision = "all",
        max_items: int = 100,
        overlap: float = 0.5,
        random_cuts: bool = False,
        shuffle_ties: bool = False,
        max_tokens: int = 1536,
        max_item_tokens: int = 48,
        group_by_length: bool = True,
        batch_tokens: int = 8192,
        micro_batch_tokens: int | Literal["auto"] | None = None,
        evaluation_batch_tokens: int = 16384,
        seed: int | None = None,
        num_workers: int = 0,
        **split: Any,
    ) -> None:
        super().__init__()
        sizes = {
            "max_items": max_items,
            "batch_tokens": batch_tokens,
            "evaluation_batch_tokens": evaluation_batch_tokens,
        }
        for name, size in sizes.items():
            if size < 1:
                raise InputError(f"Expected data.{name} to be positive, got {size}")
        if isinstance(micro_batch_tokens, int) and micro_batch_tokens < 1:
            raise InputError(f"Expected data.micro_batch_tokens to be positive, auto or null, got {micro_batch_tokens}")
        if not 0 <= overlap < 1:
            raise InputError(f"Expected data.overlap in [0, 1), got {overlap}")
        if max_item_tokens * 2 > max_tokens:
            raise InputError(
                f"Expected data.max_tokens to be at least {2 * max_item_tokens}, twice data.max_item_tokens, "
                f"got {max_tokens}"
            )
        self.source, self.columns = source, Columns.of(columns)
        self.interactions, self.items = (None if file is None else Path(file) for file in (interactions, items))
        inspect.signature(make_split).bind(None, **split)  # a name that it lacks is a TypeError here, not in `setup`
        self.split_options = split
        self.titles_only = titles_only
        self.supervision: Supervision = supervision
        self.max_items, self.max_tokens, self.max_item_tokens = max_items, max_tokens, max_item_tokens
        self.overlap, self.random_cuts, self.shuffle_ties = overlap, random_cuts, shuffle_ties
        self.group_by_length = group_by_length
        self.batch_tokens, self.evaluation_batch_tokens = batch_tokens, evaluation_batch_tokens
        self.micro_batch_tokens = micro_batch_tokens
        self.held_tokens = None if micro_batch_tokens == "auto" else micro_batch_tokens  # once found, what `auto` is
        self.seed = 0 if seed is None else seed
        self.num_workers = num_workers
        self.tokens: ItemTokenStore | None = None
        self.row_tokens = 0
        self.targets_per_batch: float | None = None  # with supervision last: the mean of an epoch, over all processes
        self._split: Split | None = None
        self._queries: dict[str, Queries] = {}
        self._text_of: np.ndarray | None = None
        self.trained_texts: TrainedTexts | None = None
        self._longest: int | None = None
        self._change: Callable[[HistoryDataset], HistoryDataset] | None = None

    @property
    def split(self) -> Split:
        """The split; there after `setup`."""
        assert self._split is not None, "setup has not run"
        return self._split

    def queries(self, stage: Literal["validation", "test"]) -> Queries:
        """The rows to rank in a stage."""
        if stage not in self._queries:
            self._queries[stage] = self.split.queries(stage)
        return self._queries[stage]

    def read(self) -> Source:
        """Read the data set, fetching it where it is a named one.

        Raises:
            InputError: When it cannot be found or read.
        """
        if self.interactions is not None:
            if self.source not in NAMES:
                raise InputError(f"Expected data.source or data.interactions, got both: {self.source}")
            return read_files(self.interactions, self.items, columns=self.columns)
        for name, value in {"items": self.items, **vars(self.columns)}.items():
            if value != getattr(Columns, name, None):
                name = name if name == "items" else f"columns.{name}"
                raise InputError(f"Expected data.interactions beside data.{name} {value}, got no file")
        return load_source(self.source)

    def prepare_data(self) -> None:
        """Fetch and read once, on one process, so that the others find the files."""
        if self._split is None:
            source = self.read()
            self._split = make_split(source, **self.split_options)
            self.template = self.split_options.get("template") or source.template
            titles = dict(zip(source.items["item_id"], title_texts(source.items, str(self.template)), strict=True))
            own = zip(self._split.item_ids, self._split.item_texts, strict=True)
            self.titles = [titles[item] or text for item, text in own]

    def setup(self, stage: str) -> None:
        """Read and split, on every process; under a Trainer, carry what its module reads."""
        self.prepare_data()
        if self.trainer is not None:
            self.read_for(self.trainer.lightning_module)

    def settings(self) -> dict[str, str]:
        """What decides how much of a history is read, and as what; for checkpoints."""
        read = ("titles_only", "max_tokens", "max_item_tokens", "template") if self.tokens is not None else ()
        return {name: str(getattr(self, name)) for name in ("supervision", "max_items", *read)}

    @property
    def texts_read(self) -> list[str]:
        """The catalogue's texts as histories read them: whole, or titles only."""
        return self.titles if self.titles_only else self.split.item_texts

    def read_for(self, module: object) -> None:
        """Let batches carry what a module reads: the tokens that its `item_tokens(data)` gives, where it has one.

        Under a Trainer, `setup` does this for the Trainer's own module.

        Args:
            module: A module as `ReadsTokens` describes it, or any other: then batches carry item ids alone.
        """
        self.tokens = module.item_tokens(self) if isinstance(module, ReadsTokens) else None
        self.row_tokens = module.row_tokens(self) if isinstance(module, ReadsPrompts) else 0
        if self.tokens is not None and self._text_of is not None:
            self.tokens = self.tokens.of_items(self._text_of)

    def largest_share(self) -> HistoryBatch:
        """Of this process's shares of an epoch's steps, the one with the most padded tokens."""
        return self.train_dataloader().largest_share()

    def view(
        self,
        *,
        text_of: np.ndarray | None = None,
        change: Callable[[HistoryDataset], HistoryDataset] | None = None,
        trained_texts: TrainedTexts | None = None,
    ) -> "RecDataModule":
        """The same data, of whose histories evaluation reads something else; ids, targets and what is masked stay.

        Args:
            text_of: (catalogue,) for each item, the item whose text is read instead.
            change: Makes the histories to read from those that there are.
            trained_texts: Those of the catalogue that a model was trained on, where this is another one.
        """
        view = copy.copy(self)
        view._text_of, view._change, view.trained_texts = text_of, change, trained_texts
        if text_of is not None:  # other texts may be longer: no row is, than the longest that was checked to fit
            view._longest = self.longest_history()
        return view

    def with_items(
        self, item_ids: Sequence[str], texts: Sequence[str], titles: Sequence[str], *, tokens: ItemTokenStore | None
    ) -> "RecDataModule":
        """The same data with further items behind the catalogue, which nobody has had, for histories that name them.

        Args:
            item_ids: Their ids, none of them in the catalogue.
            texts: Their texts.
            titles: The same by the first field of the template alone.
            tokens: Those that histories read of them, where histories are read as text.
        """
        more = copy.copy(self)
        split = self.split
        more._split = replace(
            split, item_ids=np.array([*split.item_ids, *item_ids], dtype=object), item_texts=[*split.item_texts, *texts]
        )
        more._queries, more.titles = {}, [*self.titles, *titles]
        if self.tokens is not None:
            assert tokens is not None, "Expected tokens of the further items, since histories are read as text"
            more.tokens = self.tokens.joined(tokens)
        return more

    @property
    def item_token_counts(self) -> np.ndarray | None:
        """(catalogue,) tokens of each item's text, where histories are read as text."""
        return self.tokens.lengths if self.tokens else None

    def train_dataloader(self) -> ResumableLoader:
        """Windows of the training sequences, each target supervised exactly once an epoch.

        With `random_cuts` and `shuffle_ties` they depend on the epoch: our command line reloads this loader in each.
        """
        epoch = self.trainer.current_epoch if self.trainer else 0
        random = np.random.default_rng([self.seed, epoch])
        split = with_shuffled_ties(self.split, random) if self.shuffle_ties else self.split
        cuts = random if self.random_cuts else None
        dataset = self.reader.training(split, supervision=self.supervision, overlap=self.overlap, random=cuts)
        if not len(dataset):
            raise InputError("Expected a user with at least 2 training interactions, got none")
        lengths = dataset.lengths if self.group_by_length else np.full_like(dataset.lengths, dataset.lengths.max())
        batches = TokenBudgetBatches(
            lengths, budget=self.batch_tokens, seed=self.seed, epoch=epoch, **self._processes()
        )
        if self.supervision == "last":
            self.targets_per_batch = len(dataset) / len(batches)
        return ResumableLoader(dataset, batches, consumed=self._consumed, **self._loading())

    def val_dataloader(self) -> DataLoader[HistoryBatch]:
        """The validation queries."""
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> DataLoader[HistoryBatch]:
        """The test queries; their histories include the validation items."""
        return self._evaluation_loader("test")

    def boundaries_dataloader(self) -> DataLoader[HistoryBatch]:
        """All training boundaries, once, in file order; windows overlap by half at least, none is cut anew."""
        overlap = max(self.overlap, 0.5)
        dataset = self.reader.training(self.split, supervision=self.supervision, overlap=overlap)
        batches = TokenBudgetBatches(dataset.lengths, budget=self.evaluation_batch_tokens, seed=None)
        return DataLoader(dataset, batch_size=None, sampler=batches, **self._loading())

    def predict_dataloader(self) -> DataLoader[HistoryBatch]:
        """The test queries."""
        return self._evaluation_loader("test")

    def collate(
        self,
        histories: Sequence[np.ndarray],
        *,
        hidden: Sequence[np.ndarray] | None = None,
        spans: Sequence[Sequence[np.ndarray]] | None = None,
    ) -> HistoryBatch:
        """Any histories as a batch that asks for each one's last state: the latest whole items that fit are read.

        Args:
            histories: Item ids of each history, oldest first, at least one.
            hidden: For each history, True at the items whose identity is hidden from the encoder.
            spans: For each history, the tokens that are read instead of each item's own, separator included.
        """
        return self.reader.collate(histories, hidden=hidden, spans=spans)

    def longest_history(self) -> int:
        """The most tokens (items, where no text is read) of a history that is read: what positions must hold."""
        return self.reader.longest(self.split)

    def _evaluation_loader(self, stage: Literal["validation", "test"]) -> DataLoader[HistoryBatch]:
        dataset = self.reader.evaluation(self.queries(stage))
        batches = TokenBudgetBatches(
            dataset.lengths, budget=self.evaluation_batch_tokens, seed=None, **self._processes()
        )
        if self._change is not None:
            dataset = self._change(dataset)
        # Each element is a whole batch already: the sampler yields lists of rows.
        return DataLoader(dataset, batch_size=None, sampler=batches, **self._loading())

    def _consumed(self) -> int:
        """The training batches of this epoch that the model has been trained on."""
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.current if self.trainer else None
        return progress.processed if progress else 0  # type: ignore[attr-defined]

    def _loading(self) -> dict[str, Any]:
        """Pinned memory for a GPU, which copies from it while it computes. Workers end with their epoch's loader."""
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        starts = partial(leave_sigterm_to_the_run, run=os.getpid())
        return {"num_workers": self.num_workers, "pin_memory": on_gpu, "worker_init_fn": starts}

    def _processes(self) -> dict[str, int]:
        trainer = self.trainer
        return {"rank": trainer.global_rank, "world_size": trainer.world_size} if trainer else {}

    @property
    def reader(self) -> HistoryReader:
        """How much of histories is read, and as what; after `setup` and, where they are read as text, `read_for`."""
        if self.tokens is None:
            ones = np.ones(self.split.catalogue_size, dtype=np.int64)
            return HistoryReader(ones, self.max_items, self.max_items, None, self.row_tokens)
        longest = min(self.max_tokens, self._longest or self.max_tokens)
        return HistoryReader(self.tokens.lengths, self.max_items, longest, self.tokens, self.row_tokens)
