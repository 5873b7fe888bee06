"""A history's query in plain transformers, peft and numpy: what must be known of the run, and the lines that do it."""

import json
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from anyo_lightning.data.datamodule import RecDataModule
from anyo_lightning.encoders.history import ItemTokenHistory, TextHistory
from anyo_lightning.encoders.live import PromptedHistory
from anyo_lightning.serving.exported_model import Base, check_tokenizer
from anyo_lightning.serving.flat_heads import FlatHead, NotExpressibleError, flatten


@dataclass(frozen=True)
class UserSide:
    """How the language model reads a history, and what becomes of its last state.

    Attributes:
        reads: The column of the items that is read as text; None: one vector per item.
        injected: Whether each item's vector, a row of item_inputs.npy, is an input embedding: in the place of its
            separator, or by itself where no text is read.
        before: Token ids before the items.
        after: Token ids after them, behind the last one; of a text they replace its separator.
        separator: Token id that ends each item's text.
        max_items: Most items that are read, the latest.
        max_tokens: Most tokens of the items that are read, separators included; older items are left out whole.
        max_item_tokens: Most tokens of one item's text, its separator included.
        layer_norm: Whether the state is brought to mean 0 and variance 1.
        centred: Whether user.mean is subtracted then.
        unit_length: Whether the query is scaled to length 1.
    """

    reads: str | None
    injected: bool
    before: list[int]
    after: list[int]
    separator: int | None
    max_items: int
    max_tokens: int | None
    max_item_tokens: int | None
    layer_norm: bool
    centred: bool
    unit_length: bool


def describe(encoder: nn.Module, data: RecDataModule) -> tuple[UserSide, FlatHead]:
    """What a history encoder does.

    Args:
        encoder: Of a run.
        data: The data that the run has read, with its tokens.

    Raises:
        NotExpressibleError: It is not a language model that reads texts or vectors, with a linear projector.
    """
    before: list[int] = []
    after: list[int] = []
    injected = False
    if isinstance(encoder, TextHistory):
        head, injected = flatten(encoder.projector), encoder.injection is not None
    elif isinstance(encoder, PromptedHistory):
        if encoder.reader.added is not None:
            raise NotExpressibleError("it pools tokens that were added to the language model")
        head, after = flatten(encoder.head), encoder.get_buffer("suffix").tolist()
    elif isinstance(encoder, ItemTokenHistory):
        head, injected, before = flatten(encoder.projector), True, encoder.get_buffer("prompt").tolist()
        after = encoder.get_buffer("response").tolist() if encoder.supervision == "last" else []
    else:
        raise NotExpressibleError("no language model reads its histories, but a small transformer of anyo-lightning")
    if len(head.layers) > 1:
        raise NotExpressibleError("its projector has a hidden layer")
    longest, tokens = data.longest_history(), data.tokens
    return UserSide(
        reads=None if tokens is None else "title" if data.titles_only else "text",
        injected=injected,
        before=before,
        after=after,
        separator=None if tokens is None else tokens.separator,
        max_items=min(data.max_items, longest) if tokens is None else data.max_items,
        max_tokens=None if tokens is None else longest,
        max_item_tokens=None if tokens is None else data.max_item_tokens,
        layer_norm=head.layer_norm,
        centred=head.mean is not None,
        unit_length=head.unit_length,
    ), head


def item_inputs(encoder: nn.Module, items: int) -> Float[Tensor, "items hidden"] | None:
    """The input embedding that stands for each item; None where there are texts alone.

    Args:
        encoder: A history encoder, in evaluation mode.
        items: Size of the catalogue.
    """
    injection = getattr(encoder, "injection", None)
    if injection is None:
        return None
    device = next(injection.parameters()).device
    with torch.no_grad():
        embeddings: Tensor = injection(torch.arange(items, device=device))
    return embeddings.float().cpu()


def check_reading(tokenizer: Any, data: RecDataModule) -> None:
    """Refuse a tokenizer by which the script would read other tokens than the run.

    Args:
        tokenizer: Opened from the exported folder.
        data: The data that the run has read; where histories are not read as text, there is nothing to check.

    Raises:
        NotExpressibleError: It reads some of the catalogue's texts otherwise.
    """
    if (tokens := data.tokens) is None:
        return
    read: list[list[int]] = tokenizer(data.texts_read, add_special_tokens=False)["input_ids"]
    found = [[*text[: data.max_item_tokens - 1], tokens.separator] for text in read]
    check_tokenizer(found, [tokens.span(item).tolist() for item in range(len(found))])


def script(side: UserSide, base: Base, history: list[str], *, projected: bool, hides: bool) -> str:
    """The lines that give a history its list from the exported folder.

    Args:
        side: As `describe` gives it.
        base: Where the frozen model is.
        history: Item ids of an example.
        projected: Whether a linear map follows the state.
        hides: Whether the items of the history are left out of its list.
    """
    loads = projected or side.centred
    imports = ["from peft import PeftModel"] if base.adapted else []
    if loads:
        imports.append("from safetensors.numpy import load_file")
    names = ["AutoModel"]
    if base.adapted and base.revision is not None:
        names.insert(0, "AutoConfig")
    if side.reads is not None:
        names.append("AutoTokenizer")
    lines = [
        *("import json", "import numpy as np", "import torch", *imports),
        f"from transformers import {', '.join(names)}",
        "",
        f'folder, history = ".", {json.dumps(history, ensure_ascii=False)}  # this folder; item ids, oldest first',
        'user = json.load(open(f"{folder}/recommender.json", encoding="utf-8"))["user"]',
        'items = json.load(open(f"{folder}/items.json", encoding="utf-8"))',
        *_loading(base),
        'vectors = np.load(f"{folder}/vectors.npy")',
        *(['head = load_file(f"{folder}/projectors.safetensors")'] if loads else []),
        'places = [items["item_id"].index(item) for item in history]',
        'read = places[-user["max_items"] :]',
        *_reading(side),
        *(["state = (state - state.mean()) / np.sqrt(state.var() + 1e-5)"] if side.layer_norm else []),
        _projecting(side, projected),
        *(["query = query / np.linalg.norm(query)"] if side.unit_length else []),
        "scores = vectors @ query",
        *(["scores[places] = -np.inf  # leave out what the history has"] if hides else []),
        'print([(items["title"][place], scores[place]) for place in np.argsort(-scores, kind="stable")[:10]])',
    ]
    return "\n".join(lines) + "\n"


def _projecting(side: UserSide, projected: bool) -> str:
    centred = 'state - head["user.mean"]' if side.centred else "state"
    if not projected:
        return f"query = {centred}"
    return f'query = head["user.weight"] @ {f"({centred})" if side.centred else centred} + head["user.bias"]'


def _loading(base: Base) -> list[str]:
    if not base.adapted:
        return ["model = AutoModel.from_pretrained(folder).eval()"]
    if base.revision is None:
        frozen = 'AutoModel.from_pretrained(f"{folder}/base", dtype="auto").float()'
        return [f'model = PeftModel.from_pretrained({frozen}, f"{{folder}}/adapter").eval()']
    return [
        "config = AutoConfig.from_pretrained(folder)  # its number of layers",
        f'base = AutoModel.from_pretrained("{base.name}", revision="{base.revision}", config=config, '
        f"dtype=torch.{base.dtype}).float()",
        'model = PeftModel.from_pretrained(base, f"{folder}/adapter").eval()',
    ]


def _reading(side: UserSide) -> list[str]:
    inputs = 'torch.from_numpy(np.load(f"{folder}/item_inputs.npy")[read])'
    if side.reads is None:
        return [
            "embed = model.get_input_embeddings()",
            "with torch.no_grad():",
            '    before, after = (embed(torch.tensor(user[part], dtype=torch.long)) for part in ("before", "after"))',
            f"    embeddings = torch.cat([before, {inputs}, after])",
            "    state = model(inputs_embeds=embeddings[None]).last_hidden_state[0, -1].numpy()",
        ]
    behind = 'sum(spans, [])[:-1] + user["after"]' if side.after else "sum(spans, [])"
    lines = [
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f'texts = [tokenizer(items["{side.reads}"][place], add_special_tokens=False)["input_ids"] for place in read]',
        'spans = [text[: user["max_item_tokens"] - 1] + [user["separator"]] for text in texts]',
        'while len(spans) > 1 and sum(map(len, spans)) > user["max_tokens"]:  # the oldest items go first',
        "    del spans[0], read[0]",
        f"tokens = torch.tensor({behind})",
        "with torch.no_grad():",
    ]
    if not side.injected:
        return [*lines, "    state = model(tokens[None]).last_hidden_state[0, -1].numpy()"]
    return [
        *lines,
        "    embeddings = model.get_input_embeddings()(tokens)",
        f"    embeddings[np.cumsum([len(span) for span in spans]) - 1] = {inputs}",
        "    state = model(inputs_embeds=embeddings[None]).last_hidden_state[0, -1].numpy()",
    ]
