"""Tokenizers that `tokenizers` runs: any tokenizer.json, against the library itself."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import gptk
from gptk.weights.tokenizers import load_tokenizer
from pipeline_strategies import pipelines, samples

REFUSED = [
    "decoder BPEDecoder",
    "decoder CTC",
    "of a whole text",
    "decoder ByteFallback before",
    "decoder ByteLevel is",
    "decoder ByteFallback is",
    "cuts texts at random: dropout=0.5",
    "a template with more than one token",
]
"""What a tokenizer.json may hold that gptk refuses, by the words of its messages."""


def loaded(made: tokenizers.Tokenizer) -> gptk.Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        made.save(str(Path(folder) / "tokenizer.json"))
        return load_tokenizer(folder)


def loaded_or_refused(made: tokenizers.Tokenizer) -> tuple[gptk.Tokenizer | None, str]:
    try:
        return loaded(made), ""
    except gptk.TokenizerError as error:
        return None, str(error)


def expected_ids(made: tokenizers.Tokenizer, mine: gptk.Tokenizer, text: str) -> list[int]:
    """The library's ids; gptk does not double a BOS."""
    ids: list[int] = made.encode(text).ids
    return ids[1:] if mine.add_bos and ids[:2] == [mine.bos] * 2 else ids


def check_bytes(made: tokenizers.Tokenizer, mine: gptk.Tokenizer, ids: Sequence[int]) -> None:
    """The text is the library's; and the bytes of tokens are appended to those before them."""
    text = mine.decode(ids)
    theirs = made.decode(ids, skip_special_tokens=False)
    if "\ufffd" not in text:  # the library has one for each byte of a run that is no UTF-8
        assert text == theirs
    for end in range(len(ids)):
        if start := mine.decode_bytes(ids[:end]):
            assert mine.decode_bytes(ids) == start + b"".join(map(mine.token_bytes, ids[end:]))


@settings(max_examples=300, suppress_health_check=list(HealthCheck), deadline=None)
@given(pipelines(), st.lists(samples, min_size=3, max_size=3), st.data())
def test_any_tokenizer_json_gives_the_ids_and_bytes_of_tokenizers_or_is_refused_by_name(
    made, texts, data
):
    mine, refusal = loaded_or_refused(made)
    if mine is None:
        assert any(words in refusal for words in REFUSED), refusal
        return
    for text in texts:
        try:
            ids = expected_ids(made, mine, text)
        except Exception:  # such as a character that a vocabulary without an unknown token lacks
            with pytest.raises(gptk.TokenizerError):
                mine.encode(text)
            continue
        assert mine.encode(text) == ids
        check_bytes(made, mine, ids)
    highest = mine.encoding.max_token_value
    assume(highest >= 0)
    check_bytes(made, mine, data.draw(st.lists(st.integers(0, highest), max_size=8)))
