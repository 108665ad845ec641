"""Every hook of gptk, on one page.

A plug-in is a module (or object) with any of these functions, marked `@gptk.hookimpl` and named
by an entry point in the group `gptk`. Each returns the classes it provides; a class carries its
name and declares its options as typed fields (see `gptk.Plugin`). A complete plug-in:

    import gptk

    GPTK_API = 1

    class RunnerUp(gptk.Sampler):
        \"\"\"Always the second most likely token.\"\"\"

        name = "runner-up"

        def step(self, logits, rows):
            best, tokens = logits.topk(2)
            second = ~best[:, 1].isneginf()  # there may be a single token left
            return gptk.Choice.one_each(tokens[:, 1].where(second, tokens[:, 0]), logits, rows)

    @gptk.hookimpl
    def gptk_samplers():
        return [RunnerUp]
"""

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import click

    from gptk.hooks.drafting import Drafter
    from gptk.hooks.measuring import Metric
    from gptk.hooks.observing import DecodingObserver
    from gptk.hooks.sampling import LogitsProcessor, Sampler, Scorer
    from gptk.hooks.tokenizers import TokenizerLoader
    from gptk.hooks.training import LRScheduler, Regularizer, TrainingObserver
    from gptk.hooks.weights import WeightLoader, WeightWriter

hookspec = pluggy.HookspecMarker("gptk")

API_VERSION = 1
"""The version of these hooks and of the base classes of plug-ins. The line `GPTK_API = 1` in a
plug-in says which version it was built for; gptk refuses it if its own is another. The line may be
left out."""


@hookspec
def gptk_samplers() -> "list[type[Sampler]]":  # type: ignore[empty-body]
    """Decoding strategies, for `--sampler`."""


@hookspec
def gptk_logits_processors() -> "list[type[LogitsProcessor]]":  # type: ignore[empty-body]
    """Maps from next-token logits to next-token logits, for `--processor`."""


@hookspec
def gptk_drafters() -> "list[type[Drafter]]":  # type: ignore[empty-body]
    """Guessers of tokens ahead of the model, for `--draft`."""


@hookspec
def gptk_scorers() -> "list[type[Scorer]]":  # type: ignore[empty-body]
    """Judges of whole results, for the sampler best-of-n."""


@hookspec
def gptk_metrics() -> "list[type[Metric]]":  # type: ignore[empty-body]
    """Measures of the results of a prompt, for `gptk compare --metric`."""


@hookspec
def gptk_decoding_observers() -> "list[type[DecodingObserver]]":  # type: ignore[empty-body]
    """Listeners to the steps of decoding, for `--observer` and `--trace`."""


@hookspec
def gptk_lr_schedulers() -> "list[type[LRScheduler]]":  # type: ignore[empty-body]
    """Learning rate as a function of the training step."""


@hookspec
def gptk_regularizers() -> "list[type[Regularizer]]":  # type: ignore[empty-body]
    """Penalties on the loss and changes to gradients, parameter groups or the model."""


@hookspec
def gptk_training_observers() -> "list[type[TrainingObserver]]":  # type: ignore[empty-body]
    """Listeners to what a training run records."""


@hookspec
def gptk_weight_loaders() -> "list[type[WeightLoader]]":  # type: ignore[empty-body]
    """Readers of model files and hubs, for `--model`."""


@hookspec
def gptk_weight_writers() -> "list[type[WeightWriter]]":  # type: ignore[empty-body]
    """Writers of model formats, for `gptk convert --to`."""


@hookspec
def gptk_tokenizers() -> "list[type[TokenizerLoader]]":  # type: ignore[empty-body]
    """Makers of tokenizers, for `--tokenizer`."""


@hookspec
def gptk_commands() -> "list[click.Command]":  # type: ignore[empty-body]
    """Commands of the `gptk` program."""
