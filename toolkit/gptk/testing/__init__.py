"""The conformance kit: contracts that tests of plug-ins and models inherit.

`pip install 'gptk-decoding[testing]'` installs what they need.

    from gptk.testing import ProcessorContract

    class TestMine(ProcessorContract):
        make = Mine

pytest then checks every promise of that kind of plug-in on `Mine`, with examples that Hypothesis
generates. `make` is the plug-in's class, or a function without arguments that returns an
instance. A failure is a BrokenPromise that names the promise, with the smallest example found;
docs/contracts.md has all promises with their reasons.
"""

from gptk.testing._drafter import DrafterContract
from gptk.testing._loader import LoaderContract
from gptk.testing._metric import MetricContract
from gptk.testing._model import ModelContract
from gptk.testing._observers import DecodingObserverContract, TrainingObserverContract
from gptk.testing._plugin import PluginContract
from gptk.testing._processor import ProcessorContract
from gptk.testing._promises import BrokenPromise
from gptk.testing._regularizer import RegularizerContract
from gptk.testing._sampler import SamplerContract
from gptk.testing._scheduler import SchedulerContract
from gptk.testing._scorer import ScorerContract
from gptk.testing._tokenizer import TokenizerContract
from gptk.testing._truncation import TruncationContract
from gptk.testing._writer import WriterContract
from gptk.testing.models import batches, logits, markov_lm, prompts, tiny_gpt, tiny_lm

__all__ = [
    "BrokenPromise",
    "DecodingObserverContract",
    "DrafterContract",
    "LoaderContract",
    "MetricContract",
    "ModelContract",
    "PluginContract",
    "ProcessorContract",
    "RegularizerContract",
    "SamplerContract",
    "SchedulerContract",
    "ScorerContract",
    "TokenizerContract",
    "TrainingObserverContract",
    "TruncationContract",
    "WriterContract",
    "batches",
    "logits",
    "markov_lm",
    "prompts",
    "tiny_gpt",
    "tiny_lm",
]
