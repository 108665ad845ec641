"""Checks of what samplers choose and drafters guess; errors name the plug-in."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gptk.errors import IncompatibleError, PluginError, counted, shown
from gptk.hooks.choice import Choice
from gptk.hooks.sampling import Sampler


def check_draft(sampler: Sampler) -> None:
    """Raises IncompatibleError if speculation has no meaning for a sampler."""
    if reason := sampler.refuses_draft():
        raise IncompatibleError(f"sampler {sampler.name} does not go with a draft: {reason}")


def check_rows(rows: object, sampler: Sampler) -> int:
    """What `max_rows` returned. Raises PluginError for anything but a number of rows."""
    if not isinstance(rows, int) or rows < 1:
        raise PluginError(
            f"sampler {sampler.name}: max_rows() returned {shown(rows)}; it must return a whole "
            "number, 1 or more"
        )
    return rows


def check_groups(groups: object, sampler: Sampler) -> int:
    """A sampler's `groups`. Raises PluginError for anything but a number of groups."""
    if not isinstance(groups, int) or groups < 1:
        raise PluginError(
            f"sampler {sampler.name}: groups is {shown(groups)}; it must be a whole number, 1 or "
            "more"
        )
    return groups


def check_layers(layers: object, sampler: Sampler, n_layers: int) -> Sequence[int]:
    """What `hidden_layers` returned. Raises PluginError for layers that the model does not have."""
    if not isinstance(layers, Sequence) or not all(
        isinstance(layer, int) and 0 <= layer <= n_layers for layer in layers
    ):
        raise PluginError(
            f"sampler {sampler.name}: hidden_layers() returned {shown(layers)}; it must return "
            f"whole numbers from 0 to {n_layers}"
        )
    return layers


def check_choice(choice: object, sampler: Sampler, rows: int) -> None:
    """Raises PluginError unless `choice` is a Choice for `rows` rows. Does not wait for a GPU."""
    who = f"sampler {sampler.name}"
    if not isinstance(choice, Choice):
        raise PluginError(f"{who} returned {shown(choice)}; it must return a gptk.Choice")
    for what, tensor in vars(choice).items():
        if not isinstance(tensor, Tensor) and not (what == "parents" and tensor is None):
            raise PluginError(
                f"{who} chose {what} of type {type(tensor).__name__}; they must be tensors"
            )
    for what, tensor in (("tokens", choice.tokens), ("parents", choice.parents)):
        if tensor is not None and not _holds_integers(tensor):
            raise PluginError(
                f"{who} chose {what} of type {tensor.dtype}; they must be whole numbers"
            )
    candidates = choice.tokens.shape
    if len(candidates) == 1 and candidates[0] != rows and not sampler.competing:
        raise PluginError(
            f"{who} chose {counted(candidates[0], 'token')} for {counted(rows, 'row')}; only "
            "competing rows may be dropped or forked"
        )
    shapes = {choice.logprobs.shape, choice.scores.shape, candidates}
    if choice.parents is not None:
        shapes.add(choice.parents.shape)
    if len(candidates) != 1 or len(shapes) > 1:
        raise PluginError(
            f"{who} chose tensors of unlike shapes or of more than one axis: "
            f"{', '.join(str(tuple(shape)) for shape in shapes)}"
        )


def check_values(
    sampler: Sampler, parents: Sequence[int], tokens: Sequence[int], *, rows: int, vocab_size: int
) -> None:
    """Raises PluginError for a token or a parent that does not exist."""
    for token in (min(tokens, default=0), max(tokens, default=0)):
        if not 0 <= token < vocab_size:
            raise PluginError(
                f"sampler {sampler.name} chose token {token}; the vocabulary has {vocab_size}"
            )
    for parent in (min(parents, default=0), max(parents, default=0)):
        if not 0 <= parent < rows:
            raise PluginError(f"sampler {sampler.name} chose for row {parent} of {rows}")


def check_guesses(guesses: object, who: str, *, rows: int, most: int, vocab_size: int) -> Tensor:
    """The guesses of a draft. Raises PluginError for anything but (rows, at most `most`) tokens."""
    if not isinstance(guesses, Tensor):
        raise PluginError(f"{who} guessed {shown(guesses)}; it must give a tensor")
    if guesses.dim() != 2 or len(guesses) != rows or not _holds_integers(guesses):
        raise PluginError(
            f"{who} gave guesses of shape {tuple(guesses.shape)} and type {guesses.dtype}; "
            f"they must be whole numbers of shape ({rows}, at most {most})"
        )
    if guesses.shape[1] > most:
        raise PluginError(
            f"{who} guessed {guesses.shape[1]} tokens ahead where {most} were asked for"
        )
    wrong = guesses[(guesses < -1) | (guesses >= vocab_size)].tolist()
    if wrong:
        raise PluginError(f"{who} guessed token {wrong[0]}; the vocabulary has {vocab_size}")
    return guesses


def _holds_integers(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
