"""gptk's logits processors inside a decoding loop that is not gptk's.

At each step such a loop passes all tokens of its rows and their logits, and does not say how the
rows have moved since the last call. But they are the rows of that call, reordered (beams),
shortened (rejected drafts) and extended: comparing the tokens tells which `select`, `rewind` and
`extend` lead from the old rows to the new, and all followers are told of these, as in a
`DecodeSession`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import gptk

Process = Callable[[Tensor, gptk.Rows], Tensor]
"""What a processor's `start` returns."""


class Replay:
    """Processors, and the rows of the last call.

    prompt_length: how many of the first columns are the prompt; None: the columns of the first
    call. pad_token_id: the padding on the left of shorter prompts, which belongs to no row.
    num_beams: rows of each prompt; None: each row has its own prompt, and may come from any row.
    """

    def __init__(
        self,
        processors: str | gptk.LogitsProcessor | Sequence[str | gptk.LogitsProcessor],
        *,
        prompt_length: int | None = None,
        pad_token_id: int | None = None,
        num_beams: int | None = None,
        tokenizer: gptk.Tokenizer | None = None,
        model: gptk.CausalModel | None = None,
        eos: Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        if isinstance(processors, str | gptk.LogitsProcessor):
            processors = [processors]
        self.processors = [
            gptk.plugins.create("processor", processor, gptk.LogitsProcessor)
            for processor in processors
        ]
        for name, number in (("prompt_length", prompt_length), ("num_beams", num_beams)):
            if number is not None and number < 1:
                raise gptk.OptionError(f"{name} is {number}; it must be 1 or more")
        if eos is None:
            eos = tokenizer.eos if tokenizer is not None else ()
        self._prompt_length = prompt_length
        self._beams = num_beams
        self._pad = pad_token_id
        self._tokenizer = tokenizer
        self._model = model
        self._eos = tuple(eos)
        self._seed = seed
        self.reset()

    def reset(self) -> None:
        """Forget the rows: the next call begins a new generation."""
        self._tokens: Tensor | None = None  # (rows, length), those of the last call
        self._live: list[int] = []  # the rows of the caller that have not ended

    @torch.no_grad()
    def __call__(self, tokens: Tensor, logits: Tensor) -> Tensor:
        """tokens: (rows, length), all of each row so far. logits: (rows, vocab).

        Returns new logits of the same type. Rows that have ended keep theirs.
        """
        try:
            tokens = tokens.long().clone()  # the caller may write into its tensor later
            self._follow(tokens)
            self._tokens = tokens
            if not self._live:
                return logits
            none_ended = len(self._live) == len(logits)
            processed = (logits if none_ended else logits[self._live]).float()
            with gptk.plugins.blaming(self.processors):
                for processor, process in zip(self.processors, self._processes, strict=True):
                    before = processed
                    processed = process(before, self._rows)
                    gptk.plugins.check_logits(processed, processor.name, before)
        except BaseException:
            self.reset()  # only some of the followers may have moved
            raise
        processed = processed.to(logits.dtype)
        if processed.is_inference():  # the caller could not write into an inference tensor
            processed = processed.clone()
        if none_ended:
            return processed
        return logits.index_put((torch.tensor(self._live, device=logits.device),), processed)

    def _follow(self, tokens: Tensor) -> None:
        """Move the rows so that their tokens are `tokens`, or start new rows."""
        origin = self._origin(tokens)
        if origin is None:
            prompt = tokens.shape[1] if self._prompt_length is None else self._prompt_length
            if prompt > tokens.shape[1]:
                raise gptk.OptionError(
                    f"prompt_length is {prompt}, but the rows have {tokens.shape[1]} tokens"
                )
            self._start(tokens, prompt)
            return
        parents, kept = origin
        live = self._unended(tokens, self._prompt)
        index_of = {row: index for index, row in enumerate(self._live)}
        if any(parents[row] not in index_of for row in live):  # the caller removed its EOS
            self._start(tokens, self._prompt)
            return
        assert self._tokens is not None
        dropped = self._tokens.shape[1] - kept
        selected = [index_of[parents[row]] for row in live]
        if live and selected != list(range(len(self._live))):
            self._select(selected)
        if live and dropped:
            with gptk.plugins.blaming(self.processors):
                for follower in self._followers:
                    follower.rewind([dropped] * len(live))
        if live and kept < tokens.shape[1]:
            self._extend(tokens[live, kept:])
        self._live = live

    def _origin(self, tokens: Tensor) -> tuple[list[int], int] | None:
        """Which old row each row comes from, and how many of its columns every row has kept.

        None if the rows do not continue those of the last call: a loop adds at most one token a
        call, and keeps the prompts.
        """
        old = self._tokens
        if old is None or old.device != tokens.device or len(old) != len(tokens):
            return None
        if tokens.shape[1] > old.shape[1] + 1:
            return None
        width = min(old.shape[1], tokens.shape[1])
        equal = old[:, :width] == tokens[:, :width]
        parents = list(range(len(tokens)))
        kept = width
        for row, unmoved in enumerate(equal.all(dim=1).tolist()):
            if unmoved:
                continue
            common = (old[:, :width] == tokens[row, :width]).long().cumprod(dim=1).sum(dim=1)
            lengths = common.tolist()
            parents[row] = max(self._possible_parents(row, len(old)), key=lengths.__getitem__)
            kept = min(kept, lengths[parents[row]])
        return None if kept < self._prompt else (parents, kept)

    def _possible_parents(self, row: int, count: int) -> list[int]:
        """The old rows that a row may come from, by distance, beginning with itself.

        Rows of equal tokens may have different random streams; the nearest is most likely of the
        same prompt.
        """
        beams = self._beams or count
        first = row - row % beams
        return sorted(range(first, first + beams), key=lambda other: abs(other - row))

    def _start(self, tokens: Tensor, prompt: int) -> None:
        """Start new rows with the first `prompt` columns as prompts, and add the other tokens."""
        if self._beams is not None and len(tokens) % self._beams:
            raise gptk.OptionError(
                f"num_beams is {self._beams}, which does not divide the {len(tokens)} rows"
            )
        self._prompt = prompt
        self._live = self._unended(tokens, prompt)
        if not self._live:
            return
        starts = [0] * len(tokens)
        if self._pad is not None:
            padding = (tokens[:, : prompt - 1] == self._pad).long().cumprod(dim=1)
            starts = padding.sum(dim=1).tolist()
        prompts = [row[start:prompt] for row, start in zip(tokens.tolist(), starts, strict=True)]
        beams = self._beams or 1
        self._rows = gptk.Rows(
            prompts[::beams],
            seed=self._seed,
            device=tokens.device,
            eos=self._eos,
            tokenizer=self._tokenizer,
            model=self._model,
        )
        self._rows.select([row // beams for row in range(len(tokens))])
        with gptk.plugins.blaming(self.processors):
            self._processes: list[Process] = [
                processor.start(self._rows) for processor in self.processors
            ]
        for processor, process in zip(self.processors, self._processes, strict=True):
            gptk.plugins.check_process(process, processor.name)
        self._followers: list[gptk.Follower] = [self._rows]
        for process in self._processes:
            if isinstance(process, gptk.Follower):
                self._followers.append(process)
        if len(self._live) < len(tokens):
            self._select(self._live)
        if prompt < tokens.shape[1]:
            self._extend(tokens[self._live, prompt:])

    def _select(self, parents: Sequence[int]) -> None:
        with gptk.plugins.blaming(self.processors):
            for follower in self._followers:
                follower.select(parents)

    def _extend(self, tokens: Tensor) -> None:
        with gptk.plugins.blaming(self.processors):
            for follower in self._followers:
                follower.extend(tokens)

    def _unended(self, tokens: Tensor, prompt: int) -> list[int]:
        """The rows without EOS after the prompt: the loop only pads the others."""
        if not self._eos or prompt == tokens.shape[1]:
            return list(range(len(tokens)))
        eos = torch.tensor(self._eos, device=tokens.device)
        ended = torch.isin(tokens[:, prompt:], eos).any(dim=1).tolist()
        return [row for row, end in enumerate(ended) if not end]
