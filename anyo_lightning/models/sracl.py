"""SRA-CL: contrast users with what semantically similar users do, and histories with semantically similar ones."""

import time
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from anyo_lightning import distributed
from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.encoders.ids import IdEncoders
from anyo_lightning.encoders.text import TextEncoders
from anyo_lightning.errors import InputError
from anyo_lightning.llm.backbone import Backbone
from anyo_lightning.llm.evaluation_mode import evaluating
from anyo_lightning.llm.language_model import LLM
from anyo_lightning.llm.text_vectors import Pooling
from anyo_lightning.losses import info_nce
from anyo_lightning.models.base import RetrievalModule
from anyo_lightning.models.contrast import contrast_views, same_history, shared_identity
from anyo_lightning.views.neighbours import (
    UserSemantics,
    mean_vectors,
    nearest,
    profile_texts,
    semantic_histories,
    semantic_item_vectors,
    user_text_vectors,
)
from anyo_lightning.views.operators import substitute


class SRACL(RetrievalModule):
    """`L = L_next + α · L_inter + β · L_intra`: the full softmax, and two contrasts whose positives are retrieved.

    Inter-user: the state of a history against a mixture of the states of the k users whose texts are most alike,
    weighted by a learnable `Synthesizer`; negatives are the other mixtures of the batch. Intra-user: two views of a
    history, each with a share of its items replaced by semantic neighbours; negatives are the other views.
    Recommendation needs the encoders alone.

    The encoders are an LLM that reads text (`sracl.yaml`), or SASRec's, as in the paper (`sracl_paper.yaml`). What
    differs: (1) every boundary is supervised by the next item, and the contrasts use one state per history, its last
    supervised one; in the paper and its code each prefix is a sample of both. If a user's history is cut into windows,
    only the last window takes part in the inter-user term, since the neighbours are those of the whole history: mix
    windows in a step by `data.group_by_length: false`, or most steps have none. Its negatives are the others of the
    same step: about 7 (`sracl.yaml`) and 10 (`sracl_paper.yaml`) on ML-100K, where the paper has a batch of 256; if
    histories fit into one window, the whole batch. (2) A user's vector and neighbours come from the training history
    without the last target; in the code a prefix finds the user's other prefixes, which contain its target. (3)
    Semantic vectors are those of the items' texts by the configured encoder, a user's by default the mean over the
    history; the paper embeds an LLM's summaries of items and of histories by SimCSE. (4) The inter-user term is the
    paper's, states against mixtures; the code's is symmetric over both. (5) `bank` reads the neighbours' states from a
    table that is filled at the start of each epoch, without gradient; the paper encodes them in each step (`bank:
    false`). (6) False negatives, histories with the same target or of the same user, can be masked.

    Args:
        encoders: How histories and items are encoded.
        semantics: The encoder of the semantic vectors, which is dropped afterwards; None takes that of `encoders`,
            frozen and without LoRA.
        pooling: How the states of a text become its semantic vector.
        alpha: α, weight of the inter-user term; 0 leaves it out and saves its work.
        beta: β, weight of the intra-user term; 0 leaves it out and saves its work.
        neighbours: k, of users and of items.
        share: Share of a view's items that are replaced, rounded down, but at least one item.
        temperature: Of both terms.
        user_semantics: A user's vector is the `mean` of the item vectors of the history, or the vector of its
            `texts` as one text.
        bank: Take neighbours' states from a table refreshed at the start of each epoch; otherwise encode them in
            each step, each once, with gradient.
        mask_false_negatives: Leave out negatives with the same target or of the same user.
        training: What `RetrievalModule` takes.

    Reference: Cui et al., Semantic Retrieval Augmented Contrastive Learning for Sequential Recommendation, NeurIPS 2025
    (arXiv 2503.04162).
    """

    encoders: TextEncoders | IdEncoders
    user_vectors: Tensor
    user_neighbours: Tensor
    states_of_users: Tensor

    starts_afresh = ("states_of_users",)  # the bank, filled at the start of each epoch

    def __init__(
        self,
        encoders: TextEncoders | IdEncoders,
        *,
        semantics: LLM | None = None,
        pooling: Pooling = "mean",
        alpha: float = 0.1,
        beta: float = 0.1,
        neighbours: int = 10,
        share: float = 0.2,
        temperature: float = 1.0,
        user_semantics: UserSemantics = "mean",
        bank: bool = True,
        mask_false_negatives: bool = True,
        **training: Any,
    ) -> None:
        super().__init__(encoders, **training)
        self.semantics, self.pooling = semantics, pooling
        self.alpha, self.beta, self.neighbours, self.share = alpha, beta, neighbours, share
        self.temperature, self.user_semantics = temperature, user_semantics
        self.bank, self.mask_false_negatives = bank, mask_false_negatives

    def build(self, data: RecDataModule) -> None:
        """What the terms need: neighbours, the synthesizer, the bank."""
        sizes = {"neighbours": self.neighbours, "temperature": self.temperature}
        for name, size in sizes.items():
            if size <= 0:
                raise InputError(f"Expected model.{name} to be positive, got {size}")
        if not 0 <= self.share <= 1:
            raise InputError(f"Expected model.share in [0, 1], got {self.share}")
        if not self.alpha and not self.beta:
            return
        encoder = self._semantic_encoder()
        items = semantic_item_vectors(encoder, data, pooling=self.pooling)
        if self.beta:
            trained = self.training_items.numpy()
            self.item_neighbours = nearest(items, trained, k=min(self.neighbours, len(trained) - 1))
        if self.alpha:
            self._find_users(data, encoder, items)

    def loss(
        self, states: Float[Tensor, "targets dim"], batch: HistoryBatch
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The full softmax at all boundaries, and the two contrasts."""
        loss = self.next_item_loss(states, batch)
        parts = {"next_item": loss}
        if self.alpha:
            rows = self.taking_part(batch)
            parts["inter_user_histories"] = states.new_tensor(len(rows))
            parts["inter_user"] = self.inter_user(states[batch.last_states], batch, rows)
            loss = loss + self.alpha * parts["inter_user"]
        if self.beta:
            parts["intra_user"] = self.intra_user(batch)
            loss = loss + self.beta * parts["intra_user"]
        return loss, parts

    @property
    def reads_in_loss(self) -> bool:
        """The views of the histories, and their neighbours where no bank has them."""
        return bool(self.beta or (self.alpha and not self.bank))

    def inter_user(
        self, last: Float[Tensor, "batch dim"], batch: HistoryBatch, rows: Int[Tensor, " rows"]
    ) -> Float[Tensor, ""]:
        """`-1/N Σ_u log( exp(h_u·h⁺_u/τ) / Σ_v exp(h_u·h⁺_v/τ) )`, `h⁺_u = Σ_j p_uj h_j` over u's k neighbours.

        Args:
            last: The state at each history's last supervised boundary.
            batch: Its histories.
            rows: Those that take part.
        """
        users = batch.user[rows]
        neighbours = self.user_neighbours[users]
        there = neighbours >= 0
        neighbours = neighbours.where(there, neighbours[:, :1])  # whose weight is zero
        weights = self.synthesizer(self.user_vectors[users], self.user_vectors[neighbours], there)
        positives = (weights[..., None] * self.neighbour_states(neighbours)).sum(1)
        excluded = None
        if self.mask_false_negatives:
            identities = same_history(batch)[rows]
            excluded = shared_identity(identities, distributed.gather_rows(identities))
        loss = info_nce(
            last[rows],
            distributed.gather_rows(positives, with_gradient=True),
            distributed.rows_before(len(rows), rows.device) + torch.arange(len(rows), device=rows.device),
            temperature=self.temperature,
            excluded=excluded,
        )
        return self.global_mean(loss, len(rows))

    def taking_part(self, batch: HistoryBatch) -> Int[Tensor, " rows"]:
        """The histories that end in their user's last boundary, of users who have neighbours."""
        assert batch.final is not None
        return (batch.final & (self.user_neighbours[batch.user, 0] >= 0)).nonzero()[:, 0]

    def intra_user(self, batch: HistoryBatch) -> Float[Tensor, ""]:
        """InfoNCE over the 2N views of N histories: each against all but itself, its positive the other of the two."""
        random = np.random.default_rng(int(torch.randint(2**31, ())))
        views = [
            substitute(items, share=max(self.share, 1 / len(items)), similar=self.item_neighbours, random=random)
            for items in batch.histories() * 2
        ]
        first, second = self.encode_histories(views).chunk(2)
        identities = same_history(batch) if self.mask_false_negatives else None
        loss = contrast_views(first, second, identities=identities, temperature=self.temperature)
        return self.global_mean(loss, len(first))

    def neighbour_states(self, users: Int[Tensor, "rows k"]) -> Float[Tensor, "rows k dim"]:
        """The last states of these users, from the bank or encoded now, each distinct user once."""
        if self.bank:
            return self.states_of_users[users]
        distinct, place = torch.unique(users, return_inverse=True)
        return self._states(distinct, budget=self.data.batch_tokens)[place]

    def _states(self, users: Int[Tensor, " users"], *, budget: int) -> Float[Tensor, "users dim"]:
        """The last states of users' own training histories."""
        return self.encode_in_batches([self.histories[user] for user in users.tolist()], budget=budget)

    def on_train_epoch_start(self) -> None:
        """Fill the bank with the states that the weights give now.

        It is saved with the weights: a run that resumes in the middle of an epoch needs the states of its start.
        """
        if self.alpha and self.bank:
            started = time.perf_counter()
            self.refresh_bank()
            self.log("train/bank_seconds", time.perf_counter() - started)

    def refresh_bank(self) -> None:
        """The last states of all users who take part, in evaluation mode."""
        users = (self.user_neighbours[:, 0] >= 0).nonzero()[:, 0]
        own = users[distributed.rank() :: distributed.world_size()]
        with evaluating(self):
            states = self._states(own, budget=self.data.evaluation_batch_tokens)
        self.states_of_users[distributed.gather_rows(own)] = distributed.gather_rows(states)

    def _semantic_encoder(self) -> Backbone:
        if self.semantics is not None:
            return self.semantics.load(self.build_device)
        if not self.backbones:
            raise InputError(
                "Expected model.semantics, the LLM of the semantic vectors, since model.encoders has none, got none"
            )
        return self.backbones[0]

    def _find_users(self, data: RecDataModule, encoder: Backbone, items: Float[Tensor, "catalogue width"]) -> None:
        """Semantic vectors and neighbours of users, the synthesizer and the bank."""
        semantic = semantic_histories(data.split, shuffled_ties=data.shuffle_ties)
        if self.user_semantics == "texts":
            vectors = user_text_vectors(encoder, profile_texts(semantic, data.split.item_texts), pooling=self.pooling)
        else:
            vectors = mean_vectors(semantic, items)
        there = np.flatnonzero([len(history) > 0 for history in semantic])
        neighbours = np.full((data.split.users, self.neighbours), -1)
        neighbours[there] = nearest(vectors, there, k=self.neighbours)[there]
        self.histories = [data.split.training_history(user)[:-1] for user in range(data.split.users)]
        self.register_buffer("user_vectors", vectors, persistent=False)
        self.register_buffer("user_neighbours", torch.from_numpy(neighbours), persistent=False)
        self.synthesizer = Synthesizer(vectors.shape[1], self.encoders.dim)
        if self.bank:
            self.register_buffer("states_of_users", torch.zeros(data.split.users, self.encoders.dim))


class Synthesizer(nn.Module):
    """`p_uj = softmax_j LeakyReLU(aᵀ [W x_u ‖ W x_j])`: the weight of each neighbour's state in a user's positive.

    The slope of the LeakyReLU is 0.2, that of the graph attention network whose form this is; the paper names none.

    Args:
        width: Width of the semantic vectors x.
        dim: Rows of W.
    """

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.map = nn.Linear(width, dim, bias=False)
        self.attention = nn.Parameter(torch.empty(2, dim))  # the two halves of a
        for weight in (self.map.weight, self.attention):
            nn.init.xavier_uniform_(weight)

    def forward(
        self,
        users: Float[Tensor, "users width"],
        neighbours: Float[Tensor, "users k width"],
        there: Bool[Tensor, "users k"],
    ) -> Float[Tensor, "users k"]:
        """The weights of each user's neighbours: they sum to one over those that are there."""
        own, others = self.map(users) @ self.attention[0], self.map(neighbours) @ self.attention[1]
        scores = F.leaky_relu(own[:, None] + others, 0.2)
        return scores.masked_fill(~there, -torch.inf).softmax(1)
