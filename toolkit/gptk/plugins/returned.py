"""Checks of what a logits processor returns, in gptk's decoding loop and in others' loops."""

from typing import TYPE_CHECKING

from gptk.errors import PluginError, shown

if TYPE_CHECKING:  # gptk.plugins is imported where PyTorch is not needed
    from torch import Tensor


def check_process(process: object, name: str) -> None:
    """Raises PluginError unless a processor's `start` returned a function, or one with state.

    State that follows the rows has all three methods of a `gptk.Follower`.
    """
    if not callable(process):
        raise PluginError(
            f"processor {name}: start() returned {shown(process)}; it must return a function to "
            "call at each step"
        )
    check_state(process, f"the state of processor {name}")


def check_state(state: object, whose: str) -> None:
    """Raises PluginError for an object that has some of a follower's methods, and not all."""
    from gptk.session.rows import Follower

    verbs = [verb for verb in ("extend", "select", "rewind") if hasattr(state, verb)]
    if verbs and not isinstance(state, Follower):
        raise PluginError(
            f"{whose} has {' and '.join(verbs)}, but a follower needs extend, select and rewind"
        )


def check_logits(logits: object, name: str, before: "Tensor") -> None:
    """Raises PluginError unless a processor returned logits like `before`, those that it got."""
    import torch

    returned = shown(logits)
    if isinstance(logits, torch.Tensor):
        like = logits.shape == before.shape and logits.dtype == torch.float32
        if like and logits.device == before.device:
            return
        returned = f"shape {tuple(logits.shape)} and type {logits.dtype} on {logits.device}"
    raise PluginError(
        f"processor {name} returned {returned}; it must return logits of shape "
        f"{tuple(before.shape)} and type torch.float32 on {before.device}"
    )
