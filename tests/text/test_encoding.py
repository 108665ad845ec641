"""Encoding any text: no panic, in linear time, with the pieces of the split pattern."""

import copy
import functools
import random
import time
import unicodedata

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, normalizers, pre_tokenizers

import gptk
from gptk.text import encoding
from gptk.text.encoding import ByteLevelBPE
from gptk.text.fingerprint import fingerprint
from gptk.text.normalization import normalize
from gptk.text.patterns import SPLIT_PATTERNS, SplitPattern
from tokenizer_files import any_character, texts

RANKS = {bytes([byte]): byte for byte in range(256)}
RANKS |= {b"aa": 256, b"  ": 257, b"    ": 258, b"\xcc\x81": 259}


@functools.cache
def with_pattern(pattern: str) -> gptk.Tokenizer:
    ranks = dict(RANKS)
    encoding = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return gptk.Tokenizer(encoding)


N = 1_100_000  # tiktoken's engine panics at runs of a million
RUNS = {
    "spaces": "x" + " " * N + "y",
    "tabs": "\t" * N + "y",
    "line breaks": "x" + "\n" * N + "y",
    "spaces and line breaks": " \n" * (N // 2) + "y",
    "a word": "a" * N,
    "capitals": "A" * N,
    "digits": "1" * N,
    "digits of Arabic": "٤" * N,
    "signs": "!" * N,
    "ideographs": "漢" * N,
    "marks": "\u0301" * N,
    "nulls": "\0" * N,
}


@pytest.mark.parametrize("name", SPLIT_PATTERNS)
def test_a_run_of_a_million_characters_is_encoded(name):
    tokenizer = with_pattern(SPLIT_PATTERNS[name])
    assert tokenizer.decode_bytes(tokenizer.encode(RUNS["spaces"])) == RUNS["spaces"].encode()


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", SPLIT_PATTERNS)
def test_any_run_of_a_million_characters_is_encoded(name, run):
    tokenizer = with_pattern(SPLIT_PATTERNS[name])
    assert tokenizer.decode_bytes(tokenizer.encode(RUNS[run])) == RUNS[run].encode()


def test_a_run_just_below_the_longest_that_tiktoken_splits_has_the_same_tokens():
    """tiktoken itself is the oracle up to a million characters, nine times what it is given."""
    for name in ("gpt2", "llama3", "llama.cpp"):
        tokenizer = with_pattern(SPLIT_PATTERNS[name])
        text = "x " + " " * 900_000 + "y"
        assert tokenizer.encode(text) == tiktoken.Encoding.encode_ordinary(
            tokenizer.encoding, text
        ), name


@settings(max_examples=50)
@given(texts)
def test_texts_of_all_lengths_are_split_alike(text):
    """Whether tiktoken splits a text or `regex` does makes no difference."""
    for pattern in SPLIT_PATTERNS.values():
        encoding = with_pattern(pattern).encoding
        assert encoding._trusted
        pieces = [piece.encode() for piece in encoding.split(text)]
        ids = [token for piece in pieces for token in encoding._encode_single_piece(piece)]
        assert encoding.encode_ordinary(text) == ids


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_unusual_patterns_split_as_tokenizers_does_even_what_unicode_added_lately(text):
    """`regex` knows a newer Unicode version than the two others."""
    pattern = r"\w+|\p{Lu}\P{L}|[^\w\s]+"
    parsed = SplitPattern.parse(pattern, "oniguruma").with_gaps()
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    pieces = with_pattern(parsed.written("tiktoken")).encoding.split(text)
    assert pieces == [piece for piece, _ in split.pre_tokenize_str(text)]


def test_a_pattern_that_takes_too_long_on_a_text_is_an_error(monkeypatch):
    monkeypatch.setattr(encoding, "_SECONDS", 0.3)
    tokenizer = with_pattern(r"(?:a|aa)+$|.")
    start = time.monotonic()
    with pytest.raises(gptk.TokenizerError, match="takes too long on a text of 70 characters"):
        tokenizer.encode("a" * 69 + "b")
    assert time.monotonic() - start < 15
    assert tokenizer.encode("ab") == [97, 98]


def test_long_words_take_time_in_proportion_to_their_length():
    """tiktoken below 0.13 takes the square of it."""
    encoding = with_pattern(SPLIT_PATTERNS["gpt2"]).encoding

    def seconds(length: int) -> float:
        start = time.perf_counter()
        assert len(encoding.encode_ordinary("a" * length)) == length // 2
        return time.perf_counter() - start

    seconds(100_000)
    assert seconds(1_000_000) < 60 * min(seconds(100_000) for _ in range(3))


def test_lone_surrogates_are_replaced_and_pairs_joined():
    tokenizer = with_pattern(r"\w|\W")
    assert (
        tokenizer.decode(tokenizer.encode("a\ud83d\ude00\ud800b"))
        == "a😀\N{REPLACEMENT CHARACTER}b"
    )


# --- Any encoding ------------------------------------------------------------------------------


def test_an_encoding_of_tiktoken_shares_its_tables():
    theirs = tiktoken.Encoding(
        "x", pat_str=SPLIT_PATTERNS["gpt2"], mergeable_ranks=RANKS, special_tokens={"<end>": 999}
    )
    ours = gptk.Tokenizer(theirs).encoding
    assert isinstance(ours, ByteLevelBPE)
    assert ours._core_bpe is theirs._core_bpe
    assert gptk.Tokenizer(ours).encoding is ours
    again = copy.deepcopy(ours)
    assert again.encode_ordinary("a  aa") == ours.encode_ordinary("a  aa")
    assert again.encode("<end>", allowed_special="all") == [999]


def test_an_encoding_that_lacks_bytes_drops_them():
    encoding = tiktoken.Encoding("x", pat_str=r"\w+", mergeable_ranks={b"a": 0}, special_tokens={})
    assert gptk.Tokenizer(encoding).encode("abab é") == [0, 0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mergeable_ranks": {b"a": 0, b"b": 0}}, "the same id"),
        ({"mergeable_ranks": {b"a": 0, b"": 1}}, "is empty"),
        ({"special_tokens": {"<x>": -1}}, "the id -1"),
        ({"special_tokens": {"<x>": 4_000_000_000}}, "far beyond"),
        ({"decode_only": {10**9: b"x"}}, "far beyond"),
        ({"pat_str": "a*"}, "matches between characters"),
        ({"pat_str": r"(?:\p{L}{900}){900}"}, "its split pattern cannot be used"),
    ],
)
def test_an_encoding_that_cannot_be_used_is_an_error(changes, words):
    whole = {"pat_str": r"\w", "mergeable_ranks": {b"a": 0}, "special_tokens": {}}
    with pytest.raises(gptk.TokenizerError, match=words):
        ByteLevelBPE("x", **whole | changes)


# --- Normal forms ------------------------------------------------------------------------------

MARKS = "\u0301\u0323\u0334\u0345\u0344\u0f73\u0f71\u0f72\uff9e\uff9f\u0903\u3099"


@given(st.lists(st.sampled_from(MARKS + "aé \u1100\u1161") | any_character, max_size=30), st.data())
def test_normal_forms_are_those_of_unicodedata(characters, data):
    long_run = "".join(data.draw(st.permutations(MARKS * 12)))
    text = "".join(characters)
    text = text[: len(text) // 2] + long_run + text[len(text) // 2 :]
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert normalize(form, text) == unicodedata.normalize(form, text)


@pytest.mark.parametrize("marks", ["\u0301\u0323", "\u0f73", "\uff9e\u0301", "\u0344\u0334"])
def test_200_000_combining_marks_are_normalized(marks):
    """unicodedata alone would take minutes. The oracle is `tokenizers`."""
    text = "a" + marks * (200_000 // len(marks)) + "é"
    for form in ("NFC", "NFKD"):
        expected = getattr(normalizers, form)().normalize_str(text)
        assert normalize(form, text) == expected


def test_special_tokens_that_take_spaces_along_are_found_in_linear_time():
    encoding = tiktoken.Encoding(
        "x", pat_str=r"[\s\S]", mergeable_ranks=RANKS, special_tokens={"<x>": 999, " ": 998}
    )
    options = {"<x>": ("lstrip", "rstrip"), " ": ("rstrip",)}
    tokenizer = gptk.Tokenizer(encoding, special_options=options)
    assert tokenizer.encode("<x>" + " " * 100_000) == [999, *[998] * 100_000]
    assert tokenizer.encode(" " * 100_000 + "<x>" * 2)[-2:] == [999, 999]


def test_random_texts_have_the_bytes_of_the_text():
    rng = random.Random(0)
    alphabet = "aA1 \n\t.'é漢٤\u0301\0"
    for pattern in SPLIT_PATTERNS.values():
        tokenizer = with_pattern(pattern)
        for _ in range(20):
            text = "".join(rng.choice(alphabet) * rng.choice([1, 1, 2, 300]) for _ in range(30))
            assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()


def test_the_fingerprint_tells_tokenizers_apart_that_encode_or_decode_differently():
    def variant(ranks=(), *, pattern=SPLIT_PATTERNS["gpt2"], special=(), decode_only=(), **about):
        made = gptk.ByteLevelBPE(
            "x",
            pat_str=pattern,
            mergeable_ranks={bytes([byte]): byte for byte in range(256)} | dict(ranks),
            special_tokens=dict(special),
            decode_only=dict(decode_only),
        )
        return gptk.Tokenizer(made, **about)

    variants = [
        variant(),
        variant({b"ab": 256}),
        variant({b"ab": 257}),
        variant(decode_only={256: b"ab"}),
        variant(decode_only={256: b"ac"}),
        variant(special={"ab": 256}),
        variant(special={"ab": 256}, special_options={"ab": ["lstrip"]}),
        variant(pattern=SPLIT_PATTERNS["llama3"]),
        variant(normalization="NFC"),
        variant(bos=7),
        variant(bos=7, add_bos=True),
        variant(eos=(7,)),
        variant(eos=(7, 8)),
    ]
    assert len({fingerprint(made) for made in variants}) == len(variants)
    assert fingerprint(variant(chat_template="x")) == fingerprint(variant())
