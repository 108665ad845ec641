"""Keys and values in blocks of 64 tokens, which rows take as they grow and share while equal.

A block has the keys and values of 64 consecutive tokens of a text, of all layers. A row has a list
of blocks. Rows that begin alike, such as beams, or texts with the same instructions before them,
list the same blocks; who writes into one that others have, too, takes a copy first. So forking,
reordering and pruning rows copies lists, and memory grows with what there is to remember. (Blocks:
vLLM, Kwon et al. 2023.)

    row 0    block 4, block 7, block 9        the prompt, shared; then its own
    row 1    block 4, block 7, block 2

Of a model whose layers all have a sliding window, a row gives back the blocks before it; beneath
them some are kept, so that tokens can be dropped. If more are dropped, the row is read again.

Full blocks stay after their rows have ended, until memory is needed: a text that begins alike takes
them as they are. The one not used for the longest time is given up first. The models of a process
share a budget of memory, see gptk.model.budget.
"""

from array import array
from collections.abc import Sequence

from gptk.kernels import BLOCK
from gptk.model.pool import BlockPool


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
            self.pool.release_later(_held_in(table))

    @property
    def has_blocks(self) -> bool:
        return any(self._tables)

    def unread(self, row: int) -> "array[int]":
        """The tokens of a row that its blocks do not hold."""
        return self._texts[row][self.held[row] :]

    def table(self, row: int) -> "array[int]":
        """The numbers of a row's blocks, int32; -1 for those before the window."""
        return self._tables[row]

    def prepare(self, row: int, count: int, *, beyond: bool = False) -> None:
        """Take what blocks a row needs to hold `count` more tokens, for itself alone.

        Raises OutOfBlocks; what the row holds stays as it is.
        """
        pool, table, held = self.pool, self._tables[row], self.held[row]
        if held % BLOCK and pool.is_shared(table[-1]):
            own = pool.take(beyond=beyond)
            pool.copy(table[-1], own)
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
        self._leave_behind(row)

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
                self._leave_behind(row)

    def select(self, parents: Sequence[int]) -> None:
        """Row i becomes a copy of row parents[i]; the number of rows may change."""
        old = self._tables
        for parent in parents:
            self.pool.share(_held_in(old[parent]))
        for table in old:
            self.pool.release(_held_in(table))
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
            self.pool.release_later(_held_in(table))
            self._tables[row] = array("i")
            self.held[row] = 0

    def move(self, pool: BlockPool) -> None:
        """Use this pool from now on, as after the model was converted."""
        if pool is not self.pool:
            self.drop()
            self.pool = pool

    def recover(self, row: int) -> None:
        """After `drop`: take what is still known of the row's text."""
        if not self.held[row]:
            known = self._find(self._texts[row])
            self.pool.share(known)
            self._tables[row] = array("i", known)
            self.held[row] = len(known) * BLOCK
            self._leave_behind(row)

    def shorten(self, row: int, length: int) -> None:
        """Keep the first `length` tokens of a row."""
        self.lengths[row] = length
        self.held[row] = min(self.held[row], length)
        del self._texts[row][length:]
        table, blocks = self._tables[row], -(-self.held[row] // BLOCK)
        first = self._first_needed(self.held[row])
        if first < len(table) and table[first] < 0:  # what the next token sees was given back
            self.held[row] = blocks = 0
        self.pool.release(_held_in(table[blocks:]))
        del table[blocks:]

    def _first_needed(self, held: int) -> int:
        """The first block that the token after the first `held` ones sees."""
        window = self.pool.window
        return 0 if window is None else max(0, held + 1 - window) // BLOCK

    def _leave_behind(self, row: int) -> None:
        """Give the blocks back that are far enough before the window."""
        table = self._tables[row]
        for number in reversed(range(self._first_needed(self.held[row] - SPARE))):
            if table[number] < 0:
                break
            self.pool.release([table[number]])
            table[number] = -1

    def _know(self, row: int, number: int) -> None:
        """Let others find a full block; take the one that is known, if it is another."""
        table, pool = self._tables[row], self.pool
        tokens = tuple(self._texts[row][number * BLOCK : (number + 1) * BLOCK])
        before, block = table[number - 1] if number else None, table[number]
        known = pool.know(block, before, tokens)
        if known != block:
            pool.share([known])
            pool.release([block])
            table[number] = known

    def _find(self, text: Sequence[int]) -> list[int]:
        """The known blocks that a text begins with."""
        blocks: list[int] = []
        for start in range(0, len(text) - BLOCK + 1, BLOCK):
            before = blocks[-1] if blocks else None
            block = self.pool.find(before, tuple(text[start : start + BLOCK]))
            if block is None:
                break
            blocks.append(block)
        return blocks


def _held_in(table: "array[int]") -> "array[int]":
    """Those of a table's blocks that were not given back."""
    return table if not table or table[0] >= 0 else array("i", [x for x in table if x >= 0])


SPARE = 4 * BLOCK
"""Tokens before the window that are kept: that many can be dropped at the end, as drafts are."""
