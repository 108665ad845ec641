"""The built-in samplers, one per file."""

from typing import TYPE_CHECKING

from gptk_plugins._homes import names_of

if TYPE_CHECKING:
    from gptk_plugins.samplers.beam import Beam as Beam
    from gptk_plugins.samplers.beam_sample import BeamSample as BeamSample
    from gptk_plugins.samplers.best_of_n import BestOfN as BestOfN
    from gptk_plugins.samplers.contrastive import Contrastive as Contrastive
    from gptk_plugins.samplers.diverse_beam import DiverseBeam as DiverseBeam
    from gptk_plugins.samplers.dola import DoLa as DoLa
    from gptk_plugins.samplers.greedy import Greedy as Greedy
    from gptk_plugins.samplers.min_p import MinPSampler as MinPSampler
    from gptk_plugins.samplers.mirostat import Mirostat as Mirostat
    from gptk_plugins.samplers.multinomial import Multinomial as Multinomial
    from gptk_plugins.samplers.stochastic_beam import StochasticBeam as StochasticBeam
    from gptk_plugins.samplers.top_k import TopKSampler as TopKSampler
    from gptk_plugins.samplers.top_p import TopPSampler as TopPSampler
    from gptk_plugins.samplers.typical import TypicalSampler as TypicalSampler

_HOMES = {
    "Beam": "beam",
    "BeamSample": "beam_sample",
    "BestOfN": "best_of_n",
    "Contrastive": "contrastive",
    "DiverseBeam": "diverse_beam",
    "DoLa": "dola",
    "Greedy": "greedy",
    "MinPSampler": "min_p",
    "Mirostat": "mirostat",
    "Multinomial": "multinomial",
    "StochasticBeam": "stochastic_beam",
    "TopKSampler": "top_k",
    "TopPSampler": "top_p",
    "TypicalSampler": "typical",
}
__all__ = [*_HOMES]

if not TYPE_CHECKING:  # to a type checker a misspelt name is an error
    __getattr__ = names_of(__name__, _HOMES)
