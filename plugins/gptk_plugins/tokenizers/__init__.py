"""The built-in makers of tokenizers, one per format."""

from typing import TYPE_CHECKING

from gptk_plugins._homes import names_of

if TYPE_CHECKING:
    from gptk_plugins.tokenizers.byte_level import Bytes as Bytes
    from gptk_plugins.tokenizers.gguf import GGUFTokenizer as GGUFTokenizer
    from gptk_plugins.tokenizers.gpt2 import GPT2 as GPT2
    from gptk_plugins.tokenizers.huggingface import HuggingFaceTokenizer as HuggingFaceTokenizer
    from gptk_plugins.tokenizers.smollm2 import SmolLM2Tokenizer as SmolLM2Tokenizer
    from gptk_plugins.tokenizers.tiktoken_names import Tiktoken as Tiktoken

_HOMES = {
    "Bytes": "byte_level",
    "GGUFTokenizer": "gguf",
    "GPT2": "gpt2",
    "HuggingFaceTokenizer": "huggingface",
    "SmolLM2Tokenizer": "smollm2",
    "Tiktoken": "tiktoken_names",
}
__all__ = [*_HOMES]

if not TYPE_CHECKING:  # to a type checker a misspelt name is an error
    __getattr__ = names_of(__name__, _HOMES)
