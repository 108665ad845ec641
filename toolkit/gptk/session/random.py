"""Private random streams: a prompt draws the same numbers whatever is decoded beside it.

A stream is keyed by (seed, the prompt's tokens, the prompt's ordinal, sample index), and its t-th
number is a keyed hash of t. The ordinal is the number of the prompt in its call: equal prompts draw
other numbers, and a prompt that is decoded alone with its ordinal draws those that it drew there.
Streams need no state: a row that is copied, moved or rewound goes on with the numbers it would
have had.

Where each token of the vocabulary needs a number, hashing one by one would take longer than the
model: there the keyed hash gives a key of 64 bits, and `exponential` mixes token ids with it.
"""

import functools
import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptk import kernels


@dataclass(frozen=True)
class RandomStream:
    """Uniform numbers in [0, 1) by index, with 53 random bits each."""

    key: bytes

    @classmethod
    def of(
        cls, seed: int, prompt: Sequence[int], *, ordinal: int = 0, sample: int = 0
    ) -> "RandomStream":
        """The stream of one row. ordinal: the prompt's number; sample: the row's index among n."""
        digest = hashlib.blake2b(f"{seed}/{ordinal}/{sample}/".encode(), digest_size=32)
        digest.update(array("q", prompt).tobytes())
        return cls(digest.digest())

    def uniform(self, index: int, draw: int = 0) -> float:
        """The number with that index, 0 ≤ u < 1; another `draw` gives another number."""
        return (int.from_bytes(self.bits([index, draw]), "little") >> 11) * 2.0**-53

    def bits(self, index: Sequence[int]) -> bytes:
        """Eight random bytes for an index of one or more whole numbers."""
        return hashlib.blake2b(array("q", index).tobytes(), key=self.key, digest_size=8).digest()


def exponential(keys: Tensor, tokens: Tensor) -> Tensor:
    """Exp(1) noise, float32, a function of a key and a token id.

    keys: (…, 2) int32, see `as_keys`; tokens: (count,) int32, `columns` for a whole vocabulary.
    keys[…, 0] broadcasts with tokens: keys (…, 1, 2) give noise (…, count); keys (count, 2), one
    for each token id, or (1, 2), one for all, give (count,).
    argmin(noise / weights) is a draw in proportion to the weights, and -log(noise) is Gumbel(0).
    """
    if not tokens.is_cpu or not kernels.available():
        return _exponential(keys, tokens)
    if keys.dim() == 2:
        return kernels.exponential(keys[0] if len(keys) == 1 else keys, tokens)
    return torch.stack([kernels.exponential(key, tokens) for key in keys.flatten(0, -2)]).view(
        *keys.shape[:-2], len(tokens)
    )


def draw(logits: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """A token of each row in proportion to exp(logits), and its log-probability: (rows,) each.

    It is the argmin of noise / weight, see `exponential`. logits: (rows, vocab) float32; keys:
    (rows, 2) int32. A row without a finite logit gets token 0, and NaN for its log-probability.
    """
    if logits.is_cpu and logits.dtype == torch.float32 and kernels.available():
        return kernels.draw(logits.detach(), keys)
    highest = logits.amax(dim=-1, keepdim=True)
    weights = (logits - highest).exp()
    noise = exponential(keys[:, None], columns(logits.shape[-1], logits.device))
    tokens = (noise / weights).argmin(dim=-1, keepdim=True)
    logprobs = logits.gather(1, tokens) - highest - weights.sum(dim=-1, keepdim=True).log()
    return tokens[:, 0], logprobs[:, 0]


def _exponential(keys: Tensor, tokens: Tensor) -> Tensor:
    """`exponential` by PyTorch. Integer operations give the same hash on every device."""
    x = tokens * _signed(0x9E3779B1) + keys[..., 0]
    # Two rounds of fold and multiply (constants: Wellons 2018, "lowbias32"), the key's other
    # half in between.
    x = _fold(x, 16).mul_(0x7FEB352D).bitwise_xor_(keys[..., 1])
    x = _fold(x, 15).mul_(_signed(0x846CA68B))
    # The sign, which the shift repeats in the upper half, is then left out: 31 bits.
    x = x.bitwise_xor_(x >> 16).bitwise_and_(0x7FFFFFFF)
    # -u, in the middle of its interval, so that no noise is 0, and by a hair above -1, where it
    # would be infinite. Small noise, which wins, keeps all its digits in float32.
    u = x.float().mul_(-(2.0**-31) * (1 - 2.0**-23)).sub_(2.0**-32)
    return u.log1p_().neg_()


def as_keys(bits: Sequence[bytes], device: torch.device) -> Tensor:
    """(rows, 2) int32 of eight random bytes each, see RandomStream.bits."""
    return torch.tensor([list(array("i", key)) for key in bits], dtype=torch.int32).to(device)


@functools.lru_cache(maxsize=8)
def columns(size: int, device: torch.device) -> Tensor:
    """0, 1, …, size - 1 as int32, made once."""
    with torch.inference_mode(False):
        return torch.arange(size, dtype=torch.int32, device=device)


def _fold(x: Tensor, bits: int) -> Tensor:
    """x ^ (x >> bits), as if unsigned. Changes x."""
    return x.bitwise_xor_((x >> bits).bitwise_and_((1 << (32 - bits)) - 1))


def _signed(constant: int) -> int:
    """An unsigned 32-bit constant as the signed one with the same bits."""
    return constant - (1 << 32) if constant >> 31 else constant
