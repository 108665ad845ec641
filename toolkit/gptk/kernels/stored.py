"""Laying quantized weights out for `quantized_linear` straight from the blocks of a GGUF file."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gptk.kernels.arguments import INT64, are, fail, refuse
from gptk.kernels.build import library
from gptk.kernels.products import packed_bytes

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
    if size is None or len(groups) != 1 or not all(_can_pack(part, size) for part in parts):
        refuse("pack_stored", parts=parts, format=format)
    parts = [part._replace(blocks=part.blocks.contiguous()) for part in parts]
    addresses = torch.cat([_addresses(part) for part in parts])
    outputs, inputs, bits = len(addresses), 32 * groups.pop(), 8 if format == "Q8_0" else 4
    if (
        not are(torch.uint8, y)
        or not y.is_contiguous()
        or y.numel() < packed_bytes(outputs, inputs, bits)
    ):
        refuse("pack_stored", parts=parts, format=format, y=y)
    if status := library().gptk_pack_stored(
        _NUMBERS[format], addresses.data_ptr(), y.data_ptr(), outputs, inputs
    ):
        fail(status)


def _can_pack(part: StoredRows, size: int) -> bool:
    blocks, order = part
    return (
        are(torch.uint8, blocks)
        and blocks.dim() == 3
        and blocks.shape[2] == size
        and (order is None or (order.dim() == 1 and are(INT64, order)))
    )


def _addresses(part: StoredRows) -> Tensor:
    """Where each output's blocks begin. A tensor without data has the address 0."""
    blocks, order = part
    first = torch.arange(len(blocks)) * (blocks.shape[1] * blocks.shape[2]) + blocks.data_ptr()
    return first if order is None else first[order]
