"""Linear warmup, then cosine (GPT-3, Brown et al. 2020; nanoGPT): `cosine`, warmed up by default.

η = (step + 1) / (warmup + 1) in warmup; after it (Loshchilov & Hutter 2017)
η = floor + (1 - floor) · (1 + cos πt) / 2, t from 0 at the peak to 1 at the last step.
"""

from gptk_plugins.schedulers._warming import Warming
from gptk_plugins.schedulers.cosine import Cosine


class WarmupCosine(Warming, Cosine):
    """A linear rise, then half a cosine wave to the floor, as GPT-3 and nanoGPT are trained.

    The rise takes 100 steps unless told otherwise, and never more than half of the run.
    """

    name = "warmup-cosine"
    example = "warmup=100,floor=0.1"
