"""Statistics of encoders that are measured once, before training: the whitening of states."""

from dataclasses import replace
from typing import TYPE_CHECKING

from anyo_lightning.encoders.whitening import Whitened
from anyo_lightning.llm.evaluation_mode import evaluating

if TYPE_CHECKING:
    from anyo_lightning.models.base import RetrievalModule

MEASURED = 4  # states of histories per dimension on which whitening is measured, if there are as many


def measure_whitening(module: "RetrievalModule") -> None:
    """Measure each `Whitened` part of the encoders that no checkpoint has filled, under the weights as they are.

    That of items on all items that occur in training; that of histories on training histories without their targets,
    until there are `MEASURED` states per dimension.

    Args:
        module: Built; its encoders lie on `build_device` afterwards, if there is something to measure.
    """
    for encoder in (module.item_encoder, module.history_encoder):
        for whitened in (part for part in encoder.modules() if isinstance(part, Whitened)):
            if whitened.measured:
                continue
            module.to(module.build_device)
            with evaluating(module):
                if encoder is module.item_encoder:
                    whitened.measure(lambda: module.item_encoder(module.training_items))
                else:
                    whitened.measure(lambda: _encode_some_histories(module))


def _encode_some_histories(module: "RetrievalModule") -> None:
    """Read training histories, without their targets, until there are enough states."""
    everyone = map(module.data.split.training_history, range(module.data.split.users))
    histories = [items[:-1] for items in everyone if len(items) > 1]
    states, width = 0, max(backbone.hidden_size for backbone in module.backbones)
    for start in range(0, len(histories), 8):
        batch = module.reading.collate(histories[start : start + 8]).to(module.device)
        states += len(module.history_encoder(replace(batch, target_mask=batch.item_mask)))
        if states >= MEASURED * width:
            break
