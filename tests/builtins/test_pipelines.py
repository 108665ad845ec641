"""Tokenizers that `tokenizers` runs: any tokenizer.json, against the library itself."""

import copy
import dataclasses
import functools
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tokenizers
import torch
import transformers
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers

import gptk
from gptk.data.encoding import encode_documents
from gptk.text.fingerprint import fingerprint
from gptk.weights.tokenizers import load_tokenizer
from gptk_plugins.writers._tokenizer_json import write_tokenizer
from known_tokenizers import CORPUS, KNOWN
from pipeline_strategies import pipelines, samples
from tokenizer_files import texts

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


def is_determined(made: tokenizers.Tokenizer, text: str) -> bool:
    """Whether the library gives a text the same ids each time that it loads the tokenizer. Of added
    tokens that its normalizer makes equal it takes one or the other."""
    written = made.to_str()
    loads = (tokenizers.Tokenizer.from_str(written) for _ in range(30))
    return len({tuple(each.encode(text).ids) for each in loads}) == 1


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
        except BaseException as error:
            # Such as a character that a vocabulary without an unknown token lacks; or a panic.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            with pytest.raises(gptk.TokenizerError):
                mine.encode(text)
            continue
        if mine.encode(text) != ids and not is_determined(made, text):
            continue
        assert mine.encode(text) == ids
        check_bytes(made, mine, ids)
    highest = mine.encoding.max_token_value
    assume(highest >= 0)
    check_bytes(made, mine, data.draw(st.lists(st.integers(0, highest), max_size=8)))


# Tokenizers of models that people have

BY_TIKTOKEN = {"GPT-2", "GPT-NeoX", "OPT", "Qwen2", "StarCoder", "Llama 3", "Mistral Nemo"}
BY_TIKTOKEN |= {"Command R", "SmolLM"}


@pytest.mark.parametrize("model", [name for name in KNOWN if name != "GPT-1"])
def test_the_settings_of_known_models_give_the_ids_and_bytes_of_tokenizers(model):
    made = KNOWN[model]()
    mine = loaded(made)
    assert isinstance(mine.encoding, tiktoken.Encoding) == (model in BY_TIKTOKEN)

    @settings(max_examples=60, deadline=None)
    @given(texts | samples)
    @example("  Hello  world\n\n  12 345 [INST] x<|end|>  y</s> z")
    def equal(text):
        ids = expected_ids(made, mine, text)
        assert mine.encode(text) == ids
        check_bytes(made, mine, ids)

    equal()


def test_a_decoder_that_looks_at_the_next_token_is_refused_by_name():
    with pytest.raises(gptk.TokenizerError, match="decoder BPEDecoder is not supported: what it"):
        loaded(KNOWN["GPT-1"]())


# What else decoding needs of a tokenizer


@functools.cache
def llama2() -> gptk.Tokenizer:
    return loaded(KNOWN["Llama 2"]())


def test_the_leading_space_belongs_to_a_continuation_but_not_to_a_text():
    tokenizer = llama2()
    ids = tokenizer.encode_without_bos("if x")
    assert tokenizer.decode(ids) == "if x"
    assert b"".join(map(tokenizer.token_bytes, ids)) == b" if x"
    assert tokenizer.encode_within(" if x") == ids
    assert tokenizer.decode(tokenizer.encode_within("if x")) == "if x"
    assert tokenizer.encode_within("if x") != ids


def test_bytes_of_a_character_without_a_token_are_tokens_of_their_own():
    tokenizer = llama2()
    ids = tokenizer.encode_without_bos("🦜")
    assert [tokenizer.token_bytes(token) for token in ids[-4:]] == [
        b"\xf0",
        b"\x9f",
        b"\xa6",
        b"\x9c",
    ]
    assert tokenizer.decode(ids) == "🦜"


def lm(tokenizer: gptk.Tokenizer) -> gptk.LanguageModel:
    torch.manual_seed(0)
    config = gptk.GPTConfig(
        vocab_size=tokenizer.encoding.n_vocab,
        context_length=256,
        width=32,
        n_heads=2,
        n_kv_heads=2,
        head_dim=16,
        mlp_width=32,
        n_layers=1,
    )
    return gptk.LanguageModel(gptk.GPT(config), tokenizer)


@pytest.mark.parametrize("model", ["Llama 2", "Mistral 7B v0.3", "Gemma 2", "XGLM", "BERT"])
def test_streamed_pieces_joined_are_what_the_tokenizer_itself_decodes(model):
    made = KNOWN[model]()
    own = lm(loaded(made))
    for seed in range(5):
        stream = own.stream("if x", sampler="multinomial", max_new_tokens=30, seed=seed)
        text = "".join(stream)
        result = stream.result
        assert text == result.text == "".join(result.token_texts)
        whole = made.decode([*result.prompt_tokens, *result.tokens], skip_special_tokens=False)
        before = made.decode(result.prompt_tokens, skip_special_tokens=False)
        if "\ufffd" not in text + whole:
            assert before + text == whole


def test_stop_strings_end_a_text_of_sentencepiece_tokens():
    own = lm(llama2())
    free = own.generate("if x", sampler="multinomial", max_new_tokens=40, seed=1).text
    stop = free[10:13]
    cut = own.generate("if x", sampler="multinomial", max_new_tokens=40, seed=1, stop=[stop])
    assert cut.text == free[: free.index(stop)]


@pytest.mark.parametrize("model", ["Llama 2", "Gemma 3", "T5"])
def test_a_constraint_holds_with_tokens_of_any_kind(model):
    own = lm(dataclasses.replace(loaded(KNOWN[model]()), eos=(2,)))
    pattern = "(yes|no) the [a-zé]{3} is 1[0-9]{2}"
    for seed in range(4):
        text = own.generate(
            "if x",
            sampler="multinomial",
            processors=[f"regex:pattern={pattern!r}"],
            max_new_tokens=60,
            seed=seed,
        ).text
        assert re.fullmatch(pattern, text), text


@pytest.mark.parametrize("model", ["Llama 2", "Mistral 7B v0.3", "Gemma 2", "T5", "BERT", "Falcon"])
def test_a_long_text_cut_in_chunks_has_the_ids_of_the_whole(model):
    tokenizer = loaded(KNOWN[model]())
    text = "\n\n".join(CORPUS) + " <s> x</s>  y" * 3
    pieces = [text[start : start + 100] for start in range(0, len(text), 100)]
    chunks = list(encode_documents([pieces], tokenizer, chunk=300))
    assert len(chunks) > 5
    whole = dataclasses.replace(tokenizer, add_eos=False).encode(text)
    assert np.concatenate([ids for _, ids in chunks]).tolist() == whole


@pytest.mark.parametrize("model", ["Llama 2", "Phi-3", "T5", "BERT", "BLOOM"])
@pytest.mark.parametrize("form", ["gptk", "huggingface"])
def test_a_saved_model_has_the_same_tokenizer(model, form, tmp_path):
    tokenizer = loaded(KNOWN[model]())
    own = lm(tokenizer)
    if form == "gptk":
        own.save(tmp_path / "saved")
        again = gptk.load(str(tmp_path / "saved"), device="cpu").tokenizer
        assert fingerprint(again) == fingerprint(tokenizer)
    else:
        tmp_path.joinpath("saved").mkdir()
        write_tokenizer(tmp_path / "saved", tokenizer, 256)
        again = load_tokenizer(str(tmp_path / "saved"))
        auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
        assert auto("if x  y").input_ids == tokenizer.encode("if x  y")
    for text in ("if x", "  é 🦜\n", "</s> x"):
        assert again.encode(text) == tokenizer.encode(text)
        assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_two_tokenizers_that_differ_have_different_fingerprints():
    made = KNOWN["Llama 2"]()
    made.decoder = decoders.Fuse()
    others = [loaded(made), loaded(KNOWN["Phi-3"]()), dataclasses.replace(llama2(), add_eos=True)]
    assert len({fingerprint(tokenizer) for tokenizer in (llama2(), *others)}) == 4
    assert fingerprint(copy.deepcopy(llama2())) == fingerprint(llama2())


def test_without_the_library_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.json").write_text('{"model": {"type": "Unigram", "vocab": []}}')
        with pytest.raises(gptk.TokenizerError) as caught:
            load_tokenizer(folder)
    assert "the model 'Unigram' needs the package tokenizers: pip install" in str(caught.value)
    assert str(caught.value).endswith("'gptk-decoding[tokenizers]'")


@pytest.mark.parametrize(
    "pattern", ["(a+)+b", "(?:a|b*)+c", r"(?i:x?)*", r"(\p{L}{1,3})+", "(([a-z])+.)+[A-Z]"]
)
def test_a_pattern_that_may_take_for_ever_is_refused(pattern):
    made = KNOWN["Falcon"]()
    made.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    with pytest.raises(gptk.TokenizerError, match="has a repetition in a repetition"):
        loaded(made)


def test_a_text_that_the_library_cannot_encode_is_one_line():
    made = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="?"))
    with pytest.raises(gptk.TokenizerError, match=r"^the tokenizer tokenizer.json: the package"):
        loaded(made).encode("b")


def test_settings_that_a_pipeline_has_itself_are_not_given_again():
    with pytest.raises(gptk.TokenizerError, match="leave out normalization"):
        gptk.Tokenizer(llama2().encoding, normalization="NFC")
