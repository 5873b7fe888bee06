"""CSFT: the language model learns to write the next item's title; its run starts any variant that reads texts."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.encoders.live import LiveTextEncoders
from anyo_lightning.encoders.next_titles import NextTitles
from anyo_lightning.encoders.pretext import output_embeddings
from anyo_lightning.encoders.recompute import recomputed
from anyo_lightning.errors import InputError
from anyo_lightning.internals import trainer_of
from anyo_lightning.losses import full_softmax
from anyo_lightning.models.base import RetrievalModule
from anyo_lightning.models.parts import ONE_ITEM


class CSFT(RetrievalModule):
    """Collaborative supervised fine-tuning: next-token cross-entropy on the titles that follow in a training history.

    A history is read as `TextHistory` reads it, titles one after another, each with its separator, and from the second
    title on every token is predicted from all tokens before it, through the language model's own output embeddings. Of
    LLM2Rec's loss, in which the titles before a boundary are the prompt and the next title is the answer, this is the
    sum over all boundaries of a history: what a causal model reads before a title does not depend on what follows, so
    that one pass serves them all. The separator is predicted, too: with it a title ends. Every training target is
    supervised once an epoch, and validation and test interactions never.

    `val/title_loss`, the mean over the tokens of the validation targets' titles, selects the checkpoint. Its ranking
    metrics compare the states after a history and after an item's text alone, which are not trained to meet.

    With `init_from` its run gives its LoRA weights to any model whose histories are read by the same language model
    with the same LoRA; frozen item vectors are then read with these weights.

    What differs from LLM2Rec: LoRA in place of all weights, separators in place of commas, and neither its masked
    next-token prediction nor its contrast of items is run afterwards.

    Args:
        encoders: The dual encoder, without projector, whitening and pooled tokens (`dim: null`, `whiten: false`).
        training: What `RetrievalModule` takes.

    Reference: He et al., LLM2Rec (KDD 2025, arXiv 2506.21579), section 3.1.
    """

    cosines = True
    encoders: LiveTextEncoders

    def row_tokens(self, data: RecDataModule) -> int:
        """Tokens of the longest title: the last target's stands behind each history."""
        tokens = self.item_tokens(data)
        return 0 if tokens is None else int(tokens.lengths.max())

    def build(self, data: RecDataModule) -> None:
        """The LLM's output embeddings."""
        encoders = self.encoders
        if encoders.dim is not None or encoders.whiten or encoders.pooled_tokens or data.supervision != "all":
            raise InputError(
                "Expected model.encoders.dim null, model.encoders.whiten false, model.encoders.pooled_tokens 0 and "
                f"data.supervision all, got {encoders.dim}, {encoders.whiten}, {encoders.pooled_tokens} and "
                f"{data.supervision}"
            )
        (backbone,) = self.backbones
        if not any(parameter.requires_grad for parameter in backbone.parameters()):
            raise InputError("Expected model.encoders.backbone.lora to give something to train, got none")
        backbone.check_positions(data.longest_history() + self.row_tokens(data), "data.max_tokens")
        self.register_buffer("head", output_embeddings(backbone).detach(), persistent=False)

    def states_of_step(self, batch: HistoryBatch) -> Float[Tensor, "tokens width"]:
        """Those from which the titles' tokens are predicted."""
        return self.title_states(batch)[0]

    def title_states(self, batch: HistoryBatch) -> tuple[Float[Tensor, "tokens width"], Int[Tensor, " tokens"]]:
        """The states before the tokens of the supervised titles, and these tokens, in one order.

        In training, in parts of at most `data.held_tokens`, all but the last of which keep no activations.
        """
        assert self.reading.tokens is not None
        held = self.data.held_tokens if self.training and torch.is_grad_enabled() else None
        if not len(batch.user):
            parts = []
        elif held is None:
            parts = [batch]
        else:
            parts = [batch.of_rows(rows) for rows in self._cut(batch)]
        texts = [NextTitles.of(part, self.reading.tokens) for part in parts]
        count = sum(len(part.targets) for part in texts)
        passes = texts or [NextTitles.of(self.reading.collate(ONE_ITEM), self.reading.tokens)]
        if held is not None:
            passes = self.as_many_passes(passes)
        backbone = self.backbones[0]

        def read(token_ids: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
            return backbone(token_ids, read=(rows, columns))

        states, targets = [], []
        for number, part in enumerate(passes, start=1):
            here = part.to(self.device)
            inputs = here.token_ids, here.rows, here.columns
            states.append(read(*inputs) if held is None or number == len(passes) else recomputed(read, *inputs))
            targets.append(here.targets)
        return torch.cat(states)[:count], torch.cat(targets)[:count]

    def title_loss(self, states: Float[Tensor, "tokens width"], tokens: Int[Tensor, " tokens"]) -> Float[Tensor, ""]:
        """The mean cross-entropy of tokens, each predicted by its state."""
        with torch.autocast(self.device.type, enabled=False):
            head = self.get_buffer("head")
            return full_softmax(states.to(head.dtype), head, tokens)

    def logit_scale(self) -> float:
        """There are no logits of items."""
        raise InputError("Expected runs that are trained to rank items, got one of CSFT, which writes titles")

    def training_step(self, batch: HistoryBatch, batch_idx: int) -> Tensor:
        """The mean over all processes' supervised tokens."""
        states, tokens = self.title_states(batch)
        self.seen.targets += int(batch.on_cpu.target_mask.sum())
        self.seen.tokens += self.tokens_read(batch)
        loss = self.global_mean(self.title_loss(states, tokens), len(tokens))
        self.log_shares({"train/loss": loss})
        return loss

    def tokens_read(self, batch: HistoryBatch) -> int:
        """The tokens of a batch's histories and of their last targets."""
        assert self.reading.item_token_counts is not None
        here = batch.on_cpu
        last = here.target_ids.gather(1, here.item_mask.sum(1, keepdim=True) - 1)[:, 0]
        titles = int(self.reading.item_token_counts[last.cpu().numpy()].sum())
        return batch.token_count - batch.row_tokens * len(last) + titles

    def validation_step(self, batch: HistoryBatch, batch_idx: int) -> dict[str, Tensor]:
        """The loss of the targets' titles, and the queries: the states before them."""
        states, tokens = self.title_states(batch)
        loss = self.title_loss(states, tokens)
        repeated = False  # whether another process counts this batch
        if (trainer := trainer_of(self)) is not None:
            batches = trainer.val_dataloaders.sampler  # type: ignore[union-attr]
            repeated = batches.last_is_repeated and batch_idx == len(batches) - 1
        self.log("val/title_loss", loss, batch_size=0 if repeated else len(tokens), on_epoch=True, sync_dist=True)
        assert self.reading.item_token_counts is not None
        lengths = self.reading.item_token_counts[batch.on_cpu.targets.numpy()]  # one target per history
        first = torch.from_numpy(np.cumsum(lengths) - lengths).to(self.device)
        query: Tensor = self.history_encoder.projector(states[first].float())  # type: ignore[operator]
        return {"row": batch.row, "query": query}

    def test_step(self, batch: HistoryBatch, batch_idx: int) -> dict[str, Tensor]:
        """The queries of a batch."""
        return super().validation_step(batch, batch_idx)

    def predict_step(self, batch: HistoryBatch, batch_idx: int) -> dict[str, Tensor]:
        """The queries of a batch."""
        return super().validation_step(batch, batch_idx)
