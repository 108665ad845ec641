"""Windows of a text of tokens, and the order in which an epoch takes them."""

import numpy as np
import torch
from torch import Tensor

from gptk.errors import DataError, OptionError


class Windows:
    """Windows of `context_length` tokens, one every `stride` tokens; targets are the next tokens.

    tokens: (n,), integers, perhaps memory-mapped. stride: by default context_length, so that
    windows do not overlap. There are as many windows as in the book's loader: a window also needs
    the token after its last one, and tokens left over at the end are in no window.

    Raises OptionError if context_length or stride is under 1.
    """

    def __init__(self, tokens: np.ndarray, context_length: int, stride: int | None = None) -> None:
        self.tokens = tokens
        self.context_length = context_length
        self.stride = context_length if stride is None else stride
        for name in ("context_length", "stride"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)}; it must be 1 or more")

    def __len__(self) -> int:
        return len(range(0, len(self.tokens) - self.context_length, self.stride))

    def start(self, index: int) -> int:
        """The index of a window's first token."""
        return index * self.stride

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64, each (len(indices), context_length).

        Raises IndexError for an index out of range.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"there are {len(self)} windows, counted from 0")
        positions = indices[:, None] * self.stride + np.arange(self.context_length + 1)
        tokens = torch.from_numpy(self.tokens[positions].astype(np.int64))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def epoch_order(n: int, *, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """The order of n windows in one epoch, int64: 0 to n - 1 or, with shuffle, a permutation.

    The permutation sorts n raw 64-bit numbers of the Philox generator with the 128-bit key
    seed + 2**64 * epoch (both modulo 2**64). It depends on nothing else, and is the same on every
    machine: numpy guarantees the raw streams of its bit generators.
    """
    if not shuffle:
        return np.arange(n)
    key = seed % 2**64 + 2**64 * (epoch % 2**64)
    return np.random.Philox(key=key).random_raw(n).argsort(kind="stable")


def check_enough(
    windows: Windows, batch: int, *, which: str, context_length: int, train_ratio: float | None
) -> None:
    """Raise DataError if there are fewer than `batch` windows; the message says what to change.

    which: training or validation. train_ratio: None if validation has its own texts.
    """
    if len(windows) >= batch:
        return
    if batch > 1:
        needed = f"a step takes {batch}: batch_size, times accumulate and processes"
        lower = "lower batch_size, accumulate, context_length or stride"
    else:
        needed = f"at least one is needed, which takes {context_length + 1} tokens"
        lower = "lower context_length"
    share = "" if train_ratio is None else f" (train_ratio={train_ratio:g})"
    if train_ratio is not None:
        lower += f", or {'raise' if which == 'training' else 'lower'} train_ratio"
    raise DataError(
        f"the {which} data has {len(windows.tokens)} tokens{share}, that is {len(windows)} windows "
        f"of context_length={context_length} with stride={windows.stride}; {needed}. "
        f"Give more text, {lower}"
    )
