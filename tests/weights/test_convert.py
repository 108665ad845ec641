"""`gptk convert` and the weight writers: transformers and `tokenizers` read what is written."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import tiktoken
import tokenizers
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

import checkpoints
import gptk
from gptk.plugins.registry import register, unregister
from gptk.system.files import write_directory
from gptk.testing import tiny_gpt, tiny_lm
from gptk.text.chat import render_chat
from gptk.weights.building import build_model
from gptk.weights.loading import load_checkpoint
from gptk.weights.saving import write_model
from gptk.weights.tokenizers import load_tokenizer
from gptk_plugins.loaders.huggingface import HuggingFace as Loader
from gptk_plugins.tokenizers import bpe
from gptk_plugins.tokenizers.huggingface import load_tokenizer_json
from gptk_plugins.writers._tokenizer_json import tokenizer_json
from gptk_plugins.writers.huggingface import HuggingFace
from program import failing
from program import gptk as run
from tokenizer_files import texts
from toys import GPT2_LIKE, LLAMA_LIKE, byte_tokenizer

OPENAI = Path(__file__).parents[1] / "builtins" / "openai" / "tiny"
NO_BIASES = {"mlp_bias": False, "qkv_bias": False, "out_bias": False}
MISTRAL_LIKE = replace(LLAMA_LIKE, head_dim=16, qk_norm=False, rope_theta=1e6, norm_eps=1e-6)

# The family each becomes, and the configuration that is read back, where it is another.
CONFIGS = {
    "gpt2": (GPT2_LIKE, "gpt2", {}),
    "gpt2-exact-gelu-untied": (
        replace(GPT2_LIKE, mlp="gelu", tied_head=False, norm_eps=1e-3),
        "gpt2",
        {},
    ),
    "gpt2-without-biases": (
        replace(GPT2_LIKE, norm_bias=False, **NO_BIASES),
        "gpt2",
        {"norm_bias": True, "mlp_bias": True, "qkv_bias": True, "out_bias": True},
    ),
    "the-books": (
        replace(GPT2_LIKE, qkv_bias=False, tied_head=False),
        "gpt2",
        {"qkv_bias": True},
    ),
    "llama": (replace(LLAMA_LIKE, qk_norm=False), "llama", {}),
    "llama-tied-biased": (
        replace(
            LLAMA_LIKE, qk_norm=False, tied_head=True, mlp_bias=True, qkv_bias=True, out_bias=True
        ),
        "llama",
        {},
    ),
    "llama-one-bias": (
        replace(LLAMA_LIKE, qk_norm=False, out_bias=True),
        "llama",
        {"qkv_bias": True},
    ),
    "llama-linear-rope": (
        replace(LLAMA_LIKE, qk_norm=False, rope_factors=(4.0,) * 4),
        "llama",
        {},
    ),
    "mistral": (MISTRAL_LIKE, "llama", {}),
    "qwen2": (replace(LLAMA_LIKE, qk_norm=False, qkv_bias=True, tied_head=True), "qwen2", {}),
    "qwen2-wide-heads": (replace(MISTRAL_LIKE, qkv_bias=True), "llama", {"out_bias": True}),
    "qwen3": (replace(LLAMA_LIKE, head_dim=16, tied_head=True), "qwen3", {}),
    "qwen3-biased": (
        replace(LLAMA_LIKE, qkv_bias=True),
        "qwen3",
        {"out_bias": True},
    ),
}


def random_gpt(config: gptk.GPTConfig) -> gptk.GPT:
    """A random model whose biases and norms count, too."""
    model = tiny_gpt(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.inference_mode()
def furthest(folder: Path, model: gptk.GPT) -> float:
    """How far the predictions of transformers, reading the folder, are from the model's."""
    oracle = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    vocabulary = model.config.vocab_size
    ids = checkpoints.random_ids(model.config.context_length, vocabulary)
    ours = model.logits(model(ids))
    assert ours.std() > 0.1
    return float((oracle(ids).logits - ours).abs().max())


# --- Weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CONFIGS)
def test_transformers_predicts_what_the_model_predicted(case, tmp_path):
    config, family, changes = CONFIGS[case]
    model = random_gpt(config)
    HuggingFace().write(tmp_path, model, None)
    assert furthest(tmp_path, model) < 1e-5
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == family
    again = Loader(path=str(tmp_path)).load()
    assert again.config == replace(config, **changes)
    for name, tensor in model.named_parameters():
        assert torch.equal(again.state[name], tensor), name


@pytest.mark.parametrize("case", ["gpt2-untied-gelu", "llama-llama3-rope", "mistral", "qwen3"])
def test_what_transformers_wrote_is_written_as_it_was(case, tmp_path):
    checkpoints.random_model(case).save_pretrained(tmp_path / "theirs")
    checkpoint = load_checkpoint(str(tmp_path / "theirs"))
    model = build_model(checkpoint, "cpu", torch.float32)
    (tmp_path / "ours").mkdir()
    HuggingFace().write(tmp_path / "ours", model, None)
    theirs, ours = (
        safetensors.torch.load_file(tmp_path / folder / "model.safetensors")
        for folder in ("theirs", "ours")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert load_checkpoint(str(tmp_path / "ours")).config == checkpoint.config
    if checkpoint.config.context_length <= 128:
        assert furthest(tmp_path / "ours", model) < 1e-5


@pytest.mark.parametrize("original", [32, 8192])
@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3s_rotary_rule_is_found_in_its_divisors_also_in_float32(original, factor, tmp_path):
    rule = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }
    from gptk_plugins.loaders._huggingface_config import read_config

    raw = transformers.LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=96,
        rope_parameters=rule | {"rope_theta": 500000.0},
    ).to_dict()
    config = read_config(raw, "")[0]
    # As GGUF files have them.
    divisors = torch.tensor(config.rope_factors, dtype=torch.float32).tolist()
    model = random_gpt(replace(config, rope_factors=tuple(divisors)))
    HuggingFace().write(tmp_path, model, None)
    assert json.loads((tmp_path / "config.json").read_text())["rope_scaling"] == rule
    assert furthest(tmp_path, model) < 1e-5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(LLAMA_LIKE, rope_factors=(1.0, 3.0, 2.0, 5.0)), "rotary frequencies of this"),
        (replace(LLAMA_LIKE, mlp_bias=True), "qwen3 cannot hold this model: it has biases in its"),
        (replace(LLAMA_LIKE, norm="layer"), "layer norm, rotary positions and swiglu"),
        (replace(LLAMA_LIKE, positions="learned"), "rms norm, learned positions and swiglu"),
        (replace(GPT2_LIKE, norm="rms"), "rms norm, learned positions and gelu-tanh"),
        (replace(GPT2_LIKE, mlp="swiglu"), "layer norm, learned positions and swiglu"),
        (replace(GPT2_LIKE, n_kv_heads=2), "gpt2 cannot hold this model: it has grouped heads"),
        (replace(GPT2_LIKE, qk_norm=True), "it has a norm on each head"),
        (replace(GPT2_LIKE, head_dim=16), "it has heads that do not make up its width"),
    ],
)
def test_models_that_no_family_holds_are_refused(config, message, tmp_path):
    with pytest.raises(gptk.SourceError) as caught:
        HuggingFace().write(tmp_path, tiny_gpt(config), None)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# --- Tokenizers ------------------------------------------------------------------------------

CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
TEXT = "The 12 cats don't   say HELLO to 2048 dogs; they'Ll say hello, HELLO!\n\n  Hello?\t" * 2


def learned(pattern: str, special: tuple[str, ...] = ("<|endoftext|>",)) -> tiktoken.Encoding:
    """An encoding with a few hundred tokens, learned as tiktoken's own were."""
    oracle = tokenizers.Tokenizer(tokenizers.models.BPE())
    oracle.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\s?\w+|\W"), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    oracle.train_from_iterator([TEXT, json.__doc__, bpe.__doc__], trainer)
    ranks = {
        bytes(gptk.GPT2_ALPHABET[letter] for letter in token): rank
        for token, rank in oracle.get_vocab().items()
    }
    return tiktoken.Encoding(
        "learned",
        pat_str=pattern,
        mergeable_ranks=ranks,
        special_tokens={name: len(ranks) + 7 * index for index, name in enumerate(special)},
    )


def llama3_like() -> gptk.Tokenizer:
    """Words that no merges make, as in Llama 3, and a first token."""
    encoding = learned(gptk.SPLIT_PATTERNS["llama3"], ("<s>", "<|im_end|>"))
    ranks = encoding._mergeable_ranks
    words = [b"world", "한국어".encode(), "👩\u200d👧".encode(), b" dogs and cats"]
    for word in words:
        assert word not in ranks
    with_words = gptk.ByteLevelBPE(
        "llama3-like",
        pat_str=gptk.SPLIT_PATTERNS["llama3"],
        mergeable_ranks=ranks | {word: 400 + index for index, word in enumerate(words)},
        special_tokens=encoding._special_tokens,
        decode_only={500: "▁x".encode()},
    )
    bos, eos = (encoding._special_tokens[name] for name in ("<s>", "<|im_end|>"))
    return gptk.Tokenizer(
        with_words, bos=bos, eos=(eos, 500), add_bos=True, chat_template="{{ x }}"
    )


def qwen2_like() -> gptk.Tokenizer:
    """A normal form, and tokens that only decode: one absent from all text, one spelled oddly."""
    encoding = learned(gptk.SPLIT_PATTERNS["qwen2"], ("<|im_end|>", "<|endoftext|>"))
    with_decode_only = gptk.ByteLevelBPE(
        "qwen2-like",
        pat_str=gptk.SPLIT_PATTERNS["qwen2"],
        mergeable_ranks=encoding._mergeable_ranks,
        special_tokens=encoding._special_tokens,
        decode_only={450: b"never merged", 451: "▁x".encode(), 452: b"\xff\x00"},
    )
    ends = tuple(encoding._special_tokens.values())
    return gptk.Tokenizer(with_decode_only, bos=ends[1], eos=ends, normalization="NFC")


def compatibility_form() -> gptk.Tokenizer:
    return gptk.Tokenizer(learned(r"[\s\S]{1,4}"), normalization="NFKD")


def special_options() -> gptk.Tokenizer:
    special = ("<|endoftext|>", "<mask>", " dogs", "cats", "중")
    options = {
        "<mask>": ("lstrip", "rstrip"),
        "cats": ("normalized", "single_word"),
        "중": ("normalized",),
    }
    encoding = learned(gptk.SPLIT_PATTERNS["gpt2"], special)
    return gptk.Tokenizer(encoding, normalization="NFD", special_options=options)


TOKENIZERS = {
    "bytes": byte_tokenizer,
    "gpt2": lambda: load_tokenizer("gpt2"),
    "smollm2": lambda: load_checkpoint("smollm2").tokenizer(),
    "openai": lambda: load_checkpoint(str(OPENAI)).tokenizer(),
    "cl100k-pattern": lambda: gptk.Tokenizer(learned(CL100K)),
    "r50k-pattern": lambda: gptk.Tokenizer(
        learned(gptk.SPLIT_PATTERNS["gpt2"].replace("|\\s", "|\\s++$|\\s", 1))
    ),
    "o200k-like-pattern": lambda: gptk.Tokenizer(learned(gptk.SPLIT_PATTERNS["tekken"])),
    "numbers-whole": lambda: gptk.Tokenizer(learned(gptk.SPLIT_PATTERNS["gpt2-numbers"])),
    "gaps": lambda: gptk.Tokenizer(learned(r"\p{L}+|\p{N}")),
    "lines": lambda: gptk.Tokenizer(learned(r"^\w+|\w+$|\W|\w")),
    "possessive": lambda: gptk.Tokenizer(learned(r"\p{N}{1,3}+\w|(?>\w+?)\W|\w|\W")),
    "special-options": special_options,
    "llama3-like": llama3_like,
    "qwen2-like": qwen2_like,
    "compatibility": compatibility_form,
}


def written(tokenizer: gptk.Tokenizer, folder: Path) -> Path:
    vocab_size = tokenizer.encoding.max_token_value + 1
    HuggingFace().write(folder, tiny_gpt(replace(GPT2_LIKE, vocab_size=vocab_size)), tokenizer)
    return folder


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in ("gpt2", "smollm2") else [])
        for name in TOKENIZERS
    ],
)
def test_transformers_tokenizer_gives_the_same_ids_and_texts(case, tmp_path):
    tokenizer = TOKENIZERS[case]()
    folder = written(tokenizer, tmp_path)
    oracle = transformers.AutoTokenizer.from_pretrained(folder)
    again = load_tokenizer_json(folder / "tokenizer.json")

    @settings(max_examples=60)
    @given(texts)
    @example("a  1  b 22  \n")
    @example("12345 6789\n\nx")
    @example("Hello world dogs and cats 한국어")
    @example("a <mask>  cats concats 중\n \u110c\u116e\u11bc")
    def same(text: str) -> None:
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids
        assert again.decode(ids) == tokenizer.decode(ids)
        if not (tokenizer.add_bos and text.startswith("<s>")):  # which gptk does not double
            assert oracle(text).input_ids == ids
            assert oracle.decode(ids) == tokenizer.decode(ids)

    same()
    for name in ("bos", "add_bos", "eos", "normalization", "chat_template"):
        assert getattr(again, name) == getattr(tokenizer, name), name
    assert again.encoding._special_tokens == tokenizer.encoding._special_tokens
    number = max(getattr(tokenizer.encoding, "decode_only", ()), default=0)
    assert oracle.decode([number]) == tokenizer.decode([number])
    # What is read is written as it was read.
    assert tokenizer_json(again) == json.loads((folder / "tokenizer.json").read_text())


@st.composite
def rankings(draw: st.DrawFn) -> dict[bytes, int]:
    """Any tokens in any order: merges make some of them, others only a whole piece or detours."""
    tokens = draw(st.lists(st.text("abc", min_size=2, max_size=5), unique=True, max_size=12))
    return {token.encode(): rank for rank, token in enumerate([*"abc", *tokens])}


@settings(max_examples=400)
@given(rankings(), st.lists(st.text("abc", max_size=12), min_size=5, max_size=5))
@example({b"a": 0, b"b": 1, b"c": 2, b"abc": 3, b"ab": 4}, ["cabc", "abc", "cabcab"])
def test_any_ranks_give_the_ids_that_tokenizers_gives(ranks, words):
    encoding = tiktoken.Encoding(
        "any", pat_str=r"\w+", mergeable_ranks=ranks, special_tokens={"<|end|>": 100}
    )
    settings_ = tokenizer_json(gptk.Tokenizer(encoding))
    oracle = tokenizers.Tokenizer.from_str(json.dumps(settings_))
    for word in words:
        assert oracle.encode(word).ids == encoding.encode_ordinary(word)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pat_str": r"(?m)^\w+"}, "its split pattern has '(?m)^"),
        ({"pat_str": r"[\w--\d]+|\W"}, "its split pattern has '[\\\\w--"),
        ({"pat_str": r"\w|\h|\W"}, "its split pattern has '\\\\h|"),
        ({"pat_str": r"\bx|\w|\W"}, "its split pattern has '\\b'"),
        ({"special_tokens": {"ab": 9}}, "the special token 'ab' is spelled like another token"),
    ],
)
def test_a_tokenizer_that_cannot_be_written_is_refused(changes, message, tmp_path):
    whole = {"pat_str": r"\w+", "mergeable_ranks": {b"a": 0, b"b": 1, b"ab": 2}}
    encoding = tiktoken.Encoding("any", **{"special_tokens": {}, **whole, **changes})
    with pytest.raises(gptk.TokenizerError) as caught:
        written(gptk.Tokenizer(encoding), tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_whose_role_is_no_token_of_its_is_refused(tmp_path):
    encoding = learned(gptk.SPLIT_PATTERNS["gpt2"])
    for tokenizer in (
        gptk.Tokenizer(encoding, bos=9999, add_bos=True),
        gptk.Tokenizer(encoding, eos=(9999,)),
    ):
        with pytest.raises(gptk.TokenizerError, match=r"cannot be written as tokenizer\.json"):
            written(tokenizer, tmp_path)


TEMPLATE = (
    "{{ bos_token }}{{ image }}{{ x_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
)


@pytest.mark.parametrize(
    "tokens",
    [
        {"bos_token": "<s>", "x_token": "<x>"},
        {"bos_token": "<s>", "x_token": "<x>", "image": "<img>"},
        {"bos_token": "", "image": "<img>"},
        {"pad_token": "no token, and no name in the template"},
        None,
    ],
)
def test_what_a_template_knows_by_name_stays(tokens, tmp_path):
    """Also for transformers; in their tokenizer_config.json other names than …_token are extra."""
    encoding = learned(gptk.SPLIT_PATTERNS["gpt2"], ("<s>", "<x>", "<img>"))
    start = encoding._special_tokens["<s>"]
    tokenizer = gptk.Tokenizer(encoding, start, chat_template=TEMPLATE, template_tokens=tokens)
    folder = written(tokenizer, tmp_path)
    messages = [{"role": "user", "content": "Hi"}]
    expected = render_chat(tokenizer, messages)
    assert render_chat(load_tokenizer_json(folder / "tokenizer.json"), messages) == expected
    oracle = transformers.AutoTokenizer.from_pretrained(folder)
    assert oracle.apply_chat_template(messages, tokenize=False) == expected


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"template_tokens": {"bos_token": "The"}}, "bos_token, 'The'"),
        ({"template_tokens": {"image": "<none>"}}, "image, '<none>'"),
        ({"bos": 65}, "bos_token, '.+'"),
    ],
)
def test_a_name_in_the_template_that_is_no_special_token_is_refused(changes, told, tmp_path):
    encoding = learned(gptk.SPLIT_PATTERNS["gpt2"])
    tokenizer = gptk.Tokenizer(encoding, chat_template=TEMPLATE, **changes)
    with pytest.raises(gptk.TokenizerError, match=f"template uses {told}, which is no special"):
        written(tokenizer, tmp_path)
    (tmp_path / "without").mkdir()
    written(replace(tokenizer, chat_template=None), tmp_path / "without")


def test_two_tokens_of_one_id_are_refused(tmp_path):
    encoding = tiktoken.Encoding(
        "any", pat_str=r"\w", mergeable_ranks={b"a": 0}, special_tokens={"<x>": 1, "<y>": 1}
    )
    with pytest.raises(gptk.TokenizerError, match="have the same id"):
        written(gptk.Tokenizer(encoding), tmp_path)


# --- The command -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A small random model with the tokenizer `bytes`, saved by gptk."""
    path = tmp_path_factory.mktemp("source") / "small"
    tiny_lm().save(path)
    return path


def test_convert_writes_a_directory_and_says_so_in_one_line(source, tmp_path):
    out = run("convert", source, tmp_path / "new" / "hf", "--to", "huggingface")
    assert out.returncode == 0, out.stderr
    (line,) = out.stdout.splitlines()
    assert line.startswith(f"{tmp_path / 'new' / 'hf'}: huggingface, ")
    assert "parameters in float32, with tokenizer, 5 files" in line
    assert sorted(os.listdir(tmp_path / "new")) == ["hf"]
    model = gptk.load(str(source)).model
    assert furthest(tmp_path / "new" / "hf", model) < 1e-5
    assert gptk.load(str(tmp_path / "new" / "hf")).tokenizer.encode("a<|endoftext|>") == [97, 256]


def test_openais_gpt2_becomes_gptks_and_then_hugging_faces(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert run("convert", OPENAI, ours, "--to", "gptk").returncode == 0
    assert run("convert", ours, theirs, "--to", "huggingface").returncode == 0
    model = build_model(load_checkpoint(str(OPENAI)), "cpu", torch.float32)
    assert furthest(theirs, model) < 1e-5
    ids = load_checkpoint(str(OPENAI)).tokenizer().encode("the cat sat<|endoftext|>")
    assert transformers.AutoTokenizer.from_pretrained(theirs)("the cat sat<|endoftext|>")[
        "input_ids"
    ] == ids  # fmt: skip
    assert load_checkpoint(str(ours)).tokenizer().encode("the cat sat<|endoftext|>") == ids


@pytest.mark.parametrize("format_", ["huggingface", "gptk"])
def test_the_precision_is_the_stored_one_or_the_one_asked_for(format_, tmp_path):
    small = replace(LLAMA_LIKE, qk_norm=False)
    lm = gptk.LanguageModel(tiny_gpt(small).bfloat16(), None)
    lm.save(tmp_path / "bfloat16")
    for options, dtype in (
        ([], torch.bfloat16),
        (["--dtype", "stored"], torch.bfloat16),
        (["--dtype", "float32"], torch.float32),
        (["--dtype", "float16"], torch.float16),
    ):
        run("convert", tmp_path / "bfloat16", tmp_path / "out", "--to", format_, *options)
        state = load_checkpoint(str(tmp_path / "out")).state
        assert {tensor.dtype for tensor in state.values()} == {dtype}
    theirs = transformers.AutoConfig.from_pretrained if format_ == "huggingface" else None
    assert theirs is None or theirs(tmp_path / "out").dtype == torch.float16


def test_a_mixture_of_precisions_is_stored_in_one_that_holds_all(tmp_path):
    model = tiny_gpt(replace(LLAMA_LIKE, qk_norm=False))
    state = {name: x.bfloat16() if x.dim() == 2 else x for name, x in model.state_dict().items()}
    (tmp_path / "mixed").mkdir()
    write_model(tmp_path / "mixed", model.config, state, None)
    run("convert", tmp_path / "mixed", tmp_path / "out", "--to", "gptk")
    out = load_checkpoint(str(tmp_path / "out")).state
    assert {x.dtype for x in out.values()} == {torch.float32}
    assert all(torch.equal(out[name], x.float()) for name, x in state.items())


def test_another_tokenizer_or_none_can_be_written(source, tmp_path):
    out = run("convert", source, tmp_path / "a", "--to", "huggingface", "--tokenizer", "none")
    assert "without tokenizer" in out.stdout
    assert sorted(os.listdir(tmp_path / "a")) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert load_checkpoint(str(tmp_path / "a")).tokenizer is None
    out = run("convert", tmp_path / "a", tmp_path / "b", "--to", "gptk", "--tokenizer", "bytes")
    assert "with tokenizer" in out.stdout
    assert load_checkpoint(str(tmp_path / "b")).tokenizer().eos == (256,)
    line = failing(
        "convert", source, tmp_path / "c", "--to", "gptk", "--tokenizer", "gpt2", code=1
    )  # fmt: skip
    assert "the tokenizer gpt2 has tokens up to 50,256, the model up to 256" in line
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("format_", ["huggingface", "gptk"])
def test_only_a_directory_of_the_format_is_overwritten(format_, source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    convert = ("convert", source, out, "--to", format_)
    assert run(*convert).returncode == 0  # an empty one
    assert run(*convert, "--dtype", "float16").returncode == 0
    (out / "README.md").write_text("mine")
    assert "(README.md); it is not overwritten" in failing(*convert, code=1)
    assert {x.dtype for x in load_checkpoint(str(out)).state.values()} == {torch.float16}
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "model.safetensors").write_text("mine")
    line = failing("convert", source, tmp_path / "notes", "--to", format_, code=1)
    assert f"exists and is no {format_} model; it is not overwritten" in line
    file = tmp_path / "notes" / "model.safetensors"
    line = failing("convert", source, file, "--to", format_, code=1)
    assert "it is not overwritten" in line
    assert file.read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["notes", "out"]


def test_a_model_can_be_converted_in_its_place(source, tmp_path):
    model = gptk.load(str(source)).model
    gptk.LanguageModel(model, None).save(tmp_path / "here")
    assert run("convert", tmp_path / "here", tmp_path / "here", "--to", "gptk").returncode == 0
    state = load_checkpoint(str(tmp_path / "here")).state
    assert all(torch.equal(state[name], x) for name, x in model.named_parameters())


def test_mistakes_are_one_line_and_leave_nothing(source, tmp_path):
    target = tmp_path / "out"
    line = failing("convert", source, target, "--to", "hugingface", code=2)
    assert "no writer is called 'hugingface'; did you mean huggingface?" in line
    line = failing("convert", source, target, "--to", "gptk:x=1", code=2)
    assert "writer gptk has no option 'x'" in line
    assert "no model at 'nowhere'" in failing("convert", "nowhere", target, "--to", "gptk", code=1)
    assert "Missing option '--to'" in failing("convert", source, target, code=2)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("format_", ["huggingface", "gptk"])
@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), safetensors.SafetensorError("I/O error: full")],
)
def test_a_full_disk_is_one_line_and_leaves_what_was_there(
    error, format_, source, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    run("convert", source, out, "--to", format_)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("safetensors.torch.save_file", full)
    monkeypatch.setattr("gptk_plugins.writers.huggingface.save_file", full)
    line = failing("convert", source, out, "--to", format_, code=1)
    assert f"{out} cannot be written: " in line
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert os.listdir(tmp_path) == ["out"]


def test_files_can_be_read_by_whom_the_umask_lets(source, tmp_path):
    for format_ in ("huggingface", "gptk"):
        run("convert", source, tmp_path / format_, "--to", format_)
        (tmp_path / "new").touch()
        mode = (tmp_path / "new").stat().st_mode
        assert {path.stat().st_mode for path in (tmp_path / format_).iterdir()} == {mode}


def test_a_plugin_can_bring_a_format(source, tmp_path):
    class Shapes(gptk.WeightWriter):
        """The shapes of the weights, a line each."""

        name = "shapes"

        def write(self, path, model, tokenizer):
            (path / "deep").mkdir()
            lines = [f"{name} {tuple(x.shape)}" for name, x in model.named_parameters()]
            (path / "deep" / "shapes.txt").write_text("\n".join(lines))

    class Module:
        @staticmethod
        @gptk.hookimpl
        def gptk_weight_writers():
            return [Shapes]

    register(Module)
    try:
        for _ in range(2):
            out = run("convert", source, tmp_path / "out", "--to", "shapes")
            assert out.returncode == 0, out.stderr
            assert ": shapes, " in out.stdout
    finally:
        unregister(Module)
    assert "embed.weight (257, 32)" in (tmp_path / "out" / "deep" / "shapes.txt").read_text()


def test_a_directory_is_there_whole_or_not_at_all(tmp_path):
    def half(folder: Path) -> None:
        (folder / "one").write_text("1")
        raise OSError("the plug was pulled")

    with pytest.raises(gptk.SourceError, match="cannot be written: the plug was pulled"):
        write_directory(tmp_path / "new", half, what="thing")
    assert os.listdir(tmp_path) == []


def test_averaged_weights_are_written_by_parameter_names(tmp_path):
    model = tiny_gpt(GPT2_LIKE)
    averaged = {name: x.detach() / 2 for name, x in model.named_parameters()}
    write_model(tmp_path, model.config, averaged, byte_tokenizer())
    checkpoint = load_checkpoint(str(tmp_path))
    assert dataclasses.asdict(checkpoint.config) == dataclasses.asdict(model.config)
    assert all(torch.equal(checkpoint.state[name], x) for name, x in averaged.items())


@pytest.mark.slow
def test_smollm2_is_what_transformers_reads(tmp_path, hf_smollm2):
    assert run("convert", "smollm2", tmp_path / "out", "--to", "huggingface").returncode == 0
    model = build_model(load_checkpoint("smollm2"), "cpu", torch.float32)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    for (name, want), (other_name, got) in zip(
        hf_smollm2.state_dict().items(), oracle.state_dict().items(), strict=True
    ):
        assert name == other_name
        assert torch.allclose(want, got, rtol=0, atol=1e-6), name
    prompt = "The capital of France is"
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(prompt, return_tensors="pt")
    lm = gptk.LanguageModel(model, load_checkpoint("smollm2").tokenizer())
    want = lm.generate(prompt, max_new_tokens=12).tokens
    got = oracle.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids.input_ids.shape[1] :]
    assert got.tolist() == list(want)


@pytest.mark.skipif(sys.platform == "win32", reason="names of files are text there")
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_any_locale_and_any_file_name_will_do(locale, source, tmp_path):
    """In the locale C output is ASCII; names of files are bytes, and need not be text."""
    name = os.fsdecode(b"caf\xc3\xa9\xff")
    shutil.copytree(source, tmp_path / name)
    outcomes = []
    for arguments in (["info", name], ["convert", name, f"{name}2", "--to", "gptk"]):
        outcomes.append(
            subprocess.run(
                [sys.executable, "-m", "gptk", *arguments],
                cwd=tmp_path, capture_output=True, check=True,
                env=os.environ | {
                    "LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
                    "PYTHONIOENCODING": "" if locale == "C" else ":strict",
                    "CXX": "/nonexistent",
                },
            )
        )  # fmt: skip
    assert b"source: caf" in outcomes[0].stdout
    assert (tmp_path / f"{name}2" / "gptk.json").exists()
