"""LLaRA's pre-training: the LLM learns to put a text, and what follows it, into one vector."""

import sys

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from anyo_lightning import distributed
from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.data.sampler import TokenBudgetBatches
from anyo_lightning.encoders.live import LiveTextEncoders, LiveTextItems
from anyo_lightning.encoders.pretext import PretextRows, output_embeddings
from anyo_lightning.encoders.recompute import recomputed
from anyo_lightning.errors import InputError
from anyo_lightning.losses import bag_of_tokens
from anyo_lightning.models.base import RetrievalModule


class LLaRAPretrain(RetrievalModule):
    """EBAE and EBAR: an item's SELF state predicts the tokens of its text, its NEXT state those of the next item's.

    A text and the next one are an item and the item that follows it in a training history here, so that NEXT is what a
    history's query becomes and SELF what an item's vector becomes; in the paper they are sentences of Wikipedia. Each
    distinct item of a step is read once, in one pass for both tasks, and its NEXT state serves all items that follow it
    there. Losses: EBAE is the mean over distinct items, EBAR the mean over pairs, and they are added (the paper; its
    code pools by mean over 8 tokens, takes a maximum over them in the loss, adds the autoregressive loss and divides by
    10).

    It is validated by EBAR: items are ranked by how well the NEXT state predicts the tokens of their texts. Its run
    starts `LLaRA` with `--model.init_from`; both must read the same: the same prompts (with `supervision: all` LLaRA's
    histories have no prompt, so `next_prompt` is empty here), and histories of the items' whole texts.

    Args:
        encoders: The dual encoder, without projector and whitening (`dim: null`, `whiten: false`).
        training: What `RetrievalModule` takes.

    Reference: Li et al., Llama2Vec (ACL 2024, arXiv 2312.15503), section 3.2.
    """

    cosines = True
    encoders: LiveTextEncoders
    item_encoder: LiveTextItems

    def build(self, data: RecDataModule) -> None:
        """The LLM's output embeddings."""
        if self.encoders.dim is not None or self.encoders.whiten or data.supervision != "last":
            raise InputError(
                "Expected model.encoders.dim null, model.encoders.whiten false and data.supervision last, got "
                f"{self.encoders.dim}, {self.encoders.whiten} and {data.supervision}"
            )
        if data.titles_only:
            raise InputError("Expected data.titles_only to be false, since pre-training reads whole texts, got true")
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise InputError(
                "Expected model.encoders.backbone.lora or model.encoders.pooled_tokens to give something to train, got "
                "neither"
            )
        llm = self.encoders.backbone
        self.prompts = [llm.tokens(prompt) for prompt in (self.encoders.self_prompt, self.encoders.next_prompt)]
        self.register_buffer("head", output_embeddings(self.backbones[0]).detach(), persistent=False)

    def states_of_step(self, batch: HistoryBatch) -> Float[Tensor, "items 2 width"]:
        """Those of the distinct items that are read in training."""
        return self.pretext_states(torch.unique(batch.item_ids[batch.target_places]))

    def pretext_states(self, item_ids: Int[Tensor, " items"]) -> Float[Tensor, "items 2 width"]:
        """Each item's SELF and NEXT states, in parts of at most `data.held_tokens`, which keep no activations."""
        texts, behind = self.item_encoder.texts(item_ids), self.tokens_behind
        held = self.data.held_tokens
        lengths = np.array([len(text) + behind for text in texts], dtype=np.int64)
        cut = TokenBudgetBatches(lengths, budget=held or sys.maxsize, seed=None).batches()
        parts = [[texts[row] for row in rows] for rows in cut] or [self.item_encoder.texts(self.training_items[:1])]
        if held is not None:
            parts = self.as_many_passes(parts)
        states = torch.cat([self._read(part, keep=held is None or len(parts) == 1) for part in parts])
        places = torch.from_numpy(np.argsort(np.concatenate([np.empty(0, dtype=np.int64), *cut])))
        return states.index_select(0, places.to(self.device))

    @property
    def tokens_behind(self) -> int:
        """Tokens that are read behind each text: both prompts and what is pooled of each."""
        return sum(len(prompt) + self.item_encoder.reader.count for prompt in self.prompts)

    def _read(self, texts: list[np.ndarray], *, keep: bool) -> Float[Tensor, "texts 2 width"]:
        reader = self.item_encoder.reader
        rows = PretextRows.of(
            texts, self_prompt=self.prompts[0], next_prompt=self.prompts[1], end=reader.end, count=reader.count
        )
        inputs = [t.to(self.device) for t in (rows.token_ids, rows.pooled, rows.attention_mask, rows.position_ids)]

        def read(token_ids: Tensor, pooled: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
            states: Tensor = reader(token_ids, pooled, attention_mask=mask, position_ids=positions)
            return states

        return read(*inputs) if keep else recomputed(read, *inputs)

    def logit_scale(self) -> float:
        """There are no logits of items."""
        raise InputError("Expected runs that are trained to rank items, got one of LLaRAPretrain, which writes texts")

    def training_step(self, batch: HistoryBatch, batch_idx: int) -> Tensor:
        """EBAE of the batch's items and EBAR of its pairs of item and target."""
        inputs, targets = batch.item_ids[batch.target_places], batch.targets
        items, place = torch.unique(inputs, return_inverse=True)
        states = self.pretext_states(items)
        self.seen.tokens += sum(map(len, self.item_encoder.texts(items))) + len(items) * self.tokens_behind
        head = self.get_buffer("head")
        # Means over all processes' distinct items and pairs, as in global_mean.
        everyone, processes = distributed.gather_rows(items), distributed.world_size()
        shares = processes / (len(torch.unique(everyone)) * (everyone == items[:, None]).sum(1))
        pairs = distributed.sum_over_ranks(len(targets), self.device)
        rows = torch.arange(len(items), device=items.device)
        ebae = bag_of_tokens(states[:, 0], head, *self.bags(items, rows, shares))
        ebar = bag_of_tokens(states[:, 1], head, *self.bags(targets, place, processes / pairs))
        self.seen.targets += len(targets)
        self.log_shares({"train/loss": ebae + ebar, "train/ebae": ebae, "train/ebar": ebar})
        return self.weighted(ebae + ebar, len(targets))

    def encode_items(self, item_ids: Int[Tensor, " items"]) -> Float[Tensor, "items hidden"]:
        """The mean output embedding of each item's distinct tokens.

        With a query e its inner product is `1/|T| Σ_t (W e)_t`: minus EBAR's loss, except for a term that all items
        share.
        """
        head = self.get_buffer("head")
        pairs, weights = self.bags(item_ids, torch.arange(len(item_ids), device=self.device), 1.0)
        vectors = torch.zeros(len(item_ids), head.shape[1], device=self.device)
        return vectors.index_add_(0, pairs[:, 0], weights[:, None] * head[pairs[:, 1]].float())

    def bags(
        self, item_ids: Int[Tensor, " pairs"], states: Int[Tensor, " pairs"], shares: Float[Tensor, " pairs"] | float
    ) -> tuple[Int[Tensor, "tokens 2"], Float[Tensor, " tokens"]]:
        """The distinct tokens of each item's text, beside the state that predicts them, and their weight in the loss.

        Args:
            item_ids: Items.
            states: For each, the row of its state.
            shares: The weight of each item; its tokens share it equally.
        """
        bags = [np.unique(text) for text in self.item_encoder.texts(item_ids)]
        sizes = torch.tensor([len(bag) for bag in bags], dtype=torch.long, device=self.device)
        tokens = torch.from_numpy(np.concatenate([np.empty(0), *bags]).astype(np.int64)).to(self.device)
        weights = (shares / sizes).repeat_interleave(sizes)
        return torch.stack([states.repeat_interleave(sizes), tokens], dim=1), weights
