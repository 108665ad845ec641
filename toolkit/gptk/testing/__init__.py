"""The conformance kit: contracts that a plug-in's tests inherit (extra `gptk[testing]`).

    from gptk.testing import ProcessorContract

    class TestMine(ProcessorContract):
        make = Mine

pytest then runs every promise of that kind of plug-in on `Mine`, on examples that Hypothesis
makes. `make` is the plug-in's class, or a function without arguments that returns an instance. A
failure is a BrokenPromise that names the promise, with the smallest example found;
docs/contracts.md has all promises with their reasons.
"""

from gptk.testing._decoding import (
    DrafterContract,
    ProcessorContract,
    SamplerContract,
    ScorerContract,
    TruncationContract,
)
from gptk.testing._files import LoaderContract, TokenizerContract, WriterContract
from gptk.testing._promises import BrokenPromise, PluginContract
from gptk.testing._training import RegularizerContract, SchedulerContract
from gptk.testing.models import batches, logits, markov_lm, prompts, tiny_gpt, tiny_lm

__all__ = [
    "BrokenPromise",
    "DrafterContract",
    "LoaderContract",
    "PluginContract",
    "ProcessorContract",
    "RegularizerContract",
    "SamplerContract",
    "SchedulerContract",
    "ScorerContract",
    "TokenizerContract",
    "TruncationContract",
    "WriterContract",
    "batches",
    "logits",
    "markov_lm",
    "prompts",
    "tiny_gpt",
    "tiny_lm",
]
