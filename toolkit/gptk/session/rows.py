"""The rows of a session, which are the partial sequences being decoded, and their followers."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from gptk.model.protocol import CausalModel
from gptk.session.random import RandomStream, as_keys, columns, draw, exponential
from gptk.text.tokenizer import Tokenizer


@runtime_checkable
class Follower(Protocol):
    """Something that keeps state for each row, such as a grammar's position or an estimate."""

    def extend(self, tokens: Tensor) -> None:
        """The tokens tokens[i] have been appended to row i. tokens: (rows, n)."""
        raise NotImplementedError

    def select(self, parents: Sequence[int]) -> None:
        """Row i is now a copy of what was row parents[i]; the number of rows may change."""
        raise NotImplementedError

    def rewind(self, counts: Sequence[int]) -> None:
        """The last counts[i] tokens of row i are gone."""
        raise NotImplementedError


class Rows:
    """The partial sequences being decoded, as processors and samplers see them.

    What they see they cannot assign: only the run changes it.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        eos: Sequence[int] = (),
        tokenizer: Tokenizer | None = None,
        model: CausalModel | None = None,
        ordinals: Sequence[int] | None = None,
        prompt_lengths: Sequence[int] | None = None,
    ) -> None:
        """ordinals: for each prompt its number, which its random stream depends on [0, 1, …].
        prompt_lengths: how many of its tokens are the prompt; the others count as new [all].
        """
        self._lengths = tuple(len(prompt) for prompt in prompts)
        self._prompt_lengths = self.lengths if prompt_lengths is None else tuple(prompt_lengths)
        self._prompts = tuple(range(len(prompts)))
        self._scores = [0.0] * len(prompts)
        self._logprobs = [0.0] * len(prompts)
        self._groups = (0,) * len(prompts)
        self._eos = tuple(eos)
        self._tokenizer = tokenizer
        self._model = model
        self._tokens = torch.zeros(len(prompts), max(self.lengths), dtype=torch.int64)
        self._copy: Tensor | None = None
        """The copy that `tokens` gives until the rows move, or the next plug-in asks."""
        self._origins: list[tuple[int, tuple[int, ...], int]] = []
        ordinals = range(len(prompts)) if ordinals is None else ordinals
        for i, prompt in enumerate(prompts):
            self._tokens[i, : len(prompt)] = torch.tensor(prompt)
            self._origins.append((seed, tuple(prompt), ordinals[i]))
        self._tokens = self._tokens.to(device)
        self._streams = tuple(RandomStream.of(s, p, ordinal=o) for s, p, o in self._origins)

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row, the prompt's included."""
        return self._lengths

    @property
    def prompt_lengths(self) -> tuple[int, ...]:
        """Tokens of each row's prompt."""
        return self._prompt_lengths

    @property
    def prompts(self) -> tuple[int, ...]:
        """For each row the index of its prompt in the call; rows of one prompt are adjacent."""
        return self._prompts

    @property
    def streams(self) -> tuple[RandomStream, ...]:
        """Each row's random stream."""
        return self._streams

    @property
    def scores(self) -> Tensor:
        """(rows,) float32: what the sampler ranks by so far."""
        return torch.tensor(self._scores, dtype=torch.float32, device=self._tokens.device)

    @property
    def logprobs(self) -> Tensor:
        """(rows,) float32: the sum of the new tokens' log-probabilities."""
        return torch.tensor(self._logprobs, dtype=torch.float32, device=self._tokens.device)

    @property
    def groups(self) -> tuple[int, ...]:
        """For each row its group among the rows of its prompt, see Sampler.groups."""
        return self._groups

    @property
    def eos(self) -> tuple[int, ...]:
        """The tokens that end a row; empty where end-of-text tokens are ignored."""
        return self._eos

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, for processors that work with text."""
        return self._tokenizer

    @property
    def model(self) -> CausalModel | None:
        """The model, for processors that run it on other tokens, such as a negative prompt."""
        return self._model

    @property
    def ordinals(self) -> tuple[int, ...]:
        """For each row the number of its prompt's request, which its random stream depends on."""
        return tuple(self._origins[prompt][2] for prompt in self.prompts)

    @property
    def tokens(self) -> Tensor:
        """(rows, longest) int64: all tokens of each row, prompt first; zeros pad the right.

        It is a copy, which stays as it is when the rows move.
        """
        if self._copy is None:
            self._copy = self.session_tokens.clone()
        return self._copy

    def forget_copy(self) -> None:
        """Let the next plug-in have a copy of its own as `tokens`."""
        self._copy = None

    @property
    def session_tokens(self) -> Tensor:
        """As `tokens`, but the session's memory: it must not be changed, and changes."""
        return self._tokens[:, : max(self.lengths)]

    @property
    def mask(self) -> Tensor:
        """(rows, longest) bool: True where `tokens` holds a token, False on padding."""
        device = self._tokens.device
        lengths = torch.tensor(self.lengths, device=device)
        return torch.arange(max(self.lengths), device=device) < lengths[:, None]

    @property
    def new_mask(self) -> Tensor:
        """(rows, longest) bool: True where `tokens` holds a token that came after the prompt."""
        device = self._tokens.device
        starts = torch.tensor(self.prompt_lengths, device=device)
        return self.mask & (torch.arange(max(self.lengths), device=device) >= starts[:, None])

    def uniform(self, draw: int = 0) -> Tensor:
        """(rows,): for each row a uniform random number in [0, 1) for its next token.

        draw: which of several numbers, for strategies that need more than one a step. float64, or
        float32 on devices without it.
        """
        drawn = [
            stream.uniform(length - start, draw)
            for stream, length, start in zip(
                self.streams, self.lengths, self.prompt_lengths, strict=True
            )
        ]
        device = self._tokens.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return torch.tensor(drawn, dtype=dtype, device=device)

    def exponential(self, size: int, *, apart: bool = False) -> Tensor:
        """(rows, size) float32: Exp(1) noise for each row's next token, one for each token id.

        argmin(noise / probabilities) draws from the probabilities, and -log(noise) is Gumbel
        noise. It depends on the row's stream and the position. With apart it depends on the row's
        new tokens, too, so that beams, which share a stream, draw independently once they differ.
        """
        return exponential(self._keys(apart)[:, None], columns(size, self._tokens.device))

    def draw(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's next token, drawn from softmax(logits), and its log-probability.

        logits: (rows, vocab) float32. Returns (rows,) int64 and float32. The token drawn is the
        argmin of noise / probability, with the noise of `exponential`: another call draws the same
        token, and a truncation changes the draw only if it removes the token. A row without a
        finite logit gets token 0 and NaN.
        """
        return draw(logits, self._keys(False))

    def _keys(self, apart: bool) -> Tensor:
        bits = []
        for row, stream in enumerate(self.streams):
            start, end = self.prompt_lengths[row], self.lengths[row]
            key = [-1, *self._tokens[row, start:end].tolist()] if apart else [end - start]
            bits.append(stream.bits(key))
        return as_keys(bits, self._tokens.device)

    def set_tokenizer(self, tokenizer: Tokenizer | None, eos: Sequence[int]) -> None:
        """Set what rows of a session lack: the tokenizer, and the tokens that end a row."""
        self._tokenizer, self._eos = tokenizer, tuple(eos)

    def set_scores(self, scores: list[float], logprobs: list[float]) -> None:
        """scores, logprobs: of each row."""
        self._scores, self._logprobs = scores, logprobs

    def extend(self, tokens: Tensor) -> None:
        self._copy = None
        lengths, count = self._lengths, tokens.shape[1]
        end = max(lengths) + count
        if end > (size := self._tokens.shape[1]):
            room = self._tokens.new_zeros(len(self), max(end - size, size // 2))
            self._tokens = torch.cat((self._tokens, room), dim=1)
        if min(lengths) == max(lengths):
            self._tokens[:, end - count : end] = tokens
        else:
            starts = torch.tensor(lengths, device=tokens.device)[:, None]
            positions = starts + torch.arange(count, device=tokens.device)
            self._tokens.scatter_(1, positions, tokens)
        self._lengths = tuple([length + count for length in lengths])

    def select(self, parents: Sequence[int]) -> None:
        self._copy = None
        index = torch.tensor(parents, device=self._tokens.device)
        self._tokens = self._tokens[index]
        self._scores = [self._scores[p] for p in parents]
        self._logprobs = [self._logprobs[p] for p in parents]
        self._groups = tuple(self.groups[p] for p in parents)
        self._lengths = tuple(self.lengths[p] for p in parents)
        self._prompt_lengths = tuple(self.prompt_lengths[p] for p in parents)
        self._prompts = tuple(self.prompts[p] for p in parents)
        self._streams = tuple(self.streams[p] for p in parents)

    def rewind(self, counts: Sequence[int]) -> None:
        self._copy = None
        self._lengths = tuple(length - n for length, n in zip(self.lengths, counts, strict=True))
        self._tokens = self._tokens.masked_fill(
            torch.arange(self._tokens.shape[1], device=self._tokens.device)
            >= torch.tensor(self.lengths, device=self._tokens.device)[:, None],
            0,
        )

    def fork(self, copies: int, *, group: bool) -> None:
        """Make copies distinct, after each row was copied `copies` times.

        group: each copy is one of its prompt's groups; otherwise each gets a random stream.
        """
        if group:
            self._groups = tuple(range(copies)) * (len(self) // copies)
            return
        self._streams = tuple(
            RandomStream.of(seed, prompt, ordinal=ordinal, sample=sample)
            for seed, prompt, ordinal in self._origins
            for sample in range(copies)
        )
