"""The built-in LR schedulers, one per file."""

from typing import TYPE_CHECKING

from gptk_plugins._homes import names_of

if TYPE_CHECKING:
    from gptk_plugins.schedulers.constant import Constant as Constant
    from gptk_plugins.schedulers.cosine import Cosine as Cosine
    from gptk_plugins.schedulers.inverse_sqrt import InverseSqrt as InverseSqrt
    from gptk_plugins.schedulers.linear import Linear as Linear
    from gptk_plugins.schedulers.one_cycle import OneCycle as OneCycle
    from gptk_plugins.schedulers.polynomial import Polynomial as Polynomial
    from gptk_plugins.schedulers.torch_schedulers import Torch as Torch
    from gptk_plugins.schedulers.warmup_cosine import WarmupCosine as WarmupCosine
    from gptk_plugins.schedulers.warmup_stable_decay import WarmupStableDecay as WarmupStableDecay

_HOMES = {
    "Constant": "constant",
    "Cosine": "cosine",
    "InverseSqrt": "inverse_sqrt",
    "Linear": "linear",
    "OneCycle": "one_cycle",
    "Polynomial": "polynomial",
    "Torch": "torch_schedulers",
    "WarmupCosine": "warmup_cosine",
    "WarmupStableDecay": "warmup_stable_decay",
}
__all__ = [*_HOMES]

if not TYPE_CHECKING:  # to a type checker a misspelt name is an error
    __getattr__ = names_of(__name__, _HOMES)
