"""`EncodingModule`: how a module reads histories and items, in as many passes as memory and other processes want."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from anyo_lightning import distributed
from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.data.sampler import TokenBudgetBatches
from anyo_lightning.encoders.base import CountsHistoryTokens
from anyo_lightning.llm.evaluation_mode import evaluating
from anyo_lightning.models.built import BuiltModule
from anyo_lightning.models.parts import ONE_ITEM, states_in_parts

T = TypeVar("T")
CATALOGUE_BLOCK = 1024  # items that one process encodes at a time


class EncodingModule(BuiltModule):
    """States of histories and vectors of items, from a module's encoders.

    Args:
        encoders: How histories and items are encoded; None where the class makes its own in `make_encoders`.
        init_from: Run folder whose best weights this run starts from.
    """

    def forward(self, batch: HistoryBatch) -> Float[Tensor, "targets dim"]:
        """The states at the supervised boundaries of a batch; what is read with gradients is counted."""
        if self.training and torch.is_grad_enabled():
            encoder, tokens = self.history_encoder, batch.token_count
            if isinstance(encoder, CountsHistoryTokens):
                tokens = encoder.tokens_read(batch, self._cut(batch))
            self.seen.tokens += tokens
        return self.encode_batch(batch)

    @property
    def reads_in_loss(self) -> bool:
        """Whether the loss has encoders read more, so that no part of a batch may keep its activations until then."""
        return False

    def encode_batch(self, batch: HistoryBatch) -> Float[Tensor, "targets dim"]:
        """What `forward` does, without counting: in training, in parts of at most `data.held_tokens`."""
        held = self.data.held_tokens if self.training and torch.is_grad_enabled() else None
        if held is None and len(batch.user):
            states: Tensor = self.history_encoder(batch)
            return states
        return states_in_parts(self, batch, self._cut(batch) if len(batch.user) else [], whole=held is None)

    def _cut(self, batch: HistoryBatch) -> list[np.ndarray]:
        """The rows of each part in which a batch is read in training."""
        held = self.data.held_tokens
        if held is None:
            return [np.arange(len(batch.user))]
        return TokenBudgetBatches(batch.lengths, budget=held, seed=None).batches()

    def states_of_step(self, batch: HistoryBatch) -> Float[Tensor, "states ..."]:
        """What a step encodes of a batch before its loss: by this `data.micro_batch_tokens auto` measures memory."""
        return self.encode_batch(batch)

    def encode_histories(
        self,
        histories: Sequence[np.ndarray],
        *,
        hidden: Sequence[np.ndarray] | None = None,
        spans: Sequence[Sequence[np.ndarray]] | None = None,
    ) -> Float[Tensor, "histories dim"]:
        """The last state of any histories, float32; what contrastive terms compare.

        Args:
            histories: Item ids of each history, oldest first, at least one; the latest whole items that fit are read.
                There may be none.
            hidden: For each history, True at the items whose identity is hidden from the encoder.
            spans: For each history, the tokens that are read instead of each item's own, separator included.
        """
        if len(histories):
            batch = self.reading.collate(histories, hidden=hidden, spans=spans)
        else:
            batch = self.reading.collate(ONE_ITEM).of_rows(np.empty(0, dtype=np.int64))
        states: Tensor = self(batch.to(self.device))
        return states.float()

    def encode_in_batches(
        self, histories: Sequence[np.ndarray], *, budget: int, hidden: Sequence[np.ndarray] | None = None
    ) -> Float[Tensor, "histories dim"]:
        """`encode_histories` in batches of similar length, as many passes on all processes where an LLM is sharded.

        Args:
            histories: Item ids of each history, oldest first, at least one; there may be none.
            budget: Most padded tokens (items, where no text is read) of a batch, prompts counted.
            hidden: For each history, True at the items whose identity is hidden from the encoder.
        """
        tokens = self.reading.item_token_counts
        most = self.data.max_items if tokens is None else self.data.max_tokens
        lengths = [len(items) if tokens is None else int(tokens[items].sum()) for items in histories]
        rows = np.minimum(np.array(lengths, dtype=np.int64), most) + self.reading.row_tokens
        batches = TokenBudgetBatches(rows, budget=budget, seed=None).batches()
        parts = [
            ([histories[row] for row in batch], None if hidden is None else [hidden[row] for row in batch])
            for batch in batches
        ]
        passes = self.as_many_passes(parts, spare=(ONE_ITEM, None))
        if not passes:
            return self.encode_items(self.training_items[:0])
        places = np.argsort(np.concatenate([np.empty(0, dtype=np.int64), *batches]))
        encoded = torch.cat([self.encode_histories(items, hidden=hides) for items, hides in passes])
        return encoded.index_select(0, torch.from_numpy(places).to(self.device))

    def as_many_passes(self, parts: Sequence[T], *, spare: T | None = None) -> list[T]:
        """What is to be read, pass by pass; where an LLM is sharded with repeats, for as many passes on all processes.

        Args:
            parts: One per pass.
            spare: What is read by a process without any; the states of repeats and of this are to be left out.
        """
        if not any(backbone.sharded for backbone in self.backbones):
            return list(parts)
        return distributed.as_many(parts or [spare], self.device)  # type: ignore[list-item]

    def encode_catalogue(self) -> Float[Tensor, "catalogue dim"]:
        """The vectors of all items, in evaluation mode, float32.

        The catalogue is cut into blocks that do not depend on the number of processes; each block is encoded by one
        process, and all get the same vectors.
        """
        ids = torch.arange(self.catalogue["items"], device=self.device)
        own = torch.split(ids, CATALOGUE_BLOCK)[distributed.rank() :: distributed.world_size()]
        blocks = self.as_many_passes(own or (ids[:1],))  # without a block of its own: no rows, but of the others' width
        with evaluating(self), torch.autocast(self.device.type, enabled=False):
            vectors = torch.cat([self.encode_items(block) for block in blocks])[: sum(map(len, own))]
        found = distributed.gather_rows(torch.cat([ids[:0], *own]))
        return distributed.gather_rows(vectors)[found.argsort()]

    def encode_items(self, item_ids: Int[Tensor, " items"]) -> Float[Tensor, "items dim"]:
        """The vectors by which these items are ranked, float32."""
        vectors: Tensor = self.item_encoder(item_ids)
        return vectors.float()
