"""The built-in regularizers, one per file."""

from typing import TYPE_CHECKING

from gptk_plugins._homes import names_of

if TYPE_CHECKING:
    from gptk_plugins.regularizers.confidence_penalty import ConfidencePenalty as ConfidencePenalty
    from gptk_plugins.regularizers.dropout import Dropout as Dropout
    from gptk_plugins.regularizers.ema import EMA as EMA
    from gptk_plugins.regularizers.grad_clip import GradClip as GradClip
    from gptk_plugins.regularizers.l1 import L1 as L1
    from gptk_plugins.regularizers.label_smoothing import LabelSmoothing as LabelSmoothing
    from gptk_plugins.regularizers.weight_decay import WeightDecay as WeightDecay
    from gptk_plugins.regularizers.z_loss import ZLoss as ZLoss

_HOMES = {
    "ConfidencePenalty": "confidence_penalty",
    "Dropout": "dropout",
    "EMA": "ema",
    "GradClip": "grad_clip",
    "L1": "l1",
    "LabelSmoothing": "label_smoothing",
    "WeightDecay": "weight_decay",
    "ZLoss": "z_loss",
}
__all__ = [*_HOMES]

if not TYPE_CHECKING:  # to a type checker a misspelt name is an error
    __getattr__ = names_of(__name__, _HOMES)
