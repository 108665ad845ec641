"""A file whose tensors are mapped one by one, so that memory is given back with each of them."""

import os
from pathlib import Path

import torch
from torch import Tensor


class MappedFile:
    """A file that stays the same as long as this is kept, even if another takes its name.

    Raises OSError if it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path.open("rb")

    @property
    def path(self) -> str:
        """A path to open this very file by."""
        by_number = f"/dev/fd/{self._file.fileno()}"
        return by_number if os.path.exists(by_number) else str(self._path)

    def bytes(self, start: int, size: int) -> Tensor:
        """Some bytes of it, (size,) uint8: mapped, and copied where they are written to.

        The mapping lasts as long as tensors of it. One of the whole file for all tensors would
        keep every page that was looked at in memory beside what was made of it.
        """
        end = start + size
        storage = torch.UntypedStorage.from_file(self.path, shared=False, nbytes=end)
        return torch.asarray(storage[start:end], dtype=torch.uint8)
