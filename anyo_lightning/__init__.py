"""LLMs as pure encoders, nearest-neighbour search as the recommender.

What Python users import; each name is loaded on its first use, so that `import anyo_lightning` takes no time.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anyo_lightning.data.datamodule import RecDataModule as RecDataModule
    from anyo_lightning.encoders.adapted import AdaptedTextEncoders as AdaptedTextEncoders
    from anyo_lightning.encoders.base import Encoders as Encoders
    from anyo_lightning.encoders.hierarchical import HierarchicalEncoders as HierarchicalEncoders
    from anyo_lightning.encoders.ids import IdEncoders as IdEncoders
    from anyo_lightning.encoders.live import LiveTextEncoders as LiveTextEncoders
    from anyo_lightning.encoders.text import TextEncoders as TextEncoders
    from anyo_lightning.encoders.text_start import TextStartEncoders as TextStartEncoders
    from anyo_lightning.encoders.vectors import VectorEncoders as VectorEncoders
    from anyo_lightning.evaluation.callback import RetrievalMetrics as RetrievalMetrics
    from anyo_lightning.evaluation.index import ItemIndex as ItemIndex
    from anyo_lightning.llm.language_model import LLM as LLM
    from anyo_lightning.models.anyo import Anyo as Anyo
    from anyo_lightning.models.base import RetrievalModule as RetrievalModule
    from anyo_lightning.models.cllmrec import CLLMRec as CLLMRec
    from anyo_lightning.models.csft import CSFT as CSFT
    from anyo_lightning.models.e4srec import E4SRec as E4SRec
    from anyo_lightning.models.ensemble import Ensemble as Ensemble
    from anyo_lightning.models.floors import EASE as EASE
    from anyo_lightning.models.floors import Markov as Markov
    from anyo_lightning.models.floors import Popularity as Popularity
    from anyo_lightning.models.llara import LLaRA as LLaRA
    from anyo_lightning.models.llara_pretrain import LLaRAPretrain as LLaRAPretrain
    from anyo_lightning.models.sasrec import SASRec as SASRec
    from anyo_lightning.models.sracl import SRACL as SRACL
    from anyo_lightning.models.student import Student as Student
    from anyo_lightning.models.unisrec import UniSRec as UniSRec
    from anyo_lightning.serving.recommender import Recommender as Recommender

MODULES = {
    "data.datamodule": ["RecDataModule"],
    "encoders.adapted": ["AdaptedTextEncoders"],
    "encoders.base": ["Encoders"],
    "encoders.hierarchical": ["HierarchicalEncoders"],
    "encoders.ids": ["IdEncoders"],
    "encoders.live": ["LiveTextEncoders"],
    "encoders.text": ["TextEncoders"],
    "encoders.text_start": ["TextStartEncoders"],
    "encoders.vectors": ["VectorEncoders"],
    "evaluation.callback": ["RetrievalMetrics"],
    "evaluation.index": ["ItemIndex"],
    "llm.language_model": ["LLM"],
    "models.anyo": ["Anyo"],
    "models.base": ["RetrievalModule"],
    "models.cllmrec": ["CLLMRec"],
    "models.csft": ["CSFT"],
    "models.e4srec": ["E4SRec"],
    "models.ensemble": ["Ensemble"],
    "models.floors": ["EASE", "Markov", "Popularity"],
    "models.llara": ["LLaRA"],
    "models.llara_pretrain": ["LLaRAPretrain"],
    "models.sasrec": ["SASRec"],
    "models.sracl": ["SRACL"],
    "models.student": ["Student"],
    "models.unisrec": ["UniSRec"],
    "serving.recommender": ["Recommender"],
}
PLACES = {name: f"anyo_lightning.{module}" for module, names in MODULES.items() for name in names}
__all__ = [*PLACES]


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(PLACES[name]), name)
