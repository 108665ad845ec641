"""The contract of tokenizers."""

import unicodedata
from typing import ClassVar

from hypothesis import given
from hypothesis import strategies as st

import gptk
from gptk.testing._promises import PluginContract, check, examples, promise


class TokenizerContract(PluginContract):
    """What a tokenizer promises."""

    alphabet: ClassVar[st.SearchStrategy[str]] = st.characters(exclude_categories=["Cs"])
    """The characters that it can hold."""

    @property
    def tokenizer(self) -> gptk.Tokenizer:
        """The tokenizer to test."""
        tokenizer = self.plugin().load()
        check(isinstance(tokenizer, gptk.Tokenizer), f"load() returns {tokenizer!r:.40}")
        assert isinstance(tokenizer, gptk.Tokenizer)
        return tokenizer

    @promise
    def test_a_text_is_decoded_to_itself(self) -> None:
        """decode(encode(text)) is the text, and the tokens' bytes joined are its bytes."""
        tokenizer = self.tokenizer
        start = [] if not tokenizer.add_bos or tokenizer.bos is None else [tokenizer.bos]
        bos = tokenizer.decode(start)

        @examples(100)
        @given(st.text(self.alphabet, max_size=30))
        def holds(text: str) -> None:
            ids = tokenizer.encode(text)
            check(ids[: len(start)] == start, f"{text!r} does not begin with BOS")
            if bos and text.startswith(bos):  # a BOS in the text is not doubled
                return
            rest = ids[len(start) :]
            form = tokenizer.normalization
            text = text if form is None else unicodedata.normalize(form, text)
            got = tokenizer.decode(rest)
            check(got == text, f"{text!r} comes back as {got!r}")
            joined = b"".join(map(tokenizer.token_bytes, rest))
            check(joined == text.encode(), f"{text!r} has the bytes {joined!r}")

        holds()

    @promise
    def test_ids_are_those_of_the_vocabulary(self) -> None:
        """Token ids are whole numbers below the vocabulary's size, the same each time."""
        tokenizer, again = self.tokenizer, self.tokenizer
        size = tokenizer.encoding.max_token_value + 1

        @examples(50)
        @given(st.text(self.alphabet, max_size=30))
        def holds(text: str) -> None:
            ids = tokenizer.encode(text)
            check(all(0 <= token < size for token in ids), f"{text!r} has the ids {ids}")
            check(again.encode(text) == ids, f"{text!r} has other ids the second time")

        holds()
        for token in (*tokenizer.eos, *([] if tokenizer.bos is None else [tokenizer.bos])):
            check(0 <= token < size, f"BOS or EOS is {token}, and the vocabulary has {size}")

    @promise
    def test_special_tokens_are_one_token_each(self) -> None:
        """The text of a special token is encoded as that token."""
        tokenizer = self.tokenizer
        for text, token in tokenizer.encoding._special_tokens.items():
            check(tokenizer.encode(text)[-1:] == [token], f"{text} has other ids than {token}")
