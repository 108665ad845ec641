"""What decoding needs of a model. `gptk.GPT` implements it; decoding uses nothing else of it."""

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn

Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")


class ModelConfig(Protocol):
    """The configuration that sessions and strategies read; `gptk.GPTConfig` has it."""

    @property
    def vocab_size(self) -> int:
        """Tokens are 0 to vocab_size - 1."""
        raise NotImplementedError

    @property
    def context_length(self) -> int:
        """The window: the most tokens that a prediction can depend on, the last one included."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """The size of a hidden state; 0 if hidden states must not be compared.

        Strategies that compare hidden states, such as contrastive search, refuse such a model.
        """
        raise NotImplementedError

    @property
    def n_layers(self) -> int:
        """How many layers `states` can return the states of; 0 for none.

        Strategies that need the states of layers, such as DoLa, refuse a model with 0.
        """
        raise NotImplementedError

    @property
    def tied_head(self) -> bool:
        """Whether the output head is the token embedding's matrix."""
        raise NotImplementedError


class Cache(Protocol):
    """What a model remembers of the tokens that it has read, for a changing set of rows."""

    @property
    def lengths(self) -> Sequence[int]:
        """How many tokens of each row it holds."""
        raise NotImplementedError

    def select(self, parents: Sequence[int]) -> None:
        """Row i becomes a copy of row parents[i]; the number of rows may change."""
        raise NotImplementedError

    def rewind(self, counts: Sequence[int]) -> None:
        """Drop the last counts[i] tokens of row i."""
        raise NotImplementedError

    def clear(self) -> None:
        """Drop all tokens of all rows; the rows stay."""
        raise NotImplementedError


class CausalModel(Protocol):
    """A model that predicts the next token from the tokens before it.

    `gptk.testing.ModelContract` tests a class for what is required here.
    """

    @property
    def config(self) -> ModelConfig:
        """Sizes, and what strategies read."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """The device of token ids, states and logits."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the states."""
        raise NotImplementedError

    def new_cache(self, rows: int, capacity: int) -> Cache:
        """An empty cache for `rows` rows, of which about `capacity` tokens each are expected."""
        raise NotImplementedError

    def states(
        self, ids: Tensor, cache: Any, counts: list[int] | None, layers: Collection[int]
    ) -> Tensor:
        """Read tokens, and return the hidden states after each, from which `logits` predicts.

        ids: (rows, time) int64. cache: from `new_cache`; the tokens follow those that it holds of
        each row, and are added to it. Without a cache the tokens are the rows' first ones, and are
        not remembered. counts: how many of its `time` tokens each row has, from the left (None:
        all); the rest is padding, whose states may be anything. layers: those whose states are
        returned as well, in ascending order; 0 are the embeddings, i is the result of layer i.

        Returns (rows, time, 1 + len(layers), width): the final state, then that of each layer. A
        row's states must not depend on the other rows.
        """
        raise NotImplementedError

    def logits(self, states: Tensor) -> Tensor:
        """Next-token logits, float32. states: (…, width), from `states`. Returns (…, vocab)."""
        raise NotImplementedError


def inferring(function: Callable[Arguments, Returned]) -> Callable[Arguments, Returned]:
    """`torch.inference_mode` for a function. Where it is on, as in all runs, that takes no time."""

    @functools.wraps(function)
    def inferred(*args: Arguments.args, **settings: Arguments.kwargs) -> Returned:
        if torch.is_inference_mode_enabled():
            return function(*args, **settings)
        with torch.inference_mode():
            return function(*args, **settings)

    return inferred


@contextlib.contextmanager
def evaluating(model: object) -> Iterator[None]:
    """Evaluation mode (no dropout) within the block; afterwards the mode from before.

    Where several threads are in such blocks, the mode is restored when the last one leaves. The
    mode of a wrapper, such as `gptk.engine.model.JoinedModel`, is that of its `module`.
    """
    if not isinstance(model, nn.Module):
        model = getattr(model, "module", None)
    if not isinstance(model, nn.Module):
        yield
        return
    with _lock:
        blocks = _blocks.get(model, 0)
        counted = bool(blocks) or model.training
        if counted:
            _blocks[model] = blocks + 1
            if not blocks:
                model.eval()
    try:
        yield
    finally:
        if counted:
            with _lock:
                _blocks[model] -= 1
                if not _blocks[model]:
                    del _blocks[model]
                    model.train()


_lock = threading.Lock()
_blocks: "weakref.WeakKeyDictionary[nn.Module, int]" = weakref.WeakKeyDictionary()
"""For models that were in training mode, how many blocks of `evaluating` they are in."""
