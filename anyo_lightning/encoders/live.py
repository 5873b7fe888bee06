"""The dual encoder: one LLM reads histories and items, and both are unit vectors.

A text is read with a prompt and pooled tokens after it: `text, prompt, EOS`. The SELF prompt asks for the text itself
(items), the NEXT prompt for what follows it (histories). The text is cut before anything is appended, so that the
pooled token is always there, and its position is computed, never found from the right.

History and items are two forward passes: rows of hundreds of tokens and rows of twenty in one would be mostly padding.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from anyo_lightning import distributed
from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.data.tokens import ItemTokenStore, padded
from anyo_lightning.encoders.base import Encoders, ItemsByText, check_dropout, check_sizes
from anyo_lightning.encoders.history import TextHistory, check_histories
from anyo_lightning.encoders.pooling import PooledReader
from anyo_lightning.encoders.projector import Projector, UnitLength
from anyo_lightning.encoders.recompute import recomputed
from anyo_lightning.encoders.whitening import Whitened
from anyo_lightning.errors import InputError
from anyo_lightning.llm.evaluation_mode import evaluating
from anyo_lightning.llm.language_model import LLM

SELF = " This one."
NEXT = " The next one."
# Padded tokens of a pass over items, or a process's share of a step's: few enough for the memory, enough for products.
ITEM_TOKENS = 8192


class LiveTextItems(nn.Module):
    """`head(LLM(item text, SELF prompt, EOS))`, encoded in each call, with LoRA's gradients.

    Items are read in passes of similar length. If nothing in the LLM is trained, its states never change: they are
    computed once for the whole catalogue, and only the head is applied each time.

    Args:
        reader: The LLM and its pooling, shared with the history side.
        tokens: The items' texts; each ends in a separator, which is left out.
        prompt: Token ids of the SELF prompt.
        head: Maps pooled states to unit vectors.
        batch_tokens: Most padded tokens of a pass.
        held_tokens: Most padded tokens of a training pass, which then keeps no activations; None: a single pass keeps
            them, of several none does.
    """

    texts_in = "tokens"

    def __init__(
        self,
        reader: PooledReader,
        *,
        tokens: ItemTokenStore,
        prompt: Sequence[int],
        head: nn.Module,
        batch_tokens: int = ITEM_TOKENS,
        held_tokens: Callable[[], int | None] = lambda: None,
    ) -> None:
        super().__init__()
        self.reader, self.head = reader, head
        self.tokens, self.batch_tokens, self.held_tokens = tokens, batch_tokens, held_tokens
        self.suffix = np.array([*prompt, *[reader.end] * reader.count])
        self.frozen = not any(parameter.requires_grad for parameter in reader.parameters())
        self._kept: tuple[ItemTokenStore, Tensor] | None = None  # states, and the texts they belong to

    def forward(self, item_ids: Int[Tensor, " items"]) -> Float[Tensor, "items dim"]:
        """The unit vectors of these items."""
        return self.head(self.states(item_ids))

    def states(self, item_ids: Int[Tensor, " items"], *, within: bool = False) -> Float[Tensor, "items width"]:
        """The LLM's pooled states, before the head.

        Args:
            item_ids: Any items.
            within: Whether this is a part of another pass, which `data.held_tokens` has computed again as a whole.
        """
        if not self.frozen:
            return self._encode(item_ids, within=within)
        if self._kept is None or self._kept[0] is not self.tokens:
            with evaluating(self.reader):  # these are kept: without the LLM's own dropout
                everything = torch.arange(len(self.tokens.lengths), device=item_ids.device)
                self._kept = self.tokens, self._encode(everything)
        return self._kept[1].to(item_ids.device)[item_ids]

    def add_items(self, items: ItemsByText) -> None:
        """Take further items' texts."""
        assert items.item_tokens is not None, "the further items' texts were not read"
        self.tokens = self.tokens.joined(items.item_tokens)

    def token_count(self, item_ids: Int[Tensor, " items"]) -> int:
        """Tokens that are read to encode these items in a step."""
        if self.frozen:
            return 0
        return int(self.tokens.lengths[item_ids.cpu()].sum()) + len(item_ids) * (len(self.suffix) - 1)

    def texts(self, item_ids: Int[Tensor, " items"]) -> list[np.ndarray]:
        """The tokens of each item's text, without its separator."""
        return [self.tokens.span(item)[:-1] for item in item_ids.tolist()]

    def _encode(self, item_ids: Int[Tensor, " items"], *, within: bool = False) -> Float[Tensor, "items width"]:
        if not len(item_ids):
            return torch.zeros(0, self.reader.backbone.hidden_size, device=item_ids.device)
        rows = [np.append(text, self.suffix) for text in self.texts(item_ids)]
        sizes = np.array([len(row) for row in rows])
        order = np.argsort(sizes, kind="stable")
        training = self.training and torch.is_grad_enabled()
        held = self.held_tokens() if training else None
        passes, states = list(self._passes(sizes[order], min(self.batch_tokens, held or self.batch_tokens))), []
        if self.reader.backbone.sharded:
            passes = distributed.as_many(passes, item_ids.device)  # repeats come last, and are not read below
        keeps = not training or ((held is None or within) and len(passes) == 1)
        for part in passes:
            token_ids, lengths = padded([rows[i] for i in order[part]], self.reader.end)
            pooled = lengths[:, None, None] - self.reader.count + torch.arange(self.reader.count)
            inputs = token_ids.to(item_ids.device), pooled.to(item_ids.device)
            states.append(self.reader(*inputs) if keeps else recomputed(self.reader, *inputs))
        places = torch.from_numpy(np.argsort(order)).to(item_ids.device)
        return torch.cat(states)[places, 0]

    def _passes(self, lengths: np.ndarray, budget: int) -> Iterator[slice]:
        """Cut ascending lengths so that rows times longest stays within the budget."""
        start = 0
        for end in range(1, len(lengths) + 1):
            if end == len(lengths) or (end + 1 - start) * lengths[end] > budget:
                yield slice(start, end)
                start = end


class PromptedHistory(nn.Module):
    """`head(LLM(history, NEXT prompt, EOS))`: one state per history, as the paper's queries.

    The prompt replaces the last item's separator, so that a history of one item is read as in the
    pre-training.

    Args:
        reader: The LLM and its pooling, shared with the items.
        prompt: Token ids of the NEXT prompt.
        head: Maps pooled states to unit vectors.
    """

    def __init__(self, reader: PooledReader, *, prompt: Sequence[int], head: nn.Module) -> None:
        super().__init__()
        self.backbone = reader.backbone  # first: its weights are named as in other history encoders
        self.reader, self.head = reader, head
        suffix = torch.tensor([*prompt, *[reader.end] * reader.count])
        self.register_buffer("suffix", suffix, persistent=False)

    def forward(self, batch: HistoryBatch) -> Float[Tensor, "targets dim"]:
        """The unit vectors of the histories."""
        assert batch.token_ids is not None
        assert batch.boundaries is not None
        suffix = self.get_buffer("suffix")
        places = batch.boundaries.amax(1, keepdim=True) + torch.arange(len(suffix), device=suffix.device)
        padding = batch.token_ids.new_full((len(places), len(suffix)), self.reader.end)
        token_ids = torch.cat([batch.token_ids, padding], dim=1).scatter(1, places, suffix.expand_as(places))
        states = self.reader(token_ids, places[:, None, -self.reader.count :])
        return self.head(states[:, 0])


class LiveTextEncoders(Encoders):
    """One LLM and one pooling for both sides, ending in unit length; items are encoded in each step.

    With `data.supervision last` histories end in the NEXT prompt and give one state, as the paper's queries.
    Otherwise they give the state of each boundary, that of the item's separator, which is EOS.

    Args:
        backbone: The LLM, of both sides.
        dim: Width of the projector; None leaves it out, as in the paper.
        hidden: Width of the items' own perceptron; None shares the linear projector.
        whiten: Whiten each side's states, with statistics measured before training.
        dropout: On the states before the projector.
        self_prompt: Text after an item's text.
        next_prompt: Text after a history, with `data.supervision last`.
        pooled_tokens: Added tokens whose last states are pooled by their mean; 0 pools EOS, as histories do in any case
            with `data.supervision all`.

    Raises:
        InputError: When `hidden` is given without `dim`.
    """

    texts = frozenset({"histories", "items"})
    unit_length = True

    def __init__(
        self,
        backbone: LLM,
        *,
        dim: int | None = 128,
        hidden: int | None = None,
        whiten: bool = True,
        dropout: float = 0.1,
        self_prompt: str = SELF,
        next_prompt: str = NEXT,
        pooled_tokens: int = 0,
    ) -> None:
        check_dropout(dropout=dropout)
        check_sizes(dim=dim, hidden=hidden, pooled_tokens=pooled_tokens)
        if hidden is not None and dim is None:
            raise InputError(f"Expected model.encoders.dim with model.encoders.hidden, got hidden {hidden} and no dim")
        self.backbone, self.dim, self.hidden, self.whiten, self.dropout = backbone, dim, hidden, whiten, dropout
        self.self_prompt, self.next_prompt, self.pooled_tokens = self_prompt, next_prompt, pooled_tokens

    def item_tokens(self, data: RecDataModule) -> ItemTokenStore:
        """Tokens of what histories read."""
        return self.backbone.item_tokens(data.texts_read, max_tokens=data.max_item_tokens)

    def row_tokens(self, data: RecDataModule) -> int:
        """The NEXT prompt and its pooled tokens, less the separator that they replace."""
        if data.supervision != "last":
            return 0
        return len(self.backbone.tokens(self.next_prompt)) + max(self.pooled_tokens, 1) - 1

    def build(
        self, data: RecDataModule, *, device: torch.device, saved: Mapping[str, Tensor] | None = None
    ) -> tuple[TextHistory | PromptedHistory, LiveTextItems]:
        """The dual encoder; its `Whitened` parts have still to be measured: `measure_whitening`."""
        backbone = self.backbone.load(device)
        check_histories(backbone, data, behind=self.row_tokens(data))
        projector = item_projector = None
        if self.dim is not None:
            make = partial(Projector, backbone.hidden_size, self.dim, dropout=self.dropout, norm=not self.whiten)
            projector = make()
            item_projector = projector if self.hidden is None else make(hidden=self.hidden)
        tokens = self.backbone.item_tokens(data.split.item_texts, max_tokens=data.max_item_tokens)
        behind = len(self.backbone.tokens(self.self_prompt)) + max(self.pooled_tokens, 1) - 1
        backbone.check_positions(int(tokens.lengths.max()) + behind, "data.max_item_tokens")
        reader = PooledReader(backbone, end=tokens.separator, added_tokens=self.pooled_tokens)

        def head(projector: nn.Module | None) -> nn.Module:
            first = [Whitened(backbone.hidden_size)] if self.whiten else []
            return nn.Sequential(*first, *([] if projector is None else [projector]), UnitLength())

        items = LiveTextItems(
            reader,
            tokens=tokens,
            prompt=self.backbone.tokens(self.self_prompt),
            head=head(item_projector),
            batch_tokens=max(ITEM_TOKENS, data.batch_tokens // distributed.world_size()),
            held_tokens=lambda: data.held_tokens,
        )
        if data.supervision == "last":
            prompt = self.backbone.tokens(self.next_prompt)
            return PromptedHistory(reader, prompt=prompt, head=head(projector)), items
        return TextHistory(backbone, projector=head(projector), supervision="all"), items

    def read_items(
        self,
        texts: Sequence[str],
        read: Sequence[str],
        *,
        data: RecDataModule,
        history_encoder: nn.Module,
        item_encoder: nn.Module,
        device: torch.device,
    ) -> ItemsByText:
        """Their tokens, for both sides."""
        tokens, of_histories = (self.backbone.item_tokens(of, max_tokens=data.max_item_tokens) for of in (texts, read))
        return ItemsByText(len(texts), history_tokens=of_histories, item_tokens=tokens)
