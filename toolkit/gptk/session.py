"""The decode session: a model, its KV cache and a set of rows, moved by four verbs.

extend, select, rewind, and a look at the rows. Whatever remembers a row is a follower of the
session and moves with it, the KV cache first: that is why strategies combine.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from gptk.cache import KVCache
from gptk.errors import DecodingError
from gptk.model import GPT
from gptk.random import RandomStream

Overflow = Literal["stop", "slide"]
"""What happens when a row outgrows the model's window; see DecodeSession."""


@runtime_checkable
class Follower(Protocol):
    """Something that holds state for each row: a grammar's position, a running estimate."""

    def extend(self, tokens: Tensor) -> None:
        """Row i has got the tokens tokens[i]. tokens: (rows, n)."""
        raise NotImplementedError

    def select(self, parents: Sequence[int]) -> None:
        """Row i is now a copy of what was row parents[i]; the number of rows may change."""
        raise NotImplementedError

    def rewind(self, counts: Sequence[int]) -> None:
        """The last counts[i] tokens of row i are gone."""
        raise NotImplementedError


class Rows:
    """The partial sequences being decoded, as processors and samplers see them."""

    lengths: list[int]
    """Tokens of each row, the prompt's included."""
    prompt_lengths: list[int]
    prompts: list[int]
    """For each row the index of its prompt in the call; rows of one prompt are adjacent."""
    streams: list[RandomStream]
    scores: Tensor
    """(rows,) float32: what the sampler ranks by so far; a sum of log-probabilities."""
    eos: tuple[int, ...]
    """The tokens that end a row, none where they are to be ignored."""

    def __init__(
        self, prompts: Sequence[Sequence[int]], *, seed: int, device: torch.device
    ) -> None:
        self.lengths = [len(prompt) for prompt in prompts]
        self.prompt_lengths = list(self.lengths)
        self.prompts = list(range(len(prompts)))
        self.scores = torch.zeros(len(prompts), device=device)
        self.eos = ()
        self._tokens = torch.zeros(len(prompts), max(self.lengths), dtype=torch.int64)
        seen: Counter[tuple[int, ...]] = Counter()
        self._origins: list[tuple[int, tuple[int, ...], int]] = []
        for i, prompt in enumerate(prompts):
            self._tokens[i, : len(prompt)] = torch.tensor(prompt)
            self._origins.append((seed, tuple(prompt), seen[tuple(prompt)]))
            seen[tuple(prompt)] += 1
        self._tokens = self._tokens.to(device)
        self.streams = [RandomStream.of(s, p, repeat=r) for s, p, r in self._origins]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> Tensor:
        """(rows, longest) int64: all tokens of each row, prompt first; zeros pad the right."""
        return self._tokens[:, : max(self.lengths)]

    @property
    def mask(self) -> Tensor:
        """(rows, longest) bool: True where `tokens` holds a token, False on padding."""
        device = self._tokens.device
        lengths = torch.tensor(self.lengths, device=device)
        return torch.arange(max(self.lengths), device=device) < lengths[:, None]

    def uniform(self, draw: int = 0) -> Tensor:
        """(rows,): for each row the number in [0, 1) that its next token is drawn by.

        draw: for strategies that need several numbers a step, which one. float64, or float32
        on devices without it.
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

    def extend(self, tokens: Tensor) -> None:
        end = max(self.lengths) + tokens.shape[1]
        if end > self._tokens.shape[1]:
            room = self._tokens.new_zeros(len(self), end)
            self._tokens = torch.cat((self._tokens, room), dim=1)
        if min(self.lengths) == max(self.lengths):
            self._tokens[:, end - tokens.shape[1] : end] = tokens
        else:
            at = torch.tensor(self.lengths, device=tokens.device)[:, None]
            at = at + torch.arange(tokens.shape[1], device=tokens.device)
            self._tokens.scatter_(1, at, tokens)
        self.lengths = [length + tokens.shape[1] for length in self.lengths]

    def select(self, parents: Sequence[int]) -> None:
        index = torch.tensor(parents, device=self._tokens.device)
        self._tokens = self._tokens[index]
        self.scores = self.scores[index]
        self.lengths = [self.lengths[p] for p in parents]
        self.prompt_lengths = [self.prompt_lengths[p] for p in parents]
        self.prompts = [self.prompts[p] for p in parents]
        self.streams = [self.streams[p] for p in parents]

    def rewind(self, counts: Sequence[int]) -> None:
        self.lengths = [length - n for length, n in zip(self.lengths, counts, strict=True)]
        self._tokens = self._tokens.masked_fill(
            torch.arange(self._tokens.shape[1], device=self._tokens.device)
            >= torch.tensor(self.lengths, device=self._tokens.device)[:, None],
            0,
        )

    def fork_samples(self, samples: int) -> None:
        """After each row was copied `samples` times: give the copies streams of their own."""
        self.streams = [
            RandomStream.of(seed, prompt, repeat=repeat, sample=sample)
            for seed, prompt, repeat in self._origins
            for sample in range(samples)
        ]


class DecodeSession:
    """A model and the rows it decodes.

    prompts: token ids, of any lengths, none empty. samples: rows for each prompt, which are
    copies with random streams of their own. capacity: tokens a row will reach, to reserve
    memory once; more are possible.

    overflow says what happens when a row outgrows the window: "stop", extending it is an error;
    "slide", the model sees its last `context_length` tokens at positions 0, 1, …, as the book's
    `idx[:, -context_size:]` does. All positions then change at every step, so that nothing
    cached is of use and each step costs a pass over the window.
    """

    _logits: Tensor | None

    def __init__(
        self,
        model: GPT,
        prompts: Sequence[Sequence[int]],
        *,
        samples: int = 1,
        seed: int = 0,
        capacity: int = 0,
        overflow: Overflow = "stop",
        use_cache: bool = True,
    ) -> None:
        self.model = model
        self.rows = Rows(prompts, seed=seed, device=model.device)
        self.overflow = overflow
        window = model.config.context_length
        self._cache: KVCache | None = None
        if use_cache:
            capacity = min(max(capacity, max(self.rows.lengths)), window)
            self._cache = model.new_cache(len(prompts), capacity)
        self._followers: list[Follower] = [self.rows]
        with torch.inference_mode():
            self.logits = self.model.logits(self._recompute(1))[:, -1]
            if samples > 1:
                self.select([i for i in range(len(prompts)) for _ in range(samples)])
                self.rows.fork_samples(samples)

    @property
    def logits(self) -> Tensor:
        """(rows, vocab) float32, for the token after each row's last.

        Raises DecodingError after a `rewind`, when they are unknown.
        """
        if self._logits is None:
            raise DecodingError("after rewind there are no logits until the rows are extended")
        return self._logits

    @logits.setter
    def logits(self, logits: Tensor) -> None:
        self._logits = logits

    def follow(self, follower: Follower) -> None:
        """From now on `follower` is told whenever the rows move."""
        self._followers.append(follower)

    @torch.inference_mode()
    def extend(self, tokens: Tensor) -> Tensor:
        """Append tokens[i] to row i and run the model on them.

        tokens: (rows,) or (rows, n). Returns the logits after each, (rows, n, vocab) float32.
        Raises DecodingError if a row outgrows the window and overflow is "stop".
        """
        tokens = tokens[:, None] if tokens.dim() == 1 else tokens
        if tokens.dim() != 2 or tokens.shape[0] != len(self.rows) or not tokens.shape[1]:
            raise DecodingError(
                f"tokens of shape {tuple(tokens.shape)} cannot extend {len(self.rows)} rows"
            )
        n = tokens.shape[1]
        fits = max(self.rows.lengths) + n <= self.model.config.context_length
        if not fits and self.overflow == "stop":
            raise self._too_long(max(self.rows.lengths) + n)
        if not fits and n > 1:  # each token has a window of its own
            return torch.cat([self.extend(column) for column in tokens.T], dim=1)
        for follower in self._followers:
            follower.extend(tokens)
        usable = self._cached and fits
        hidden = self.model(tokens, self._cache) if usable else self._recompute(n)
        logits = self.model.logits(hidden)
        self.logits = logits[:, -1]
        return logits

    @torch.inference_mode()
    def select(self, parents: Sequence[int]) -> None:
        """Row i becomes a copy of row parents[i]: reorder, fork, prune. `logits` follow."""
        if list(parents) == list(range(len(self.rows))):
            return
        if not parents or not 0 <= min(parents) <= max(parents) < len(self.rows):
            raise DecodingError(f"parents {list(parents)} do not select from {len(self.rows)} rows")
        for follower in self._followers:
            follower.select(parents)
        if self._cache is not None:
            self._cache.select(parents)
        if self._logits is not None:
            self._logits = self._logits[torch.tensor(parents, device=self._logits.device)]

    @torch.inference_mode()
    def rewind(self, counts: int | Sequence[int]) -> None:
        """Drop the last tokens of each row, as many of row i as counts[i] says.

        `logits` are unknown until the next `extend`, or until they are set to what they were.
        Raises DecodingError if a row would lose a token of its prompt.
        """
        if isinstance(counts, int):
            counts = [counts] * len(self.rows)
        for row, count in enumerate(counts):
            new = self.rows.lengths[row] - self.rows.prompt_lengths[row]
            if not 0 <= count <= new:
                raise DecodingError(f"cannot rewind {count} tokens of a row with {new} new ones")
        for follower in self._followers:
            follower.rewind(counts)
        if self._cache is not None and self._cached:
            self._cache.rewind(counts)
        self._logits = None

    def _too_long(self, length: int) -> DecodingError:
        window = self.model.config.context_length
        return DecodingError(
            f"a row of {length} tokens is longer than the model's window of {window}"
        )

    def _recompute(self, n: int) -> Tensor:
        """The hidden states of each row's last n tokens, from the tokens in its window alone.

        This is the first pass over the prompts, every pass without a cache, and every pass once
        a row has outgrown the window.
        """
        window = self.model.config.context_length
        lengths = self.rows.lengths
        if max(lengths) > window and self.overflow == "stop":
            raise self._too_long(max(lengths))
        counts = [min(length, window) for length in lengths]
        ids = self.rows.tokens
        if max(lengths) > window:
            starts = torch.tensor(lengths, device=ids.device) - torch.tensor(counts).to(ids.device)
            steps = torch.arange(window, device=ids.device)
            ids = ids.gather(1, (starts[:, None] + steps).clamp(max=ids.shape[1] - 1))
        self._cached = self._cache is not None and max(lengths) <= window
        if self._cache is not None:
            self._cache.clear()
        hidden = self.model(ids, self._cache if self._cached else None, counts)
        last = torch.tensor(counts, device=ids.device)[:, None] - n
        last = last + torch.arange(n, device=ids.device)
        picked: Tensor = hidden.gather(1, last[:, :, None].expand(-1, -1, hidden.shape[2]))
        return picked
