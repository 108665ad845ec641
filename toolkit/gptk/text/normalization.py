"""Unicode normal forms in linear time.

`unicodedata.normalize` sorts combining marks by insertion: a run of 100,000 takes it half a minute.
A long run is therefore decomposed and sorted before, which does not change the result.
"""

import itertools
import unicodedata
from typing import Literal

import regex  # type: ignore[import-untyped]  # tiktoken's own dependency

NormalForm = Literal["NFC", "NFD", "NFKC", "NFKD"]

_LONG_RUN = regex.compile(r"[\p{M}\uff9e\uff9f]{100,}+")


def normalize(form: NormalForm, text: str) -> str:
    """The normal form of a text."""
    if text.isascii():
        return text

    decomposition: NormalForm = "NFKD" if "K" in form else "NFD"

    def ordered(match: regex.Match[str]) -> str:
        marks = "".join(unicodedata.normalize(decomposition, mark) for mark in match[0])
        groups = itertools.groupby(marks, lambda mark: unicodedata.combining(mark) > 0)
        return "".join(
            character
            for movable, group in groups
            for character in (sorted(group, key=unicodedata.combining) if movable else group)
        )

    return unicodedata.normalize(form, _LONG_RUN.sub(ordered, text))
