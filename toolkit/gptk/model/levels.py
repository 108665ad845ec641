"""Quantized matrices: integer codes, with a scale and an offset for each group of 32 weights.

A weight is code · scale + offset: one of 16 levels of its group with 4 bits, one of 256 with 8.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptk import kernels

GROUP = 32
"""Consecutive inputs of an output whose weights share a scale and an offset."""
WEIGHTS_AT_A_TIME = 1 << 16
"""Weights that are converted at a time, so that intermediate tensors take little memory."""


@dataclass(frozen=True, repr=False)
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
    bits: int
    """4 or 8."""

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

    def __repr__(self) -> str:
        formats = ", ".join(part.format.name for part in self.segments)
        return f"<Levels {tuple(self.shape)} in {formats}>"

    @property
    def nbytes(self) -> int:
        """The size with packed codes, and with scales and offsets of two bytes."""
        count = self.shape.numel()
        return count * self.bits // 8 + 4 * (count // GROUP)

    @property
    def format(self) -> kernels.Format:
        """How gptk's kernels store it."""
        return kernels.FORMATS[kernels.FORMAT_OF_BITS[self.bits]]

    @property
    def packed_bytes(self) -> int:
        """Its size as gptk's kernels store it."""
        return kernels.packed_bytes(self.format.number, *self.shape)

    @property
    def has_codes(self) -> bool:
        """Whether there are `codes`, `scale` and `offset`: some formats of files have others."""
        return True

    @property
    def segments(self) -> "tuple[Levels, ...]":
        """The matrices in one format each that it consists of, one after the other by outputs."""
        return (self,)

    def pack_into(self, y: Tensor) -> None:
        """Lay the weights out for gptk's kernels. y: uint8, `packed_bytes` or more."""
        kernels.pack(self.codes, self.scale, self.offset, self.bits, y)

    def equals(self, other: "Levels") -> bool:
        """Whether the other has the same codes, scales and offsets, stored in the same way."""
        return (
            type(other) is Levels
            and self.bits == other.bits
            and torch.equal(self.codes, other.codes)
            and torch.equal(self.scale, other.scale)
            and torch.equal(self.offset, other.offset)
        )

    @staticmethod
    def from_blocks(blocks: Tensor, format: str) -> "Levels":
        """A quantized matrix as a GGUF file stores it: codes are read from it when they are needed.

        blocks: (outputs, blocks of a row, bytes of a block) uint8. format: ggml's name, of
        gptk.kernels.FORMATS. Raises ValueError for others, and for blocks of another shape or
        dtype.
        """
        return StoredLevels.of(blocks, format)

    def __getitem__(self, rows: Tensor | slice) -> "Levels":
        return Levels(self.codes[rows], self.scale[rows], self.offset[rows], self.bits)

    @staticmethod
    def stack(parts: "Sequence[Levels]") -> "Levels":
        """Concatenate matrices by outputs. Raises RuntimeError if inputs differ."""
        parts = [segment for part in parts for segment in part.segments]
        if len({part.shape[1] for part in parts}) > 1:
            raise RuntimeError("levels of different inputs")
        parts = [part for part in parts if part.shape[0]] or parts[:1]
        if (stacked := parts[0]._stacked(parts)) is not None:
            return stacked
        if len({part.bits for part in parts}) > 1 or not all(part.has_codes for part in parts):
            alike = itertools.groupby(parts, lambda part: (part.bits, part.has_codes, part.format))
            return JoinedLevels([Levels.stack(list(group)) for _, group in alike])
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

    parts: Sequence[kernels.StoredRows]
    _format: kernels.Format

    def __init__(self, parts: Sequence[kernels.StoredRows], format: kernels.Format) -> None:
        self.__dict__ |= {"parts": parts, "_format": format, "bits": format.bits}

    @property
    def format(self) -> kernels.Format:
        return self._format

    @classmethod
    def of(cls, blocks: Tensor, name: str) -> "StoredLevels":
        """See Levels.from_blocks."""
        format = kernels.FORMATS.get(name)
        if (
            format is None
            or not format.stored
            or blocks.dtype != torch.uint8
            or blocks.dim() != 3
            or blocks.shape[2] != format.stored
        ):
            raise ValueError(
                f"not the blocks of a matrix in {name}: {blocks.dtype} {tuple(blocks.shape)}"
            )
        return cls([kernels.StoredRows(blocks.contiguous())], format)

    @property
    def shape(self) -> torch.Size:
        outputs = sum(len(part) for part in self._orders())
        return torch.Size((outputs, self.parts[0].blocks.shape[1] * self.format.unit))

    @property
    def nbytes(self) -> int:
        """The bytes of the blocks."""
        return self.shape.numel() // self.format.unit * self.format.stored

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
        return StoredLevels([kernels.StoredRows(self.blocks(), selected)], self.format)

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
        return StoredLevels([rows for part in stored for rows in part.parts], self.format)

    def blocks(self) -> Tensor:
        """The blocks, (outputs, blocks of a row, bytes of a block), in one tensor."""
        selected = [blocks if order is None else blocks[order] for blocks, order in self.parts]
        return selected[0] if len(selected) == 1 else torch.cat(selected)

    def equals(self, other: Levels) -> bool:
        if not isinstance(other, StoredLevels) or other.format is not self.format:
            return False
        return torch.equal(self.blocks(), other.blocks())

    @property
    def has_codes(self) -> bool:
        return self.format.name in _WITH_CODES

    @property
    def codes(self) -> Tensor:
        """Computed at each use, as `scale` and `offset`."""
        packed = self._coded_blocks()[:, :, 4 if self.format.name == "Q4_1" else 2 :]
        if self.bits == 8:
            return (packed ^ 128).flatten(1)  # from two's complement to 0 … 255
        # The first 16 codes are in the low nibbles, the others in the high nibbles.
        return torch.cat((packed & 15, packed >> 4), dim=2).flatten(1)

    @property
    def scale(self) -> Tensor:
        return _halves(self._coded_blocks(), 0)

    @property
    def offset(self) -> Tensor:
        if self.format.name == "Q4_1":
            return _halves(self._coded_blocks(), 2)
        return (-128 if self.bits == 8 else -8) * self.scale

    def _coded_blocks(self) -> Tensor:
        if not self.has_codes:
            raise ValueError(f"{self.format.name} has no scale and offset for each {GROUP} inputs")
        return self.blocks()

    def dense(self, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        out = _room_for(self.shape, dtype, out)
        step = max(1, 16 * WEIGHTS_AT_A_TIME // max(1, self.shape[1]))
        for start in range(0, self.shape[0], step):
            part, rows = self[start : start + step], out[start : start + step]
            rows.copy_(part._numbers(rows.dtype))
        return out

    def _numbers(self, dtype: torch.dtype) -> Tensor:
        if kernels.available():
            packed = torch.empty(self.packed_bytes, dtype=torch.uint8)
            self.pack_into(packed)
            kept = dtype if dtype == torch.bfloat16 else torch.float32
            outputs, inputs = self.shape
            return kernels.dequantize_packed(packed, self.format, outputs, inputs, kept)
        import gguf

        row = self.blocks().view(1, -1).numpy()  # gguf takes much longer for many rows
        numbers = gguf.quants.dequantize(row, gguf.GGMLQuantizationType[self.format.name])
        return torch.from_numpy(numbers).view(self.shape)

    def pack_into(self, y: Tensor) -> None:
        kernels.pack_stored(self.parts, self.format, y)


_WITH_CODES = ("Q4_0", "Q4_1", "Q8_0")


class JoinedLevels(Levels):
    """Matrices one after the other by outputs, whose codes have different formats."""

    _segments: tuple[Levels, ...]

    def __init__(self, segments: Sequence[Levels]) -> None:
        self.__dict__["_segments"] = tuple(segments)

    @property
    def segments(self) -> tuple[Levels, ...]:
        return self._segments

    @property
    def has_codes(self) -> bool:
        return False

    @property
    def shape(self) -> torch.Size:
        outputs = sum(segment.shape[0] for segment in self.segments)
        return torch.Size((outputs, self.segments[0].shape[1]))

    @property
    def nbytes(self) -> int:
        return sum(segment.nbytes for segment in self.segments)

    def __getitem__(self, rows: Tensor | slice) -> Levels:
        if not isinstance(rows, slice):
            raise TypeError("rows of matrices in different formats are selected by a slice")
        start, stop, _ = rows.indices(self.shape[0])
        parts, first = [], 0
        for segment in self.segments:
            parts.append(segment[max(0, start - first) : max(0, stop - first)])
            first += segment.shape[0]
        return Levels.stack(parts)

    def equals(self, other: Levels) -> bool:
        return len(self.segments) == len(other.segments) and all(
            a.equals(b) for a, b in zip(self.segments, other.segments, strict=True)
        )

    def dense(self, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
        out = _room_for(self.shape, dtype, out)
        sizes = [segment.shape[0] for segment in self.segments]
        for segment, rows in zip(self.segments, torch.split(out, sizes), strict=True):
            segment.dense(out=rows)
        return out


def _room_for(shape: torch.Size, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """`out`, or a new tensor. Raises ValueError for one of another shape."""
    out = torch.empty(shape, dtype=dtype) if out is None else out
    if out.shape != shape or not out.is_contiguous():
        raise ValueError(f"weights {tuple(shape)} into {tuple(out.shape)}, or with gaps")
    return out


def _halves(blocks: Tensor, first: int) -> Tensor:
    """The float16 number from the byte `first` of each block on, in float32: (outputs, groups)."""
    halves = blocks[:, :, first : first + 2].contiguous().view(torch.float16)
    return halves[:, :, 0].float()
