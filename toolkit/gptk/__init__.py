"""gptk: decoding strategies for GPT models, each combines with every other, exactly.

    import gptk

    lm = gptk.load("smollm2")
    out = lm.generate("The capital of France is", sampler="beam:width=4", max_new_tokens=32)
    print(out.text, out.score)

Names below are imported on first use, so `import gptk` itself loads neither torch nor plug-ins.
"""

import importlib
import logging
from typing import TYPE_CHECKING

import pluggy

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())  # a program chooses what is shown

hookimpl = pluggy.HookimplMarker("gptk")
"""Marks a plug-in's implementation of a hook from `gptk.hooks.hookspecs`."""

# Public name -> the module that defines it. For type checkers they are imported below.
_HOMES = {
    "Acceptance": "decoding.speculation",
    "best_checkpoint": "runs.checkpoints",
    "check_run_file": "runs.checkpoints",
    "build_model": "weights.building",
    "ByteLevelBPE": "text.encoding",
    "CausalModel": "model.protocol",
    "check_settings": "decoding.settings",
    "CheckedSettings": "decoding.settings",
    "Checkpoint": "hooks.weights",
    "Choice": "hooks.choice",
    "compare": "measure.comparison",
    "Comparison": "measure.comparison",
    "ContinuationScore": "engine.scoring",
    "DataError": "errors",
    "DecodeSession": "session.session",
    "Decoding": "decoding.run",
    "DecodingError": "errors",
    "DecodingListener": "hooks.observing",
    "DecodingObserver": "hooks.observing",
    "DecodingStep": "hooks.observing",
    "default_source": "weights.loading",
    "DeviceError": "errors",
    "Draft": "hooks.drafting",
    "Drafter": "hooks.drafting",
    "evaluate": "measure.evaluation",
    "Evaluation": "measure.evaluation",
    "FinishReason": "hooks.results",
    "Follower": "session.rows",
    "Generation": "hooks.results",
    "GPT": "model.gpt",
    "GPTConfig": "model.config",
    "GptkError": "errors",
    "GPT2_ALPHABET": "text.decoders",
    "gradient_norm": "training.gradients",
    "IncompatibleError": "errors",
    "KVCache": "model.cache",
    "LanguageModel": "language_model",
    "Levels": "model.levels",
    "Limits": "decoding.limits",
    "InternalError": "errors",
    "keep_freed_memory": "system.memory",
    "load": "language_model",
    "load_checkpoint": "weights.loading",
    "load_tokenizer": "weights.tokenizers",
    "LogitsProcessor": "hooks.sampling",
    "LRScheduler": "hooks.training",
    "Metric": "hooks.measuring",
    "ModelConfig": "model.protocol",
    "OptionError": "errors",
    "OutOfMemory": "errors",
    "PipelineEncoding": "text.pipeline",
    "Plugin": "hooks.base",
    "PluginError": "errors",
    "PluginWarning": "plugins.registry",
    "prepare_tokens": "data.token_files",
    "PromptError": "errors",
    "RandomStream": "session.random",
    "RankedToken": "hooks.results",
    "Regularizer": "hooks.training",
    "render_chat": "text.chat",
    "Request": "decoding.requests",
    "Response": "decoding.requests",
    "Rows": "session.rows",
    "Run": "hooks.run",
    "Sampler": "hooks.sampling",
    "Score": "engine.scoring",
    "set_kv_memory": "system.kv_memory",
    "Scorer": "hooks.sampling",
    "Settings": "language_model",
    "SourceError": "errors",
    "SPLIT_PATTERNS": "text.patterns",
    "SplitPattern": "text.patterns",
    "SpecError": "errors",
    "StopCondition": "decoding.limits",
    "Stream": "decoding.stream",
    "StreamedToken": "decoding.stream",
    "Tensors": "weights.tensors",
    "TokenFile": "data.token_files",
    "Tokenizer": "text.tokenizer",
    "TokenizerError": "errors",
    "TokenizerLoader": "hooks.tokenizers",
    "TopTokens": "hooks.results",
    "TrainConfig": "training.config",
    "Trainer": "training.trainer",
    "TrainingError": "errors",
    "TrainingListener": "hooks.training",
    "TrainingObserver": "hooks.training",
    "TransformersModel": "model.transformers_model",
    "translate_settings": "decoding.other_names",
    "Translation": "decoding.other_names",
    "UnknownNameError": "errors",
    "WeightLoader": "hooks.weights",
    "WeightWriter": "hooks.weights",
    "Windows": "data.windows",
}

__all__ = [
    *_HOMES,
    "distribution",
    "plugins",
    "vocabulary",
    "__version__",
    "hookimpl",
]

if TYPE_CHECKING:
    from gptk import distribution as distribution
    from gptk import plugins as plugins
    from gptk import vocabulary as vocabulary
    from gptk.data.token_files import TokenFile as TokenFile
    from gptk.data.token_files import prepare_tokens as prepare_tokens
    from gptk.data.windows import Windows as Windows
    from gptk.decoding.limits import Limits as Limits
    from gptk.decoding.limits import StopCondition as StopCondition
    from gptk.decoding.other_names import Translation as Translation
    from gptk.decoding.other_names import translate_settings as translate_settings
    from gptk.decoding.requests import Request as Request
    from gptk.decoding.requests import Response as Response
    from gptk.decoding.run import Decoding as Decoding
    from gptk.decoding.settings import CheckedSettings as CheckedSettings
    from gptk.decoding.settings import check_settings as check_settings
    from gptk.decoding.speculation import Acceptance as Acceptance
    from gptk.decoding.stream import Stream as Stream
    from gptk.decoding.stream import StreamedToken as StreamedToken
    from gptk.engine.scoring import ContinuationScore as ContinuationScore
    from gptk.engine.scoring import Score as Score
    from gptk.errors import DataError as DataError
    from gptk.errors import DecodingError as DecodingError
    from gptk.errors import DeviceError as DeviceError
    from gptk.errors import GptkError as GptkError
    from gptk.errors import IncompatibleError as IncompatibleError
    from gptk.errors import InternalError as InternalError
    from gptk.errors import OptionError as OptionError
    from gptk.errors import OutOfMemory as OutOfMemory
    from gptk.errors import PluginError as PluginError
    from gptk.errors import PromptError as PromptError
    from gptk.errors import SourceError as SourceError
    from gptk.errors import SpecError as SpecError
    from gptk.errors import TokenizerError as TokenizerError
    from gptk.errors import TrainingError as TrainingError
    from gptk.errors import UnknownNameError as UnknownNameError
    from gptk.hooks.base import Plugin as Plugin
    from gptk.hooks.choice import Choice as Choice
    from gptk.hooks.drafting import Draft as Draft
    from gptk.hooks.drafting import Drafter as Drafter
    from gptk.hooks.measuring import Metric as Metric
    from gptk.hooks.observing import DecodingListener as DecodingListener
    from gptk.hooks.observing import DecodingObserver as DecodingObserver
    from gptk.hooks.observing import DecodingStep as DecodingStep
    from gptk.hooks.results import FinishReason as FinishReason
    from gptk.hooks.results import Generation as Generation
    from gptk.hooks.results import RankedToken as RankedToken
    from gptk.hooks.results import TopTokens as TopTokens
    from gptk.hooks.run import Run as Run
    from gptk.hooks.sampling import LogitsProcessor as LogitsProcessor
    from gptk.hooks.sampling import Sampler as Sampler
    from gptk.hooks.sampling import Scorer as Scorer
    from gptk.hooks.tokenizers import TokenizerLoader as TokenizerLoader
    from gptk.hooks.training import LRScheduler as LRScheduler
    from gptk.hooks.training import Regularizer as Regularizer
    from gptk.hooks.training import TrainingListener as TrainingListener
    from gptk.hooks.training import TrainingObserver as TrainingObserver
    from gptk.hooks.weights import Checkpoint as Checkpoint
    from gptk.hooks.weights import WeightLoader as WeightLoader
    from gptk.hooks.weights import WeightWriter as WeightWriter
    from gptk.language_model import LanguageModel as LanguageModel
    from gptk.language_model import Settings as Settings
    from gptk.language_model import load as load
    from gptk.measure.comparison import Comparison as Comparison
    from gptk.measure.comparison import compare as compare
    from gptk.measure.evaluation import Evaluation as Evaluation
    from gptk.measure.evaluation import evaluate as evaluate
    from gptk.model.cache import KVCache as KVCache
    from gptk.model.config import GPTConfig as GPTConfig
    from gptk.model.gpt import GPT as GPT
    from gptk.model.levels import Levels as Levels
    from gptk.model.protocol import CausalModel as CausalModel
    from gptk.model.protocol import ModelConfig as ModelConfig
    from gptk.model.transformers_model import TransformersModel as TransformersModel
    from gptk.plugins.registry import PluginWarning as PluginWarning
    from gptk.runs.checkpoints import best_checkpoint as best_checkpoint
    from gptk.runs.checkpoints import check_run_file as check_run_file
    from gptk.session.random import RandomStream as RandomStream
    from gptk.session.rows import Follower as Follower
    from gptk.session.rows import Rows as Rows
    from gptk.session.session import DecodeSession as DecodeSession
    from gptk.system.kv_memory import set_kv_memory as set_kv_memory
    from gptk.system.memory import keep_freed_memory as keep_freed_memory
    from gptk.text.chat import render_chat as render_chat
    from gptk.text.decoders import GPT2_ALPHABET as GPT2_ALPHABET
    from gptk.text.encoding import ByteLevelBPE as ByteLevelBPE
    from gptk.text.patterns import SPLIT_PATTERNS as SPLIT_PATTERNS
    from gptk.text.patterns import SplitPattern as SplitPattern
    from gptk.text.pipeline import PipelineEncoding as PipelineEncoding
    from gptk.text.tokenizer import Tokenizer as Tokenizer
    from gptk.training.config import TrainConfig as TrainConfig
    from gptk.training.gradients import gradient_norm as gradient_norm
    from gptk.training.trainer import Trainer as Trainer
    from gptk.weights.building import build_model as build_model
    from gptk.weights.loading import default_source as default_source
    from gptk.weights.loading import load_checkpoint as load_checkpoint
    from gptk.weights.tensors import Tensors as Tensors
    from gptk.weights.tokenizers import load_tokenizer as load_tokenizer


if not TYPE_CHECKING:  # to a type checker a misspelt name is an error

    def __getattr__(name: str) -> object:
        if name in ("distribution", "plugins", "vocabulary"):
            return importlib.import_module(f"gptk.{name}")
        if name not in _HOMES:
            raise AttributeError(f"module 'gptk' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"gptk.{_HOMES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
