"""Which token ids a vocabulary can have."""

from collections.abc import Collection, Iterable

from gptk.errors import TokenizerError


def check_ids(vocabulary: Collection[int], others: Iterable[int] = ()) -> int:
    """The highest id. Raises TokenizerError for ids that cannot be used: two of `vocabulary` that
    are the same, or any that is negative or far beyond the number of tokens."""
    if len(set(vocabulary)) < len(vocabulary):
        raise TokenizerError("two tokens of the vocabulary have the same id")
    ids = [*vocabulary, *others]
    if min(ids, default=0) < 0:
        raise TokenizerError(f"a token has the id {min(ids)}; ids are 0 and above")
    highest, most = max(ids, default=-1), 4 * len(ids) + 100_000
    if highest > most:
        raise TokenizerError(
            f"a token has the id {highest:,}, far beyond its {len(ids):,} tokens (at most {most:,})"
        )
    return highest
