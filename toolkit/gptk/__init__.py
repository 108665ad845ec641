"""gptk: decoding strategies for GPT models, each with every other, exactly.

    import gptk

    lm = gptk.load("smollm2")
    out = lm.generate("The capital of France is", sampler="beam:width=4", max_new_tokens=32)
    print(out.text, out.score)

Names below are imported on first use, so `import gptk` itself loads neither torch nor plug-ins.
"""

import importlib
from typing import TYPE_CHECKING

import pluggy

__version__ = "0.1.0"

hookimpl = pluggy.HookimplMarker("gptk")
"""Marks a plug-in's implementation of a hook from `gptk.hookspecs`."""

# Public name -> the module that defines it. The same names stand below for type checkers.
_HOMES = {
    "Acceptance": "decoding",
    "Checkpoint": "weights",
    "Choice": "sampling",
    "Comparison": "comparison",
    "DataError": "errors",
    "DecodeSession": "session",
    "Decoding": "decoding",
    "DecodingError": "errors",
    "DecodingListener": "observing",
    "DecodingObserver": "observing",
    "DecodingStep": "observing",
    "DeviceError": "errors",
    "Draft": "drafting",
    "Drafter": "drafting",
    "Evaluation": "evaluation",
    "FinishReason": "decoding",
    "Follower": "session",
    "GPT": "model",
    "GPTConfig": "model",
    "Generation": "generation",
    "GptkError": "errors",
    "IncompatibleError": "errors",
    "KVCache": "cache",
    "LRScheduler": "training",
    "LanguageModel": "language_model",
    "Levels": "quantization",
    "LogitsProcessor": "sampling",
    "OptionError": "errors",
    "Plugin": "plugins",
    "PluginError": "errors",
    "PluginWarning": "plugins",
    "PromptError": "errors",
    "RandomStream": "random",
    "Regularizer": "training",
    "gradient_norm": "training",
    "Rows": "session",
    "Sampler": "sampling",
    "Score": "generation",
    "Scorer": "sampling",
    "Settings": "language_model",
    "SourceError": "errors",
    "SpecError": "errors",
    "StopCondition": "decoding",
    "Stream": "language_model",
    "Tensors": "weights",
    "TokenFile": "data",
    "Tokenizer": "tokenizer",
    "TokenizerError": "errors",
    "TokenizerLoader": "tokenizer",
    "TrainingListener": "training",
    "TrainingObserver": "training",
    "TrainConfig": "train_config",
    "Trainer": "trainer",
    "TrainingError": "errors",
    "UnknownNameError": "errors",
    "WeightLoader": "weights",
    "WeightWriter": "weights",
    "Windows": "data",
    "best_checkpoint": "checkpoints",
    "build_model": "weights",
    "compare": "comparison",
    "default_source": "weights",
    "evaluate": "evaluation",
    "load": "language_model",
    "load_checkpoint": "weights",
    "load_tokenizer": "tokenizer",
    "prepare_tokens": "data",
}

__all__ = [
    *_HOMES,
    "plugins",
    "vocabulary",
    "__version__",
    "hookimpl",
]

if TYPE_CHECKING:
    from gptk import plugins as plugins
    from gptk import vocabulary as vocabulary
    from gptk.cache import KVCache as KVCache
    from gptk.checkpoints import best_checkpoint as best_checkpoint
    from gptk.comparison import Comparison as Comparison
    from gptk.comparison import compare as compare
    from gptk.data import TokenFile as TokenFile
    from gptk.data import Windows as Windows
    from gptk.data import prepare_tokens as prepare_tokens
    from gptk.decoding import Acceptance as Acceptance
    from gptk.decoding import Decoding as Decoding
    from gptk.decoding import FinishReason as FinishReason
    from gptk.decoding import StopCondition as StopCondition
    from gptk.drafting import Draft as Draft
    from gptk.drafting import Drafter as Drafter
    from gptk.errors import DataError as DataError
    from gptk.errors import DecodingError as DecodingError
    from gptk.errors import DeviceError as DeviceError
    from gptk.errors import GptkError as GptkError
    from gptk.errors import IncompatibleError as IncompatibleError
    from gptk.errors import OptionError as OptionError
    from gptk.errors import PluginError as PluginError
    from gptk.errors import PromptError as PromptError
    from gptk.errors import SourceError as SourceError
    from gptk.errors import SpecError as SpecError
    from gptk.errors import TokenizerError as TokenizerError
    from gptk.errors import TrainingError as TrainingError
    from gptk.errors import UnknownNameError as UnknownNameError
    from gptk.evaluation import Evaluation as Evaluation
    from gptk.evaluation import evaluate as evaluate
    from gptk.generation import Generation as Generation
    from gptk.generation import Score as Score
    from gptk.language_model import LanguageModel as LanguageModel
    from gptk.language_model import Settings as Settings
    from gptk.language_model import Stream as Stream
    from gptk.language_model import load as load
    from gptk.model import GPT as GPT
    from gptk.model import GPTConfig as GPTConfig
    from gptk.observing import DecodingListener as DecodingListener
    from gptk.observing import DecodingObserver as DecodingObserver
    from gptk.observing import DecodingStep as DecodingStep
    from gptk.plugins import Plugin as Plugin
    from gptk.plugins import PluginWarning as PluginWarning
    from gptk.quantization import Levels as Levels
    from gptk.random import RandomStream as RandomStream
    from gptk.sampling import Choice as Choice
    from gptk.sampling import LogitsProcessor as LogitsProcessor
    from gptk.sampling import Sampler as Sampler
    from gptk.sampling import Scorer as Scorer
    from gptk.session import DecodeSession as DecodeSession
    from gptk.session import Follower as Follower
    from gptk.session import Rows as Rows
    from gptk.tokenizer import Tokenizer as Tokenizer
    from gptk.tokenizer import TokenizerLoader as TokenizerLoader
    from gptk.tokenizer import load_tokenizer as load_tokenizer
    from gptk.train_config import TrainConfig as TrainConfig
    from gptk.trainer import Trainer as Trainer
    from gptk.training import LRScheduler as LRScheduler
    from gptk.training import Regularizer as Regularizer
    from gptk.training import TrainingListener as TrainingListener
    from gptk.training import TrainingObserver as TrainingObserver
    from gptk.training import gradient_norm as gradient_norm
    from gptk.weights import Checkpoint as Checkpoint
    from gptk.weights import Tensors as Tensors
    from gptk.weights import WeightLoader as WeightLoader
    from gptk.weights import WeightWriter as WeightWriter
    from gptk.weights import build_model as build_model
    from gptk.weights import default_source as default_source
    from gptk.weights import load_checkpoint as load_checkpoint


if not TYPE_CHECKING:  # to a type checker a misspelt name is an error

    def __getattr__(name: str) -> object:
        if name in ("plugins", "vocabulary"):
            return importlib.import_module(f"gptk.{name}")
        if name not in _HOMES:
            raise AttributeError(f"module 'gptk' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"gptk.{_HOMES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
