"""The built-in weight loaders, one per format."""

from typing import TYPE_CHECKING

from gptk_plugins._homes import names_of

if TYPE_CHECKING:
    from gptk_plugins.loaders.gguf import GGUF as GGUF
    from gptk_plugins.loaders.gptk_format import Gptk as Gptk
    from gptk_plugins.loaders.huggingface import HuggingFace as HuggingFace
    from gptk_plugins.loaders.llms_from_scratch import LLMsFromScratch as LLMsFromScratch
    from gptk_plugins.loaders.nanogpt import NanoGPT as NanoGPT
    from gptk_plugins.loaders.openai import OpenAI as OpenAI
    from gptk_plugins.loaders.smollm2 import SmolLM2 as SmolLM2
    from gptk_plugins.loaders.transformers import Transformers as Transformers

_HOMES = {
    "GGUF": "gguf",
    "Gptk": "gptk_format",
    "HuggingFace": "huggingface",
    "LLMsFromScratch": "llms_from_scratch",
    "NanoGPT": "nanogpt",
    "OpenAI": "openai",
    "SmolLM2": "smollm2",
    "Transformers": "transformers",
}
__all__ = [*_HOMES]

if not TYPE_CHECKING:  # to a type checker a misspelt name is an error
    __getattr__ = names_of(__name__, _HOMES)
