"""The dual encoder: one LLM reads histories and items, and both are unit vectors.

A text is read with a prompt and pooled tokens behind it: `text, prompt, EOS`. The SELF prompt asks for the text itself
(items), the NEXT prompt for what follows it (histories). The text is cut before anything is appended, so that the
pooled token is always there, and its position is computed, never found from the right.

History and items are two forward passes: rows of hundreds of tokens and rows of twenty in one would be mostly padding.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from anyo_lightning import distributed
from anyo_lightning.data.batches import HistoryBatch
from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.data.tokens import ItemTokenStore, padded
from anyo_lightning.disk import cache_folder
from anyo_lightning.encoders.history import TextHistory
from anyo_lightning.encoders.pooling import PooledReader
from anyo_lightning.encoders.projector import UnitLength
from anyo_lightning.encoders.whitening import Whitened
from anyo_lightning.llm.backbone import Backbone, load_tokenizer
from anyo_lightning.llm.evaluation_mode import evaluating

SELF = " This one."
NEXT = " The next one."
ITEM_TOKENS = 8192  # padded tokens of a pass over items: few enough for the memory, enough for the matrix products


class LiveTextItems(nn.Module):
    """`head(LLM(item text, SELF prompt, EOS))`, encoded anew in each call, with LoRA's gradients.

    Items are read in passes of like length. Where the LLM has nothing trained, its states never change: they are
    computed once, for the whole catalogue, and only the head is applied anew.

    Args:
        reader: The LLM and its pooling, shared with the history side.
        tokens: The items' texts; each ends in a separator, which is left out.
        prompt: Token ids of the SELF prompt.
        head: Maps pooled states to unit vectors.
        batch_tokens: Most padded tokens of a pass.
        recompute: Keep no activations of a pass: compute them again in the backward pass.
    """

    def __init__(
        self,
        reader: PooledReader,
        *,
        tokens: ItemTokenStore,
        prompt: Sequence[int],
        head: nn.Module,
        batch_tokens: int = ITEM_TOKENS,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.reader, self.head = reader, head
        self.tokens, self.batch_tokens, self.recompute = tokens, batch_tokens, recompute
        self.suffix = np.array([*prompt, *[reader.end] * reader.count])
        self.frozen = not any(parameter.requires_grad for parameter in reader.parameters())
        self._kept: tuple[ItemTokenStore, Tensor] | None = None  # states, and the texts that they are of

    def forward(self, item_ids: Int[Tensor, " items"]) -> Float[Tensor, "items dim"]:
        """The unit vectors of these items."""
        if not self.frozen:
            return self.head(self._encode(item_ids))
        if self._kept is None or self._kept[0] is not self.tokens:
            with evaluating(self.reader):  # these are kept: without the LLM's own dropout
                everything = torch.arange(len(self.tokens.lengths), device=item_ids.device)
                self._kept = self.tokens, self._encode(everything)
        return self.head(self._kept[1].to(item_ids.device)[item_ids])

    def token_count(self, item_ids: Int[Tensor, " items"]) -> int:
        """Tokens that are read to encode these items in a step."""
        if self.frozen:
            return 0
        return int(self.tokens.lengths[item_ids.cpu()].sum()) + len(item_ids) * (len(self.suffix) - 1)

    def texts(self, item_ids: Int[Tensor, " items"]) -> list[np.ndarray]:
        """The tokens of each item's text, without its separator."""
        return [self.tokens.span(item)[:-1] for item in item_ids.tolist()]

    def _encode(self, item_ids: Int[Tensor, " items"]) -> Float[Tensor, "items width"]:
        if not len(item_ids):
            return torch.zeros(0, self.reader.backbone.hidden_size, device=item_ids.device)
        rows = [np.append(text, self.suffix) for text in self.texts(item_ids)]
        sizes = np.array([len(row) for row in rows])
        order = np.argsort(sizes, kind="stable")
        passes, states = list(self._passes(sizes[order])), []
        if self.reader.backbone.sharded:
            passes = distributed.as_many(passes, item_ids.device)  # repeats come last, and are not read below
        for part in passes:
            token_ids, lengths = padded([rows[i] for i in order[part]], self.reader.end)
            pooled = lengths[:, None, None] - self.reader.count + torch.arange(self.reader.count)
            inputs = token_ids.to(item_ids.device), pooled.to(item_ids.device)
            states.append(recomputed(self.reader, *inputs) if self.recompute else self.reader(*inputs))
        places = torch.from_numpy(np.argsort(order)).to(item_ids.device)
        return torch.cat(states)[places, 0]

    def _passes(self, lengths: np.ndarray) -> Iterator[slice]:
        """Cut ascending lengths so that rows times longest stays within the budget."""
        start = 0
        for end in range(1, len(lengths) + 1):
            if end == len(lengths) or (end + 1 - start) * lengths[end] > self.batch_tokens:
                yield slice(start, end)
                start = end


class PromptedHistory(nn.Module):
    """`head(LLM(history, NEXT prompt, EOS))`: one state a history, as the paper's queries.

    The prompt stands in the place of the last item's separator, so that a history of one item is read as in the
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


def live_encoders(
    backbone: Backbone,
    data: RecDataModule,
    *,
    self_prompt: str,
    next_prompt: str,
    pooled_tokens: int,
    prompted: bool,
    whiten: bool = False,
    projector: nn.Module | None = None,
    item_projector: nn.Module | None = None,
    chunk_tokens: int | None = None,
) -> tuple[TextHistory | PromptedHistory, LiveTextItems]:
    """The history encoder and the item encoder, of one LLM and one pooling, ending in unit length.

    Prompted histories end in the NEXT prompt and give one state. Others give the state of each boundary, that of the
    item's separator, which is EOS.

    Args:
        backbone: The LLM.
        data: The data module, set up; histories carry tokens.
        self_prompt: Text behind an item's text.
        next_prompt: Text behind a prompted history.
        pooled_tokens: How many tokens to add and pool; 0 pools EOS.
        prompted: Whether histories are.
        whiten: Begin each side's head with `Whitened`, yet to be measured.
        projector: Maps pooled states of histories to the space of inner products; None leaves them there.
        item_projector: The same for items; it may be the same one.
        chunk_tokens: Items are read in passes of at most so many tokens, whose activations are not kept.
    """
    assert data.tokens is not None
    tokenizer = load_tokenizer(*backbone.source)

    def tokenize(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False)["input_ids"]

    reader = PooledReader(backbone, end=data.tokens.separator, added_tokens=pooled_tokens)

    def head(projector: nn.Module | None) -> nn.Module:
        first = [Whitened(backbone.hidden_size)] if whiten else []
        return nn.Sequential(*first, *([] if projector is None else [projector]), UnitLength())

    items = LiveTextItems(
        reader,
        tokens=ItemTokenStore.build(
            data.split.item_texts,
            tokenize,
            separator=data.tokens.separator,
            max_tokens=data.max_item_tokens,
            folder=cache_folder() / "tokens",
            identity=f"{backbone.identity['name']} {backbone.identity['revision']}",
        ),
        prompt=prompt_tokens(backbone, self_prompt),
        head=head(item_projector),
        batch_tokens=chunk_tokens or ITEM_TOKENS,
        recompute=chunk_tokens is not None,
    )
    if prompted:
        return PromptedHistory(reader, prompt=prompt_tokens(backbone, next_prompt), head=head(projector)), items
    return TextHistory(backbone, projector=head(projector), supervision="all"), items


def prompt_tokens(backbone: Backbone, prompt: str) -> list[int]:
    """The tokens of a prompt; none of an empty one."""
    tokens: list[int] = load_tokenizer(*backbone.source)(prompt, add_special_tokens=False)["input_ids"]
    return tokens


def recomputed(encode: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`encode(*inputs)` without keeping its activations: the backward pass computes them again, dropout and all.

    Gradient caching is this for each chunk of a batch: first representations of all chunks without activations, then
    the loss's gradient with respect to them, then chunk by chunk the activations and the gradient of the weights.
    Autograd does it in one backward pass, so that clipping, accumulation and DDP's one reduction a step stay
    Lightning's own, and gradients are those of the direct pass. (On a GPU its random state is kept for dropout
    only where an input is a tensor there.)

    Reference: Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup (arXiv 2101.06983).
    """
    states: Tensor = checkpoint(encode, *inputs, use_reentrant=False)
    return states
