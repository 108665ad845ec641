"""Tokenizer files, mutated; texts made to trouble tokenizers; and gptk's pieces against others'."""

import functools
import json
import random
from pathlib import Path
from typing import Any

import regex
import tokenizers
from attacking import mutated_json, mutated_text
from tokenizers import Regex, decoders, models, pre_tokenizers

import gptk
from gptk.plugins import provided
from gptk.text.patterns import SPLIT_PATTERNS
from gptk.weights.tokenizers import load_tokenizer
from gptk_plugins.tokenizers.gguf import _PRE, tokenizer_from_gguf
from known_tokenizers import BYTES, KNOWN
from pipeline_strategies import charsmap

provided("tokenizer")  # imports the plug-ins, which may take as long as an input may

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NASTY = [
    " ",
    "\t",
    "\n",
    "\r\n",
    "\0",
    "a",
    "A",
    "'s",
    "'",
    "1",
    "٤",
    "²",
    "é",
    "e\u0301",
    "\u0323",
]
NASTY += ["漢", "🙂", "👩\u200d👧", "\ufeff", "\u202e", "\ud800", "\udfff", "\u0378", "\U000e0041"]
NASTY += ["<|end|>", "<|end", "|>", "<mask>", " <mask> ", "\x85", "\u3000", "\u200b", "ß", "ſ", "İ"]


def text(rng: random.Random) -> str:
    """A text of pieces, some of which are repeated, up to a million times."""
    times = [1, 1, 1, 2, 10, 1000, 100_000]
    pieces = [rng.choice(NASTY) * rng.choice(times) for _ in range(rng.randrange(1, 8))]
    if rng.random() < 0.1:
        pieces.append(rng.choice([" ", "a", "\u0301\u0323", "1", "!", "\n"]) * 1_100_000)
    return "".join(pieces)[:2_500_000]


def use(tokenizer: gptk.Tokenizer, sample: str) -> None:
    """Encode and decode. All of the vocabulary is decoded, as constraints do."""
    ids = tokenizer.encode(sample)
    tokenizer.decode(ids)
    assert all(0 <= token <= tokenizer.encoding.max_token_value for token in ids)
    for token in range(tokenizer.encoding.max_token_value + 1):
        tokenizer.token_bytes(token)


@functools.cache
def tokenizer_json() -> str:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(alphabet)}
    merges = [("a", "s"), ("Ġ", "a"), ("Ġa", "s"), ("'", "s"), ("Ġ", "Ġ")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    made = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    made.normalizer = tokenizers.normalizers.NFC()
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|end|>"])
    made.add_tokens([tokenizers.AddedToken("<mask>", lstrip=True, single_word=True)])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", len(vocabulary))]
    )
    return str(made.to_str())


BESIDE: dict[str, dict[str, Any]] = {
    "tokenizer_config": {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|end|>",
        "eos_token": {"__type": "AddedToken", "content": "<eos>", "lstrip": False},
        "added_tokens_decoder": {"300": {"content": "<new>", "special": True, "rstrip": True}},
        "extra_special_tokens": ["<x>", {"content": "<y>", "normalized": True}],
        "split_special_tokens": False,
        "chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}],
    },
    "special_tokens_map": {"pad_token": "<pad>", "additional_special_tokens": ["<z>"]},
    "added_tokens": {"<more>": 301},
    "generation_config": {"bos_token_id": 1, "eos_token_id": [0, 2]},
    "config": {"model_type": "llama", "eos_token_id": 3},
}


def test_reading_a_tokenizer_json_and_the_files_beside_it(attack):
    def make(rng: random.Random) -> dict[str, str]:
        files = {"tokenizer": tokenizer_json()}
        chosen = rng.sample(sorted(BESIDE), rng.randrange(len(BESIDE) + 1))
        files |= {name: json.dumps(BESIDE[name]) for name in chosen}
        if "tokenizer_config" in files and rng.random() < 0.3:  # as older versions wrote it
            config = json.loads(files["tokenizer_config"])
            del config["added_tokens_decoder"]
            files["tokenizer_config"] = json.dumps(config)
        for name in set(rng.choices(sorted(files), k=rng.choice([1, 1, 2]))):
            files[name] = mutated_json(rng, json.loads(files[name]))
        return files

    def run(files: dict[str, str]) -> None:
        for name, content in files.items():
            Path(f"{name}.json").write_text(content, encoding="utf-8", errors="surrogatepass")
        use(load_tokenizer(str(Path().resolve())), "as <mask> <|end|>'S  12\n<new> <x>é\u0301")

    attack(make, run)


def gguf_fields() -> dict[str, Any]:
    model = json.loads(tokenizer_json())["model"]
    tokens = [*model["vocab"], "<|end|>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 1) + [3],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
        "tokenizer.ggml.padding_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ messages[0].content }}",
        "general.name": "x",
    }


def test_reading_the_tokenizer_of_a_gguf_file(attack):
    """Its fields, as read from the file: any values that a GGUF file can hold."""

    def make(rng: random.Random) -> dict[str, Any]:
        kind = rng.choice(["gpt2", "llama", "t5"])
        fields = gguf_fields() if kind == "gpt2" else sentencepiece_fields(kind)
        if kind == "gpt2":
            fields["tokenizer.ggml.pre"] = rng.choice(sorted(_PRE))
        values: list[Any] = [None, True, -1, 0, 2**31, 2**64 - 1, 0.5, float("nan"), "", "x", []]
        values += ["\udcff", [1], ["a"], [["a"]], ["a", 1], [[]] * 1000, "a" * 10**6, [-1] * 262]
        for key in rng.sample(sorted(fields), rng.choice([1, 1, 2])):
            value = fields[key]
            if isinstance(value, list) and rng.random() < 0.7:
                place = rng.randrange(len(value))
                value[place] = rng.choice([*values, value[place - 1]])
            elif rng.random() < 0.1:
                del fields[key]
            else:
                fields[key] = rng.choice(values)
        return fields

    def run(fields: dict[str, Any]) -> None:
        use(tokenizer_from_gguf(fields, "model.gguf"), "as <|end|>'S  12\né")

    attack(make, run)


PIPELINES = ["Llama 2", "Mistral 7B v0.3", "Phi-3", "T5", "ALBERT", "BERT", "Falcon", "RoBERTa"]


@functools.cache
def pipeline(model: str) -> str:
    return KNOWN[model]().to_str()


def test_reading_a_tokenizer_json_that_tokenizers_runs(attack):
    def make(rng: random.Random) -> tuple[str, str]:
        model = rng.choice(PIPELINES)
        return model, mutated_json(rng, json.loads(pipeline(model)))

    def run(attacked: tuple[str, str]) -> None:
        _, content = attacked
        Path("tokenizer.json").write_text(content, encoding="utf-8", errors="surrogatepass")
        use(load_tokenizer(str(Path().resolve())), "as <s> 'S  12\n[CLS] <|end|>é\u0301 🦜")

    attack(make, run)


def test_encoding_nasty_texts_by_pipelines(attack):
    def make(rng: random.Random) -> tuple[str, str]:
        return rng.choice(PIPELINES), text(rng)[: rng.choice([1000, 50_000])]

    def run(attacked: tuple[str, str]) -> None:
        model, sample = attacked
        tokenizer = by_pipeline(model)
        tokenizer.decode(tokenizer.encode(sample))

    attack(make, run)


@functools.cache
def by_pipeline(model: str) -> gptk.Tokenizer:
    return gptk.Tokenizer(gptk.PipelineEncoding.from_json(model, pipeline(model)))


def sentencepiece_fields(kind: str) -> dict[str, Any]:
    tokens = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("<b>", 0.0, 4)]
    tokens += [(byte, 0.0, 6) for byte in BYTES]
    pieces = ["a", "s", "\u2581", "as", "\u2581a", "\u2581as", "é", "\n", "'", "1"]
    tokens += [(piece, -float(number), 1) for number, piece in enumerate(pieces)]
    names = ("tokens", "scores", "token_type")
    fields: dict[str, Any] = {
        name: [token[place] for token in tokens] for place, name in enumerate(names)
    }
    fields |= {"model": kind, "add_space_prefix": True, "remove_extra_whitespaces": True}
    fields |= {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    fields |= {"precompiled_charsmap": [*charsmap()], "add_eos_token": False}
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


@functools.cache
def by_pattern(pattern: str) -> gptk.Tokenizer:
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"as": 256, b"  ": 257}
    special = {"<|end|>": 300, "<mask>": 301}
    encoding = gptk.ByteLevelBPE(
        "x", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
    )
    options: Any = {"<mask>": ("lstrip", "rstrip", "single_word")}
    return gptk.Tokenizer(encoding, normalization="NFC", special_options=options)


def test_encoding_nasty_texts_by_each_pattern(attack):
    def make(rng: random.Random) -> tuple[str, str]:
        return rng.choice(list(SPLIT_PATTERNS.values())), text(rng)

    def run(attacked: tuple[str, str]) -> None:
        pattern, sample = attacked
        tokenizer = by_pattern(pattern)
        tokenizer.decode(tokenizer.encode(sample))

    attack(make, run)


PATTERNS = [LLAMA3, *SPLIT_PATTERNS.values(), r"\w+|[^\w\s]+", r"^\s+|\S+$", r"(?i:'s|[a-d])+|\W"]
PATTERNS += [
    r"\p{N}{1,3}+|[^\W\d_]+",
    r"(?>a|as)+(?=\s)|.",
    r"(a*)*b|\s",
    r"(?:a|a?)+$",
    r"\s+X|\w",
]


def test_split_patterns_mutated(attack):
    """What is accepted encodes any text in bounded time; `tokenizers` splits a short one alike."""

    def make(rng: random.Random) -> tuple[str, str]:
        return mutated_text(rng, rng.choice(PATTERNS)), text(rng)[: rng.choice([40, 100_000])]

    def run(attacked: tuple[str, str]) -> None:
        source, sample = attacked
        parsed = gptk.SplitPattern.parse(source, "oniguruma")
        by_pattern(parsed.with_gaps().written("tiktoken")).encode(sample)
        short = sample[:30].encode("utf-8", "replace").decode()
        try:
            split = pre_tokenizers.Split(Regex(source), "removed", invert=True)
        except Exception:  # Oniguruma's error is a bare Exception
            return
        expected = [piece for piece, _ in split.pre_tokenize_str(short) if piece]
        assert regex.findall(parsed.written("regex"), short, timeout=5) == expected

    attack(make, run)
