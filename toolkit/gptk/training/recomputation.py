"""Activation checkpointing: the backward pass computes a block's activations again.

Of each block only the input is kept (Chen et al. 2016, "Training Deep Nets with Sublinear Memory
Cost", with a block as the segment).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class ActivationCheckpointing:
    """Has blocks checkpoint their activations in the forward passes inside `with enabled():`.

    The backward pass may follow outside. Only the `forward` of each block is replaced, and only
    inside: DDP, FSDP2 and torch.compile wrap the same modules with and without checkpointing.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        # Made once, as torch.compile would compile anew for other objects.
        self._forwards = [(block, partial(_checkpointed, block.forward)) for block in blocks]

    @contextmanager
    def enabled(self) -> Iterator[None]:
        """Replace the blocks' `forward` inside; it is restored at the end."""
        before = [vars(block).get("forward") for block, _ in self._forwards]
        try:
            for block, checkpointed in self._forwards:
                block.forward = checkpointed
            yield
        finally:
            for (block, _), forward in zip(self._forwards, before, strict=True):
                del block.forward
                if forward is not None:  # an attribute of the instance, set by somebody else
                    block.forward = forward


def _checkpointed(forward: Callable[..., Tensor], *args: Any) -> Tensor:
    return checkpoint(forward, *args, use_reentrant=False)  # type: ignore[no-any-return]
