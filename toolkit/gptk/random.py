"""Private random streams: the same prompt draws the same numbers wherever it stands in a batch.

A stream is keyed by (seed, the prompt's tokens, how many equal prompts came before it in the
call, sample index), and its t-th number is a keyed hash of t. Streams therefore need no state:
a row that is copied, moved or rewound goes on with the numbers it would have had.
"""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RandomStream:
    """Uniform numbers in [0, 1) by index, with 53 random bits each."""

    key: bytes

    @classmethod
    def of(
        cls, seed: int, prompt: Sequence[int], *, repeat: int = 0, sample: int = 0
    ) -> "RandomStream":
        """The stream of one row. repeat: equal prompts before this one; sample: of n."""
        digest = hashlib.blake2b(f"{seed}/{repeat}/{sample}/".encode(), digest_size=32)
        digest.update(array("q", prompt).tobytes())
        return cls(digest.digest())

    def uniform(self, index: int, draw: int = 0) -> float:
        """The number at `index`, 0 ≤ u < 1; others of the same index by `draw`."""
        place = index.to_bytes(8, "little") + draw.to_bytes(8, "little")
        digest = hashlib.blake2b(place, key=self.key, digest_size=8)
        return (int.from_bytes(digest.digest(), "little") >> 11) * 2.0**-53
