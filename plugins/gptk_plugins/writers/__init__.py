"""The built-in weight writers, one per format."""

from typing import TYPE_CHECKING

from gptk_plugins._homes import names_of

if TYPE_CHECKING:
    from gptk_plugins.writers.gptk_format import Gptk as Gptk
    from gptk_plugins.writers.huggingface import HuggingFace as HuggingFace

_HOMES = {
    "Gptk": "gptk_format",
    "HuggingFace": "huggingface",
}
__all__ = [*_HOMES]

if not TYPE_CHECKING:  # to a type checker a misspelt name is an error
    __getattr__ = names_of(__name__, _HOMES)
