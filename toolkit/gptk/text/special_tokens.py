"""Finding special tokens in a text, as `tokenizers` does (its `added_vocabulary.rs`).

Of two tokens that begin at the same character the longer is found. Options of a token:

    normalized     it is looked for in the normalized text, once the others have been found
    lstrip, rstrip it takes the whitespace before or after it along
    single_word    it counts only where no word character is beside it
    as_text        it is never found: its text in a prompt is ordinary text
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import regex  # type: ignore[import-untyped]  # tiktoken's own dependency

SpecialOption = Literal["normalized", "lstrip", "rstrip", "single_word", "as_text"]

# As in Rust: Unicode's White_Space and word characters.
_SPACE = regex.compile(r"\s")
_WORD = regex.compile(r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\u200c\u200d]")


class SpecialTokens:
    """The special tokens of a tokenizer that are looked for at the same time."""

    def __init__(
        self,
        ids: Mapping[str, int],
        options: Mapping[str, Sequence[SpecialOption]],
        *,
        normalized: bool,
        normalize: Callable[[str], str],
    ) -> None:
        chosen = [
            text for text in ids if text and normalized == ("normalized" in options.get(text, ()))
        ]
        spelled = {normalize(text) if normalized else text: text for text in chosen}
        longest_first = sorted(filter(None, spelled), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._tokens = {
            spelling: (ids[spelled[spelling]], frozenset(options.get(spelled[spelling], ())))
            for spelling in longest_first
        }

    def parts(self, text: str) -> Iterator[tuple[str, int | None]]:
        """The text in parts: ordinary text with None, or "" with the id of a token."""
        if not self._tokens:
            if text:
                yield text, None
            return
        done = spaces_end = 0
        for match in self._pattern.finditer(text):
            start, end = match.span()
            token, options = self._tokens[match[0]]
            if options:
                if "as_text" in options or (
                    "single_word" in options and _in_word(text, start, end)
                ):
                    continue
                if "lstrip" in options:
                    start = max(start, done)
                    while start > done and _SPACE.match(text[start - 1]):
                        start -= 1
                if "rstrip" in options:
                    spaces_end = max(spaces_end, end)
                    while spaces_end < len(text) and _SPACE.match(text[spaces_end]):
                        spaces_end += 1
                    end = spaces_end
            if done < start:
                yield text[done:start], None
            if start < end:  # not if the token before took all of it along
                yield "", token
            done = end
        if done < len(text):
            yield text[done:], None


def _in_word(text: str, start: int, end: int) -> bool:
    before, after = text[start - 1 : start], text[end : end + 1]
    return any(character and _WORD.match(character) for character in (before, after))
