"""Errors of the system while a model is read, explained."""

import contextlib
from collections.abc import Iterator

from gptk.errors import SourceError
from gptk.system.memory import explaining_out_of_memory, is_out_of_memory


@contextlib.contextmanager
def explaining_load_failures(source: str, size: str = "") -> Iterator[None]:
    """Raise OutOfMemory if memory runs out in the block, SourceError if a file cannot be read.

    source: the model's, for messages. size: how much memory its weights take, in words.
    """
    what = f"the model {source}" + (f", {size}," if size else "")
    remedy = "take --dtype bfloat16, --quantize int8 or a smaller model"
    with explaining_out_of_memory(what, remedy):
        try:
            yield
        except OSError as error:
            if is_out_of_memory(error):
                raise
            raise SourceError(f"{source} cannot be read: {error.strerror or error}") from error
