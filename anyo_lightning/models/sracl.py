"""SRA-CL: contrast histories with what semantically similar histories lead to, and with semantically similar views."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from anyo_lightning import distributed
from anyo_lightning.checkpoint_io import METADATA
from anyo_lightning.data.batches import HistoryBatch, HistoryDataset
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.data.loader import ResumableLoader
from anyo_lightning.data.sampler import TokenBudgetBatches
from anyo_lightning.encoders.base import LANGUAGE_MODEL
from anyo_lightning.encoders.ids import IdEncoders
from anyo_lightning.encoders.text import TextEncoders
from anyo_lightning.errors import InputError
from anyo_lightning.internals import trainer_of
from anyo_lightning.llm.backbone import Backbone
from anyo_lightning.llm.evaluation_mode import evaluating
from anyo_lightning.llm.language_model import LLM
from anyo_lightning.llm.text_vectors import Pooling
from anyo_lightning.models import identity
from anyo_lightning.models.base import RetrievalModule
from anyo_lightning.models.checks import check_positive, check_weights
from anyo_lightning.models.contrast import Synthesizer, boundary_identities, contrast_views, same_history, sampled
from anyo_lightning.views.neighbours import (
    Positives,
    UserSemantics,
    mean_vectors,
    nearest,
    profile_texts,
    semantic_item_vectors,
    similar_prefixes,
    training_prefixes,
    user_text_vectors,
)
from anyo_lightning.views.operators import substitute_before_last


class SRACL(RetrievalModule):
    """`L = L_next + α · L_inter + β · L_intra`: the full softmax, and two contrasts whose positives are retrieved.

    Inter-user: the state after a prefix of a training history against a mixture of the states after the k prefixes
    whose texts are most alike, weighted by a learnable `Synthesizer`. Intra-user: two views of a history, in each of
    which items are replaced by semantic neighbours. Both are InfoNCE over the 2N vectors of a step, as in the code; the
    paper's inter-user term has the mixtures alone as keys. Recommendation needs the encoders alone.

    The encoders are an LLM that reads text (`sracl.yaml`), or SASRec's, as in the paper (`sracl_paper.yaml`). What
    differs: (1) With `data.supervision all` one pass supervises all prefixes of a history, of which the intra-user term
    uses the longest; with `last`, as in the code, each prefix is a sample of all terms. (2) `positives`: the code's
    neighbours come from `all` prefixes; more than half are the user's own, and every third contains the target. The
    default is `others`, the prefixes of other users. (3) Semantic vectors are those of the items' texts by the
    configured encoder, a prefix's by default the mean over its items; the paper embeds an LLM's summaries of items and
    of histories by SimCSE. (4) `bank` reads the neighbours' states from a table that is filled at the start of each
    epoch, without gradient; the paper encodes them in each step (`bank: false`). (5) By default states are compared at
    unit length: inner products of states of norm 8, as in the paper (`unit_length: false`), saturate the softmax. (6)
    False negatives, histories with the same target or of the same user, can be masked. (7) The state that is compared
    is that of the next-item loss, where the code reads the prefix once more. (8) No item of a view is replaced by the
    target of its history, which the code may draw.

    Args:
        encoders: How histories and items are encoded.
        semantics: The encoder of the semantic vectors, which is dropped afterwards; None takes that of `encoders`,
            frozen and without LoRA.
        pooling: How the states of a text become its semantic vector.
        alpha: α, weight of the inter-user term; 0 leaves it out and saves its work.
        beta: β, weight of the intra-user term; 0 leaves it out and saves its work.
        neighbours: k, of prefixes and of items.
        positives: Whose prefixes are the neighbours of the inter-user term: those of `others`; the user's `own`, of
            which the longer ones contain the target; `own_without_target`, those that do not; or `all`. Only training
            interactions are used.
        prefixes: Prefixes per user that take part, evenly spaced, the longest among them; None takes all. The search
            takes time in the square of their number.
        anchors: Prefixes of a step that the inter-user term contrasts, over all processes, drawn at random.
        share: Chance of each item of a view to be replaced; the last one never is.
        temperature: Of both terms.
        unit_length: Compare cosines, or else inner products.
        user_semantics: A prefix's vector is the `mean` of its items' vectors, or the vector of its `texts` as one text.
        bank: Take neighbours' states from a table refreshed at the start of each epoch; otherwise encode them in
            each step, each once, with gradient.
        mask_false_negatives: Leave out negatives with the same target or of the same user.
        training: What `RetrievalModule` takes.

    Reference: Cui et al., Semantic Retrieval Augmented Contrastive Learning for Sequential Recommendation, NeurIPS 2025
    (arXiv 2503.04162).
    """

    encoders: TextEncoders | IdEncoders
    prefix_vectors: Tensor
    prefix_neighbours: Tensor
    prefix_of_target: Tensor
    states_of_prefixes: Tensor

    masks = True
    starts_afresh = ("states_of_prefixes",)  # the bank, filled at the start of each epoch

    def __init__(
        self,
        encoders: TextEncoders | IdEncoders,
        *,
        semantics: LLM | None = None,
        pooling: Pooling = "mean",
        alpha: float = 0.02,
        beta: float = 0.02,
        neighbours: int = 10,
        positives: Positives = "others",
        prefixes: int | None = None,
        anchors: int = 256,
        share: float = 0.2,
        temperature: float = 0.2,
        unit_length: bool = True,
        user_semantics: UserSemantics = "mean",
        bank: bool = True,
        mask_false_negatives: bool = True,
        **training: Any,
    ) -> None:
        super().__init__(encoders, **training)
        self.semantics, self.pooling = semantics, pooling
        self.alpha, self.beta, self.neighbours, self.share = alpha, beta, neighbours, share
        self.positives, self.prefixes, self.anchors = positives, prefixes, anchors
        self.temperature, self.unit_length, self.user_semantics = temperature, unit_length, user_semantics
        self.bank, self.mask_false_negatives = bank, mask_false_negatives
        self.semantic_model: dict[str, str] = {}
        self.restored: Mapping[str, Tensor] | None = None  # the weights of a trained model that is only evaluated

    def make_encoders(self, data: RecDataModule, saved: Mapping[str, Tensor] | None) -> tuple[nn.Module, nn.Module]:
        """The encoders; where a trained model is only evaluated, `build` finds no neighbours."""
        trainer, saved = trainer_of(self), saved or {}
        whole = any(not name.startswith(LANGUAGE_MODEL) for name in saved)
        self.restored = saved if whole and (trainer is None or trainer.state.fn != "fit") else None
        return super().make_encoders(data, saved or None)

    def build(self, data: RecDataModule) -> None:
        """What the terms need: neighbours, the synthesizer, the bank.

        Raises:
            InputError: A setting is out of range, or no language model gives semantic vectors.
        """
        check_positive(neighbours=self.neighbours, temperature=self.temperature)
        check_positive(anchors=self.anchors, prefixes=self.prefixes)
        check_weights(alpha=self.alpha, beta=self.beta)
        if not 0 <= self.share <= 1:
            raise InputError(f"Expected model.share in [0, 1], got {self.share}")
        if not self.alpha and not self.beta:
            return
        if self.restored is not None:
            self._make_saved_parts(self.restored)
            self.restored = None
            return
        encoder = self._semantic_encoder()
        self.semantic_model = dict(encoder.identity)
        items = semantic_item_vectors(encoder, data, pooling=self.pooling)
        if self.beta:
            trained = self.training_items.numpy()
            self.item_neighbours = nearest(items, trained, k=min(self.neighbours, len(trained) - 1))
        if self.alpha:
            self._find_prefixes(data, encoder, items)

    def loss(
        self, states: Float[Tensor, "targets dim"], batch: HistoryBatch
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The full softmax at all boundaries, and the two contrasts."""
        loss = self.next_item_loss(states, batch)
        parts = {"next_item": loss}
        if self.alpha:
            rows = self.taking_part(batch)
            parts["inter_user_anchors"] = states.new_tensor(len(rows) * distributed.world_size())
            parts["inter_user"] = self.inter_user(states, batch, rows)
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
        self, states: Float[Tensor, "targets dim"], batch: HistoryBatch, rows: Int[Tensor, " rows"]
    ) -> Float[Tensor, ""]:
        """`contrast_views` of the states `h_i` and the mixtures `h⁺_i = Σ_j p_ij h_j` over i's k neighbours.

        Args:
            states: The states at the batch's supervised boundaries.
            batch: Its histories.
            rows: The boundaries that take part.
        """
        prefixes = self.prefix_of_target[batch.target_positions[rows]]
        neighbours = self.prefix_neighbours[prefixes]
        there = neighbours >= 0
        neighbours = neighbours.where(there, neighbours[:, :1])  # whose weight is zero
        weights = self.synthesizer(self.prefix_vectors[prefixes], self.prefix_vectors[neighbours], there)
        positives = (weights[..., None] * self.neighbour_states(neighbours)).sum(1)
        identities = boundary_identities(batch)[rows] if self.mask_false_negatives else None
        return self._contrast(states[rows], positives, identities)

    def taking_part(self, batch: HistoryBatch) -> Int[Tensor, " rows"]:
        """The boundaries whose prefixes have neighbours, or this process's part of a sample of `anchors`."""
        prefixes = self.prefix_of_target[batch.target_positions]
        rows = ((prefixes >= 0) & (self.prefix_neighbours[prefixes, 0] >= 0)).nonzero()[:, 0]
        return sampled(batch, rows, self.anchors, random=self.shared_random)

    def intra_user(self, batch: HistoryBatch) -> Float[Tensor, ""]:
        """InfoNCE over the 2N views of N histories: each against all but itself, its positive the other of the two."""
        random = np.random.default_rng(int(torch.randint(2**31, ())))
        here = batch.on_cpu
        targets = here.targets[here.last_states].tolist()
        views = [
            substitute_before_last(items, chance=self.share, similar=self.item_neighbours, target=target, random=random)
            for items, target in [*zip(batch.histories(), targets, strict=True)] * 2
        ]
        first, second = self.encode_histories(views).chunk(2)
        return self._contrast(first, second, same_history(batch) if self.mask_false_negatives else None)

    def _contrast(
        self,
        first: Float[Tensor, "rows dim"],
        second: Float[Tensor, "rows dim"],
        identities: Int[Tensor, "rows kinds"] | None,
    ) -> Float[Tensor, ""]:
        """`contrast_views` as a `global_mean`, of cosines or inner products."""
        if self.unit_length:
            first, second = F.normalize(first, dim=1), F.normalize(second, dim=1)
        loss = contrast_views(first, second, identities=identities, temperature=self.temperature)
        return self.global_mean(loss, len(first))

    def neighbour_states(self, prefixes: Int[Tensor, "rows k"]) -> Float[Tensor, "rows k dim"]:
        """The states after these prefixes, from the bank or encoded now, each distinct prefix once."""
        if self.bank:
            return self.states_of_prefixes[prefixes]
        distinct, place = torch.unique(prefixes, return_inverse=True)
        histories = [self.histories[prefix] for prefix in distinct.tolist()]
        return self.encode_in_batches(histories, budget=self.data.batch_tokens)[place]

    def on_train_epoch_start(self) -> None:
        """Fill the bank with the states that the weights give now.

        It is saved with the weights: a run that resumes in the middle of an epoch needs the states of its start.
        """
        if self.alpha and self.bank:
            started = time.perf_counter()
            self.refresh_bank()
            self.log("train/bank_seconds", time.perf_counter() - started)

    def refresh_bank(self) -> None:
        """The states after all prefixes, in evaluation mode, from one pass over the epoch's training windows."""
        loader = self.data.train_dataloader()
        assert isinstance(loader, ResumableLoader)
        windows = loader.dataset
        assert isinstance(windows, HistoryDataset)
        known = np.append(0, np.cumsum(self.prefix_of_target.cpu().numpy() >= 0))
        needed = np.flatnonzero(known[windows.end + 1] > known[windows.supervised + 1])
        lengths = windows.lengths[needed]
        cut = TokenBudgetBatches(lengths, budget=self.data.evaluation_batch_tokens, seed=None).batches()
        own = [needed[rows] for rows in cut[distributed.rank() :: distributed.world_size()]]
        found, states = [self.prefix_of_target[:0]], [self.states_of_prefixes[:0]]
        with evaluating(self):
            for number, rows in enumerate(self.as_many_passes(own, spare=needed[:1])):
                batch = windows[rows.tolist()].to(self.device)
                read = self(batch).float()
                if number < len(own):
                    prefixes = self.prefix_of_target[batch.target_positions]
                    found.append(prefixes[prefixes >= 0])
                    states.append(read[prefixes >= 0])
        self.states_of_prefixes[distributed.gather_rows(torch.cat(found))] = distributed.gather_rows(torch.cat(states))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note whose vectors the neighbours are found by."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[METADATA]["semantics"] = self.semantic_model

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume training with other neighbours."""
        super().on_load_checkpoint(checkpoint)
        trainer = trainer_of(self)
        found = checkpoint[METADATA].get("semantics", self.semantic_model)  # missing in those of earlier versions
        if trainer is not None and trainer.state.fn == "fit":
            identity.check_same("model.semantics", found, self.semantic_model)
        self.semantic_model = found

    def _make_saved_parts(self, saved: Mapping[str, Tensor]) -> None:
        """The synthesizer and the bank as a checkpoint has them: recommending needs neither, loading both.

        Of one that lacks them, such as another class's, they are empty: loading it says what is wrong.
        """
        if self.alpha:
            dim, width = saved.get("synthesizer.map.weight", torch.empty(1, 1)).shape
            self.synthesizer = Synthesizer(width, dim)
            if self.bank:
                bank = saved.get("states_of_prefixes", torch.empty(0))
                self.register_buffer("states_of_prefixes", torch.zeros_like(bank))

    def _semantic_encoder(self) -> Backbone:
        if self.semantics is not None:
            return self.semantics.load(self.build_device)
        if not self.backbones:
            raise InputError(
                "Expected model.semantics, the LLM of the semantic vectors, since model.encoders has none, got none"
            )
        return self.backbones[0]

    def _find_prefixes(self, data: RecDataModule, encoder: Backbone, items: Float[Tensor, "catalogue width"]) -> None:
        """Semantic vectors and neighbours of prefixes, the synthesizer and the bank."""
        prefixes = training_prefixes(data.split, shuffled_ties=data.shuffle_ties, most=self.prefixes)
        self.histories = prefixes.histories()
        if self.user_semantics == "texts":
            texts = profile_texts(self.histories, data.split.item_texts)
            vectors = user_text_vectors(encoder, texts, pooling=self.pooling)
        else:
            vectors = mean_vectors(prefixes, items)
        neighbours = similar_prefixes(prefixes, vectors, self.positives, k=self.neighbours)
        self.register_buffer("prefix_vectors", vectors, persistent=False)
        self.register_buffer("prefix_neighbours", torch.from_numpy(neighbours), persistent=False)
        self.register_buffer("prefix_of_target", torch.from_numpy(prefixes.of_targets()), persistent=False)
        self.synthesizer = Synthesizer(vectors.shape[1], self.encoders.dim)
        if self.bank:
            self.register_buffer("states_of_prefixes", torch.zeros(len(prefixes), self.encoders.dim))
