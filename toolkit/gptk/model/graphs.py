"""Passes over few tokens as CUDA graphs: their operations are recorded once, and launched together.

In a decoding step a GPU computes for less time than it takes to launch some ten operations a layer
one by one. A graph repeats operations on the same tensors. So what differs from pass to pass is
written into one tensor before each replay: tokens, positions, tiles (see
gptk.kernels.triton_attention) and tables of blocks. The tokens may be of any rows, those of beams,
drafts and short prompts, too.

Passes of 3 or 17 tokens are padded to 4 or 24, so that there are few graphs. A graph is recorded
when a pass of its size comes for the second time. All share their memory, so what a replay returns
is copied before the next one. They are dropped if weights of the model are replaced, moved or
converted, or if layers are exchanged, quantized or get hooks.

https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs has the rules for what is recorded.
"""

import functools
import logging
import weakref
from array import array
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gptk.kernels import BLOCK
from gptk.kernels.gpu import Tiling
from gptk.model.captured import Snapshot, why_not_capturable
from gptk.model.gpt import GPT
from gptk.model.joined import JoinedSlots, Numbers, as_tensor
from gptk.model.pool import BlockPool

_log = logging.getLogger(__name__)

Replay = Callable[[], Tensor]
Recorder = Callable[[Replay], Replay]
"""Takes a function; returns one that repeats its operations on the same tensors, and returns the
same tensor each time."""


def graphs_of(model: GPT, pool: BlockPool, tiling: Tiling, longest: int) -> "Graphs | None":
    """The model's graphs over the blocks of a pool; None if it can have none now.

    tiling: of the passes. longest: the most tokens of a row that they must be able to have.
    """
    if torch.is_grad_enabled() or torch.is_autocast_enabled(pool.device.type):
        return None
    known = _graphs.get(model)
    if known is not None and known.hold(pool, longest):
        return known
    _graphs.pop(model, None)
    if (reason := why_not_capturable(model)) is not None:
        _log.debug("no CUDA graphs: %s", reason)
        return None
    made = _graphs[model] = Graphs(model, pool, tiling, longest)
    return made


class Graphs:
    """The graphs of a model over the blocks of a pool. They do not keep the model alive."""

    def __init__(self, model: GPT, pool: BlockPool, tiling: Tiling, longest: int) -> None:
        self._model_of = weakref.ref(model)
        self._record: Recorder = CUDARecorder(pool.device)
        self._snapshot = Snapshot(model)
        self._pool, self._tiling = pool, tiling
        self._blocks_per_slab = pool.per_slab
        config = model.config
        self._blocks_of_row = -(-config.context_length // BLOCK)
        self._graphs: dict[tuple[int, tuple[int, ...]], _Graph] = {}
        """By how many tokens it is for, and by the layers whose states it returns."""
        self._seen: set[tuple[int, tuple[int, ...]]] = set()
        """The sizes of passes there have been."""
        with torch.inference_mode(False):  # to be written to in any mode
            positions = max(longest, min(config.context_length, _POSITIONS))
            self._table = model.position_table(positions)
            self._addresses = pool.addresses
            self._slabs = torch.zeros(
                max(_SLABS, 2 * len(pool.addresses)), dtype=torch.int64, device=pool.device
            )
        self._slabs[: len(self._addresses)] = self._addresses
        learned = model.embed_positions is not None
        self._longest = config.context_length if learned else self._table.shape[2]

    def hold(self, pool: BlockPool, longest: int) -> bool:
        """Whether the model is still what was recorded, and these are its blocks.

        Others need graphs of their own, which share no memory with these: PyTorch does not take
        a pool of memory again once no graph has it.
        """
        return (
            pool is self._pool
            and longest <= self._longest
            and pool.per_slab == self._blocks_per_slab
            and len(pool.addresses) <= len(self._slabs)
            and self._snapshot.is_current()
        )

    def states(self, numbers: Numbers, layers: tuple[int, ...]) -> Tensor | None:
        """The states that a pass is asked for, (tokens, 1 + layers, width).

        None if there is no graph for it, and none is to be made: the pass is the first of its size,
        or has too many tokens or blocks. numbers: with sequences of at most the tiling's tokens.
        """
        count = padded(len(numbers.tokens))
        if count is None or len(numbers.tables) > count * self._blocks_of_row:
            return None
        key = count, layers
        graph = self._graphs.get(key)
        if graph is None:
            if key not in self._seen:
                self._seen.add(key)
                return None
            if len(self._graphs) == _MOST_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            graph = self._graphs[key] = self._new_graph(count, layers)
        self._update_slabs()
        states = graph.states(numbers)
        if len(numbers.wanted) == len(numbers.tokens):
            return states[: len(numbers.tokens)].clone()  # the next replay overwrites it
        return states.index_select(0, as_tensor(numbers.wanted).to(states.device))

    def _update_slabs(self) -> None:
        if self._addresses is not self._pool.addresses:
            self._addresses = self._pool.addresses
            self._slabs[: len(self._addresses)] = self._addresses

    def _new_graph(self, count: int, layers: tuple[int, ...]) -> "_Graph":
        device = self._pool.device
        with torch.inference_mode(False):
            room = 6 * count + count * self._blocks_of_row
            memory = torch.zeros(room, dtype=torch.int64, device=device)
        tokens, positions, tiles, tables = torch.split(
            memory, [count, count, 4 * count, room - 6 * count]
        )
        heads, slabs = self._heads(), self._slabs
        slots = JoinedSlots(
            *(self._pool, heads, positions[None], None),
            *(tiles.view(-1, 4), tables, slabs, self._tiling),
        )
        run = functools.partial(_states, self._model_of, tokens[None], slots, self._table, layers)
        return _Graph(count, memory, run, self._record)

    def _heads(self) -> int:
        model = self._model_of()
        assert model is not None
        return model.config.n_heads


class _Graph:
    """A recorded pass over `count` tokens."""

    def __init__(self, count: int, memory: Tensor, run: Replay, record: Recorder) -> None:
        """memory: where the numbers of a pass are written, int64."""
        self._count, self._memory = count, memory
        self._run, self._record = run, record
        self._replay: Replay | None = None

    def states(self, numbers: Numbers) -> Tensor:
        """(count, 1 + layers, width). Padding is a token that is in no tile."""
        count = self._count
        host = array("q")
        for values, room in (
            (numbers.tokens, count),
            (numbers.positions, count),
            (numbers.sequences, 4 * count),
        ):
            host += values
            host.frombytes(bytes(8 * (room - len(values))))
        host += array("q", numbers.tables)
        self._memory[: len(host)].copy_(as_tensor(host))
        if self._replay is None:
            self._replay = self._record(self._run)
        return self._replay()


def _states(
    model_of: "weakref.ref[GPT]",
    tokens: Tensor,
    slots: JoinedSlots,
    table: Tensor,
    layers: Sequence[int],
) -> Tensor:
    model = model_of()
    assert model is not None
    return model.states_at(tokens, slots, table, layers)[0]


class CUDARecorder:
    """Records CUDA graphs, which share their memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._memory = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, run: Replay) -> Replay:
        """Records the operations of a function.

        It is run once before, on the stream of the recording: to compile and load kernels and to
        take memory for these is not allowed while recording. That stores the keys and values which
        the first replay stores again. Recording forbids these things to this thread alone, since
        others may use the device meanwhile.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            # The outer context restores the stream also where the recording fails.
            with torch.cuda.stream(self._stream):
                run()
                with torch.cuda.graph(
                    graph,
                    pool=self._memory,
                    stream=self._stream,
                    capture_error_mode="thread_local",
                ):
                    states = run()
            current.wait_stream(self._stream)

        def replay() -> Tensor:
            graph.replay()
            return states

        return replay


def padded(count: int) -> int | None:
    """The size of the graph for so many tokens; None if they are too many."""
    if count > MOST_TOKENS:
        return None
    return 1 << (count - 1).bit_length() if count <= 8 else count + -count % 8


MOST_TOKENS = 256
"""The most tokens of a pass that is a graph: with more it computes for longer than it launches."""
_MOST_GRAPHS = 64
_POSITIONS = 8192
"""Of the table of positions that graphs begin with."""
_SLABS = 4096
"""Of how many slabs there is room for the addresses, at least: 128 GiB."""
_graphs: "weakref.WeakKeyDictionary[GPT, Graphs]" = weakref.WeakKeyDictionary()
