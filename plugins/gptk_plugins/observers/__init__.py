"""The built-in observers, of decoding and of training."""

from typing import TYPE_CHECKING

from gptk_plugins._homes import names_of

if TYPE_CHECKING:
    from gptk_plugins.observers.tensorboard import TensorBoard as TensorBoard
    from gptk_plugins.observers.trace import Trace as Trace

_HOMES = {
    "TensorBoard": "tensorboard",
    "Trace": "trace",
}
__all__ = [*_HOMES]

if not TYPE_CHECKING:  # to a type checker a misspelt name is an error
    __getattr__ = names_of(__name__, _HOMES)
