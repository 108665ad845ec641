r"""Watermark (Kirchenbauer et al. 2023): favours a pseudorandom part of the vocabulary, the green
list, which depends on the tokens before.

$$\text{logit}'(v) = \text{logit}(v) + \text{bias} \cdot [\,v \in \text{green list}\,]$$

The green list is a share of the vocabulary, drawn by a random generator whose seed depends on
hashing_key and, for lefthash (algorithm 2), on the last token: every token of the list is favoured.
For selfhash (algorithm 3) it depends on $v$ and the last context_width - 1 tokens; the 40 likeliest
$v$ are tried.

A text with the watermark has a large

$$z = \frac{\text{green} - \text{share} \cdot n}
{\sqrt{n \cdot \text{share} \cdot (1 - \text{share})}}$$

where green of its $n$ tokens are in their green lists.

Lists and scores equal those of transformers on a CPU, so that each detects texts of the other; here
they are drawn on the CPU for models on other devices, too. A list of 49,152 tokens takes 0.1 ms to
draw, so those of 4,096 seeds are cached (25 MB). selfhash needs up to 40 for each row and step.
"""

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

import gptk

CANDIDATES = 40
TABLE_SIZE = 1_000_003


@dataclass(frozen=True)
class Detection:
    """How many tokens of a text are green, and whether it has the watermark."""

    tokens_scored: int
    green_tokens: int
    green_fraction: float
    z_score: float
    """By how many standard deviations the green tokens exceed their expected number."""
    p_value: float
    """The probability that a text without the watermark has at least as many green tokens."""
    prediction: bool
    """Whether the text has the watermark: z_score is above the threshold."""


class Watermark(gptk.LogitsProcessor):
    """Favours tokens of a secret list at each step, so that the text can be detected later."""

    name = "watermark"
    example = "bias=2.0"
    positional = "bias"

    greenlist_ratio: float = Field(
        0.25, gt=0, lt=1, description="the share of the vocabulary that is favoured; γ"
    )
    bias: float = Field(2.0, ge=-1e6, le=1e6, description="added to the logits of those tokens; δ")
    hashing_key: int = Field(
        15485863, ge=0, lt=2**63, description="the secret; choose another and keep it"
    )
    seeding_scheme: Literal["lefthash", "selfhash"] = Field(
        "lefthash",
        description="whether the list depends on the last token, or also on the candidate",
    )
    context_width: int = Field(
        1,
        ge=1,
        description="shorter rows stay unchanged; how many tokens selfhash hashes",
    )

    def __call__(self, logits: Tensor, rows: gptk.Rows) -> Tensor:
        vocabulary = logits.shape[-1]
        added = torch.zeros(logits.shape)
        for row, length in enumerate(rows.lengths):
            if length < self.context_width:
                continue
            context = rows.tokens[row, length - self.context_width : length].tolist()
            if self.seeding_scheme == "lefthash":
                green = self._green(self._lefthash_seed(context), vocabulary)
                added[row] = torch.from_numpy(
                    np.unpackbits(green, count=vocabulary, bitorder="little")
                )
                continue
            likeliest = logits[row].topk(min(CANDIDATES, vocabulary)).indices.tolist()
            seeds = self._selfhash_seeds(context, likeliest)
            chosen = [
                v
                for v, seed in zip(likeliest, seeds, strict=True)
                if _has(self._green(seed, vocabulary), v)
            ]
            added[row, chosen] = 1
        return torch.add(logits, added.to(logits.device), alpha=self.bias)

    def detect(
        self,
        tokens: Sequence[int],
        vocabulary: int,
        *,
        bos: int | None = None,
        ignore_repeated_ngrams: bool = False,
        z_threshold: float = 3.0,
    ) -> Detection:
        """Whether tokens have this watermark, as transformers' WatermarkDetector decides it.

        tokens: those of the text without its prompt. vocabulary: the size of the model's
        vocabulary, from which the lists are drawn. bos: skipped if it is the first token.
        ignore_repeated_ngrams: count repeated sequences once.

        Raises DataError if there is no token to score.
        """
        tokens = list(tokens)
        tokens = tokens[1:] if tokens[:1] == [bos] else tokens
        if len(tokens) <= self.context_width:
            what = "one token" if len(tokens) == 1 else f"{len(tokens)} tokens"
            raise gptk.DataError(
                f"{self.title()}: a text of {what} is too short to judge; it takes "
                f"more than context_width={self.context_width}"
            )
        # For selfhash, the token itself is part of the hashed context.
        width = self.context_width + (self.seeding_scheme == "lefthash")
        ngrams = Counter(zip(*(tokens[start:] for start in range(width)), strict=False))
        if ignore_repeated_ngrams:
            ngrams = Counter(ngrams.keys())
        scored = ngrams.total()
        green = sum(n for ngram, n in ngrams.items() if self._is_green(ngram, vocabulary))
        share = self.greenlist_ratio
        z = (green - share * scored) / math.sqrt(scored * share * (1 - share))
        return Detection(
            tokens_scored=scored,
            green_tokens=green,
            green_fraction=green / scored,
            z_score=z,
            p_value=math.erfc(z / math.sqrt(2)) / 2,
            prediction=z > z_threshold,
        )

    def _is_green(self, tokens: Sequence[int], vocabulary: int) -> bool:
        """Whether the last token is in the green list that the tokens decide on."""
        last = tokens[-1]
        if self.seeding_scheme == "selfhash":
            (seed,) = self._selfhash_seeds(tokens[:-1], [last])
        else:
            seed = self._lefthash_seed(tokens[:-1])
        return last < vocabulary and _has(self._green(seed, vocabulary), last)

    def _green(self, seed: int, vocabulary: int) -> npt.NDArray[np.uint8]:
        return _green_list(seed, vocabulary, int(vocabulary * self.greenlist_ratio))

    def _lefthash_seed(self, context: Sequence[int]) -> int:
        return self.hashing_key * context[-1] % (2**64 - 1)

    def _selfhash_seeds(self, context: Sequence[int], tokens: Sequence[int]) -> list[int]:
        """The seed for each of `tokens` as the next token after a context."""
        table = _table(self.hashing_key)
        before = context[len(context) - self.context_width + 1 :]
        token_hashes = table[np.array(tokens) % TABLE_SIZE]
        hashes = [token_hashes, *table[np.array(before, dtype=np.int64) % TABLE_SIZE, None]]
        # Products overflow 64 bits and wrap around.
        products = [np.int64(self.hashing_key) * hash_ * token_hashes for hash_ in hashes]
        return [seed % (2**64 - 1) for seed in np.min(products, axis=0).tolist()]


def _has(green: npt.NDArray[np.uint8], token: int) -> bool:
    return bool(green[token >> 3] >> (token & 7) & 1)


@functools.lru_cache(maxsize=4096)
def _green_list(seed: int, vocabulary: int, size: int) -> npt.NDArray[np.uint8]:
    """A green list as a bit for each token, eight to a byte."""
    green = gptk.vocabulary.permutation(vocabulary, seed, size)
    bits = np.zeros(vocabulary, dtype=np.uint8)
    bits[green.numpy()] = 1
    return np.packbits(bits, bitorder="little")


@functools.lru_cache(maxsize=4)
def _table(key: int) -> npt.NDArray[np.int64]:
    """A random number from 1 to TABLE_SIZE for each token id."""
    generator = torch.Generator().manual_seed(key)
    return torch.randperm(TABLE_SIZE, generator=generator).numpy() + 1
