"""What the contract of models does with a model: passes, moves of a cache, comparisons."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import gptk
from gptk.testing._promises import check


def longest(model: gptk.CausalModel) -> int:
    """The most tokens of a row in the tests: 24, or the model's window if it is shorter."""
    return min(model.config.context_length, 24)


def all_layers(model: gptk.CausalModel) -> tuple[int, ...]:
    """The numbers of all layers, that of the embeddings included; none if it has no layers."""
    return tuple(range(model.config.n_layers + 1)) if model.config.n_layers else ()


def padded(
    model: gptk.CausalModel, texts: Sequence[Sequence[int]], padding: int = 0
) -> tuple[Tensor, list[int]]:
    """Token ids, (rows, longest), padded on the right, and how many each row has."""
    counts = list(map(len, texts))
    rows = [[*text, *[padding] * (max(counts) - len(text))] for text in texts]
    return torch.tensor(rows, device=model.device), counts


@torch.inference_mode()
def read(
    model: gptk.CausalModel,
    ids: Tensor,
    cache: Any = None,
    counts: list[int] | None = None,
    layers: Collection[int] = (),
) -> Tensor:
    """`model.states` in inference mode, as in a session."""
    return model.states(ids, cache, counts, layers)


def states_of(
    model: gptk.CausalModel,
    texts: Sequence[Sequence[int]],
    cache: Any = None,
    *,
    layers: Collection[int] = (),
    padding: int = 0,
) -> list[Tensor]:
    """For each row its states, (its tokens, 1 + layers, width), from one pass."""
    ids, counts = padded(model, texts, padding)
    states = read(model, ids, cache, counts if len(set(counts)) > 1 else None, layers)
    return [states[row, :count] for row, count in enumerate(counts)]


@torch.inference_mode()
def logits_of(model: gptk.CausalModel, states: Tensor) -> Tensor:
    """`model.logits` in inference mode, as in a session."""
    return model.logits(states)


def compare(got: Tensor, want: Tensor, what: str) -> None:
    """Raises AssertionError unless both are equal, but for rounding of float32 numbers."""
    check(got.shape == want.shape, f"{what}: {tuple(got.shape)}, and not {tuple(want.shape)}")
    size = max([1.0, *want[want.isfinite()].abs().tolist()])
    largest = float((got - want).nan_to_num(posinf=0, neginf=0).abs().amax())
    check(
        torch.allclose(got, want, rtol=1e-4, atol=1e-4 * size),
        f"{what}: the numbers differ by up to {largest:.3g}",
    )


def check_lengths(cache: Any, want: Sequence[int], when: str) -> None:
    """Raises AssertionError unless a cache holds as many tokens of each row as it should."""
    lengths = list(cache.lengths)
    check(lengths == list(want), f"{when} the cache's lengths are {lengths}, and not {list(want)}")


class TrackedCache:
    """A cache, and the tokens that its rows have after the moves so far.

    Each move draws what it needs from data, or, without it, takes the next of the moves that a
    cache is most likely to get wrong. Each pass is compared with one without a cache. As in a
    session, moves and passes are in inference mode.
    """

    def __init__(
        self,
        model: gptk.CausalModel,
        texts: list[list[int]],
        data: st.DataObject | None,
        *,
        padding: int = 0,
    ) -> None:
        self._model, self._data, self._padding = model, data, padding
        self._cache = model.new_cache(len(texts), 4)
        self._turns = 0
        self._texts: list[list[int]] = [[] for _ in texts]
        self._read(texts)

    def read(self) -> None:
        """Read one to three tokens of each row, if the window has room for them."""
        most = min(3, longest(self._model) - max(map(len, self._texts)))
        if most < 1:
            return
        size, count = self._model.config.vocab_size, len(self._texts)
        if self._data is None:
            turn = self._turn()
            self._read(
                [
                    [(5 * turn + 3 * row + i) % size for i in range(1 + (row + turn) % most)]
                    for row in range(count)
                ]
            )
            return
        row = st.lists(st.integers(0, size - 1), min_size=1, max_size=most)
        self._read(self._data.draw(st.lists(row, min_size=count, max_size=count), label="read"))

    @torch.inference_mode()
    def select(self) -> None:
        last = len(self._texts) - 1
        if self._data is None:
            # Reversed, with a copy; the first row copied over others; the last row alone.
            kinds = [[*range(last, -1, -1), 0], [last, 0, 0], [0, last, last, 0], [last]]
            parents = kinds[self._turn() % 4]
        else:
            row = st.integers(0, last)
            parents = self._data.draw(st.lists(row, min_size=1, max_size=5), label="select")
        self._cache.select(parents)
        self._texts = [self._texts[parent] for parent in parents]
        self._check(f"after select({parents})")

    @torch.inference_mode()
    def rewind(self) -> None:
        if self._data is None:
            turn = self._turn()  # all tokens of a row, none, or the last ones, in turns
            counts = [
                [0, len(text), min(1, len(text)), len(text) // 2][(row + turn) % 4]
                for row, text in enumerate(self._texts)
            ]
        else:
            draw = self._data.draw
            counts = [draw(st.integers(0, len(text)), label="rewind") for text in self._texts]
        self._cache.rewind(counts)
        self._texts = [t[: len(t) - n] for t, n in zip(self._texts, counts, strict=True)]
        self._check(f"after rewind({counts})")

    @torch.inference_mode()
    def clear(self) -> None:
        self._cache.clear()
        self._texts = [[] for _ in self._texts]
        self._check("after clear()")

    def _turn(self) -> int:
        """How many moves without data there were before."""
        self._turns += 1
        return self._turns - 1

    def _read(self, new: list[list[int]]) -> None:
        got = states_of(self._model, new, self._cache, padding=self._padding)
        for row, (text, tokens) in enumerate(zip(self._texts, new, strict=True)):
            want = states_of(self._model, [text + tokens])[0][len(text) :]
            what = f"row {row} of {self._texts}, then {new}, with a cache and directly"
            compare(got[row], want, what)
        self._texts = [text + tokens for text, tokens in zip(self._texts, new, strict=True)]
        self._check("after a pass")

    def _check(self, when: str) -> None:
        check_lengths(self._cache, list(map(len, self._texts)), when)
