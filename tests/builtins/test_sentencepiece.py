"""SentencePiece vocabularies of GGUF files, against llama.cpp's algorithms and itself."""

import functools
import itertools
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

import gptk
from gptk.weights.tokenizers import load_tokenizer
from gptk_plugins.tokenizers.gguf import tokenizer_from_gguf
from pipeline_strategies import charsmap, samples
from tokenizer_files import texts

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
SPACE = "\u2581"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = [*"abcé中.1<>s\n", SPACE]


def fields(kind: str, tokens: Sequence[tuple[str, float, int]], **more: object) -> dict[str, Any]:
    named = {"tokens": [t for t, _, _ in tokens], "scores": [s for _, s, _ in tokens]}
    named |= {"token_type": [t for _, _, t in tokens], "model": kind, **more}
    return {f"tokenizer.ggml.{name}": value for name, value in named.items()}


@st.composite
def vocabularies(draw: st.DrawFn) -> list[tuple[str, float, int]]:
    """Tokens, each of them two others joined; no two have the same score."""
    made = [*LETTERS]
    for _ in range(draw(st.integers(0, 20))):
        left, right = (draw(st.sampled_from(made)) for _ in range(2))
        if left + right not in made and len(left + right) < 9:
            made.append(left + right)
    scores = draw(st.permutations([-float(number) for number in range(len(made))]))
    special = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    special += [("<b>", 0.0, USER_DEFINED), ("\n\n", 0.0, USER_DEFINED)]
    special = [token for token in special if token[0] not in made]
    special += [(token, 0.0, BYTE) for token in BYTES]
    return [*special, *((t, s, NORMAL) for t, s in zip(made, scores, strict=True))]


def by_scores(tokens: Sequence[tuple[str, float, int]], text: str) -> list[int]:
    """llm_tokenizer_spm of llama.cpp: joins the two neighbours whose token has the highest score,
    the first of several, until none is left."""
    ids = {token: number for number, (token, _, _) in enumerate(tokens)}
    parts = [*text]
    while True:
        found = [
            (-tokens[ids[parts[i] + parts[i + 1]]][1], i)
            for i in range(len(parts) - 1)
            if parts[i] + parts[i + 1] in ids
        ]
        if not found:
            break
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [
        number
        for part in parts
        for number in (
            [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
        )
    ]


@settings(max_examples=150)
@given(vocabularies(), samples, st.booleans())
def test_bpe_by_scores_gives_the_ids_of_llama_cpps_algorithm(tokens, text, prefix):
    text = text.replace("<", "").replace("\n\n", "\n")  # special tokens are tested below
    mine = tokenizer_from_gguf(fields("llama", tokens, add_space_prefix=prefix), "x.gguf")
    spaced = (" " if prefix and text else "") + text
    assert mine.encode_without_bos(text) == by_scores(tokens, spaced.replace(" ", SPACE))


def by_log_probabilities(tokens: Sequence[tuple[str, float, int]], text: str) -> list[int]:
    """llm_tokenizer_ugm of llama.cpp: the tokens with the highest sum of scores; unknown
    characters in a row are one token."""
    normal = {t: (s, number) for number, (t, s, kind) in enumerate(tokens) if kind == NORMAL}
    unknown = min(score for score, _ in normal.values()) - 10
    best: list[tuple[float, list[int]]] = [(0.0, []), *[(float("-inf"), [])] * len(text)]
    for start in range(len(text)):
        total, ids = best[start]
        for end in range(start + 1, len(text) + 1):
            score, number = normal.get(text[start:end], (unknown, 0))
            if (text[start:end] in normal or end == start + 1) and total + score > best[end][0]:
                best[end] = (total + score, [*ids, number])
    ids = best[-1][1]
    return [t for i, t in enumerate(ids) if not (t == 0 and i and ids[i - 1] == 0)]


@settings(max_examples=150)
@given(vocabularies(), st.lists(st.sampled_from([*"abcAx é中.", "ab", "  "])).map("".join))
def test_unigram_gives_the_ids_of_llama_cpps_algorithm(tokens, text):
    tokens = [t for t in tokens if t[2] in (UNKNOWN, CONTROL, NORMAL)]
    more = {"remove_extra_whitespaces": True, "add_space_prefix": True, "unknown_token_id": 0}
    more["precompiled_charsmap"] = [*charsmap()]  # makes each A a b
    mine = tokenizer_from_gguf(fields("t5", tokens, eos_token_id=2, **more), "x.gguf")
    words = text.replace("A", "b").split()
    ids = by_log_probabilities(tokens, "".join(SPACE + word for word in words))
    assert mine.encode(text) == [*ids, 2]
    assert mine.encode_without_bos(text) == ids


def written(folder: Path, metadata: Mapping[str, Any]) -> Path:
    """A GGUF file with these metadata and no weights."""
    writer = gguf.GGUFWriter(folder / "x.gguf", "llama")
    for key, value in metadata.items():
        if key.endswith("precompiled_charsmap"):
            writer.add_array(key, bytes(value))
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return folder / "x.gguf"


def llama_cpp_ids(path: Path) -> Callable[[str], list[int]]:
    """llama.cpp's ids of a text, with what it puts in front and behind."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    return lambda text: list(model.tokenize(text.encode(), add_bos=True, special=True))


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_small_vocabularies_give_the_ids_of_llama_cpp(kind, tmp_path):
    pytest.importorskip("llama_cpp")
    numbers = itertools.count()

    @settings(max_examples=25)
    @given(vocabularies(), st.lists(samples, min_size=8, max_size=8), st.booleans())
    def equal(tokens, drawn, flag):
        more: dict[str, Any] = {"add_space_prefix": flag, "unknown_token_id": 0}
        if kind == "t5":
            tokens = [t for t in tokens if t[2] != BYTE]
            more |= {"precompiled_charsmap": [*charsmap()], "remove_extra_whitespaces": True}
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        path = written(folder, fields(kind, tokens, bos_token_id=1, eos_token_id=2, **more))
        mine, oracle = load_tokenizer(str(path)), llama_cpp_ids(path)
        for text in drawn:
            # NUL ends a text for llama.cpp's table of characters, and `tokenizers` replaces a
            # letter together with the marks behind it.
            text = "".join(c for c in text if c != "\0" and not unicodedata.combining(c))
            ids = oracle(text)
            assert mine.encode(text) == (ids[1:] if ids[:2] == [1, 1] else ids)

    equal()


def test_what_a_file_leaves_out_is_as_llama_cpp_has_it():
    tokens = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    tokens += [("<b>", 0.0, USER_DEFINED), *((byte, 0.0, BYTE) for byte in BYTES)]
    tokens += [("a", -1.0, NORMAL), (SPACE, -2.0, NORMAL), (SPACE + "a", -3.0, NORMAL)]
    mine = tokenizer_from_gguf(fields("llama", tokens), "x.gguf")
    a, space, word = range(260, 263)
    assert (mine.bos, mine.eos, mine.add_bos, mine.add_eos) == (1, (2,), True, False)
    assert mine.encode("a") == [1, word]
    assert mine.encode("a<b>a</s>a") == [1, word, 3, word, 2, word]
    assert mine.encode_within("aa a") == [a, a, word]
    assert mine.encode_without_bos(" a") == [space, word]
    assert mine.decode([word, word]) == "a a"
    assert mine.token_bytes(3) == b"<b>"
    assert mine.encoding.special_tokens_set == {"<unk>", "<s>", "</s>"}
    t5 = tokenizer_from_gguf(fields("t5", [*tokens[1:3], tokens[0], *tokens[-3:]]), "x.gguf")
    assert (t5.bos, t5.eos, t5.add_bos, t5.add_eos) == (None, (1,), False, True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scores": None}, "3 tokens, but no scores"),
        ({"scores": [0.0]}, "3 tokens, but 1 scores"),
        ({"scores": [0.0, float("nan"), 0.0]}, "finite number"),
        ({"tokens": ["a", "a", "b"]}, "'a' occurs twice"),
        ({"model": "t5", "unknown_token_id": 9}, "no token for unknown characters"),
        ({"model": "t5", "unknown_token_id": 0, "precompiled_charsmap": [1, 2]}, "corrupt"),
        ({"add_sep_token": True}, "a separator"),
        ({"model": "bert"}, "WordPiece"),
    ],
)
def test_metadata_that_cannot_be_used_are_one_line(changes, words):
    tokens = [("a", 0.0, NORMAL), ("b", 0.0, NORMAL), ("c", 0.0, NORMAL)]
    metadata = fields("llama", tokens) | {f"tokenizer.ggml.{k}": v for k, v in changes.items()}
    with pytest.raises(gptk.TokenizerError, match=words) as caught:
        tokenizer_from_gguf(metadata, "x.gguf")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("x.gguf")


# Gemma 3, 262,144 tokens


@functools.cache
def gemma(path: Path) -> gptk.Tokenizer:
    return load_tokenizer(str(path))


pieces = [
    "a",
    "the",
    " of",
    "ing",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "é",
    "e\u0301",
    "🙂",
    "🦜",
    "中文",
]
pieces += [
    "한국어",
    "<b>",
    "</h1>",
    "<eos>",
    "<start_of_turn>",
    "<end_of_turn",
    "12 345",
    "▁",
    "\0",
]
gemma_texts = st.lists(st.sampled_from(pieces) | texts, max_size=8).map("".join)


@pytest.mark.slow
def test_gemmas_ids_and_bytes_equal_those_of_llama_cpp(gemma_path):
    mine, oracle = gemma(gemma_path), llama_cpp_ids(gemma_path)

    @settings(max_examples=1000)
    @given(gemma_texts)
    @example("  x" + " " * 40 + "\n" * 40 + "<eos>  y")
    def equal(text):
        ids = oracle(text)
        assert mine.encode(text) == (ids[1:] if ids[:2] == [2, 2] else ids)
        assert mine.decode(mine.encode_without_bos(text)) == text.replace(SPACE, " ")

    equal()


@pytest.mark.slow
def test_gemmas_ids_equal_those_of_transformers(gemma_path):
    mine = gemma(gemma_path)
    oracle = transformers.AutoTokenizer.from_pretrained(
        gemma_path.parent, gguf_file=gemma_path.name
    )

    @settings(max_examples=1000)
    @given(gemma_texts)
    def equal(text):
        # transformers looks for the tokens of several spaces as the characters U+2581.
        text = text.replace(SPACE, "")
        assert mine.encode_without_bos(text) == oracle(text, add_special_tokens=False).input_ids

    equal()
