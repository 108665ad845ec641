"""Loss, perplexity and bits per byte of a text of any length, by a sliding window.

    loss = -1/n Σ log p(token i | the tokens before it in its window)
    perplexity = exp(loss),    bits per byte = n loss / (ln 2 · bytes)

Windows of the model's context length begin every `stride` tokens, and each token is scored in the
first window that predicts it. So the first tokens have the whole text before them as context, and
later ones at least window - stride + 1 tokens. A smaller stride means more context, a lower loss
and more work; figures are comparable only at equal window and stride. A stride of half the window
brings most of the gain, at twice the work of disjoint windows, and is the default here and on
transformers' page on the perplexity of fixed-length models; the default of lm-evaluation-harness
(`loglikelihood_rolling`) is the window.

Bits per byte can be compared between tokenizers (Gao et al. 2020, The Pile, section 3.1).
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gptk.data.token_files import TokenFile, prepare_tokens
from gptk.data.windows import Windows
from gptk.errors import DataError, DecodingError, OptionError
from gptk.model.protocol import CausalModel, evaluating

if TYPE_CHECKING:
    from gptk.language_model import LanguageModel
    from gptk.text.tokenizer import Tokenizer

Data = str | os.PathLike[str] | Sequence[str] | Sequence[int] | TokenFile | np.ndarray
"""What can be evaluated: names of texts, or tokens."""


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text."""

    loss: float
    """Mean negative log-likelihood, nats a token."""
    perplexity: float
    """exp(loss)."""
    bits_per_byte: float | None
    """None without a tokenizer, or if the scored tokens have no text."""
    tokens: int
    """Tokens scored: all but the first."""
    bytes: int | None
    """The size of the scored tokens' text; BOS and end-of-text tokens have none."""
    context_length: int
    """The size of the windows: the model's."""
    stride: int
    """Tokens from one window to the next."""


def evaluate(
    lm: "LanguageModel",
    data: Data,
    *,
    stride: int | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score each token of a text but the first, with a sliding window.

    data: files, folders or builtin:python-docs, as `prepare_tokens` takes them; or tokens. If the
    tokenizer has add_bos, a text begins with BOS, so that the text's first token is scored, too.
    stride: 1 to the model's window; by default half the window. batch_size: windows at a time; by
    default as many as hold 8,192 tokens together, at least one. progress: called after each batch
    with the number of tokens scored so far, and of all.

    Raises DataError if there are fewer than two tokens, or tokens outside the model's vocabulary;
    OptionError for a stride or batch size out of bounds; DecodingError if the loss is not finite;
    and what `prepare_tokens` raises.
    """
    result = None
    for result, all_tokens in evaluations(lm, data, stride=stride, batch_size=batch_size):
        if progress is not None:
            progress(result.tokens, all_tokens)
    assert result is not None
    return result


def evaluations(
    lm: "LanguageModel",
    data: Data,
    *,
    stride: int | None = None,
    batch_size: int | None = None,
) -> Iterator[tuple[Evaluation, int]]:
    """After each batch, the evaluation of the tokens scored so far, and the number of all tokens.

    Arguments and errors as of `evaluate`.
    """
    model, tokenizer = lm.model, lm.tokenizer if lm.has_tokenizer else None
    vocabulary, window = model.config.vocab_size, model.config.context_length
    stride = max(window // 2, 1) if stride is None else stride
    if not 1 <= stride <= window:
        raise OptionError(f"stride is {stride}; it must be 1 to the model's window, {window}")
    batch_size = max(_BATCH // window, 1) if batch_size is None else batch_size
    if batch_size < 1:
        raise OptionError(f"batch_size is {batch_size}; it must be 1 or more")
    tokens = _tokens(lm, data)
    lengths = None if tokenizer is None else _text_lengths(tokenizer, vocabulary)
    nats, scored, n_bytes = 0.0, 0, 0
    for starts, length, new in _batches(len(tokens) - 1, window, stride, batch_size):
        # (windows, length); the last `new` targets of each window have not been scored
        windows = Windows(tokens[starts.start :], length, stride)
        inputs, targets = windows.batch(np.arange(len(starts)))
        targets = targets[:, -new:].flatten()
        with evaluating(model), torch.inference_mode():
            hidden = model.states(inputs.to(model.device), None, None, ())[:, -new:, 0].flatten(
                0, 1
            )
            logprobs = token_logprobs(model, hidden, targets.to(model.device))
        nats -= float(logprobs.cpu().double().sum())
        scored += len(targets)
        if lengths is not None:
            n_bytes += int(lengths[targets].sum())
        loss = _finite(nats / scored)
        evaluation = Evaluation(
            loss=loss,
            perplexity=math.exp(loss) if loss < 700 else math.inf,
            bits_per_byte=nats / math.log(2) / n_bytes if n_bytes else None,
            tokens=scored,
            bytes=None if lengths is None else n_bytes,
            context_length=window,
            stride=stride,
        )
        yield evaluation, len(tokens) - 1


def token_logprobs(model: CausalModel, states: Tensor, targets: Tensor) -> Tensor:
    """The log-probability of each target. states: (n, width); targets: (n,). Returns (n,) float32.

    In chunks, so that the logits of a whole text are never in memory at once.
    """
    parts = []
    for start in range(0, len(states), _CHUNK):
        logits = model.logits(states[start : start + _CHUNK])
        chunk = targets[start : start + _CHUNK]
        parts.append(-F.cross_entropy(logits, chunk, reduction="none"))
    return torch.cat(parts)


_CHUNK = 256
"""Positions whose logits are computed at a time: 50 MB with GPT-2's vocabulary."""


def _finite(loss: float) -> float:
    """The loss. Raises DecodingError if it is not finite."""
    if not math.isfinite(loss):
        raise DecodingError(
            f"the loss is {loss}: not all logits are finite; the weights are damaged, or the dtype "
            "is too narrow for them"
        )
    return loss


_BATCH = 8192  # tokens


def _batches(count: int, window: int, stride: int, size: int) -> Iterator[tuple[range, int, int]]:
    """Batches of windows of equal length that together make `count` predictions.

    Yields where the windows start, their length, and how many predictions at the end of each have
    not been made by a window before it.
    """
    first = min(window, count)
    yield range(1), first, first
    full = range(stride, count - window + 1, stride)
    for i in range(0, len(full), size):
        yield full[i : i + size], window, stride
    done = first + len(full) * stride
    if done < count:
        start = (len(full) + 1) * stride
        yield range(start, start + 1), count - start, count - done


def _tokens(lm: "LanguageModel", data: Data) -> np.ndarray:
    """The tokens to score. Raises DataError if there are too few, or any that the model lacks."""
    if isinstance(data, str | os.PathLike):
        data = [os.fspath(data)]
    if isinstance(data, TokenFile):
        tokens = data.tokens
    elif isinstance(data, np.ndarray):
        tokens = data
    elif sources := [os.fspath(name) for name in data if isinstance(name, str | os.PathLike)]:
        tokens = prepare_tokens(sources, lm.tokenizer).tokens
    else:
        tokens = np.array(data, dtype=np.int64)
    if len(tokens) < 2:
        raise DataError(f"a text needs at least two tokens to be scored; this has {len(tokens)}")
    vocabulary = lm.model.config.vocab_size
    for token in (int(tokens.min()), int(tokens.max())):
        if not 0 <= token < vocabulary:
            raise DataError(
                f"the text has token {token}, the model a vocabulary of {vocabulary}; the tokens "
                "are another tokenizer's"
            )
    return tokens


def _text_lengths(tokenizer: "Tokenizer", vocabulary: int) -> np.ndarray:
    """The number of bytes of each token's text; 0 for BOS and end of text."""
    lengths = np.array([len(tokenizer.token_bytes(token)) for token in range(vocabulary)])
    for token in (tokenizer.bos, *tokenizer.eos):
        if token is not None and token < vocabulary:
            lengths[token] = 0
    return lengths
