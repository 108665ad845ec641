"""Pausing Python's garbage collector while many objects are created that all stay in use."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """No garbage collection within the block, or within a function that this decorates.

    Importing PyTorch and building a tokenizer create a hundred thousand objects or more each, and
    hardly any garbage; searching these again and again for garbage takes a seventh of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
