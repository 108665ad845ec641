"""Quantized matrices: integer codes, with a scale and an offset for each group of 32 weights.

A weight is code · scale + offset: one of 16 levels of its group with 4 bits, one of 256 with 8.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gptk import kernels

Precision = Literal["int8", "int4"]
"""int8: 127 steps to each side of zero, a scale for each output. int4: 16 levels from the smallest
to the largest of each 32 weights, a scale and an offset for each such group."""

GROUP = 32
"""Consecutive inputs of an output whose weights share a scale and an offset."""
WEIGHTS_AT_A_TIME = 1 << 16
"""Weights that are converted at a time, so that intermediate tensors take little memory."""


@dataclass(frozen=True)
class Levels:
    """A quantized matrix (outputs, inputs): w = code · scale + offset, in groups of 32 inputs.

    Raises ValueError for tensors of other shapes, dtypes or devices. That codes of 4 bits are below
    16 is checked where they are packed.
    """

    codes: Tensor
    """(outputs, inputs) uint8: 0 to 15 with 4 bits, 0 to 255 with 8."""
    scale: Tensor
    """(outputs, groups) float32."""
    offset: Tensor
    """(outputs, groups) float32: the weight whose code is 0."""
    bits: Literal[4, 8]

    def __post_init__(self) -> None:
        groups = (*self.codes.shape[:-1], self.codes.shape[-1] // GROUP) if self.codes.dim() else ()
        problem = None
        if self.bits not in (4, 8):
            problem = f"bits are 4 or 8, not {self.bits}"
        elif self.codes.dtype != torch.uint8:
            problem = f"codes are uint8, not {self.codes.dtype}"
        elif self.codes.dim() != 2 or self.codes.shape[1] % GROUP:
            problem = f"codes are (outputs, groups · {GROUP}), not {tuple(self.codes.shape)}"
        for name, x in (("scale", self.scale), ("offset", self.offset)):
            if x.dtype != torch.float32:
                problem = problem or f"the {name} is float32, not {x.dtype}"
            elif x.shape != groups or x.device != self.codes.device:
                problem = problem or (
                    f"the {name} is {groups} on {self.codes.device}, not {tuple(x.shape)} on "
                    f"{x.device}"
                )
        if problem is not None:
            raise ValueError(f"not the levels of a quantized matrix: {problem}")

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """The size with packed codes, and with scales and offsets of two bytes."""
        count = self.shape.numel()
        return count * self.bits // 8 + 4 * (count // GROUP)

    @staticmethod
    def from_blocks(blocks: Tensor, format: kernels.Format) -> "Levels":
        """A quantized matrix as a GGUF file stores it: codes are read from it when they are needed.

        blocks: (outputs, groups, bytes of a block) uint8. format: Q4_0, Q4_1 or Q8_0. Raises
        ValueError for blocks of another shape or dtype.
        """
        return StoredLevels.of(blocks, format)

    def __getitem__(self, rows: Tensor | slice) -> "Levels":
        return Levels(self.codes[rows], self.scale[rows], self.offset[rows], self.bits)

    @staticmethod
    def stack(parts: "Sequence[Levels]") -> "Levels":
        """Concatenate matrices by outputs. Raises RuntimeError if bits or inputs differ."""
        if len({part.bits for part in parts}) > 1:
            raise RuntimeError("levels of 4 and of 8 bits")
        if (stacked := parts[0]._stacked(parts)) is not None:
            return stacked
        return Levels(
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scale for part in parts]),
            torch.cat([part.offset for part in parts]),
            parts[0].bits,
        )

    def _stacked(self, parts: "Sequence[Levels]") -> "Levels | None":
        """The parts, of which this is the first, concatenated without a copy if that can be."""
        return None

    def dense(self, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        """The dequantized weights, (outputs, inputs), in `dtype`; or in `out`, and in its dtype."""
        out = self.codes.new_empty(self.shape, dtype=dtype) if out is None else out
        if out.shape != self.shape or not out.is_contiguous():
            raise ValueError(f"weights {tuple(self.shape)} into {tuple(out.shape)}, or with gaps")
        if out.dtype in (torch.float32, torch.bfloat16) and kernels.available():
            kernels.dequantize(self.codes, self.scale, self.offset, out)
            return out
        dense = out.view(*self.scale.shape, GROUP)
        step = max(1, WEIGHTS_AT_A_TIME // max(1, self.shape[1]))
        for start in range(0, len(dense), step):
            part = slice(start, start + step)
            codes = self.codes[part].reshape(dense[part].shape).float()
            dense[part] = torch.addcmul(
                self.offset[part, :, None], codes, self.scale[part, :, None]
            )
        return out


class StoredLevels(Levels):
    """Levels in the blocks of a GGUF file, see Levels.from_blocks.

    Codes in a byte each take twice the memory of a file with 4 bits, and as long as packing itself.
    So `pack_into` packs straight from the blocks, and other readers take some rows at a time. Rows
    that are selected or stacked stay where they are in the file.
    """

    format: kernels.Format
    parts: Sequence[kernels.StoredRows]

    def __init__(self, parts: Sequence[kernels.StoredRows], format: kernels.Format) -> None:
        self.__dict__ |= {"parts": parts, "format": format}
        self.__dict__["bits"] = 8 if format == "Q8_0" else 4

    @classmethod
    def of(cls, blocks: Tensor, format: kernels.Format) -> "StoredLevels":
        """See Levels.from_blocks."""
        size = kernels.BLOCK_BYTES.get(format)
        if blocks.dtype != torch.uint8 or blocks.dim() != 3 or blocks.shape[2] != size:
            raise ValueError(
                f"not the blocks of a matrix in {format}: {blocks.dtype} {tuple(blocks.shape)}"
            )
        return cls([kernels.StoredRows(blocks.contiguous())], format)

    @property
    def shape(self) -> torch.Size:
        outputs = sum(len(part) for part in self._orders())
        return torch.Size((outputs, self.parts[0].blocks.shape[1] * GROUP))

    def _orders(self) -> Iterator[Tensor]:
        for blocks, order in self.parts:
            yield torch.arange(len(blocks)) if order is None else order

    def __getitem__(self, rows: Tensor | slice) -> "StoredLevels":
        if isinstance(rows, slice) and rows.step in (None, 1):
            return self._sliced(*rows.indices(self.shape[0])[:2])
        selected = torch.arange(self.shape[0])[rows]
        if len(self.parts) == 1:
            (part,) = self.parts
            order = selected if part.order is None else part.order[selected]
            return StoredLevels([kernels.StoredRows(part.blocks, order)], self.format)
        return StoredLevels([kernels.StoredRows(self._blocks(), selected)], self.format)

    def _sliced(self, start: int, stop: int) -> "StoredLevels":
        parts, first = [], 0
        for blocks, order in self.parts:
            count = len(blocks) if order is None else len(order)
            rows = slice(max(0, start - first), max(0, stop - first))
            if order is None:
                parts.append(kernels.StoredRows(blocks[rows]))
            else:
                parts.append(kernels.StoredRows(blocks, order[rows]))
            first += count
        return StoredLevels(parts, self.format)

    def _stacked(self, parts: Sequence[Levels]) -> "StoredLevels | None":
        stored = [part for part in parts if isinstance(part, StoredLevels)]
        if len(stored) < len(parts) or len({part.format for part in stored}) > 1:
            return None
        if len({part.shape[1] for part in stored}) > 1:
            raise RuntimeError("levels of different inputs")
        return StoredLevels([rows for part in stored for rows in part.parts], self.format)

    def _blocks(self) -> Tensor:
        """The blocks, (outputs, groups, bytes of a block), in one tensor."""
        selected = [blocks if order is None else blocks[order] for blocks, order in self.parts]
        return selected[0] if len(selected) == 1 else torch.cat(selected)

    @property
    def codes(self) -> Tensor:
        """Computed at each use, as `scale` and `offset`."""
        packed = self._blocks()[:, :, 4 if self.format == "Q4_1" else 2 :]
        if self.format == "Q8_0":
            return (packed ^ 128).flatten(1)  # from two's complement to 0 … 255
        # The first 16 codes are in the low nibbles, the others in the high nibbles.
        return torch.cat((packed & 15, packed >> 4), dim=2).flatten(1)

    @property
    def scale(self) -> Tensor:
        return _halves(self._blocks(), 0)

    @property
    def offset(self) -> Tensor:
        if self.format == "Q4_1":
            return _halves(self._blocks(), 2)
        return (-128 if self.format == "Q8_0" else -8) * self.scale

    def dense(self, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        out = torch.empty(self.shape, dtype=dtype) if out is None else out
        if out.shape != self.shape or not out.is_contiguous():
            raise ValueError(f"weights {tuple(self.shape)} into {tuple(out.shape)}, or with gaps")
        for rows in self._rows_at_a_time(16 * WEIGHTS_AT_A_TIME):
            part = self[rows]
            Levels(part.codes, part.scale, part.offset, self.bits).dense(out=out[rows])
        return out

    def pack_into(self, y: Tensor) -> None:
        """Lay the weights out for gptk's kernel. y: uint8, see kernels.packed_bytes."""
        kernels.pack_stored(self.parts, self.format, y)

    def _rows_at_a_time(self, weights: int) -> Iterator[slice]:
        """Slices of outputs of about so many weights."""
        outputs, inputs = self.shape
        step = max(1, weights // max(1, inputs))
        return (slice(start, start + step) for start in range(0, outputs, step))


def _halves(blocks: Tensor, first: int) -> Tensor:
    """The float16 number from the byte `first` of each block on, in float32: (outputs, groups)."""
    halves = blocks[:, :, first : first + 2].contiguous().view(torch.float16)
    return halves[:, :, 0].float()


@dataclass(frozen=True)
class NearestLevels:
    """A matrix that is quantized when it is indexed: its codes are never all in memory at once.

    Weights are rounded to the nearest level, see `to_four_bits` and `to_eight_bits`.
    """

    weight: Tensor
    bits: Literal[4, 8]

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    def __getitem__(self, rows: slice) -> Levels:
        weight = self.weight[rows].float()
        return to_four_bits(weight) if self.bits == 4 else to_eight_bits(weight)


def to_four_bits(weight: Tensor) -> Levels:
    """Round to 16 levels from the smallest to the largest of each 32 weights.

    weight: (outputs, inputs) float32.
    """
    dtype = torch.float16 if kernels.available() else torch.bfloat16
    groups = weight.view(len(weight), -1, GROUP)
    smallest, largest = groups.amin(dim=2), groups.amax(dim=2)
    # Rounded to the kernel's dtype before the codes are computed from them.
    scale = ((largest - smallest) / 15).to(dtype).float()
    offset = smallest.to(dtype).float()
    step = scale[:, :, None].clamp(min=torch.finfo(torch.float32).tiny)
    codes = ((groups - offset[:, :, None]) / step).round_().clamp_(0, 15)
    return Levels(codes.flatten(1).to(torch.uint8), scale, offset, 4)


def to_eight_bits(weight: Tensor) -> Levels:
    """Round to -127 to 127 times a scale for each output. weight: (outputs, inputs) float32."""
    # The scale is rounded to the kernel's float16 before the codes are computed from it, but never
    # to less than the largest weight needs: the rounding error is at most 2⁻¹¹, relative to the
    # scale, or 2⁻²⁵ for the smallest scales.
    least = weight.abs().amax(dim=1, keepdim=True) / 127
    scale = (least * (1 + 2**-11) + 2**-25 * (least > 0)).half().float()
    step = scale.clamp(min=torch.finfo(torch.float32).tiny)
    codes = ((weight / step).round_().clamp_(-127, 127) + 128).to(torch.uint8)
    scale = scale.expand(-1, weight.shape[1] // GROUP)
    return Levels(codes, scale, -128 * scale, 8)


def outputs_at_a_time(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of outputs, each with its weights in float32. See WEIGHTS_AT_A_TIME."""
    step = max(1, WEIGHTS_AT_A_TIME // max(1, weight.shape[1]))
    for start in range(0, len(weight), step):
        outputs = slice(start, start + step)
        yield outputs, weight[outputs].float()
