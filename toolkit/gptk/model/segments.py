"""How the quantized weights of a matrix are stored: formats of consecutive outputs."""

from collections.abc import Iterator
from typing import Self

from gptk.kernels.formats import BLOCK, FORMATS, Format, packed_bytes
from gptk.kernels.structures import SEGMENTS
from gptk.model.levels import Levels


class Segments(tuple[tuple[Format, int], ...]):
    """Formats and counts of outputs, one after the other."""

    @classmethod
    def of(cls, levels: Levels) -> Self:
        return cls((part.format, part.shape[0]) for part in levels.segments)

    def each(self) -> Iterator[Self]:
        """Each segment alone."""
        return (type(self)([segment]) for segment in self)

    @property
    def kind(self) -> str:
        """The precision: int and the bits of a code, or several."""
        return "+".join(dict.fromkeys(f"int{format.bits}" for format, _ in self))

    @property
    def sizes(self) -> list[int]:
        """The outputs of each."""
        return [outputs for _, outputs in self]

    @property
    def outputs(self) -> int:
        return sum(self.sizes)

    @property
    def can_be_packed(self) -> bool:
        """Whether gptk's kernels take them: each but the last has whole blocks."""
        return len(self) <= SEGMENTS and all(outputs % BLOCK == 0 for outputs in self.sizes[:-1])

    @property
    def have_codes(self) -> bool:
        """Whether they are codes of 4 or 8 bits in groups of 32 inputs: see `Levels.has_codes`."""
        return len(self) == 1 and self[0][0].name in ("Q4_0", "Q4_1", "Q8_0", "Q8_OFFSET")

    def packed_bytes(self, inputs: int) -> int:
        """Their size as gptk's kernels store them."""
        return sum(packed_bytes(format.number, outputs, inputs) for format, outputs in self)

    def to_json(self) -> list[tuple[str, int]]:
        return [(format.name, outputs) for format, outputs in self]

    @classmethod
    def from_json(cls, segments: list[tuple[str, int]]) -> Self:
        """Raises KeyError for a format that there is not."""
        return cls((FORMATS[name], outputs) for name, outputs in segments)
