"""Bytes as tokens: 256 of them and an end of text, so that any text or file can be encoded."""

import gptk

END_OF_TEXT = 256


class Bytes(gptk.TokenizerLoader):
    """The 256 bytes and <|endoftext|>, for tiny models trained from scratch."""

    name = "bytes"

    def load(self) -> gptk.Tokenizer:
        import tiktoken

        encoding = tiktoken.Encoding(
            self.name,
            pat_str=gptk.SPLIT_PATTERNS["bytes"],
            mergeable_ranks={bytes([byte]): byte for byte in range(256)},
            special_tokens={"<|endoftext|>": END_OF_TEXT},
        )
        return gptk.Tokenizer(encoding, eos=(END_OF_TEXT,))
