"""n-grams of a text."""

from collections.abc import Hashable, Sequence

Text = Sequence[Hashable]
"""A text as its tokens, or words."""


def ngrams(text: Text, n: int) -> list[tuple[Hashable, ...]]:
    """All of them, in their order."""
    return [tuple(text[start : start + n]) for start in range(len(text) - n + 1)]
