"""Laying quantized weights out for `quantized_linear` straight from the blocks of a GGUF file."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gptk.kernels.build import library
from gptk.kernels.formats import Format
from gptk.kernels.structures import STRUCTURES, StoredAddresses


class StoredRows(NamedTuple):
    """Rows of a quantized matrix in blocks."""

    blocks: Tensor
    """(rows, blocks of a row, bytes of a block) uint8."""
    order: Tensor | None = None
    """(outputs,) int64: the row of each output; None for all rows in their order."""


def pack_stored(parts: Sequence[StoredRows], format: Format, y: Tensor) -> None:
    """Lay weights out that are in blocks of this format.

    parts: concatenated by outputs, all with as many blocks in a row. y: contiguous uint8 with room
    for all, see `packed_bytes`. Raises IndexError for a row that there is not.
    """
    counts = {part.blocks.shape[1] for part in parts if part.blocks.dim() == 3}
    if not format.stored or len(counts) != 1:
        raise ValueError(
            f"gptk.kernels.pack_stored cannot take {format.name} with rows of {len(counts)} sizes; "
            "it needs a format of files, and as many blocks in all rows"
        )
    parts = [part._replace(blocks=part.blocks.contiguous()) for part in parts]
    addresses = torch.cat([_addresses(part, format.stored, y) for part in parts])
    library().pack_stored(StoredAddresses(addresses, format.number, format.unit * counts.pop()), y)


def _addresses(part: StoredRows, size: int, y: Tensor) -> Tensor:
    """Where each output's blocks begin."""
    start, rows, count = STRUCTURES.stored_rows(*part, size, y)
    first = torch.arange(rows, device="cpu") * (count * size) + start
    addresses: Tensor = first if part.order is None else first[part.order]
    return addresses
