"""What decoding needs of a model. `gptk.GPT` is one such model; nothing in decoding asks which."""

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class ModelConfig(Protocol):
    """What sessions and strategies ask about a model; `gptk.GPTConfig` answers it."""

    @property
    def vocab_size(self) -> int:
        """Tokens are 0 to vocab_size - 1."""
        raise NotImplementedError

    @property
    def context_length(self) -> int:
        """The window: the most tokens that a prediction may look back on, itself included."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """The size of a hidden state; 0 for a model whose states are not meant to be compared.

        Strategies that compare hidden states, such as contrastive search, refuse such a model.
        """
        raise NotImplementedError

    @property
    def n_layers(self) -> int:
        """Layers whose states `states` can return; 0 for a model that has none to return.

        Strategies that look at layers, such as DoLa, refuse such a model.
        """
        raise NotImplementedError

    @property
    def tied_head(self) -> bool:
        """Whether the output head is the token embedding's matrix."""
        raise NotImplementedError


class Cache(Protocol):
    """What a model keeps of the tokens it has read, for a changing set of rows."""

    @property
    def lengths(self) -> Sequence[int]:
        """How many tokens it holds of each row."""
        raise NotImplementedError

    def select(self, parents: Sequence[int]) -> None:
        """Row i becomes a copy of row parents[i]; the number of rows may change."""
        raise NotImplementedError

    def rewind(self, counts: Sequence[int]) -> None:
        """Drop the last counts[i] tokens of row i."""
        raise NotImplementedError

    def clear(self) -> None:
        """Forget all tokens of all rows; the rows stay."""
        raise NotImplementedError


class Step(Protocol):
    """A faster way to read one new token of a single row, such as a compiled program."""

    def fits(self, ids: Tensor, cache: Any, layers: Collection[int]) -> bool:
        """Whether a pass of `CausalModel.states` with these arguments can be made by this step."""
        raise NotImplementedError

    def __call__(self, ids: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
        """The states, (1, 1, 1, width), and the logits after the token, (1, 1, vocab) float32."""
        raise NotImplementedError


class CausalModel(Protocol):
    """A model that predicts the next token from the tokens before it.

    `gptk.testing.ModelContract` tests whether a class keeps what is promised here.
    """

    @property
    def config(self) -> ModelConfig:
        """Sizes, and what a strategy may ask about."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where token ids are expected, and where states and logits are."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the states."""
        raise NotImplementedError

    @property
    def step(self) -> Step | None:
        """A faster way to make some passes, or None. A session tries it first."""
        raise NotImplementedError

    def new_cache(self, rows: int, capacity: int) -> Cache:
        """An empty cache for `rows` rows; about `capacity` tokens of each are expected."""
        raise NotImplementedError

    def states(
        self, ids: Tensor, cache: Any, counts: list[int] | None, layers: Collection[int]
    ) -> Tensor:
        """Read tokens, and return the hidden states after each, from which `logits` predicts.

        ids: (rows, time) int64. cache: what `new_cache` returned, which then holds these tokens,
        too; they follow what it held of each row. None: the tokens begin their rows, and nothing
        is kept. counts: how many of its `time` tokens each row really has, from the left; the rest
        is padding, whose states mean nothing (None: all). layers: of which to return the states as
        well, in ascending order; 0 are the embeddings, i is what layer i gives.

        Returns (rows, time, 1 + len(layers), width): the final state, then that of each layer.
        What a row gets must not depend on the other rows.
        """
        raise NotImplementedError

    def logits(self, states: Tensor) -> Tensor:
        """Next-token logits, float32. states: (…, width), as `states` gives. Returns (…, vocab)."""
        raise NotImplementedError


@contextlib.contextmanager
def evaluating(model: object) -> Iterator[None]:
    """No dropout within the block; afterwards the model is in the mode in which it was."""
    training = isinstance(model, nn.Module) and model.training
    if training:
        assert isinstance(model, nn.Module)
        model.eval()
    try:
        yield
    finally:
        if training:
            assert isinstance(model, nn.Module)
            model.train()
