"""A pool: the blocks of a model, taken, shared, found by what they hold. See gptk.model.blocks."""

import heapq
import itertools
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from gptk.errors import OutOfMemory
from gptk.kernels import BLOCK
from gptk.kernels.attention import slabs_of
from gptk.kernels.structures import Slabs
from gptk.model.budget import Budget
from gptk.system.memory import is_out_of_memory, new_zeros

Beginning = tuple[int, tuple[int, ...]]
"""What a full block is found by: the number of the text before it (-1: none), and its tokens."""


class OutOfBlocks(OutOfMemory):
    """All memory of the budget is in use."""


class Sizes(Protocol):
    """What a block has room for; `gptk.GPTConfig` has it."""

    @property
    def n_layers(self) -> int:
        """Layers that have keys and values."""
        raise NotImplementedError

    @property
    def n_kv_heads(self) -> int:
        """Heads of keys and values, of the layer that has most of them."""
        raise NotImplementedError

    @property
    def head_dim(self) -> int:
        """Numbers of a key or of a value, of the layer that has most of them."""
        raise NotImplementedError

    @property
    def window_of_all(self) -> int | None:
        """How many tokens of a row, the last ones, any layer will see. None: all."""
        raise NotImplementedError


class BlockPool:
    """The blocks of a model.

    Memory is taken from the budget in slabs of some blocks, when they are needed. A slab of which
    no row has a block may be given back for another model. All methods are for one thread, but
    `release_later`.
    """

    def __init__(
        self, sizes: Sizes, device: torch.device, dtype: torch.dtype, budget: Budget
    ) -> None:
        self._shape = (sizes.n_layers, 2, sizes.n_kv_heads, BLOCK, sizes.head_dim)
        size = torch.Size(self._shape).numel() * dtype.itemsize
        self.block_bytes = size
        """Bytes of a block."""
        pairs = device.type == "cpu" and dtype.itemsize == 2 and sizes.head_dim % 2 == 0
        self._per_lane = 2 if pairs else 1
        self.per_slab = 1
        """Blocks of a slab, a power of two."""
        self.device, self.dtype = device, dtype
        self.window = sizes.window_of_all
        """How many tokens of a row, the last ones, need their blocks; None: all."""
        self._slabs: list[Tensor | None] = []
        """Each (layers, 2, per_slab, kv_heads, BLOCK, head_dim); None: given back."""
        self.addresses = torch.empty(0, dtype=torch.int64, device=device)
        """(slabs,): where they are. Another tensor if they change."""
        self._for_kernels: Slabs | None = None
        self.taken = 0
        """Bytes of all slabs."""
        self.budget = budget
        self._in_use: list[int] = []
        """For each slab how many of its blocks rows have."""
        self._free: list[int] = []
        """A heap: blocks with low numbers are taken first, so that the last slabs empty."""
        self._users: list[int] = []
        """For each block how many rows have it."""
        self._found_by: list[Beginning | None] = []
        """For each block what it is found by, if it is full and known."""
        self._texts: list[int] = []
        """For each known block the number of the text that it ends; no two texts share one."""
        self._known: dict[Beginning, int] = {}
        self._unused: OrderedDict[int, int] = OrderedDict()
        """Known blocks that no row has, each with the moment since when, in this order."""
        self._released: deque[Sequence[int]] = deque()
        self._choose_slabs()
        budget.add(self)

    @property
    def used(self) -> int:
        """Blocks that rows have."""
        self._settle()
        return sum(self._in_use)

    @property
    def available(self) -> int:
        """Blocks that can be taken within the budget."""
        self._settle()
        if not self._slabs:
            self._choose_slabs()
        more = self.budget.within_reach(self) // self.slab_bytes * self.per_slab
        return len(self._free) + len(self._unused) + more

    @property
    def slab_bytes(self) -> int:
        """Bytes of a slab."""
        return self.block_bytes * self.per_slab

    @property
    def idle(self) -> int:
        """Bytes of the slabs of which no row has a block."""
        self._settle()
        return self.taken - self.slab_bytes * sum(map(bool, self._in_use))

    @property
    def for_kernels(self) -> Slabs:
        """The slabs, as gptk's kernels for CPUs take them. There is one."""
        if self._for_kernels is None:
            self._for_kernels = slabs_of(self._slabs)
        return self._for_kernels

    @property
    def sample(self) -> Tensor:
        """Any slab, for its shape and dtype."""
        return next(slab for slab in self._slabs if slab is not None)

    def take(self, *, beyond: bool = False) -> int:
        """A block for one row. beyond: also beyond the budget. Raises OutOfBlocks."""
        self._settle()
        if not self._free:
            self._free_a_block(beyond=beyond)
        block = heapq.heappop(self._free)
        self._add_user(block)
        return block

    def share(self, blocks: Sequence[int]) -> None:
        """One more row has these blocks."""
        for block in blocks:
            if not self._users[block]:
                del self._unused[block]
            self._add_user(block)

    def release(self, blocks: Sequence[int]) -> None:
        """A row does not have these blocks any more."""
        for block in reversed(blocks):  # the last are given up before those they follow
            self._users[block] -= 1
            if not self._users[block]:
                self._in_use[block // self.per_slab] -= 1
                if self._found_by[block] is None:
                    heapq.heappush(self._free, block)
                else:
                    self._unused[block] = next(_MOMENTS)

    def release_later(self, blocks: Sequence[int]) -> None:
        """As `release`, in any thread: it happens when a block is needed."""
        self._released.append(blocks)

    def is_shared(self, block: int) -> bool:
        """Whether writing into a block would change what others have."""
        return self._users[block] > 1 or self._found_by[block] is not None

    def copy(self, source: int, target: int) -> None:
        """Copy a block into another one."""
        old = self._slab_of(source)[:, :, source % self.per_slab]
        self._slab_of(target)[:, :, target % self.per_slab] = old

    def know(self, block: int, before: int | None, tokens: tuple[int, ...]) -> int:
        """Remember a full block by what it holds, after the known block `before`. Returns the block
        that is known by it: another one, if the same text was read elsewhere at the same time."""
        beginning = self._beginning(before, tokens)
        known = self._known.setdefault(beginning, block)
        if known == block and self._found_by[block] is None:
            self._found_by[block] = beginning
            self._texts[block] = next(_MOMENTS)
        return known

    def find(self, before: int | None, tokens: tuple[int, ...]) -> int | None:
        """The block that holds these tokens after the known block `before`."""
        return self._known.get(self._beginning(before, tokens))

    def view(self, layer: int, blocks: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, a copy: (kv_heads, blocks · BLOCK, head_dim) each."""
        _, _, kv_heads, slots, d = self._shape
        n, size = self._per_lane, self.per_slab
        in_slabs = [
            _selected(self._slab_of(slab * size)[layer], [block % size for block in run])
            for slab, run in itertools.groupby(blocks, key=lambda block: block // size)
        ]
        stored = in_slabs[0] if len(in_slabs) == 1 else torch.cat(in_slabs, dim=1)
        keys = stored[0].view(-1, kv_heads, d // n, slots, n).permute(1, 0, 3, 2, 4)
        values = stored[1].view(-1, kv_heads, slots // n, d, n).permute(1, 0, 2, 4, 3)
        shape = kv_heads, len(blocks) * slots, d
        return keys.reshape(shape), values.reshape(shape)

    def write(self, layer: int, block: int, slot: int, kv: Tensor) -> None:
        """Store keys and values in consecutive slots of a block. kv: (2, kv_heads, slots, d)."""
        keys, values = self._lanes(layer, block)
        kv_heads, count = kv.shape[1:3]
        keys[:, :, slot : slot + count] = (
            kv[0].reshape(kv_heads, count, -1, self._per_lane).transpose(1, 2)
        )
        slots = torch.arange(slot, slot + count, device=self.device)
        values[:, slots // self._per_lane, :, slots % self._per_lane] = kv[1].transpose(0, 1)

    def _lanes(self, layer: int, block: int) -> tuple[Tensor, Tensor]:
        """Keys (kv_heads, d / n, slots, n) and values (kv_heads, slots / n, d, n) of a block, in
        the order of gptk's kernels: n numbers fill 32 bits on a CPU, of one slot in keys, of
        consecutive slots in values; on other devices n is 1."""
        _, _, kv_heads, slots, d = self._shape
        keys, values = self._slab_of(block)[layer, :, block % self.per_slab]
        n = self._per_lane
        return keys.view(kv_heads, d // n, slots, n), values.view(kv_heads, slots // n, d, n)

    def forget_unused(self) -> None:
        """Give up all blocks that no row has, and the memory of slabs without others."""
        self._settle()
        while self._unused:
            self._give_up(next(iter(self._unused)))
        for _, slab in list(self.idle_slabs()):
            self.give_back(slab)

    def idle_slabs(self) -> Iterator[tuple[int, int]]:
        """Slabs of which no row has a block: the moment when a row had one last, its number."""
        self._settle()
        for slab, in_use in enumerate(self._in_use):
            if not in_use and self._slabs[slab] is not None:
                yield max(self._unused.get(block, 0) for block in self._blocks_of(slab)), slab

    def give_back(self, slab: int) -> None:
        """Forget the blocks of an idle slab, and give its memory back."""
        for block in self._blocks_of(slab):
            if block in self._unused:
                self._give_up(block)
        self._free = [block for block in self._free if block // self.per_slab != slab]
        heapq.heapify(self._free)
        self._set_slab(slab, None)
        if not self.taken:
            self._slabs, self._in_use, self._free = [], [], []
            self._users, self._texts, self._found_by = [], [], []

    def _free_a_block(self, *, beyond: bool) -> None:
        """Have a free block: in a new slab, or that which no row has had for the longest time, of
        this model or of another."""
        if not self._slabs:
            self._choose_slabs()
        unused = next(iter(self._unused.items()), None)
        if unused is None:
            may_grow = self.budget.make_room(self) or beyond
        else:
            is_kept = len(self._unused) * self.block_bytes < _KEPT_BYTES
            may_grow = is_kept and self.budget.make_room(self, unused[1])
        if may_grow:
            try:
                self._grow()
                return
            except Exception as error:
                if not is_out_of_memory(error) or (beyond and unused is None):
                    raise
        if unused is None:
            raise OutOfBlocks("all memory for keys and values is in use")
        self._give_up(unused[0])

    def _give_up(self, block: int) -> None:
        """Forget an unused block, which is free then."""
        beginning = self._found_by[block]
        assert beginning is not None
        del self._unused[block], self._known[beginning]
        self._found_by[block] = None
        heapq.heappush(self._free, block)

    def _beginning(self, before: int | None, tokens: tuple[int, ...]) -> Beginning:
        return (-1 if before is None else self._texts[before], tokens)

    def _add_user(self, block: int) -> None:
        if not self._users[block]:
            self._in_use[block // self.per_slab] += 1
        self._users[block] += 1

    def _slab_of(self, block: int) -> Tensor:
        slab = self._slabs[block // self.per_slab]
        assert slab is not None
        return slab

    def _blocks_of(self, slab: int) -> range:
        return range(slab * self.per_slab, (slab + 1) * self.per_slab)

    def _settle(self) -> None:
        while self._released:
            self.release(self._released.popleft())

    def _grow(self) -> None:
        """Take the memory of another slab."""
        layers, two, kv_heads, slots, size = self._shape
        shape = (layers, two, self.per_slab, kv_heads, slots, size)
        memory = new_zeros(shape, self.dtype, self.device)
        slab = next((i for i, old in enumerate(self._slabs) if old is None), len(self._slabs))
        if slab == len(self._slabs):
            self._slabs.append(None)
            self._in_use.append(0)
            self._users += [0] * self.per_slab
            self._texts += [0] * self.per_slab
            self._found_by += [None] * self.per_slab
        self._set_slab(slab, memory)
        for block in self._blocks_of(slab):
            heapq.heappush(self._free, block)

    def _choose_slabs(self) -> None:
        """Choose how large slabs are, by the budget. There are none."""
        blocks = min(_SLAB_BYTES, self.budget.limit // _LEAST_SLABS) // self.block_bytes
        self.per_slab = 1 << max(0, blocks.bit_length() - 1)

    def _set_slab(self, slab: int, memory: Tensor | None) -> None:
        self._slabs[slab] = memory
        addresses = [0 if slab is None else slab.data_ptr() for slab in self._slabs]
        self.addresses = torch.tensor(addresses, dtype=torch.int64, device=self.device)
        self._for_kernels = None
        self.taken = self.slab_bytes * sum(slab is not None for slab in self._slabs)


def _selected(slab: Tensor, blocks: list[int]) -> Tensor:
    """Blocks of a slab, along axis 1. Those next to each other are not copied."""
    first = blocks[0]
    if blocks == list(range(first, first + len(blocks))):
        return slab[:, first : first + len(blocks)]
    return slab.index_select(1, torch.tensor(blocks, device=slab.device))


_SLAB_BYTES = 32 << 20
_LEAST_SLABS = 16
"""How many slabs of a model a small budget has room for, so that models can share it."""
_KEPT_BYTES = 256 << 20
"""For blocks that no row has: with more of them no further memory is taken."""
_MOMENTS = itertools.count(1)
"""They order events of all pools."""
