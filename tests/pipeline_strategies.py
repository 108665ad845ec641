"""Tokenizers of the library `tokenizers`, drawn over all its components with small vocabularies."""

import struct
from typing import Any

import tokenizers
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

LETTERS = [*"abAé1.#'<>s▁Ġ中\n ", "\u0301"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = [
    "a",
    "b",
    " ",
    "  ",
    "▁",
    "é",
    "e\u0301",
    "中",
    "🙂",
    "1",
    "12",
    "345",
    "\n",
    "A",
    ".",
    "'s",
]
PIECES += ["<s>", "</s>", "<x>", "##", "Ġ", "ab ", " ab", "\t", "\u00a0", "ﬁ", "<0x41>", "\0", "İ"]
samples = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=10).map("".join)
"""Texts; the library reads them on both sides, so any character will do."""

_words = st.lists(st.sampled_from(LETTERS), min_size=2, max_size=4).map("".join)
_words_lists = st.lists(_words, max_size=12, unique=True)


def charsmap() -> bytes:
    """SentencePiece's table of characters to replace, which makes each `A` a `b`.

    A double array (https://github.com/s-yata/darts-clone): the child of a node for a byte is at
    the node's offset XOR the byte, and the value of a leaf at its offset.
    """
    units = [0] * 512
    units[0x41] = (0x100 << 10) | (1 << 8) | 0x41
    return struct.pack("<I512I", 4 * 512, *units) + b"b\0"


@st.composite
def _bpe(draw: st.DrawFn) -> Any:
    suffix = draw(st.sampled_from([None, None, None, "</w>"]))
    prefix = None if suffix else draw(st.sampled_from([None, None, None, "##"]))
    fallback = draw(st.booleans())
    tokens = [*LETTERS, *(BYTES if fallback else []), "<s>", "</s>", "<unk>"]
    if suffix:
        tokens += [letter + suffix for letter in LETTERS]
    if prefix:
        tokens += [prefix + letter for letter in LETTERS]
    merges = []
    for _ in range(draw(st.integers(0, 12))):
        left, right = (draw(st.sampled_from([t for t in tokens if len(t) < 6])) for _ in range(2))
        if (suffix and left.endswith(suffix)) or (prefix and not right.startswith(prefix)):
            continue
        token = left + right.removeprefix(prefix or "")
        if (left, right) not in merges:
            merges.append((left, right))
            tokens += [] if token in tokens else [token]
    tokens = draw(st.permutations(tokens)) if draw(st.booleans()) else tokens
    options = {
        "unk_token": draw(st.sampled_from([None, "<unk>"])),
        "continuing_subword_prefix": prefix,
        "end_of_word_suffix": suffix,
        "dropout": draw(st.sampled_from([None] * 9 + [0.5])),
    }
    return models.BPE(
        {token: number for number, token in enumerate(tokens)},
        merges,
        fuse_unk=draw(st.booleans()),
        byte_fallback=fallback,
        ignore_merges=draw(st.booleans()),
        **{name: value for name, value in options.items() if value is not None},
    )


@st.composite
def _unigram(draw: st.DrawFn) -> Any:
    fallback = draw(st.booleans())
    tokens = ["<unk>", "<s>", "</s>", *(BYTES if fallback else [])]
    tokens += [*draw(st.lists(st.sampled_from(LETTERS), unique=True)), *draw(_words_lists)]
    scores = [draw(st.floats(-20, 0)) for _ in tokens]
    return models.Unigram(list(zip(tokens, scores, strict=True)), 0, fallback)


@st.composite
def _word_piece(draw: st.DrawFn) -> Any:
    words = [*draw(_words_lists), *draw(st.lists(st.sampled_from(LETTERS), unique=True))]
    tokens = dict.fromkeys(["[UNK]", "<s>", "</s>", *words, *(f"##{word}" for word in words)])
    return models.WordPiece(
        {token: number for number, token in enumerate(tokens)},
        unk_token="[UNK]",
        max_input_chars_per_word=draw(st.sampled_from([3, 100])),
    )


@st.composite
def _word_level(draw: st.DrawFn) -> Any:
    tokens = dict.fromkeys(["[UNK]", "<s>", "</s>", *LETTERS, *draw(_words_lists)])
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return models.WordLevel(vocabulary, unk_token="[UNK]")


_patterns = st.sampled_from(
    [" ", "a", "▁", "ab", Regex(r"\s+"), Regex(r"\w+|\S"), Regex(r"^a|b$"), Regex(r"\p{N}{1,3}")]
)
_behaviors = st.sampled_from(
    ["removed", "isolated", "merged_with_previous", "merged_with_next", "contiguous"]
)
_flag = st.booleans()
_normalizer = st.one_of(
    st.sampled_from(
        [
            normalizers.NFC(),
            normalizers.NFD(),
            normalizers.NFKC(),
            normalizers.NFKD(),
            normalizers.Nmt(),
            normalizers.Lowercase(),
            normalizers.StripAccents(),
            normalizers.ByteLevel(),
            normalizers.Prepend("▁"),
            normalizers.Prepend("ab"),
            normalizers.Precompiled(charsmap()),
        ]
    ),
    st.builds(normalizers.Strip, left=_flag, right=_flag),
    st.builds(normalizers.Replace, _patterns, st.sampled_from(["▁", "", " ", "ab"])),
    st.builds(
        normalizers.BertNormalizer,
        clean_text=_flag,
        handle_chinese_chars=_flag,
        strip_accents=st.sampled_from([None, True, False]),
        lowercase=_flag,
    ),
)
_metaspace = {
    "replacement": st.sampled_from(["▁", "_"]),
    "prepend_scheme": st.sampled_from(["always", "never", "first"]),
}
_pre_tokenizer = st.one_of(
    st.sampled_from(
        [
            pre_tokenizers.BertPreTokenizer(),
            pre_tokenizers.UnicodeScripts(),
            pre_tokenizers.Whitespace(),
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.CharDelimiterSplit("a"),
            pre_tokenizers.FixedLength(3),
        ]
    ),
    st.builds(pre_tokenizers.ByteLevel, add_prefix_space=_flag, use_regex=_flag),
    st.builds(pre_tokenizers.Digits, individual_digits=_flag),
    st.builds(pre_tokenizers.Metaspace, split=_flag, **_metaspace),
    st.builds(pre_tokenizers.Punctuation, _behaviors),
    st.builds(pre_tokenizers.Split, _patterns, _behaviors, _flag),
)
_around = {
    "bos": ("<s>", "$A"),
    "eos": ("$A", "</s>"),
    "both": ("<s>", "$A", "</s>"),
    "none": ("$A",),
}
_around |= {"two": ("<s>", "<s>", "$A")}


@st.composite
def _post_processor(draw: st.DrawFn, model: Any) -> Any:
    named = [(name, model.token_to_id(name)) for name in ("<s>", "</s>")]
    template = processors.TemplateProcessing(
        single=list(_around[draw(st.sampled_from([*_around]))]), special_tokens=named
    )
    byte_level = processors.ByteLevel(trim_offsets=draw(_flag))
    return draw(
        st.sampled_from(
            [
                template,
                byte_level,
                processors.Sequence([byte_level, template]),
                processors.BertProcessing(named[1], named[0]),
                processors.RobertaProcessing(named[1], named[0]),
            ]
        )
    )


_decoder = st.one_of(
    st.sampled_from([decoders.ByteLevel(), decoders.ByteFallback(), decoders.Fuse()]),
    st.builds(decoders.Metaspace, split=_flag, **_metaspace),
    st.builds(decoders.WordPiece, prefix=st.just("##"), cleanup=_flag),
    st.builds(decoders.BPEDecoder, suffix=st.just("</w>")),
    st.builds(decoders.CTC),
    st.builds(decoders.Replace, _patterns, st.sampled_from([" ", "", "x"])),
    st.builds(decoders.Strip, st.sampled_from([" ", "a"]), st.integers(0, 2), st.just(0)),
)
_space = decoders.Replace("▁", " ")
_sentencepiece = [_space, decoders.ByteFallback(), decoders.Fuse()]
_decoders = st.one_of(
    _decoder,
    st.lists(_decoder, min_size=1, max_size=3).map(decoders.Sequence),
    st.integers(0, 3).map(
        lambda most: decoders.Sequence([*_sentencepiece, decoders.Strip(" ", most, 0)])
    ),
)
_added = st.builds(
    AddedToken,
    st.sampled_from(["<s>", "</s>", "<x>", "ab", " a", "é", "▁b", "Ab"]),
    single_word=_flag,
    lstrip=_flag,
    rstrip=_flag,
    normalized=_flag,
    special=_flag,
)


def _parts(part: Any, sequence: Any) -> Any:
    return st.one_of(st.none(), part, st.lists(part, max_size=3).map(sequence))


@st.composite
def pipelines(draw: st.DrawFn) -> tokenizers.Tokenizer:
    """A tokenizer of any kind."""
    model = draw(st.one_of(_bpe(), _unigram(), _word_piece(), _word_level()))
    made = tokenizers.Tokenizer(model)
    for name, part in (
        ("normalizer", draw(_parts(_normalizer, normalizers.Sequence))),
        ("pre_tokenizer", draw(_parts(_pre_tokenizer, pre_tokenizers.Sequence))),
        ("post_processor", draw(st.none() | _post_processor(model))),
        ("decoder", draw(st.none() | _decoders)),
    ):
        if part is not None:
            setattr(made, name, part)
    made.add_tokens(draw(st.lists(_added, max_size=3, unique_by=str)))
    return made
