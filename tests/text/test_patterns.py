"""Split patterns: the same pieces in tiktoken, `regex` and Oniguruma, as `tokenizers` has it."""

import random
import re

import pytest
import regex
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

import gptk
from gptk.text.pattern_parser import MAX_DEPTH, PROPERTIES
from gptk.text.patterns import MAX_LENGTH, SPLIT_PATTERNS, SplitPattern

BYTES = {bytes([byte]): byte for byte in range(256)}
CHARACTERS = [chr(number) for number in range(0x110000) if not 0xD800 <= number < 0xE000]


def oniguruma_pieces(pattern: str, text: str) -> list[str]:
    """What a pattern matches in `tokenizers`."""
    split = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    return [piece for piece, _ in split.pre_tokenize_str(text) if piece]


def tiktoken_matches(pattern: str, text: str) -> str:
    """All that a pattern matches in tiktoken, joined."""
    encoding = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=BYTES, special_tokens={})
    return bytes(encoding.encode_ordinary(text)).decode()


def regex_pieces(pattern: SplitPattern, text: str) -> list[str]:
    return regex.findall(pattern.written("regex"), text)


# The smallest texts on which engines disagree, were the pattern handed to them as it is.
@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"\w+", "m²"),
        (r"[\w]+", "m²½a\u200db"),
        (r"\W", "m²½"),
        (r"[^\W\d_]+", "a1_é²b"),
        (r"[\W_]+", "a_²-b"),
        (r"^\w", "xy\nz\n"),
        (r"\w$", "xy\nz\n"),
        (r"a$|\n", "a\n\na\n"),
        (r"^.|\n", "\n\nab\n"),
        (r"\p{N}{1,3}+", "1234567"),
        (r"a{1,2}+a", "aaa"),
        (r"a++a|b", "aaab"),
        (r"(?>a|ab)c|b", "abc"),
        (r"(?i:'s|k)", "'S'ſKk\u212a"),
        (r"\x{e9}|\u00b2", "é²"),
        (r"\p{^L}|\P{N}", "a1²"),
        (r"[a-c\-&~^]+", "ab-&~^d"),
        (r".+", "a\u2028b\x85c\nd"),
        (r"\s+(?!\S)|\s", "a  \x1c\x85\u3000 b "),
        (r"(?<=a)b|(?<!x)c", "abcxc"),
    ],
)
def test_a_pattern_of_oniguruma_has_the_pieces_of_tokenizers(pattern, text):
    parsed = SplitPattern.parse(pattern, "oniguruma")
    expected = oniguruma_pieces(pattern, text)
    assert regex_pieces(parsed, text) == expected
    assert tiktoken_matches(parsed.written("tiktoken"), text) == "".join(expected)
    assert oniguruma_pieces(parsed.written("oniguruma"), text) == expected


ATOMS = re.findall(
    r"\S+",
    r"""\s \S \d \D \w \W . a b ' ſ \p{L} \p{N} \P{L} \p{^Lu} \p{Lu} \p{Han} [ab] [^ab] [\w'] é
    [^\W\d_] [\W_] [^\w\s] [^\s\p{L}\p{N}] [\r\n] [a-z] [A-Z_-] [\d.] \n ² \x41 \x{e9} - & ~ #
    (?i:s) (?i:'s|'re|k) (?i:[sdmt]|ll) ^ $ \A \z \p{Alphabetic}""",
)
QUANTIFIERS = re.findall(r"\S+", "? * + ++ *+ ?+ +? *? ?? {2} {1,3} {2,} {1,3}+ {1,3}? {2}+ {0,2}")
atoms = st.sampled_from([*ATOMS, " "])


def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    group = st.sampled_from(["(?:", "(", "(?>", "(?=", "(?!"])
    return st.one_of(
        st.builds("{}{}".format, inner, inner),
        st.builds("{}|{}".format, inner, inner),
        st.builds("{}{})".format, group, inner),
        st.builds("(?:{}){}".format, inner, st.sampled_from(QUANTIFIERS)),
        st.builds("(?<={}){}".format, atoms, inner),
    )


patterns = st.recursive(
    st.builds("{}{}".format, atoms, st.sampled_from(["", "", *QUANTIFIERS])), larger, max_leaves=6
)
pieces = st.sampled_from(list("aabbsSkKſ\u212adltrRe'' \n\r\t_-&~.#1٤²Ⅻ漢éÉßﬆ\x85\xa0\u200c\u0345"))
short_texts = st.lists(pieces, max_size=14).map("".join)


@settings(max_examples=300)
@given(patterns, st.lists(short_texts, min_size=8, max_size=8))
@example(r"(?<=^)a|b", ["ab\na"])
def test_any_accepted_pattern_has_the_pieces_of_tokenizers(pattern, texts):
    try:
        Regex(pattern)
        parsed = SplitPattern.parse(pattern, "oniguruma")
    except Exception:  # Oniguruma's error is a bare Exception
        return
    written = parsed.written("tiktoken")
    again = SplitPattern.parse(written, "tiktoken")
    for text in texts:
        expected = oniguruma_pieces(pattern, text)
        assert regex_pieces(parsed, text) == regex_pieces(again, text) == expected
        with_gaps = regex_pieces(parsed.with_gaps(), text)
        assert "".join(with_gaps) == text
        isolated = pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(text)
        assert with_gaps == [piece for piece, _ in isolated]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (r"\bx", r"'\\bx'"),
        (r"(?m)^a", "'(?m)^a'"),
        (r"(a)\1", r"'\\1'"),
        (r"\h+", r"'\\h+'"),
        (r"\R", r"'\\R'"),
        (r"[[:alpha:]]", "'[[:alpha:]]'"),
        (r"[a&&b]", "'[a&&b]'"),
        (r"\p{IsLatin}", r"'\\p{IsLatin}'"),
        (r"(?i:ss)", "'ss)'"),
        (r"(?i:é)", "'é)'"),
        (r"(?i:(?:s)t)", "'(?:s)t)'"),
        (r"\xe9", r"'\\xe9'"),
        (r"a{2}?", "'a{2}?'"),
        (r"a**", "'a**'"),
        (r"a{99999}", "'a{99999}'"),
        (r"(?~a)", "'(?~a)'"),
        (r"a|(b", "an unclosed ( or ["),
        (r"a)", "')'"),
        (r"[a", "an unclosed ( or ["),
        ("a*", "between characters"),
        (r"(?=a)", "between characters"),
        ("(" * (MAX_DEPTH + 1), "nested groups"),
        ("a" * (MAX_LENGTH + 1), "more than 20,000 characters"),
    ],
)
def test_a_construct_with_another_meaning_elsewhere_is_named(pattern, words):
    with pytest.raises(gptk.TokenizerError, match=re.escape(words)):
        SplitPattern.parse(pattern, "oniguruma")


def test_what_oniguruma_cannot_say_is_refused_when_written():
    for pattern, words in ((r"\bx", r"\b"), (r"(?<=^a)b", "lookbehind")):
        parsed = SplitPattern.parse(pattern, "tiktoken")
        if words == "lookbehind":
            assert parsed.written("oniguruma") == r"(?<=\Aa)b"
            parsed = SplitPattern.parse(r"(?<=(?!a)b)c", "tiktoken")
        with pytest.raises(gptk.TokenizerError, match=re.escape(words)):
            parsed.written("oniguruma")


def test_the_properties_have_the_same_characters_in_tiktoken_and_tokenizers():
    """Of all characters; `regex` may know a newer Unicode version, see ByteLevelBPE."""
    text = "".join(CHARACTERS[:: 1 + len(CHARACTERS) // 20_000])
    for name in [*sorted(PROPERTIES), None]:
        pattern = r"\s" if name is None else rf"\p{{{name}}}"
        assert tiktoken_matches(pattern, text) == "".join(oniguruma_pieces(pattern, text)), name


def test_the_patterns_of_well_known_tokenizers_are_those_of_tiktoken():
    from tiktoken_ext import openai_public

    assert SPLIT_PATTERNS["gpt2-tiktoken"] == openai_public.r50k_pat_str


@pytest.mark.parametrize("name", SPLIT_PATTERNS)
def test_a_well_known_pattern_covers_any_text(name):
    parsed = SplitPattern.parse(SPLIT_PATTERNS[name], "tiktoken")
    rng = random.Random(0)
    text = "".join(rng.choices(CHARACTERS, k=5_000) + rng.choices("aA1 \n'.é\t", k=5_000))
    assert "".join(regex_pieces(parsed, text)) == text
    assert tiktoken_matches(SPLIT_PATTERNS[name], text) == text
