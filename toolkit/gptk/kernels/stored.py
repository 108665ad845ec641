"""Laying quantized weights out for `quantized_linear` straight from the blocks of a GGUF file."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gptk.kernels.build import library
from gptk.kernels.structures import STRUCTURES, StoredAddresses

Format = Literal["Q4_0", "Q4_1", "Q8_0"]
"""How a GGUF file stores 32 weights, in a block: a scale, in Q4_1 the value of code 0, and the
codes of 4 or 8 bits. Scale and value are float16."""

BLOCK_BYTES: dict[Format, int] = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
_NUMBERS: dict[Format, int] = {"Q4_0": 0, "Q4_1": 1, "Q8_0": 2}  # as in cpp/stored.h


class StoredRows(NamedTuple):
    """Rows of a quantized matrix in blocks."""

    blocks: Tensor
    """(rows, groups, bytes of a block) uint8."""
    order: Tensor | None = None
    """(outputs,) int64: the row of each output; None for all rows in their order."""


def pack_stored(parts: Sequence[StoredRows], format: Format, y: Tensor) -> None:
    """What `pack` writes for the codes in these blocks, without these in between.

    parts: concatenated by outputs, all with as many groups. y: contiguous uint8 with room for all,
    see `packed_bytes`. Raises IndexError for a row that there is not.
    """
    size = BLOCK_BYTES.get(format)
    groups = {part.blocks.shape[1] for part in parts if part.blocks.dim() == 3}
    if size is None or len(groups) != 1:
        raise ValueError(
            f"gptk.kernels.pack_stored cannot take {format!r} with rows of {len(groups)} sizes; it "
            f"needs one of {', '.join(BLOCK_BYTES)}, and as many groups in all rows"
        )
    parts = [part._replace(blocks=part.blocks.contiguous()) for part in parts]
    addresses = torch.cat([_addresses(part, size, y) for part in parts])
    bits = 8 if format == "Q8_0" else 4
    library().pack_stored(StoredAddresses(addresses, _NUMBERS[format], bits, groups.pop()), y)


def _addresses(part: StoredRows, size: int, y: Tensor) -> Tensor:
    """Where each output's blocks begin."""
    start, rows, groups = STRUCTURES.stored_rows(*part, size, y)
    first = torch.arange(rows, device="cpu") * (groups * size) + start
    addresses: Tensor = first if part.order is None else first[part.order]
    return addresses
