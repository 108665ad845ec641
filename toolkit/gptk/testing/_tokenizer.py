"""The contract of tokenizers."""

import functools
import unicodedata
from collections.abc import Iterator
from typing import ClassVar

import pytest
from hypothesis import strategies as st

import gptk
from gptk.testing._plugin import PluginContract
from gptk.testing._promises import check, instance, promise, worst_and_drawn

TEXTS = [
    "", " ", "  a  b ", "a\n\n\tb\r\n", "\0\x7f", "don't 1234567 x1", "naïve Größe", "한국어 中文",
    "e\u0301 \u212b", "😀👩\u200d👩\u200d👧", "\ufeffBOM", "\u2028\u00a0\u3000", "<|endoftext|",
    "a" * 200,
]  # fmt: skip
"""Texts with runs of spaces, line breaks, digits, marks that combine, and most lengths in UTF-8."""


class TokenizerContract(PluginContract):
    """What a tokenizer promises."""

    _base: ClassVar[type] = gptk.TokenizerLoader
    alphabet: ClassVar[st.SearchStrategy[str]] = st.characters(exclude_categories=["Cs"])
    """The characters that it can hold."""

    @functools.cached_property
    def tokenizer(self) -> gptk.Tokenizer:
        """The tokenizer to test, loaded once for each promise."""
        tokenizer: gptk.Tokenizer = self.plugin().load()
        check(isinstance(tokenizer, gptk.Tokenizer), f"load() returns {tokenizer!r:.40}")
        return tokenizer

    @promise
    @worst_and_drawn(50)
    def test_ids_are_those_of_the_vocabulary(self, data: st.DataObject | None) -> None:
        """Token ids are whole numbers below the vocabulary's size."""
        tokenizer = self.tokenizer
        size = tokenizer.encoding.max_token_value + 1
        for token in (*tokenizer.eos, *([] if tokenizer.bos is None else [tokenizer.bos])):
            check(0 <= token < size, f"BOS or EOS is {token}, and the vocabulary has {size}")
        for text in self._texts(data):
            ids = tokenizer.encode(text)
            check(all(0 <= token < size for token in ids), f"{text!r} has the ids {ids}")

    @promise
    def test_one_instance_serves_several_calls(self) -> None:
        """A text has the same ids each time, whatever was encoded before, also when made anew."""
        texts = list(self._texts(None))
        anew: gptk.Tokenizer = instance(self).load()
        want = [anew.encode(text) for text in texts]
        for tokenizer in (self.tokenizer, self.plugin().load()):
            forwards = [tokenizer.encode(text) for text in texts]
            backwards = [tokenizer.encode(text) for text in texts[::-1]][::-1]
            for text, ids, *others in zip(texts, want, forwards, backwards, strict=True):
                check(others == [ids, ids], f"{text!r} has other ids the second time")

    @promise
    @worst_and_drawn(100)
    def test_a_text_is_decoded_to_itself(self, data: st.DataObject | None) -> None:
        """decode(encode(text)) is the text, and the tokens' bytes joined are its bytes."""
        tokenizer = self.tokenizer
        start = [] if not tokenizer.add_bos or tokenizer.bos is None else [tokenizer.bos]
        bos = tokenizer.decode(start)
        for text in self._texts(data):
            ids = tokenizer.encode(text)
            check(ids[: len(start)] == start, f"{text!r} does not begin with BOS")
            if bos and text.startswith(bos):  # a BOS in the text is not doubled
                continue
            rest = ids[len(start) :]
            form = tokenizer.normalization
            text = text if form is None else unicodedata.normalize(form, text)
            got = tokenizer.decode(rest)
            check(got == text, f"{text!r} comes back as {got!r}")
            joined = b"".join(map(tokenizer.token_bytes, rest))
            check(joined == text.encode(), f"{text!r} has the bytes {joined!r}")

    @promise
    def test_special_tokens_are_one_token_each(self) -> None:
        """The text of a special token is encoded as that token, unless it is `as_text`."""
        tokenizer = self.tokenizer
        special = tokenizer.encoding._special_tokens
        if not special:
            pytest.skip("it has no special tokens")
        options = tokenizer.special_options or {}
        for text, token in special.items():
            if "as_text" in options.get(text, ()):
                continue
            check(tokenizer.encode(text)[-1:] == [token], f"{text} has other ids than {token}")

    def _texts(self, data: st.DataObject | None) -> Iterator[str]:
        """The texts written by hand, unless the alphabet is another; or a drawn one."""
        if data is not None:
            yield data.draw(st.text(self.alphabet, max_size=30), label="text")
            return
        yield from TEXTS if self.alphabet is TokenizerContract.alphabet else ("",)
