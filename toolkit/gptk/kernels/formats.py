"""How quantized weights are stored: the formats of GGUF files, and their size in memory.

In memory a matrix is in blocks of 16 outputs, with the codes, scales and offsets of the file, in an
order that gptk's kernels multiply by: see cpp/formats.h.
"""

from dataclasses import dataclass

BLOCK = 16
"""Outputs of a block in memory; those that the last block lacks are zeros."""


@dataclass(frozen=True)
class Format:
    """How quantized weights are stored: w = value · scale + offset."""

    name: str
    """ggml's."""
    number: int
    """As in cpp/formats.h."""
    bits: int
    """Of a code."""
    unit: int
    """Consecutive inputs of an output that a block of the file has."""
    stored: int
    """The bytes of such a block; 0 for a format that no file has."""
    packed: int
    """The bytes of as many inputs of an output in memory."""


_FORMATS = (
    Format("Q4_0", 0, 4, 32, 18, 18),
    Format("Q4_1", 1, 4, 32, 20, 20),
    Format("Q8_0", 2, 8, 32, 34, 34),
    Format("Q8_OFFSET", 3, 8, 32, 0, 36),
    Format("Q5_0", 4, 5, 32, 22, 22),
    Format("Q5_1", 5, 5, 32, 24, 24),
    Format("Q2_K", 6, 2, 256, 84, 84),
    Format("Q3_K", 7, 3, 256, 110, 114),
    Format("Q4_K", 8, 4, 256, 144, 148),
    Format("Q5_K", 9, 5, 256, 176, 180),
    Format("Q6_K", 10, 6, 256, 210, 210),
    Format("IQ4_NL", 11, 4, 32, 18, 18),
    Format("IQ4_XS", 12, 4, 256, 136, 138),
    Format("MXFP4", 13, 4, 32, 17, 17),
)
FORMATS = {format.name: format for format in _FORMATS}
"""All formats by name. Q8_OFFSET is no file's: any codes of 8 bits with a scale and an offset for
each 32 inputs, as Q4_1 has those of 4 bits."""
FORMAT_OF_BITS = {4: "Q4_1", 8: "Q8_OFFSET"}
"""The formats of gptk.Levels, which have any codes, scales and offsets."""


def packed_bytes(format: int, outputs: int, inputs: int) -> int:
    """The bytes of a matrix in memory; -1 for a number of no format or sizes it cannot have."""
    if not (0 <= format < len(_FORMATS) and 0 <= outputs < 2**31 and 0 <= inputs < 2**31):
        return -1
    found = _FORMATS[format]
    if inputs % found.unit:
        return -1
    return (outputs + -outputs % BLOCK) * (inputs // found.unit) * found.packed
