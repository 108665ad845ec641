"""The built-in scorers, one per file."""

from typing import TYPE_CHECKING

from gptk_plugins._homes import names_of

if TYPE_CHECKING:
    from gptk_plugins.scorers.mean_logprob import MeanLogprob as MeanLogprob

_HOMES = {
    "MeanLogprob": "mean_logprob",
}
__all__ = [*_HOMES]

if not TYPE_CHECKING:  # to a type checker a misspelt name is an error
    __getattr__ = names_of(__name__, _HOMES)
