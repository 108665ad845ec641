"""The plug-ins of a training run, made from the spec strings in its settings."""

from dataclasses import dataclass

from gptk.errors import OptionError
from gptk.hooks.sampling import Sampler
from gptk.hooks.training import LRScheduler, Regularizer, TrainingObserver
from gptk.plugins.creating import create
from gptk.training.config import TrainConfig


@dataclass(frozen=True)
class TrainingPlugins:
    """What the settings name: scheduler, regularizers, sampler and observers."""

    scheduler: LRScheduler
    regularizers: list[Regularizer]
    sampler: Sampler
    """Writes the text that is sampled at each evaluation."""
    observers: list[TrainingObserver]

    @classmethod
    def create(cls, config: TrainConfig) -> "TrainingPlugins":
        """Raises what `create` of gptk.plugins does, and OptionError for a repeated regularizer."""
        plugins = cls(
            scheduler=create("scheduler", config.scheduler, LRScheduler),
            regularizers=[create("regularizer", s, Regularizer) for s in config.regularizers],
            sampler=create("sampler", config.sample_sampler, Sampler),
            observers=[create("training-observer", s, TrainingObserver) for s in config.observers],
        )
        names = [regularizer.name for regularizer in plugins.regularizers]
        if twice := [name for name in names if names.count(name) > 1]:
            raise OptionError(f"the regularizer {twice[0]} is given twice")
        return plugins
