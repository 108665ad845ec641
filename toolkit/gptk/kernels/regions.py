"""Regions of memory, to find out whether a tensor shares any of them."""

from bisect import bisect_right
from collections.abc import Iterable


class Regions:
    """Parts of memory: from an address, so many bytes."""

    def __init__(self, parts: Iterable[tuple[int, int]]) -> None:
        """parts: address and bytes of each; parts without bytes do not count."""
        self.overlap = False
        """Whether some of them share memory."""
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._apart_from: Regions | None = None
        """Those that they were last found to share nothing with."""
        for start, size in sorted(parts):
            if size <= 0:
                continue
            if self._ends and start < self._ends[-1]:
                self.overlap = True
                self._ends[-1] = max(self._ends[-1], start + size)
            else:
                self._starts.append(start)
                self._ends.append(start + size)

    def share(self, start: int, end: int) -> bool:
        """Whether one of them has a byte of those from start to before end."""
        place = bisect_right(self._ends, start)
        return place < len(self._ends) and self._starts[place] < end

    def meet(self, others: "Regions") -> bool:
        """Whether one of them shares memory with one of the others."""
        if others is self._apart_from:
            return False
        meets = any(map(self.share, others._starts, others._ends))
        if not meets:
            self._apart_from = others
        return meets
