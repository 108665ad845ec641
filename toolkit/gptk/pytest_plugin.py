"""Fixtures for the tests of plug-ins; pytest loads this module by itself.

Nothing heavy is imported before a test asks for a fixture, so that other tests stay fast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from gptk.language_model import LanguageModel


@pytest.fixture(scope="session")
def gptk_lm() -> LanguageModel:
    """A tiny random model, always the same, with the 256 bytes and an end of text as tokens."""
    from gptk.testing import tiny_lm

    return tiny_lm()


@pytest.fixture(scope="session")
def gptk_markov() -> Callable[..., LanguageModel]:
    """`gptk.testing.markov_lm`: a model whose next-token probabilities are the rows of a matrix."""
    from gptk.testing import markov_lm

    return markov_lm


@pytest.fixture(scope="session")
def gptk_smollm2() -> LanguageModel:
    """SmolLM2-135M-Instruct in float32 on the CPU; without it the test is skipped."""
    from gptk import SourceError, load

    try:
        return load("smollm2", device="cpu", dtype="float32")
    except SourceError as error:
        pytest.skip(str(error))
