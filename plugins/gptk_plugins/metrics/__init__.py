"""The built-in metrics, one per file."""

from typing import TYPE_CHECKING

from gptk_plugins._homes import names_of

if TYPE_CHECKING:
    from gptk_plugins.metrics.distinct import Distinct as Distinct
    from gptk_plugins.metrics.mean_logprob import MeanLogprob as MeanLogprob
    from gptk_plugins.metrics.self_bleu import SelfBLEU as SelfBLEU
    from gptk_plugins.metrics.seq_rep import SeqRep as SeqRep

_HOMES = {
    "Distinct": "distinct",
    "MeanLogprob": "mean_logprob",
    "SelfBLEU": "self_bleu",
    "SeqRep": "seq_rep",
}
__all__ = [*_HOMES]

if not TYPE_CHECKING:  # to a type checker a misspelt name is an error
    __getattr__ = names_of(__name__, _HOMES)
