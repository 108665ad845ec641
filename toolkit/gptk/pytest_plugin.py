"""Fixtures for the tests of plug-ins; pytest loads this module by itself.

Torch and gptk.testing are imported when a test asks for a fixture, so that other tests start fast.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

import gptk


@pytest.fixture(scope="session")
def gptk_lm() -> gptk.LanguageModel:
    """A tiny random model, always the same, with the 256 bytes and an end of text as tokens."""
    from gptk.testing import tiny_lm

    return tiny_lm()


@pytest.fixture(scope="session")
def gptk_markov() -> Callable[..., gptk.LanguageModel]:
    """`gptk.testing.markov_lm`: a model whose next-token probabilities are the rows of a matrix."""
    from gptk.testing import markov_lm

    return markov_lm


@pytest.fixture(scope="session")
def gptk_smollm2() -> gptk.LanguageModel:
    """SmolLM2-135M-Instruct in float32 on the CPU; without it the test is skipped."""
    try:
        return gptk.load("smollm2", device="cpu", dtype="float32")
    except gptk.SourceError as error:
        pytest.skip(str(error))
