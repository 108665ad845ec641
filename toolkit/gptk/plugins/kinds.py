"""The kinds of plug-ins by name, with the hook and the base class of each."""

from dataclasses import dataclass

import click

from gptk.hooks.drafting import Drafter
from gptk.hooks.measuring import Metric
from gptk.hooks.observing import DecodingObserver
from gptk.hooks.sampling import LogitsProcessor, Sampler, Scorer
from gptk.hooks.tokenizers import TokenizerLoader
from gptk.hooks.training import LRScheduler, Regularizer, TrainingObserver
from gptk.hooks.weights import WeightLoader, WeightWriter


@dataclass(frozen=True)
class Kind:
    """A kind of plug-in."""

    hook: str
    plural: str
    """For messages."""
    base: type
    """The class that its plug-ins are subclasses, or for commands instances, of."""


KINDS = {
    "sampler": Kind("gptk_samplers", "samplers", Sampler),
    "processor": Kind("gptk_logits_processors", "logits processors", LogitsProcessor),
    "drafter": Kind("gptk_drafters", "drafters", Drafter),
    "scorer": Kind("gptk_scorers", "scorers", Scorer),
    "metric": Kind("gptk_metrics", "metrics", Metric),
    "decoding-observer": Kind("gptk_decoding_observers", "decoding observers", DecodingObserver),
    "scheduler": Kind("gptk_lr_schedulers", "LR schedulers", LRScheduler),
    "regularizer": Kind("gptk_regularizers", "regularizers", Regularizer),
    "training-observer": Kind("gptk_training_observers", "training observers", TrainingObserver),
    "loader": Kind("gptk_weight_loaders", "weight loaders", WeightLoader),
    "writer": Kind("gptk_weight_writers", "weight writers", WeightWriter),
    "tokenizer": Kind("gptk_tokenizers", "tokenizers", TokenizerLoader),
    "command": Kind("gptk_commands", "commands", click.Command),
}
"""By the name that users and messages give the kind."""
