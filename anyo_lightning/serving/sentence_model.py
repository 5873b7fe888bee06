"""The item side as a sentence-transformers model: Transformer, Pooling, Dense, Normalize.

Its files are written by hand, so that an export needs no further package. What is read of an item, its text cut at a
length, then the prompt and the pooled token, is in the tokenizer's post-processor, which cuts texts before it appends.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from anyo_lightning.disk import write_json
from anyo_lightning.encoders.live import LiveTextItems
from anyo_lightning.models.base import RetrievalModule
from anyo_lightning.serving.exported_model import check_tokenizer
from anyo_lightning.serving.flat_heads import FlatHead, NotExpressibleError, flatten

MODULES = "sentence_transformers.models."  # the names that all versions read
WEIGHTS = "model.safetensors"


def write_sentence_model(
    model: RetrievalModule, tokenizer: Any, texts: list[str], folder: Path, *, max_item_tokens: int
) -> None:
    """Write `modules.json` and all that it names beside the merged weights, and the tokenizer.

    Args:
        model: The run's model.
        tokenizer: Of its language model.
        texts: The catalogue's, by which it is seen whether the tokenizer reads them as the run does.
        folder: Holds the merged weights.
        max_item_tokens: Most tokens of an item's text, its separator included.

    Raises:
        NotExpressibleError: The item side is something else than a pooled token's state through a projector; nothing
            but a tokenizer is written then.
    """
    items, head = _live_items(model)
    longest = max_item_tokens - 1 + len(items.suffix)
    written = with_suffix(tokenizer, items.suffix.tolist())
    written.save_pretrained(str(folder))
    _check_rows(AutoTokenizer.from_pretrained(str(folder)), items, texts, longest)
    steps: list[tuple[str, str, dict[str, Any], dict[str, Tensor]]] = [
        ("Pooling", "Pooling", {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, {})
    ]
    width = model.backbones[0].hidden_size
    steps[0][2]["word_embedding_dimension"] = width
    if head.layer_norm:
        steps.append(("LayerNorm", "LayerNorm", {"dimension": width}, _norm(width)))
    if head.mean is not None:  # by a product with 1: in float32 a bias behind the layer would lose digits
        steps.append(_dense("Centre", torch.eye(width), -head.mean, gelu=False))
    for number, layer in enumerate(head.layers, start=1):
        steps.append(_dense("Dense", layer.weight, layer.bias, gelu=number < len(head.layers)))
    if head.unit_length:
        steps.append(("Normalize", "Normalize", {}, {}))
    modules = [{"idx": 0, "name": "0", "path": "", "type": f"{MODULES}Transformer"}]
    for number, (name, kind, settings, weights) in enumerate(steps, start=1):
        path = f"{number}_{name}"
        (folder / path).mkdir()
        if settings:
            write_json(folder / path / "config.json", settings)
        if weights:
            save_file({name: value.float().contiguous() for name, value in weights.items()}, folder / path / WEIGHTS)
        modules.append({"idx": number, "name": str(number), "path": path, "type": f"{MODULES}{kind}"})
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": longest, "do_lower_case": False})
    write_json(folder / "config_sentence_transformers.json", {"similarity_fn_name": "dot", "prompts": {}})
    write_json(folder / "modules.json", modules)


def reads_histories_too(items: LiveTextItems, model: RetrievalModule) -> bool:
    """Whether the language model of the items is that of the histories, which an export holds.

    Args:
        items: The model's item encoder.
        model: The run's.
    """
    return items.reader.backbone is getattr(model.history_encoder, "backbone", None)


def with_suffix(tokenizer: Any, suffix: list[int]) -> PreTrainedTokenizerFast:
    """The same tokenizer, which appends tokens to each text by itself, after the text was cut.

    Args:
        tokenizer: Of the run's language model.
        suffix: Token ids.

    Raises:
        NotExpressibleError: It is not one of the library `tokenizers`.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise NotExpressibleError("its tokenizer is not one of the library tokenizers")
    own = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    own.no_truncation()
    own.no_padding()
    tokens = tokenizer.convert_ids_to_tokens(suffix)
    own.post_processor = TemplateProcessing(
        single="$A suffix", special_tokens=[{"id": "suffix", "ids": suffix, "tokens": tokens}]
    )
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    written = PreTrainedTokenizerFast(tokenizer_object=own, **special)
    written.padding_side = "right"
    return written


def _live_items(model: RetrievalModule) -> tuple[LiveTextItems, FlatHead]:
    """The item encoder and its head, where they fit."""
    items = model.item_encoder
    if not isinstance(items, LiveTextItems):
        raise NotExpressibleError(
            "its item vectors are not one text encoder's: they are made of frozen text vectors that were whitened over "
            "this catalogue, of free rows, or of both"
        )
    if type(model).encode_items is not RetrievalModule.encode_items:
        raise NotExpressibleError(f"items of {type(model).__name__} are not states of the language model")
    if not reads_histories_too(items, model):
        raise NotExpressibleError("its items are read by a second language model, which is not in the export")
    if items.reader.added is not None:
        raise NotExpressibleError("it pools tokens that were added to the language model, by their mean")
    return items, flatten(items.head)


def _check_rows(tokenizer: Any, items: LiveTextItems, texts: list[str], longest: int) -> None:
    """Refuse a tokenizer that reads the catalogue's texts otherwise than the run."""
    found = tokenizer(texts, truncation=True, max_length=longest)["input_ids"]
    ids = torch.arange(len(texts))
    rows = [[*text.tolist(), *items.suffix.tolist()] for text in items.texts(ids)]
    check_tokenizer(found, rows)


def _dense(
    name: str, weight: Tensor, bias: Tensor, *, gelu: bool
) -> tuple[str, str, dict[str, Any], dict[str, Tensor]]:
    settings = {
        "in_features": weight.shape[1],
        "out_features": weight.shape[0],
        "bias": True,
        "activation_function": f"torch.nn.modules.{'activation.GELU' if gelu else 'linear.Identity'}",
    }
    return name, "Dense", settings, {"linear.weight": weight, "linear.bias": bias}


def _norm(width: int) -> dict[str, Tensor]:
    return {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
