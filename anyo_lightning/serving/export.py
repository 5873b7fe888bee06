"""`export`: a finished run as a folder that transformers, peft, sentence-transformers, FAISS and numpy open.

    README.md               the model card, with the lines that give a history its list
    items.parquet           item_id, title, text, vector
    vectors.npy             the same vectors, (items, dim) float32
    items.faiss             an index of them; its ids are rows of the three files here
    items.json              item_id, title and text, in the same order
    recommender.json        how a history is read, and what is compared
    projectors.safetensors  linear maps behind the language model: user.*, and item.* where items have one
    item_inputs.npy         one input embedding per item, where the language model reads vectors
    config.json, model.safetensors, tokenizer.json   the language model with LoRA merged into it, cut to its layers
    adapter/, base/         LoRA by itself, and the frozen model where no hub has it
    modules.json, 1_*, 2_*  the item side for sentence-transformers

All is computed in float32, but for a quantised language model, which is left out and encodes as in the run. What a run
does not have, or what others could not open, is left out; the card says why.
"""

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from anyo_lightning.disk import folder_renamed_to, write_json
from anyo_lightning.encoders.items import FrozenTextItems
from anyo_lightning.encoders.live import LiveTextItems
from anyo_lightning.errors import InputError
from anyo_lightning.evaluation.index import ItemIndex
from anyo_lightning.llm.backbone import Backbone, load_tokenizer
from anyo_lightning.models.restored_run import RestoredRun, chosen_device, restore_run
from anyo_lightning.runs import RunFolder
from anyo_lightning.serving import user_side
from anyo_lightning.serving.exported_model import Base, in_float32, write_language_model
from anyo_lightning.serving.flat_heads import FlatHead, NotExpressibleError, flatten
from anyo_lightning.serving.hub import check_hub, push
from anyo_lightning.serving.model_card import Exported, model_card
from anyo_lightning.serving.recommender import Recommender
from anyo_lightning.serving.sentence_model import reads_histories_too, write_sentence_model


def export(
    run: Path, output: Path, *, index: str = "Flat", device: str | None = None, push_to_hub: str | None = None
) -> None:
    """Write a finished run for other libraries.

    Args:
        run: Run folder, trained and tested.
        output: Folder to write; one that exists is refused.
        index: FAISS factory string of the index; `Flat` is exact.
        device: Of the model while items are encoded, such as `cpu` or `cuda:0`; by default the first GPU if there is
            one.
        push_to_hub: Repository on the Hugging Face Hub, such as `me/my-recommender`, to which the folder is uploaded;
            made, private, where there is none.

    Raises:
        InputError: The folder exists, the run is not tested, cannot be restored or is of a floor, whose items have no
            vectors, FAISS cannot make the index, or the hub cannot be reached.
    """
    if output.exists():
        raise InputError(f"Expected --output to name a folder that does not exist, got {output}")
    metrics = RunFolder(run).read_metrics()
    if push_to_hub is not None:
        check_hub(push_to_hub)
    restored = restore_run(run, device=chosen_device(device))
    if not restored.model.trained:
        raise InputError(
            f"Expected a trained run, whose items have vectors to export, got {type(restored.model).__name__}, which "
            f"{'is made of several: export these' if restored.model.runs_read() else 'counts'}"
        )
    left_out: dict[str, str] = {}
    backbone = _readable(restored, left_out)
    recommender = Recommender(replace(restored, mixed=None))
    with folder_renamed_to(output) as folder:
        written = _write(recommender, backbone, folder, left_out, index=index)
        card = model_card(written, metrics, restored, folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
    for what, why in left_out.items():
        print(f"Left out: {what}, since {why}", file=sys.stderr)
    print(f"Wrote {len(recommender.item_ids):,} items, figures and what else the run has to {output}", file=sys.stderr)
    if push_to_hub is not None:
        push(output, push_to_hub)


def _readable(restored: RestoredRun, left_out: dict[str, str]) -> Backbone | None:
    """The language model that reads histories, computing in float32; None where there is none to write."""
    backbone = getattr(restored.model.history_encoder, "backbone", None)
    try:
        in_float32(restored.model.backbones)
    except NotExpressibleError as reason:
        left_out["the language model"] = str(reason)
        return None
    if not isinstance(backbone, Backbone):
        left_out["a language model"] = "none is left in the run: its vectors are frozen, or its items are ids"
        return None
    return backbone


def _write(
    recommender: Recommender, backbone: Backbone | None, folder: Path, left_out: dict[str, str], *, index: str
) -> Exported:
    """Everything but the card."""
    _write_items(recommender, folder, index=index)
    model, projectors = recommender.model, _item_maps(recommender)
    side, base, lines = None, None, None
    if backbone is not None:
        base = write_language_model(backbone, folder)
        tokenizer = load_tokenizer(*backbone.source)
        try:
            texts, most = recommender.data.split.item_texts, recommender.data.max_item_tokens
            write_sentence_model(model, tokenizer, texts, folder, max_item_tokens=most)
        except NotExpressibleError as reason:
            tokenizer.save_pretrained(str(folder))
            left_out["the item side for sentence-transformers"] = str(reason)
    try:
        side, head = user_side.describe(model.history_encoder, recommender.data)
        projectors |= _maps("user", head, single=True)
        if (inputs := user_side.item_inputs(model.history_encoder, len(recommender.item_ids))) is not None:
            np.save(folder / "item_inputs.npy", inputs.numpy())
        if base is not None:
            user_side.check_reading(AutoTokenizer.from_pretrained(str(folder)), recommender.data)
            frequent = np.argsort(-recommender.data.split.training_counts(), kind="stable")[:3]
            example = [recommender.item_ids[item] for item in frequent]  # a user's own history would be published
            hides = recommender.restored.history_masked
            lines = user_side.script(side, base, example, projected=bool(head.layers), hides=hides)
    except NotExpressibleError as reason:
        left_out["the user side in transformers"] = str(reason)
    if projectors:
        save_file(projectors, folder / "projectors.safetensors")
    write_json(folder / "recommender.json", _description(recommender, side, base))
    return Exported(base, lines, left_out, (folder / "modules.json").is_file())


def _write_items(recommender: Recommender, folder: Path, *, index: str) -> None:
    """Vectors with ids and texts, by themselves, and as an index."""
    vectors = np.ascontiguousarray(recommender.vectors.cpu().numpy(), dtype=np.float32)
    names = {"item_id": recommender.item_ids, "title": recommender.titles, "text": recommender.texts}
    table = pl.DataFrame(names, schema=dict.fromkeys(names, pl.String))
    width = vectors.shape[1]
    table = table.with_columns(pl.Series("vector", vectors, dtype=pl.Array(pl.Float32, width)))
    table.write_parquet(folder / "items.parquet")
    np.save(folder / "vectors.npy", vectors)
    ItemIndex(vectors, factory=index).write(folder / "items.faiss")
    write_json(folder / "items.json", names)


def _item_maps(recommender: Recommender) -> dict[str, Tensor]:
    """The linear maps of the item side, where it has some."""
    items = recommender.model.item_encoder
    try:
        if isinstance(items, LiveTextItems) and reads_histories_too(items, recommender.model):
            return _maps("item", flatten(items.head))
        if isinstance(items, FrozenTextItems):
            return _maps("item", flatten(items.projector))
    except NotExpressibleError:
        return {}
    return {}


def _maps(side: str, head: FlatHead, *, single: bool = False) -> dict[str, Tensor]:
    """A head's tensors by name: `user.weight`, or `item.0.weight` where there may be several layers."""
    named = {} if head.mean is None else {f"{side}.mean": head.mean}
    for number, layer in enumerate(head.layers):
        start = side if single else f"{side}.{number}"
        named |= {f"{start}.weight": layer.weight, f"{start}.bias": layer.bias}
    return {name: value.detach().float().cpu().contiguous() for name, value in named.items()}


def _description(recommender: Recommender, side: user_side.UserSide | None, base: Base | None) -> dict[str, Any]:
    """The content of recommender.json."""
    data, model = recommender.data, recommender.model
    lengths = recommender.vectors.norm(dim=1)
    unit = bool((lengths - 1).abs().max() < 1e-4) and side is not None and side.unit_length
    return {
        "model": type(model).__name__,
        "similarity": "inner product" + (", of vectors of length 1: the cosine" if unit else ""),
        "items": len(recommender.item_ids),
        "dim": recommender.vectors.shape[1],
        "hides_history": recommender.restored.history_masked,
        "item_text": data.template,
        "split": data.split.fingerprint,
        "base": None if base is None else asdict(base),
        "user": None if side is None else asdict(side),
    }
