"""Logits processors for llama-cpp-python.

    from gptk.adapters.llama_cpp import to_llama_cpp

    llm = llama_cpp.Llama("model.gguf")
    llm(prompt, logits_processor=to_llama_cpp("min-p:p=0.1"))

This module does not import llama-cpp-python, which calls processors with numpy arrays.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import gptk
from gptk.adapters._replay import Replay

__all__ = ["to_llama_cpp"]


def to_llama_cpp(
    processors: str | gptk.LogitsProcessor | Sequence[str | gptk.LogitsProcessor],
    *,
    prompt_length: int | None = None,
    tokenizer: gptk.Tokenizer | None = None,
    model: gptk.CausalModel | None = None,
    eos: Sequence[int] | None = None,
    seed: int = 0,
) -> "ToLlamaCpp":
    """One or more of gptk's processors, for `logits_processor` or an element of such a list.

    Make a new one for each generation, or call `reset()` between two. Without that, a prompt that
    continues the last tokens is taken for their next step.

    prompt_length: how many tokens are the prompt; default: those of the first call.
    tokenizer: for processors that need texts: `gptk.load_tokenizer("model.gguf")`.
    model: for processors that run the model themselves, as cfg does:
    `gptk.load("model.gguf").model`.
    eos: tokens that end a text; default: the tokenizer's. seed: for processors that draw.

    llama-cpp-python calls processors from C. When one raises an exception, it prints a message on
    stderr and goes on; look at `error` after the generation.

    Raises what `gptk.plugins.create` raises for a wrong spec.
    """
    return ToLlamaCpp(
        Replay(
            processors,
            prompt_length=prompt_length,
            tokenizer=tokenizer,
            model=model,
            eos=eos,
            seed=seed,
        )
    )


class ToLlamaCpp:
    """gptk's processors as llama-cpp-python calls them; made by `to_llama_cpp`."""

    error: Exception | None = None
    """What a call raised; all later calls raise it again, until `reset()`."""

    def __init__(self, replay: Replay) -> None:
        self._replay = replay

    @property
    def processors(self) -> list[gptk.LogitsProcessor]:
        """gptk's processors, in their order."""
        return self._replay.processors

    def reset(self) -> None:
        """Forget the tokens: the next call begins a new generation."""
        self._replay.reset()
        self.error = None

    def __iter__(self) -> Iterator["ToLlamaCpp"]:
        """Only itself, since llama-cpp-python loops over `logits_processor`."""
        return iter((self,))

    def __call__(self, input_ids: NDArray[np.intc], scores: NDArray[np.single]) -> NDArray[Any]:
        """input_ids: (length,). scores: (vocab,). Returns new scores."""
        if self.error is not None:
            raise self.error
        try:
            tokens = torch.from_numpy(np.asarray(input_ids, dtype=np.int64)[None])
            # A copy: `scores` is a strided view of a field of llama.cpp's candidates.
            logits = torch.from_numpy(np.array(scores, dtype=np.single)[None])
            return self._replay(tokens, logits)[0].numpy()
        except Exception as error:
            self.error = error
            raise
