"""Python's garbage collector, paused where much is made and all of it stays."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """No search for garbage within the block, or within a function that this decorates.

    Importing PyTorch and building a tokenizer make some hundred thousand objects each, and next to
    no garbage; looking through them again and again takes a seventh of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
