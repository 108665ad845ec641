"""Well-known models' tokenizers: the settings of their public files, with small vocabularies."""

import functools
import json
import pydoc_data.topics
from collections.abc import Callable
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from pipeline_strategies import charsmap

CORPUS = [pydoc_data.topics.topics[name][:3000] for name in ("assert", "if", "numbers")]
CORPUS += ["naïve 한국어 中文 12 345 6789\r\n\r\n  x 🙂"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPACES = decoders.Replace("▁", " ")


def _around(made: Tokenizer, template: str) -> None:
    names = [part for part in template.split() if part != "$A"]
    named = [(name, made.token_to_id(name)) for name in dict.fromkeys(names)]
    made.post_processor = processors.TemplateProcessing(single=template, special_tokens=named)


def _split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


_LAST = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


def byte_level(
    *parts: Any,
    normalizer: Any = None,
    special: tuple[str, ...] = ("<|endoftext|>",),
    template: str = "",
    ignore_merges: bool = False,
) -> Tokenizer:
    """Byte-level BPE with a sequence of pre-tokenizers."""
    made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(list(parts)) if len(parts) > 1 else parts[0]
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    if normalizer:
        made.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=list(special),
            initial_alphabet=sorted(alphabet),
            show_progress=False,
        ),
    )
    if template:
        _around(made, template)
    return made


@functools.cache
def _sentencepiece_bpe() -> str:
    """A BPE over words that begin with U+2581, with tokens for bytes."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = ["<unk>", "<s>", "</s>", *BYTES]
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=special, limit_alphabet=90, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    settings = json.loads(made.to_str())
    settings["added_tokens"] = settings["added_tokens"][:3]
    return json.dumps(settings | {"pre_tokenizer": None})


def sentencepiece_bpe(
    normalizer: Any = None,
    pre_tokenizer: Any = None,
    *,
    strip: bool,
    template: str = "<s> $A",
    added: tuple[AddedToken, ...] = (),
) -> Tokenizer:
    """SentencePiece's BPE as Llama 2 and Gemma have it."""
    made = Tokenizer.from_str(_sentencepiece_bpe())
    if normalizer:
        made.normalizer = normalizer
    if pre_tokenizer:
        made.pre_tokenizer = pre_tokenizer
    steps = [SPACES, decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * strip)
    made.add_tokens(list(added))
    _around(made, template)
    return made


def unigram(
    normalizer: Any,
    pre_tokenizer: Any,
    template: str,
    special: tuple[str, ...] = ("<unk>", "<s>", "</s>", "<pad>"),
) -> Tokenizer:
    """SentencePiece's Unigram."""
    made = Tokenizer(models.Unigram())
    made.normalizer, made.pre_tokenizer = normalizer, pre_tokenizer
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=list(special), unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    _around(made, template)
    return made


def bert() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    _around(made, "[CLS] $A [SEP]")
    return made


def gpt1() -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.BPEDecoder()
    return made


_PREFIX = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
_FIRST = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
_GEMMA = pre_tokenizers.Split(" ", "merged_with_previous")
_DIGITS = pre_tokenizers.Digits(individual_digits=True)
_T5_SPACES = pre_tokenizers.Sequence(
    [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
)
_ALBERT = normalizers.Sequence(
    [
        normalizers.Replace("``", '"'),
        normalizers.Replace("''", '"'),
        normalizers.NFKD(),
        normalizers.StripAccents(),
        normalizers.Lowercase(),
        normalizers.Precompiled(charsmap()),
        normalizers.Replace(Regex(" {2,}"), " "),
    ]
)
_PRECOMPILED = normalizers.Precompiled(charsmap())
_INST = tuple(AddedToken(text, normalized=False, special=True) for text in ("[INST]", "[/INST]"))
_END = AddedToken("<|end|>", rstrip=True, normalized=False, special=True)
_SPACES_TOKENS = tuple(AddedToken("▁" * n, normalized=False) for n in (2, 3))

KNOWN: dict[str, Callable[[], Tokenizer]] = {
    "Llama 2": lambda: sentencepiece_bpe(_PREFIX, strip=True),
    "Mistral 7B v0.1": lambda: sentencepiece_bpe(_PREFIX, strip=True),
    "Mistral 7B v0.3": lambda: sentencepiece_bpe(None, _FIRST, strip=True, added=_INST),
    "Phi-3": lambda: sentencepiece_bpe(_PREFIX, strip=True, template="$A", added=(_END,)),
    "Gemma": lambda: sentencepiece_bpe(normalizers.Replace(" ", "▁"), strip=False),
    "Gemma 2": lambda: sentencepiece_bpe(normalizers.Replace(" ", "▁"), _GEMMA, strip=False),
    "Gemma 3": lambda: sentencepiece_bpe(
        normalizers.Replace(" ", "▁"), _GEMMA, strip=False, added=_SPACES_TOKENS
    ),
    "T5": lambda: unigram(_PRECOMPILED, _T5_SPACES, "$A </s>"),
    "XGLM": lambda: unigram(_PRECOMPILED, pre_tokenizers.Metaspace(), "</s> $A"),
    "XLM-RoBERTa": lambda: unigram(_PRECOMPILED, _T5_SPACES, "<s> $A </s>"),
    "ALBERT": lambda: unigram(_ALBERT, pre_tokenizers.Metaspace(), "<s> $A </s>"),
    "BERT": bert,
    "GPT-1": gpt1,
    "GPT-2": lambda: byte_level(_GPT2),
    "RoBERTa": lambda: byte_level(
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        special=("<s>", "<pad>", "</s>"),
        template="<s> $A </s>",
    ),
    "GPT-NeoX": lambda: byte_level(_GPT2, normalizer=normalizers.NFC()),
    "OPT": lambda: byte_level(_GPT2, special=("<s>", "<pad>", "</s>"), template="</s> $A"),
    "Falcon": lambda: byte_level(
        pre_tokenizers.Punctuation("contiguous"),
        _GPT2,
        pre_tokenizers.Digits(individual_digits=False),
        _split("[0-9][0-9][0-9]"),
    ),
    "BLOOM": lambda: byte_level(_split(r" ?[^(\s|[.,!?…。，、।۔،])]+"), _LAST),
    "Qwen2": lambda: byte_level(
        _split(GPT4.replace("DIGITS", "")), _LAST, normalizer=normalizers.NFC()
    ),
    "StarCoder": lambda: byte_level(_DIGITS, _GPT2),
    "DeepSeek-Coder": lambda: byte_level(
        _split("[\r\n]"),
        _split(r"\s?\p{L}+"),
        _split(r"\s?\p{P}+"),
        _split("[一-龥ࠀ-一가-퟿]+"),
        _DIGITS,
        _LAST,
    ),
    "DeepSeek-V3": lambda: byte_level(
        _split(r"\p{N}{1,3}"), _split("[一-龥぀-ゟ゠-ヿ]+"), _split(DEEPSEEK_V3), _LAST
    ),
    "Llama 3": lambda: byte_level(
        _split(GPT4.replace("DIGITS", "{1,3}")),
        _LAST,
        special=("<|begin_of_text|>", "<|eot_id|>"),
        template="<|begin_of_text|> $A",
        ignore_merges=True,
    ),
    "Mistral Nemo": lambda: byte_level(
        _split(TEKKEN), _LAST, special=("<s>", "</s>"), template="<s> $A", ignore_merges=True
    ),
    "Command R": lambda: byte_level(_DIGITS, _GPT2, normalizer=normalizers.NFC()),
    "SmolLM": lambda: byte_level(_DIGITS, _GPT2, special=("<|endoftext|>", "<|im_start|>")),
}
