"""OpenAI's encodings by their names in tiktoken, which downloads each once and caches it."""

from pydantic import Field

import gptk


class Tiktoken(gptk.TokenizerLoader):
    """One of tiktoken's encodings, such as cl100k_base or o200k_base."""

    name = "tiktoken"
    example = "encoding=cl100k_base"
    positional = "encoding"

    encoding: str = Field(description="name of the encoding in tiktoken")

    @classmethod
    def matches(cls, source: str) -> bool:
        import tiktoken

        return source != "gpt2" and source in tiktoken.list_encoding_names()

    @classmethod
    def from_source(cls, source: str) -> gptk.TokenizerLoader:
        return cls(encoding=source)

    def load(self) -> gptk.Tokenizer:
        import tiktoken

        names = tiktoken.list_encoding_names()
        if self.encoding not in names:
            raise gptk.TokenizerError(
                f"tiktoken has no encoding {self.encoding!r}; it has {', '.join(sorted(names))}"
            )
        try:
            encoding = tiktoken.get_encoding(self.encoding)
        except (OSError, ValueError) as error:  # no network, or a wrong checksum
            raise gptk.TokenizerError(
                f"fetching {self.encoding} failed ({type(error).__name__}); tiktoken needs the "
                "network once for it, or a folder with the fetched file in TIKTOKEN_CACHE_DIR"
            ) from None
        end = ("<|endoftext|>",) if "<|endoftext|>" in encoding.special_tokens_set else ()
        return gptk.Tokenizer(encoding, eos=tuple(map(encoding.encode_single_token, end)))
