"""Texts that tell tokenizers apart, and tokenizer files written by `tokenizers`."""

import json
import pydoc_data.topics
from pathlib import Path
from typing import Any

import tokenizers
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

# Unassigned characters are left out: libraries know different versions of Unicode.
any_character = st.characters(exclude_categories=["Cs", "Cn"])
TELLING = {
    "digits": ["12", " 3", "4567", "٤٥", "²", "Ⅻ"],
    "spaces": [" ", "  ", "\t", "\n", "\r\n", " \n ", "\x85", "\xa0", "\u3000", "\u200b"],
    "words": ["'s", "'LL", "'ſ", "don't", "Hello", " world", "naïve", "e\u0301", "ﬁ"],
    "scripts": ["한국어", "中文", "عربي", "हिन्दी", "🙂", "👩\u200d👧", "\U00050000"],
    "controls": ["\0", "\x04", "\x1d", "\x1f", "!!", "!\x04!"],
    "special": ["<|im_end|>", "<|im_end|", "<|endoftext|>", "<|begin_of_text|>", "\u0338"],
}
telling = st.sampled_from([text for kind in TELLING.values() for text in kind])
texts = st.lists(telling | st.text(any_character, max_size=5), max_size=12).map("".join)


def trained(
    pre_tokenizer: Any = None, normalizer: Any = None, special: tuple[str, ...] = ("<|im_end|>",)
) -> tokenizers.Tokenizer:
    """A byte-level BPE of `tokenizers`, trained on some of CPython's reference."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    topics = [pydoc_data.topics.topics[name][:3000] for name in ("assert", "if", "numbers")]
    tokenizer.train_from_iterator([*topics, "naïve 한국어 12 345 6789\r\n\r\n  x"], trainer)
    return tokenizer


def saved(tokenizer: tokenizers.Tokenizer, folder: Path, **beside: object) -> Path:
    """A directory with the tokenizer.json and the files beside it."""
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in beside.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder
