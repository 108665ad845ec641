"""The passes of an engine: what runs want read, together, within the budget of memory."""

import math
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from gptk.engine.memory import Memory
from gptk.engine.reading import LogitsWanted, Reading
from gptk.engine.run import Run, Wanted
from gptk.model.blocks import BlockCache
from gptk.model.joined import Part
from gptk.model.passes import has_blocks, read_parts, sizes_of
from gptk.model.pool import BlockPool, OutOfBlocks
from gptk.model.protocol import Cache, CausalModel, evaluating

Taken = tuple[Run[Any], Reading, list[Part]]
"""A run, what it wants read, and what of that a pass reads."""


class Passes:
    """Answers what runs want of one model.

    It holds the model only as long as somebody else does.
    """

    def __init__(
        self,
        model: CausalModel,
        wait_for: "Callable[[Passes, Wanted], Any]",
        memory: Memory,
    ) -> None:
        """wait_for: suspends a run until it has its answer. memory: of all models."""
        self._model_of = weakref.ref(model)
        self._wait_for = wait_for
        self._memory = memory
        self._pool: BlockPool | None = None
        self.count = 0
        """Passes so far."""
        self.waited = 0
        """How often the engine has read another model since the last of them."""
        self._shared: list[StorageWeakRef] = []
        """Memory of which several runs have parts."""

    @property
    def pool(self) -> BlockPool:
        """The model's blocks."""
        model, old = self._model, self._pool
        if old is None or (old.dtype, old.device) != (model.dtype, model.device):
            assert has_blocks(model)  # new, or converted
            budget = self._memory.budget(model.device)
            self._pool = BlockPool(sizes_of(model), model.device, model.dtype, budget)
        assert self._pool is not None
        return self._pool

    @property
    def is_on_gpu(self) -> bool:
        """Whether the model is on a CUDA device."""
        model = self._model_of()
        return model is not None and model.device.type == "cuda"

    def has_room(self, rows: int) -> bool:
        """Whether so many rows will find some blocks, if runs use the model."""
        pool = self._pool
        return pool is None or not pool.used or pool.available >= 2 * rows

    def new_cache(self, model: CausalModel, rows: int, capacity: int) -> Cache:
        """A cache in blocks, or the model's own if it must have that."""
        if not has_blocks(model):
            return model.new_cache(rows, capacity)
        return BlockCache(self.pool, rows)

    def wait_for(self, wanted: Wanted) -> Any:
        """Suspend the run that asks until the engine has what it wants."""
        return self._wait_for(self, wanted)

    def at_once(self, run: Run[Any], wanted: Wanted) -> Any:
        """The answer to the only run there is; None if its tokens are many, and it has to wait."""
        if isinstance(wanted, LogitsWanted):
            return self._logits(wanted.states)
        if wanted.size > self._most_tokens:
            return None
        run.wanted = wanted
        self.read([run])
        run.wanted = None
        answer, run.answer = run.answer, None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def give_logits(self, asking: deque[Run[Any]]) -> list[Run[Any]]:
        """Compute the logits that runs want of states, together: of the first of those that ask, as
        many as are allowed in memory. Returns these, which no longer ask."""
        runs: list[Run[Any]] = []
        states = 0
        while asking and (not runs or states + _asked(asking[0]) <= MOST_LOGITS):
            runs.append(asking.popleft())
            states += _asked(runs[-1])
        if runs:
            self._give_logits(runs)
        return runs

    def _give_logits(self, runs: Sequence[Run[Any]]) -> None:
        wanted = [_states_of(run) for run in runs]
        try:
            logits = self._logits_of_each(wanted)
        except Exception as error:
            self._each_alone(runs, error, self._give_logits)
            return
        for run, part in zip(runs, logits, strict=True):
            run.answer = part

    def read(self, runs: Sequence[Run[Any]]) -> None:
        """Read tokens that runs want read; those whose tokens are all read have their answer.

        First those with few tokens, so that long prompts do not hold them up.
        """
        self.count, self.waited = self.count + 1, 0
        self.pool.budget.trim()
        order = sorted(runs, key=_order)
        taken, beyond = self._take(order), False
        while True:
            parts = [part for _, _, of_run in taken for part in of_run]
            layers = sorted({layer for _, reading, _ in taken for layer in reading.layers})
            try:
                states = self._states(parts, layers, beyond=beyond)
                break
            except OutOfBlocks:
                order, beyond = self._fewer(order)
                if not order:
                    return
                taken = self._take(order)
            except Exception as error:
                for _, reading, _ in taken:
                    reading.start_again()
                self._each_alone([run for run, _, _ in taken], error, self.read)
                return
        self._answer(taken, states, layers)

    def _answer(self, taken: Sequence[Taken], states: Tensor, layers: list[int]) -> None:
        """Give the runs that a pass has read for what they want of its states, (tokens, 1 + layers,
        width)."""
        sizes = [part.wanted for _, _, of_run in taken for part in of_run]
        pieces = iter(self._split(states[None], sizes))
        with_logits: list[Run[Any]] = []
        asked = 0
        for run, reading, of_run in taken:
            for part in of_run:
                piece = next(pieces)
                if len(reading.layers) < len(layers):
                    piece = piece[:, :, [0, *(1 + layers.index(n) for n in reading.layers)]]
                reading.took(part, piece)
            run.answer = reading.result()
            if reading.with_logits and run.answer is not None:
                with_logits.append(run)
                asked += math.prod(reading.asked)
        if with_logits:
            # If all that they asked for was read just now, it is here side by side.
            is_all = len(with_logits) == len(taken) and asked == len(states)
            self._add_logits(with_logits, states[None, :, 0].contiguous() if is_all else None)

    def _add_logits(self, runs: Sequence[Run[Any]], together: Tensor | None = None) -> None:
        """To the answers of runs, which are states, the logits of these.

        together: the final states of them all, (1, tokens, width), if these are at hand.
        """
        try:
            if together is None:
                logits = self._logits_of_each([run.answer.select(-2, 0) for run in runs])
            else:
                logits = self._logits_in_parts(together, [_reading(run).asked for run in runs])
        except Exception as error:
            self._each_alone(runs, error, self._add_logits)
            return
        for run, part in zip(runs, logits, strict=True):
            run.answer = run.answer, part

    def _logits_of_each(self, states: Sequence[Tensor]) -> Sequence[Tensor]:
        """The logits of several tensors of states, (…, width) each, together."""
        if len(states) == 1:
            return [self._logits(states[0])]
        together = torch.cat([each.flatten(0, -2) for each in states])
        return self._logits_in_parts(together[None], [each.shape[:-1] for each in states])

    def _logits_in_parts(
        self, together: Tensor, shapes: Sequence[Sequence[int]]
    ) -> Sequence[Tensor]:
        """The logits of states, (1, tokens, width), in parts.

        shapes: of each part without its last dimension, which is the vocabulary.
        """
        parts = self._split(self._logits(together), [math.prod(shape) for shape in shapes])
        return [
            part if len(shape) == 2 and shape[0] == 1 else part.view(*shape, -1)
            for part, shape in zip(parts, shapes, strict=True)
        ]

    def _split(self, together: Tensor, sizes: list[int]) -> Sequence[Tensor]:
        """What a pass has computed for several runs, (1, tokens, …), in parts of so many tokens.

        A part that is in use keeps the memory of all. So where much is kept in this way, as by
        streams that are read slowly, the parts are copies.
        """
        parts: Sequence[Tensor] = torch.split(together, sizes, dim=1)
        if len(parts) == 1:
            return parts
        self._shared = [memory for memory in self._shared if not _is_gone(memory)]
        if len(self._shared) >= _MOST_SHARED:
            return [part.clone() for part in parts]
        self._shared.append(_reference(together))
        return parts

    def _take(self, runs: Sequence[Run[Any]]) -> list[Taken]:
        """What of each run a pass reads."""
        taken: list[Taken] = []
        room, pool = self._most_tokens, self.pool
        for run in runs:
            if room <= 0:
                break
            reading = _reading(run)
            reading.use(pool)
            if taken and reading.is_lost and pool.available < reading.blocks + len(taken):
                continue
            parts = reading.parts(room)
            for part in parts:
                room -= len(part.tokens)
            taken.append((run, reading, parts))
        return taken

    @property
    def _most_tokens(self) -> int:
        """The most tokens that a pass reads."""
        if self.is_on_gpu:
            return TOKENS_ON_GPU
        return TOKENS_IN_16_BITS if self.pool.dtype.itemsize <= 2 else TOKENS

    @property
    def _model(self) -> CausalModel:
        model = self._model_of()
        assert model is not None
        return model

    def _states(self, parts: Sequence[Part], layers: Sequence[int], *, beyond: bool) -> Tensor:
        model = self._model
        assert has_blocks(model)
        with evaluating(model):
            return read_parts(model, parts, layers, beyond=beyond)

    def _logits(self, states: Tensor) -> Tensor:
        model = self._model
        with evaluating(model):
            return model.logits(states)

    def _fewer(self, runs: list[Run[Any]]) -> tuple[list[Run[Any]], bool]:
        """Where memory is short for what runs want read: the runs to try a pass for, after others
        were set back, and whether it may take memory beyond the budget. The list is empty if older
        runs, of another model, have to end first."""
        oldest = min(runs, key=lambda run: run.number)
        budget = self.pool.budget
        set_back = self._memory.set_back(oldest, budget)
        if set_back is not None:
            return [run for run in runs if run is not set_back[1]], False
        if len(runs) > 1:
            return [oldest], False
        if self._memory.is_oldest(oldest, budget):
            return [oldest], True
        return [], False

    def _each_alone(self, runs: Sequence[Run[Any]], error: Exception, answer: Any) -> None:
        """After an error of several together: only who fails alone has it."""
        if len(runs) == 1:
            runs[0].answer = error
            return
        for run in runs:
            answer([run])


def _reference(tensor: Tensor) -> StorageWeakRef:
    """To the memory of a tensor, which it does not keep."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _is_gone(memory: StorageWeakRef) -> bool:
    return bool(memory.expired())  # type: ignore[no-untyped-call]


def _reading(run: Run[Any]) -> Reading:
    assert isinstance(run.wanted, Reading)
    return run.wanted


def _states_of(run: Run[Any]) -> Tensor:
    """Those of which it wants logits."""
    assert isinstance(run.wanted, LogitsWanted)
    return run.wanted.states


def _asked(run: Run[Any]) -> int:
    """Of how many states it wants logits."""
    states = _states_of(run)
    return states.numel() // states.shape[-1]


def _order(run: Run[Any]) -> tuple[bool, int]:
    """Runs with few tokens first, and the oldest of them."""
    return _reading(run).size > 16, run.number


TOKENS, TOKENS_IN_16_BITS = 128, 768
"""The most tokens of a pass: with more it takes longer, and no less for each of them."""
TOKENS_ON_GPU = 8192
"""A GPU takes less time for each of them up to about here, and others do not wait for long."""
MOST_LOGITS = 512
"""States whose logits are in memory at the same time, but that one run may ask for more: 100 MB
with GPT-2's vocabulary."""
_MOST_SHARED = 8
"""Tensors whose parts several runs have: the states and logits of four passes."""
