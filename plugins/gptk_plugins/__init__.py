"""The built-in plug-ins of gptk. Like third-party ones, they use only what gptk makes public.

The classes are imported from the package of their kind: `from gptk_plugins.samplers import Beam`.
"""

import click

import gptk
from gptk_plugins._homes import classes


@gptk.hookimpl
def gptk_samplers() -> list[type[gptk.Sampler]]:
    from gptk_plugins import samplers

    return classes(samplers)


@gptk.hookimpl
def gptk_logits_processors() -> list[type[gptk.LogitsProcessor]]:
    from gptk_plugins import constraints, processors

    return [*classes(constraints), *classes(processors)]


@gptk.hookimpl
def gptk_drafters() -> list[type[gptk.Drafter]]:
    from gptk_plugins import drafters

    return classes(drafters)


@gptk.hookimpl
def gptk_scorers() -> list[type[gptk.Scorer]]:
    from gptk_plugins import scorers

    return classes(scorers)


@gptk.hookimpl
def gptk_metrics() -> list[type[gptk.Metric]]:
    from gptk_plugins import metrics

    return classes(metrics)


@gptk.hookimpl
def gptk_weight_loaders() -> list[type[gptk.WeightLoader]]:
    from gptk_plugins import loaders

    return classes(loaders)


@gptk.hookimpl
def gptk_weight_writers() -> list[type[gptk.WeightWriter]]:
    from gptk_plugins import writers

    return classes(writers)


@gptk.hookimpl
def gptk_tokenizers() -> list[type[gptk.TokenizerLoader]]:
    from gptk_plugins import tokenizers

    return classes(tokenizers)


@gptk.hookimpl
def gptk_lr_schedulers() -> list[type[gptk.LRScheduler]]:
    from gptk_plugins import schedulers

    return classes(schedulers)


@gptk.hookimpl
def gptk_regularizers() -> list[type[gptk.Regularizer]]:
    from gptk_plugins import regularizers

    return classes(regularizers)


@gptk.hookimpl
def gptk_decoding_observers() -> list[type[gptk.DecodingObserver]]:
    from gptk_plugins.observers import Trace

    return [Trace]


@gptk.hookimpl
def gptk_training_observers() -> list[type[gptk.TrainingObserver]]:
    from gptk_plugins.observers import TensorBoard

    return [TensorBoard]


@gptk.hookimpl
def gptk_commands() -> list[click.Command]:
    from gptk_plugins.commands import detect_watermark, lm_eval

    return [detect_watermark.command, lm_eval.command]
