"""The decode session: a model, its KV cache and a set of rows, moved by four verbs.

extend, select, rewind, and a look at the rows. Whatever remembers a row is a follower of the
session and moves with it, the KV cache first: that is why strategies combine.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from gptk.cache import KVCache
from gptk.errors import DecodingError, GptkError, PromptError
from gptk.model import GPT, evaluating
from gptk.random import RandomStream, as_keys, columns, draw, exponential
from gptk.tokenizer import Tokenizer

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
    """(rows,) float32: what the sampler ranks by so far."""
    logprobs: Tensor
    """(rows,) float32: the sum of the new tokens' log-probabilities."""
    groups: list[int]
    """For each row its group among the rows of its prompt, see Sampler.groups."""
    eos: tuple[int, ...]
    """The tokens that end a row, none where they are to be ignored."""
    tokenizer: Tokenizer | None
    """The model's, for those who need the text of tokens or the tokens of a text."""
    model: GPT | None
    """What makes the logits, for those who run it on tokens of their own."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        eos: Sequence[int] = (),
        tokenizer: Tokenizer | None = None,
        model: GPT | None = None,
    ) -> None:
        self.lengths = [len(prompt) for prompt in prompts]
        self.prompt_lengths = list(self.lengths)
        self.prompts = list(range(len(prompts)))
        self.scores = torch.zeros(len(prompts), device=device)
        self.logprobs = torch.zeros(len(prompts), device=device)
        self.groups = [0] * len(prompts)
        self.eos = tuple(eos)
        self.tokenizer = tokenizer
        self.model = model
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

    @property
    def new_mask(self) -> Tensor:
        """(rows, longest) bool: True where `tokens` holds a token that came after the prompt."""
        device = self._tokens.device
        starts = torch.tensor(self.prompt_lengths, device=device)
        return self.mask & (torch.arange(max(self.lengths), device=device) >= starts[:, None])

    def uniform(self, draw: int = 0) -> Tensor:
        """(rows,): for each row the number in [0, 1) of its next token.

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

    def exponential(self, size: int, *, apart: bool = False) -> Tensor:
        """(rows, size) float32: Exp(1) noise for each row's next token, one for each token id.

        argmin(noise / probabilities) draws from the probabilities, and -log(noise) is Gumbel
        noise. It depends on the row's stream and the position; apart: and on the row's new
        tokens, so that beams, which share a stream, draw independently once they have parted.
        """
        return exponential(self._keys(apart)[:, None], columns(size, self._tokens.device))

    def draw(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's next token, drawn from softmax(logits), and its log-probability.

        logits: (rows, vocab) float32. Returns (rows,) int64 and float32. It is the token of
        least noise / probability, with the noise of `exponential`, so that another call draws
        the same, and a truncation changes a token only where it takes it out. A row without a
        finite logit gets token 0 and NaN.
        """
        return draw(logits, self._keys(False))

    def _keys(self, apart: bool) -> Tensor:
        bits = []
        for row, stream in enumerate(self.streams):
            start, end = self.prompt_lengths[row], self.lengths[row]
            place = [-1, *self._tokens[row, start:end].tolist()] if apart else [end - start]
            bits.append(stream.bits(place))
        return as_keys(bits, self._tokens.device)

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
        self.logprobs = self.logprobs[index]
        self.groups = [self.groups[p] for p in parents]
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

    def fork(self, copies: int, *, group: bool) -> None:
        """After each row was copied `copies` times: tell the copies apart.

        As groups of one search, or as samples with random streams of their own.
        """
        if group:
            self.groups = list(range(copies)) * (len(self) // copies)
            return
        self.streams = [
            RandomStream.of(seed, prompt, repeat=repeat, sample=sample)
            for seed, prompt, repeat in self._origins
            for sample in range(copies)
        ]


class DecodeSession:
    """A model and the rows it decodes.

    prompts: token ids, of any lengths, none empty. samples: rows for each prompt, which are
    copies with random streams of their own. groups: instead, copies that share one, see
    Sampler.groups. capacity: tokens a row will reach, to reserve memory once; more are possible.
    layers: of which the states are kept for `layer_hidden`; 0 are the embeddings, i is block i.

    overflow says what happens when a row outgrows the window: "stop", extending it is an error;
    "slide", the model sees its last `context_length` tokens at positions 0, 1, …, as the book's
    `idx[:, -context_size:]` does. All positions then change at every step, so that nothing
    cached is of use and each step costs a pass over the window.

    `extend` is two things, which speculation takes apart: `move` appends tokens to the rows and
    tells the followers, `read` runs the model on those tokens that it has not seen, and on
    guesses of what follows. A row that moves on as guessed has its logits without another pass.

    What it gives are inference tensors: to change them in place or to train on them, `clone()`
    them outside `torch.inference_mode`. Dropout is off, whatever the model's mode. Raises
    PromptError for prompts that are empty or not of the model's vocabulary.
    """

    _logits: Tensor
    _hidden: Tensor
    _places: list[int]
    """Where each row stands in these two: it is copied only if it is asked for."""

    def __init__(
        self,
        model: GPT,
        prompts: Sequence[Sequence[int]],
        *,
        samples: int = 1,
        groups: int = 1,
        seed: int = 0,
        capacity: int = 0,
        overflow: Overflow = "stop",
        use_cache: bool = True,
        layers: Sequence[int] = (),
    ) -> None:
        self.model = model
        if not prompts:
            raise PromptError("a session needs a prompt")
        for number, prompt in enumerate(prompts, 1):
            if not len(prompt):
                raise PromptError(f"prompt {number} has no tokens")
            self._check_ids(prompt, PromptError)
        self.rows = Rows(prompts, seed=seed, device=model.device, model=model)
        self.overflow = overflow
        self._layers = tuple(layers)
        window = model.config.context_length
        self._cache: KVCache | None = None
        if use_cache:
            capacity = min(max(capacity, max(self.rows.lengths)), window)
            self._cache = model.new_cache(len(prompts), capacity)
        self._cached = False
        self._followers: list[Follower] = [self.rows]
        self._ahead: list[list[int]] = [[] for _ in prompts]
        """For each row the tokens that the cache holds past its end: guessed, or rewound."""
        self._at: list[int | None] = [0] * len(prompts)
        """For each row where its last token stands in the states below, if it does."""
        with torch.inference_mode():
            self._keep(self._recompute(1))
            copies = max(samples, groups)
            if copies > 1:
                self.select([i for i in range(len(prompts)) for _ in range(copies)])
                self.rows.fork(copies, group=groups > 1)

    @property
    def known(self) -> list[bool]:
        """For each row whether its logits are known: the model has read its last token."""
        return [at is not None for at in self._at]

    @property
    def logits(self) -> Tensor:
        """(rows, vocab) float32, for the token after each row's last.

        Raises DecodingError where none are known, as after `rewind`. Rows that are not `known`
        have numbers without meaning.
        """
        return self._now(self._logits)

    @property
    def hidden(self) -> Tensor:
        """(rows, width): the final hidden state of each row's last token, normalized."""
        return self._now(self._hidden)[:, 0]

    @property
    def layer_hidden(self) -> Tensor:
        """(rows, layers, width): its state after each of the session's `layers`, as it is."""
        return self._now(self._hidden)[:, 1:]

    def follow(self, follower: Follower) -> None:
        """From now on `follower` is told whenever the rows move."""
        self._followers.append(follower)

    @torch.inference_mode()
    def extend(self, tokens: Tensor) -> Tensor:
        """Append tokens[i] to row i and run the model on them.

        tokens: (rows,) or (rows, n). Returns the logits after each, (rows, n, vocab) float32.
        Raises DecodingError if a row outgrows the window and overflow is "stop".
        """
        tokens = self._checked(tokens)
        n = tokens.shape[1]
        if self.overflow == "slide" and n > 1 and max(self.rows.lengths) + n > self._window:
            # Each token has a window of its own.
            return torch.cat([self.extend(column) for column in tokens.T], dim=1)
        self.move(tokens)
        return self.read(at_least=n)[:, -n:]

    @torch.inference_mode()
    def move(self, tokens: Tensor) -> None:
        """Append tokens[i] to row i, for all followers but the model. tokens: (rows,) or (rows, n).

        Where they are what was guessed, or rewound before, the model has read them already.
        """
        tokens = self._checked(tokens)
        n = tokens.shape[1]
        longest = max(self.rows.lengths) + n
        if longest > self._window and self.overflow == "stop":
            raise self._too_long(longest)
        for follower in self._followers:
            follower.extend(tokens)
        if not any(self._ahead):
            self._at = [None] * len(self.rows)
            return
        for row, new in enumerate(tokens.tolist()):
            ahead = self._ahead[row]
            at = self._at[row]
            if ahead[:n] == new:
                del ahead[:n]
                known = at is not None and at + n < self._logits.shape[1]
                self._at[row] = at + n if at is not None and known else None
            else:
                same = next((i for i, token in enumerate(ahead[:n]) if token != new[i]), len(ahead))
                self._forget(row, len(ahead) - same)
                self._ahead[row] = []
                self._at[row] = None

    @torch.inference_mode()
    def read(self, guesses: Tensor | None = None, *, at_least: int = 1) -> Tensor:
        """Run the model on the tokens it has not read, and on guesses of what follows them.

        guesses: (rows, d), for which the rows do not move. at_least: how many of each row's last
        tokens to read, if need be again. Returns the logits after each token read, (rows, n + d,
        vocab) float32, where n is the number for the row with most to read.
        """
        rows, cache = self.rows, self._cache
        d = 0 if guesses is None else guesses.shape[1]
        n = at_least
        if cache is not None and self._cached and max(rows.lengths) <= self._window:
            read = [have - len(more) for have, more in zip(cache.lengths, self._ahead, strict=True)]
            n = max(n, *(all_ - have for all_, have in zip(rows.lengths, read, strict=True)))
            usable = n <= min(rows.lengths)
        else:
            usable = False
        if guesses is not None and not usable:
            rows.extend(guesses)
        if usable and cache is not None:
            cache.rewind(
                [have - all_ + n for have, all_ in zip(cache.lengths, rows.lengths, strict=True)]
            )
            ids = self._last_tokens(n)
            ids = ids if guesses is None else torch.cat((ids, guesses), dim=1)
            step = self.model.step
            if step is not None and step.fits(ids, cache, self._layers):
                self._ahead, self._at = [[]], [0]
                return self._take(*step(ids, cache))
            hidden = self._states(ids, cache)
        else:
            hidden = self._recompute(n + d)
        if guesses is not None and not usable:
            rows.rewind([d] * len(rows))
        self._ahead = [[] for _ in rows.lengths] if guesses is None else guesses.tolist()
        self._at = [n - 1] * len(rows)
        return self._keep(hidden)

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
        self._ahead = [list(self._ahead[p]) for p in parents]
        self._at = [self._at[p] for p in parents]
        self._places = [self._places[p] for p in parents]

    @torch.inference_mode()
    def rewind(self, counts: int | Sequence[int]) -> None:
        """Drop the last tokens of each row, as many of row i as counts[i] says.

        The logits of a row that loses tokens are unknown until it is extended. Raises
        DecodingError if a row would lose a token of its prompt.
        """
        if isinstance(counts, int):
            counts = [counts] * len(self.rows)
        if len(counts) != len(self.rows):
            raise DecodingError(f"there are {len(counts)} counts for {len(self.rows)} rows")
        for row, count in enumerate(counts):
            new = self.rows.lengths[row] - self.rows.prompt_lengths[row]
            if not 0 <= count <= new:
                raise DecodingError(f"cannot rewind {count} tokens of a row with {new} new ones")
        for row, count in enumerate(counts):
            if count and self._cache is not None and self._cached:
                end = self.rows.lengths[row]
                read = min(end, self._cache.lengths[row] - len(self._ahead[row]))
                dropped = self.rows.tokens[row, end - count : max(read, end - count)]
                self._ahead[row] = dropped.tolist() + self._ahead[row]
            self._at[row] = None if count else self._at[row]
        for follower in self._followers:
            follower.rewind(counts)

    @property
    def _window(self) -> int:
        return self.model.config.context_length

    def _now(self, states: Tensor) -> Tensor:
        """What belongs to each row's last token. states: (rows, read, …)."""
        first = self._at[0]
        in_order = self._places == list(range(len(states)))
        if first is not None and in_order and all(at == first for at in self._at):
            return states[:, first]
        if not any(self.known):
            raise DecodingError(
                "after rewind there are no logits until the rows are extended or read"
            )
        at = torch.tensor([at or 0 for at in self._at], device=states.device)
        return states[torch.tensor(self._places, device=states.device), at]

    def _keep(self, hidden: Tensor) -> Tensor:
        """Take over the states of a pass, (rows, read, 1 + layers, width); returns its logits."""
        return self._take(hidden, self.model.logits(hidden[:, :, 0]))

    def _take(self, hidden: Tensor, logits: Tensor) -> Tensor:
        self._hidden, self._logits = hidden, logits
        self._places = list(range(len(logits)))
        return logits

    def _forget(self, row: int, count: int) -> None:
        """Take the last tokens of a row out of the cache."""
        if self._cache is not None and self._cached and count:
            counts = [0] * len(self.rows)
            counts[row] = count
            self._cache.rewind(counts)

    def _checked(self, tokens: Tensor) -> Tensor:
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise DecodingError(f"tokens of type {tokens.dtype} are no token ids")
        tokens = tokens[:, None].long() if tokens.dim() == 1 else tokens.long()
        if tokens.device.type == "cpu" and tokens.numel():  # others would have to be waited for
            self._check_ids([int(tokens.min()), int(tokens.max())], DecodingError)
        if tokens.dim() != 2 or tokens.shape[0] != len(self.rows) or not tokens.shape[1]:
            raise DecodingError(
                f"tokens of shape {tuple(tokens.shape)} cannot extend {len(self.rows)} rows"
            )
        return tokens

    def _check_ids(self, ids: Iterable[int], error: type[GptkError]) -> None:
        vocabulary = self.model.config.vocab_size
        for token in ids:
            if not 0 <= token < vocabulary:
                raise error(f"token {token} is not in the model's vocabulary of {vocabulary}")

    def _too_long(self, length: int) -> DecodingError:
        return DecodingError(
            f"a row of {length} tokens is longer than the model's window of {self._window}"
        )

    def _last_tokens(self, n: int) -> Tensor:
        """(rows, n): the last n tokens of each row."""
        lengths = self.rows.lengths
        if min(lengths) == max(lengths):
            return self.rows.tokens[:, -n:]
        last = torch.tensor(lengths, device=self.rows.tokens.device)[:, None] - n
        last = last + torch.arange(n, device=last.device)
        return self.rows.tokens.gather(1, last)

    def _states(
        self, ids: Tensor, cache: KVCache | None, counts: list[int] | None = None
    ) -> Tensor:
        with evaluating(self.model):
            return self.model.hidden_states(ids, cache, counts, layers=self._layers)

    def _recompute(self, n: int) -> Tensor:
        """The hidden states of each row's last n tokens, from the tokens in its window alone.

        This is the first pass over the prompts, every pass without a cache, and every pass once
        a row has outgrown the window.
        """
        window = self._window
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
        hidden = self._states(ids, self._cache if self._cached else None, counts)
        last = torch.tensor(counts, device=ids.device)[:, None] - n
        last = last + torch.arange(n, device=ids.device)
        return hidden[torch.arange(len(counts), device=ids.device)[:, None], last]
