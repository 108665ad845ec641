"""Linear warmup, then cosine (GPT-3, Brown et al. 2020; nanoGPT): `cosine` with a warmup.

η = (step + 1) / (warmup + 1) during warmup; then (Loshchilov & Hutter 2017)
η = floor + (1 - floor) · (1 + cos πt) / 2, t from 0 at the peak to 1 at the last step.
"""

from gptk_plugins.schedulers._default_warmup import DefaultWarmup
from gptk_plugins.schedulers.cosine import Cosine


class WarmupCosine(DefaultWarmup, Cosine):
    """A linear rise, then half a cosine wave to the floor, as GPT-3 and nanoGPT are trained.

    The warmup takes 100 steps by default, and at most half of the run.
    """

    name = "warmup-cosine"
    example = "warmup=100,floor=0.1"
