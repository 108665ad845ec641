"""A file whose tensors are mapped one by one, so that each frees its memory when deleted."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class MappedFile:
    """A file that stays open and the same, even if another file replaces it at its path.

    Raises OSError if it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path.open("rb")

    @property
    def path(self) -> str:
        """A path that opens this very file, even if its name was reused."""
        by_descriptor = f"/dev/fd/{self._file.fileno()}"
        return by_descriptor if os.path.exists(by_descriptor) else str(self._path)

    def bytes(self, start: int, size: int) -> "Tensor":
        """`size` bytes from `start`, (size,) uint8: mapped copy-on-write.

        The mapping lasts as long as tensors that use it. A single mapping of the whole file would
        keep every page that was read in memory, beside the tensors made from it.
        """
        import torch

        end = start + size
        storage = torch.UntypedStorage.from_file(self.path, shared=False, nbytes=end)
        return torch.asarray(storage[start:end], dtype=torch.uint8)
