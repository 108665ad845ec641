"""The decode session: a model, its KV cache and a set of rows, moved by four verbs.

The verbs are extend, select, rewind, and reading the rows. Whatever keeps state for a row, such as
the KV cache or a grammar, is a follower of the session and is told of every move: that is why
strategies combine.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from gptk.engine.engine import ENGINE
from gptk.engine.model import JoinedModel
from gptk.errors import DecodingError, GptkError, PromptError
from gptk.model.blocks import BlockCache
from gptk.model.protocol import Cache, CausalModel, evaluating, inferring
from gptk.session.rows import Follower, Rows

Overflow = Literal["stop", "slide"]
"""What happens when a row outgrows the model's window; see DecodeSession."""


class DecodeSession:
    """A model and the rows it decodes.

    model: a gptk.GPT, or any other gptk.CausalModel. prompts: token ids, of any lengths, none
    empty. samples: how many rows each prompt gets, each with a random stream of its own. groups:
    instead, how many rows that share the prompt's random stream, see Sampler.groups. capacity: how
    many tokens a row is expected to reach, so that memory is reserved once; rows may grow beyond.
    layers: those whose states `layer_hidden` returns; 0 are the embeddings, i is block i. ordinals:
    for each prompt its number, which its random stream depends on [0, 1, …].

    overflow says what happens when a row outgrows the window: "stop", extending it is an error;
    "slide", the model sees its last `context_length` tokens at positions 0, 1, …, as the book's
    `idx[:, -context_size:]` does. All positions then change at every step, so that the cache
    is of no use and each step costs a pass over the window.

    `extend` does two things, which speculation does one by one: `move` appends tokens to the rows
    and tells the followers; `read` runs the model on the tokens that it has not read, and on
    guesses of what follows. A row that moves on as guessed has its logits without another pass.

    Logits and states are inference tensors: to change them in place or to train on them,
    `clone()` them outside `torch.inference_mode`. Dropout is off, whatever the model's mode.
    Raises PromptError for prompts that are empty or have tokens that the model lacks.
    """

    _logits: Tensor
    """(rows of the last pass, read, vocab): after each token that the last pass read."""
    _hidden: Tensor
    """(rows of the last pass, read, 1 + layers, width): the final states, which give
    `_logits`, and those of `layers`."""
    _state_row: list[int]
    """For each row its row in these two tensors, which `select` does not copy."""
    _state_column: list[int | None]
    """For each row the column of its last token in these two tensors; None: not computed yet."""

    def __init__(
        self,
        model: CausalModel,
        prompts: Sequence[Sequence[int]],
        *,
        samples: int = 1,
        groups: int = 1,
        seed: int = 0,
        capacity: int = 0,
        overflow: Overflow = "stop",
        use_cache: bool = True,
        layers: Sequence[int] = (),
        ordinals: Sequence[int] | None = None,
    ) -> None:
        self.model = model = ENGINE.joined(model)
        if not prompts:
            raise PromptError("a session needs a prompt")
        for number, prompt in enumerate(prompts, 1):
            if not len(prompt):
                raise PromptError(f"prompt {number} has no tokens")
            self._check_ids(prompt, PromptError)
        self.rows = Rows(prompts, seed=seed, device=model.device, model=model, ordinals=ordinals)
        self.overflow = overflow
        self._layers = tuple(layers)
        window = model.config.context_length
        self._cache: Cache | None = None
        if use_cache:
            capacity = min(max(capacity, max(self.rows.lengths)), window)
            self._cache = model.new_cache(len(prompts), capacity)
        self._cached = False
        self._followers: list[Follower] = [self.rows]
        self._ahead: list[list[int]] = [[] for _ in prompts]
        """For each row the tokens that the cache holds past its end: guesses, or rewound tokens."""
        self._state_column = [0] * len(prompts)
        with torch.inference_mode():
            self._store(*self._begin())
            copies = max(samples, groups)
            if copies > 1:
                self.select([i for i in range(len(prompts)) for _ in range(copies)])
                self.rows.fork(copies, group=groups > 1)

    @property
    def known(self) -> list[bool]:
        """For each row whether its logits are known: the model has read its last token."""
        return [column is not None for column in self._state_column]

    @property
    def logits(self) -> Tensor:
        """(rows, vocab) float32, for the token after each row's last.

        Raises DecodingError if no row is `known`, as after `rewind`. The numbers of rows that are
        not known have no meaning.
        """
        return self._of_last_tokens(self._logits)

    @property
    def hidden(self) -> Tensor:
        """(rows, width): the final hidden state of each row's last token, normalized."""
        return self._of_last_tokens(self._hidden)[:, 0]

    @property
    def layer_hidden(self) -> Tensor:
        """(rows, layers, width): that token's state after each of `layers`, not normalized."""
        return self._of_last_tokens(self._hidden)[:, 1:]

    @inferring
    def all_hidden(self) -> Tensor:
        """(rows, longest, width): the final hidden state of each token, computed by an extra pass.

        A row's tokens are those in the model's window, from the left; states of padding mean
        nothing.
        """
        ids, counts = self._ids_in_window()
        cache: Cache | None = None
        if isinstance(self._cache, BlockCache):  # its passes are joined with those of other runs
            cache = self.model.new_cache(len(ids), max(counts))
        try:
            return self._states(ids, cache, counts)[:, :, 0]
        finally:
            if isinstance(cache, BlockCache):
                cache.drop()

    def follow(self, follower: Follower) -> None:
        """Tell `follower` from now on whenever the rows move."""
        self._followers.append(follower)

    @inferring
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
        self._move(tokens)
        return self.read(at_least=n)[:, -n:]

    @inferring
    def move(self, tokens: Tensor) -> None:
        """Append tokens[i] to row i and tell the followers; the model does not read them yet.

        tokens: (rows,) or (rows, n). Tokens that were guessed, or rewound before, are in the cache
        already.
        """
        self._move(self._checked(tokens))

    def _move(self, tokens: Tensor) -> None:
        """`move`, for tokens that are `_checked`. Followers but `rows` may change theirs."""
        n = tokens.shape[1]
        longest = max(self.rows.lengths) + n
        if longest > self._window and self.overflow == "stop":
            raise self._too_long(longest)
        for follower in self._followers:
            follower.extend(tokens if follower is self.rows else tokens.clone())
        if not any(self._ahead):
            self._state_column = [None] * len(self.rows)
            return
        for row, new in enumerate(tokens.tolist()):
            ahead = self._ahead[row]
            column = self._state_column[row]
            if ahead[:n] == new:
                del ahead[:n]
                known = column is not None and column + n < self._logits.shape[1]
                self._state_column[row] = column + n if column is not None and known else None
            else:
                right = next(
                    (i for i, token in enumerate(ahead[:n]) if token != new[i]), len(ahead)
                )
                self._drop_from_cache(row, len(ahead) - right)
                self._ahead[row] = []
                self._state_column[row] = None

    @inferring
    def read(self, guesses: Tensor | None = None, *, at_least: int = 1) -> Tensor:
        """Run the model on the tokens it has not read, and on guesses of what follows them.

        guesses: (rows, d); the rows do not move by them. at_least: how many of each row's last
        tokens to read; those that were read before are read again. Returns the logits after each
        token read, (rows, n + d, vocab) float32, where n is what the row with most to read needs.
        """
        rows, cache = self.rows, self._cache
        d = 0 if guesses is None else guesses.shape[1]
        n = at_least
        if cache is not None and self._cached and max(rows.lengths) <= self._window:
            # How many of each row's tokens the cache holds, without those past the row's end.
            lengths = zip(cache.lengths, self._ahead, strict=True)
            cached = [length - len(ahead) for length, ahead in lengths]
            unread = [length - old for length, old in zip(rows.lengths, cached, strict=True)]
            n = max(n, *unread)
            usable = n <= min(rows.lengths)
        else:
            usable = False
        if guesses is not None and not usable:
            rows.extend(guesses)  # for the pass, which reads the rows' tokens
        if usable and cache is not None:
            ends = zip(cache.lengths, rows.lengths, strict=True)
            cache.rewind([held - length + n for held, length in ends])
            ids = self._last_tokens(n)
            ids = ids if guesses is None else torch.cat((ids, guesses), dim=1)
            self._hidden = self._logits = torch.empty(0)  # keep nothing during the pass
            self._state_column = [None] * len(rows)
            hidden, logits = self._states_and_logits(ids, cache)
        else:
            hidden, logits = self._recompute(n + d)
        if guesses is not None and not usable:
            rows.rewind([d] * len(rows))
        self._ahead = [[] for _ in rows.lengths] if guesses is None else guesses.tolist()
        self._state_column = [n - 1] * len(rows)
        return self._store(hidden, logits)

    @inferring
    def select(self, parents: Sequence[int]) -> None:
        """Row i becomes a copy of row parents[i]: reorder, fork, prune. `logits` follow."""
        if list(parents) == list(range(len(self.rows))):
            return
        if not parents or not 0 <= min(parents) <= max(parents) < len(self.rows):
            raise DecodingError(f"parents {list(parents)} do not select from {len(self.rows)} rows")
        parents = tuple(parents)
        for follower in self._followers:
            follower.select(parents)
        if self._cache is not None:
            self._cache.select(parents)
        self._ahead = [list(self._ahead[p]) for p in parents]
        self._state_column = [self._state_column[p] for p in parents]
        self._state_row = [self._state_row[p] for p in parents]

    @inferring
    def rewind(self, counts: int | Sequence[int]) -> None:
        """Drop the last tokens of each row, as many of row i as counts[i] says.

        The logits of a row that loses tokens are unknown until it is extended. Raises
        DecodingError if a row would lose a token of its prompt.
        """
        counts = (counts,) * len(self.rows) if isinstance(counts, int) else tuple(counts)
        if len(counts) != len(self.rows):
            raise DecodingError(f"there are {len(counts)} counts for {len(self.rows)} rows")
        for row, count in enumerate(counts):
            new = self.rows.lengths[row] - self.rows.prompt_lengths[row]
            if not 0 <= count <= new:
                raise DecodingError(f"cannot rewind {count} tokens of a row with {new} new ones")
        for row, count in enumerate(counts):
            if count and self._cache is not None and self._cached:
                end = self.rows.lengths[row]
                cached = min(end, self._cache.lengths[row] - len(self._ahead[row]))
                dropped = self.rows.session_tokens[row, end - count : max(cached, end - count)]
                self._ahead[row] = dropped.tolist() + self._ahead[row]
            self._state_column[row] = None if count else self._state_column[row]
        for follower in self._followers:
            follower.rewind(counts)

    def release(self) -> None:
        """Give back the cache's memory. If the session goes on, its rows are read again."""
        if isinstance(self._cache, BlockCache):
            self._cache.drop()

    @property
    def _window(self) -> int:
        return self.model.config.context_length

    def _of_last_tokens(self, states: Tensor) -> Tensor:
        """What belongs to each row's last token. states: (rows of the last pass, read, …)."""
        first = self._state_column[0]
        in_order = self._state_row == list(range(states.shape[0]))
        if first is not None and in_order and all(c == first for c in self._state_column):
            return states[:, first]
        if not any(self.known):
            raise DecodingError(
                "after rewind there are no logits until the rows are extended or read"
            )
        columns = torch.tensor([c or 0 for c in self._state_column], device=states.device)
        return states[torch.tensor(self._state_row, device=states.device), columns]

    def _store(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """Keep what a pass has computed; returns its logits."""
        self._hidden, self._logits = hidden, logits
        self._state_row = list(range(logits.shape[0]))
        return logits

    def _drop_from_cache(self, row: int, count: int) -> None:
        """Take the last `count` tokens of a row out of the cache."""
        if self._cache is not None and self._cached and count:
            counts = [0] * len(self.rows)
            counts[row] = count
            self._cache.rewind(counts)

    def _checked(self, tokens: Tensor) -> Tensor:
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype is torch.bool:
            raise DecodingError(f"tokens of type {tokens.dtype} are no token ids")
        tokens = (tokens[:, None] if tokens.dim() == 1 else tokens).long()
        if tokens.is_cpu and tokens.numel():  # on a GPU this would wait for it
            few = tokens.numel() <= 64  # then a list takes less time than two reductions
            ids = tokens.flatten().tolist() if few else [int(tokens.min()), int(tokens.max())]
            self._check_ids(ids, DecodingError)
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
            return self.rows.session_tokens[:, -n:]
        last = torch.tensor(lengths, device=self.model.device)[:, None] - n
        last = last + torch.arange(n, device=last.device)
        return self.rows.session_tokens.gather(1, last)

    def _states(self, ids: Tensor, cache: Cache | None, counts: list[int] | None = None) -> Tensor:
        with evaluating(self.model):
            return self.model.states(ids, cache, counts, self._layers)

    def _states_and_logits(
        self, ids: Tensor, cache: Cache, wanted: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Read tokens that follow those in the cache. wanted: how many of each row's tokens, the
        last ones, the states are asked of, if the cache is in blocks [all]."""
        if isinstance(cache, BlockCache):
            assert isinstance(self.model, JoinedModel)  # whose caches are in blocks
            return self.model.states_and_logits(ids, cache, self._layers, wanted)
        return self._with_logits(self._states(ids, cache))

    def _with_logits(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        with evaluating(self.model):
            return hidden, self.model.logits(hidden[:, :, 0])

    def _begin(self) -> tuple[Tensor, Tensor]:
        """Read the prompts. Returns the states and logits of each one's last token."""
        length = self.rows.lengths[0]
        if isinstance(self._cache, BlockCache) and len(self.rows) == 1 and length <= self._window:
            self._cache.recall(self.rows.session_tokens.tolist())
            self._cached = True
            unread = self._last_tokens(length - self._cache.lengths[0])
            return self._states_and_logits(unread, self._cache, wanted=1)
        return self._recompute(1)

    def _recompute(self, n: int) -> tuple[Tensor, Tensor]:
        """States and logits of each row's last n tokens, from the tokens in its window alone.

        This is the first pass over the prompts, every pass without a cache, and every pass once
        a row has outgrown the window.
        """
        longest = max(self.rows.lengths)
        if longest > self._window and self.overflow == "stop":
            raise self._too_long(longest)
        ids, counts = self._ids_in_window()
        self._cached = self._cache is not None and longest <= self._window
        if self._cache is not None:
            self._cache.clear()
        hidden = self._states(ids, self._cache if self._cached else None, counts)
        last = torch.tensor(counts, device=ids.device)[:, None] - n
        last = last + torch.arange(n, device=ids.device)
        each = torch.arange(len(counts), device=ids.device)[:, None]
        return self._with_logits(hidden[each, last])

    def _ids_in_window(self) -> tuple[Tensor, list[int]]:
        """The last tokens of each row, as many as the window holds, and how many these are.

        (rows, time), from the left; what follows a row's last token is padding.
        """
        window, lengths, ids = self._window, self.rows.lengths, self.rows.session_tokens
        counts = [min(length, window) for length in lengths]
        if max(lengths) > window:
            starts = torch.tensor(lengths, device=ids.device) - torch.tensor(counts).to(ids.device)
            steps = torch.arange(window, device=ids.device)
            ids = ids.gather(1, (starts[:, None] + steps).clamp(max=ids.shape[1] - 1))
        return ids, counts
