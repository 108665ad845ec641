"""Keys and values in blocks of 64 tokens, which rows take as they grow and share while equal.

A block has the keys and values of 64 consecutive tokens of a text, of all layers. A row has a list
of blocks. Rows that begin alike, such as beams, or texts with the same instructions before them,
list the same blocks; who writes into one that others have, too, takes a copy first. So forking,
reordering and pruning rows copies lists, and memory grows with what there is to remember. (Blocks:
vLLM, Kwon et al. 2023.)

    row 0    block 4, block 7, block 9        the prompt, shared; then its own
    row 1    block 4, block 7, block 2

Full blocks stay after their rows have ended, until memory is needed: a text that begins alike takes
them as they are. The one not used for the longest time is given up first.
"""

from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence

import torch
from torch import Tensor

from gptk.errors import OutOfMemory
from gptk.kernels import BLOCK
from gptk.model.config import GPTConfig

Beginning = tuple[int, tuple[int, ...]]
"""What a full block is found by: the block before it (-1: none), and its tokens."""


class OutOfBlocks(OutOfMemory):
    """All blocks of the budget are in use."""


class BlockPool:
    """The blocks of a model.

    budget: bytes that blocks may take, of which at least `least` blocks are had in any case.
    Memory is taken in slabs of some blocks, when they are needed. All methods are for one thread,
    but `release_later`.
    """

    def __init__(
        self, config: GPTConfig, device: torch.device, dtype: torch.dtype, budget: int
    ) -> None:
        self._shape = (config.n_layers, 2, config.n_kv_heads, BLOCK, config.head_dim)
        size = torch.Size(self._shape).numel() * dtype.itemsize
        self.block_bytes = size
        """Bytes of a block."""
        self.per_slab = 1 << max(0, (_SLAB_BYTES // size).bit_length() - 1)
        """Blocks of a slab, a power of two."""
        self.device, self.dtype = device, dtype
        self.slabs: list[Tensor] = []
        """Each (layers, 2, per_slab, kv_heads, BLOCK, head_dim)."""
        self.addresses = torch.empty(0, dtype=torch.int64)
        """(slabs,): where they are."""
        self.budget = budget
        self._free: list[int] = []
        self._users: list[int] = []
        """For each block how many rows have it."""
        self._found_by: list[Beginning | None] = []
        """For each block what it is found by, if it is full and known."""
        self._known: dict[Beginning, int] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()
        """Known blocks that no row has, that used longest ago first."""
        self._released: deque[Sequence[int]] = deque()

    @property
    def used(self) -> int:
        """Blocks that rows have."""
        self._settle()
        return len(self._users) - len(self._free) - len(self._unused)

    @property
    def available(self) -> int:
        """Blocks that can be taken within the budget."""
        self._settle()
        more = max(0, self.budget // self.block_bytes - len(self._users))
        return len(self._free) + len(self._unused) + more

    def take(self, *, beyond: bool = False) -> int:
        """A block for one row. beyond: also beyond the budget. Raises OutOfBlocks."""
        self._settle()
        can_grow = (len(self._users) + self.per_slab) * self.block_bytes <= self.budget
        if not self._free and can_grow and len(self._unused) * self.block_bytes < _KEPT_BYTES:
            self._grow()
        if not self._free and self._unused:
            block, _ = self._unused.popitem(last=False)
            self._forget(block)
            self._free.append(block)
        if not self._free:
            if not beyond and self._users:
                raise OutOfBlocks("all blocks of the cache are in use")
            self._grow()
        block = self._free.pop()
        self._users[block] = 1
        return block

    def share(self, blocks: Sequence[int]) -> None:
        """One more row has these blocks."""
        for block in blocks:
            if not self._users[block]:
                del self._unused[block]
            self._users[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """A row does not have these blocks any more."""
        for block in reversed(blocks):  # the last are given up before those they follow
            self._users[block] -= 1
            if not self._users[block]:
                if self._found_by[block] is None:
                    self._free.append(block)
                else:
                    self._unused[block] = None

    def release_later(self, blocks: Sequence[int]) -> None:
        """As `release`, in any thread: it happens when a block is needed."""
        self._released.append(blocks)

    def is_shared(self, block: int) -> bool:
        """Whether writing into a block would change what others have."""
        return self._users[block] > 1 or self._found_by[block] is not None

    def copy(self, source: int, slots: int, target: int) -> None:
        """Copy the first slots of a block into another one."""
        old = self._slab_of(source)[:, :, source % self.per_slab, :, :slots]
        self._slab_of(target)[:, :, target % self.per_slab, :, :slots] = old

    def know(self, block: int, before: int, tokens: tuple[int, ...]) -> int:
        """Remember a full block by what it holds. Returns the block that is known by it: another
        one, if the same text was read elsewhere at the same time."""
        beginning = (before, tokens)
        known = self._known.setdefault(beginning, block)
        if known == block:
            self._found_by[block] = beginning
        return known

    def find(self, before: int, tokens: tuple[int, ...]) -> int | None:
        """The block that holds these tokens after the block `before`."""
        return self._known.get((before, tokens))

    def view(self, layer: int, blocks: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, a copy: (kv_heads, blocks · BLOCK, head_dim) each."""
        parts = [self._slab_of(block)[layer, :, block % self.per_slab] for block in blocks]
        keys, values = torch.cat(parts, dim=2).unbind()
        return keys, values

    def write(self, layer: int, block: int, slot: int, kv: Tensor) -> None:
        """Store keys and values in consecutive slots of a block. kv: (2, kv_heads, slots, d)."""
        target = self._slab_of(block)[layer, :, block % self.per_slab]
        target[:, :, slot : slot + kv.shape[2]] = kv

    def forget_unused(self) -> None:
        """Give up all blocks that no row has, and the memory if no row has any."""
        self._settle()
        while self._unused:
            block, _ = self._unused.popitem()
            self._forget(block)
            self._free.append(block)
        if len(self._free) == len(self._users):
            self.slabs, self._free, self._users, self._found_by = [], [], [], []
            self.addresses = self.addresses[:0]

    def _slab_of(self, block: int) -> Tensor:
        return self.slabs[block // self.per_slab]

    def _forget(self, block: int) -> None:
        beginning = self._found_by[block]
        if beginning is not None:
            del self._known[beginning]
            self._found_by[block] = None

    def _settle(self) -> None:
        while self._released:
            self.release(self._released.popleft())

    def _grow(self) -> None:
        layers, two, kv_heads, slots, size = self._shape
        shape = (layers, two, self.per_slab, kv_heads, slots, size)
        self.slabs.append(torch.zeros(shape, device=self.device, dtype=self.dtype))
        addresses = [slab.data_ptr() for slab in self.slabs]
        self.addresses = torch.tensor(addresses, dtype=torch.int64)
        first = len(self._users)
        self._free += range(first + self.per_slab - 1, first - 1, -1)
        self._users += [0] * self.per_slab
        self._found_by += [None] * self.per_slab


_SLAB_BYTES = 32 << 20
_KEPT_BYTES = 256 << 20
"""For blocks that no row has: with more of them no further memory is taken."""


class BlockCache:
    """What a model remembers of a changing set of rows, in the blocks of a pool.

    Implements `gptk.model.protocol.Cache`. Blocks can be taken away (`drop`): then the rows' tokens
    are read again before the next ones.
    """

    def __init__(self, pool: BlockPool, rows: int) -> None:
        self.pool = pool
        self.lengths = [0] * rows
        """Tokens of each row."""
        self.held = [0] * rows
        """How many of them the row's blocks hold: all, but after `drop`."""
        self._texts: list[array[int]] = [array("q") for _ in range(rows)]
        self._tables: list[array[int]] = [array("i") for _ in range(rows)]

    def __del__(self) -> None:
        for table in self._tables:
            self.pool.release_later(table)

    @property
    def has_blocks(self) -> bool:
        return any(self._tables)

    def unread(self, row: int) -> "array[int]":
        """The tokens of a row that its blocks do not hold."""
        return self._texts[row][self.held[row] :]

    def table(self, row: int) -> "array[int]":
        """The numbers of a row's blocks, int32."""
        return self._tables[row]

    def prepare(self, row: int, count: int, *, beyond: bool = False) -> None:
        """Take what blocks a row needs to hold `count` more tokens, for itself alone.

        Raises OutOfBlocks; what the row holds stays as it is.
        """
        pool, table, held = self.pool, self._tables[row], self.held[row]
        if held % BLOCK and pool.is_shared(table[-1]):
            own = pool.take(beyond=beyond)
            pool.copy(table[-1], held % BLOCK, own)
            pool.release([table[-1]])
            table[-1] = own
        while len(table) * BLOCK < held + count:
            table.append(pool.take(beyond=beyond))

    def advance(self, row: int, tokens: "array[int]") -> None:
        """The row's blocks hold these tokens, too. They follow those held before."""
        held = self.held[row]
        end = held + len(tokens)
        if end > self.lengths[row]:
            text = self._texts[row]
            text += tokens[self.lengths[row] - held :]
            self.lengths[row] = len(text)
        self.held[row] = end
        for number in range(held // BLOCK, end // BLOCK):
            self._know(row, number)

    def recall(self, texts: Sequence[Sequence[int]]) -> None:
        """Begin each row, of which nothing is held yet, with what is known of its text.

        The last token of a text is never among them, so that there is something to read.
        """
        for row, text in enumerate(texts):
            known = self._find(text[:-1])
            if known:
                self.pool.share(known)
                self._tables[row] = array("i", known)
                self._texts[row] = array("q", text[: len(known) * BLOCK])
                self.lengths[row] = self.held[row] = len(known) * BLOCK

    def select(self, parents: Sequence[int]) -> None:
        """Row i becomes a copy of row parents[i]; the number of rows may change."""
        old = self._tables
        for parent in parents:
            self.pool.share(old[parent])
        for table in old:
            self.pool.release(table)
        self._tables = [old[parent][:] for parent in parents]
        self._texts = [self._texts[parent][:] for parent in parents]
        self.lengths = [self.lengths[parent] for parent in parents]
        self.held = [self.held[parent] for parent in parents]

    def rewind(self, counts: Sequence[int]) -> None:
        """Drop the last counts[i] tokens of row i."""
        for row, count in enumerate(counts):
            if count:
                self.shorten(row, self.lengths[row] - count)

    def clear(self) -> None:
        """Drop all tokens of all rows; the rows stay."""
        for row in range(len(self.lengths)):
            self.shorten(row, 0)

    def drop(self) -> None:
        """Give all blocks back, in any thread. The rows keep their tokens, to be read again."""
        for row, table in enumerate(self._tables):
            self.pool.release_later(table)
            self._tables[row] = array("i")
            self.held[row] = 0

    def recover(self, row: int) -> None:
        """After `drop`: take what is still known of the row's text."""
        if not self.held[row]:
            known = self._find(self._texts[row])
            self.pool.share(known)
            self._tables[row] = array("i", known)
            self.held[row] = len(known) * BLOCK

    def shorten(self, row: int, length: int) -> None:
        """Keep the first `length` tokens of a row."""
        self.lengths[row] = length
        self.held[row] = min(self.held[row], length)
        del self._texts[row][length:]
        table, blocks = self._tables[row], -(-self.held[row] // BLOCK)
        self.pool.release(table[blocks:])
        del table[blocks:]

    def _know(self, row: int, number: int) -> None:
        """Let others find a full block; take the one that is known, if it is another."""
        table, pool = self._tables[row], self.pool
        tokens = tuple(self._texts[row][number * BLOCK : (number + 1) * BLOCK])
        before, block = table[number - 1] if number else -1, table[number]
        known = pool.know(block, before, tokens)
        if known != block:
            pool.share([known])
            pool.release([block])
            table[number] = known

    def _find(self, text: Sequence[int]) -> list[int]:
        """The known blocks that a text begins with."""
        blocks: list[int] = []
        for start in range(0, len(text) - BLOCK + 1, BLOCK):
            before = blocks[-1] if blocks else -1
            block = self.pool.find(before, tuple(text[start : start + BLOCK]))
            if block is None:
                break
            blocks.append(block)
        return blocks
