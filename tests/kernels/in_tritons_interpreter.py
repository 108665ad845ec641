"""Triton's attention as its interpreter runs it, on tensors on the CPU.

The interpreter must be chosen before Triton is imported, so test_triton_attention.py runs this file
in a process with TRITON_INTERPRET=1.
"""

import pytest
import torch

import blocks_by_address
from gptk.kernels import BLOCK
from gptk.kernels.gpu import tiling
from gptk.kernels.triton_attention import attend_blocks

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, about padding


class Case:
    """Sequences with their keys and values in blocks, which are in slabs of four, in any order.

    rows: for each sequence how many tokens its blocks hold, and how many are new.
    """

    def __init__(self, rows, d, heads, kv_heads, dtype, few):
        generator = torch.Generator().manual_seed(0)
        self.tiling = tiling(dtype, few=few)
        most = self.tiling.tokens(heads // kv_heads)
        counts = [-(-(past + count) // BLOCK) for past, count in rows]
        numbers = torch.randperm(sum(counts) + 5, generator=generator).tolist()
        shape = (2, 2, 4, kv_heads, BLOCK, d)
        # NaN where nothing was stored: 0 times it is not 0.
        self.slabs = [
            torch.full(shape, torch.nan, dtype=dtype) for _ in range(len(numbers) // 4 + 1)
        ]
        self.addresses = torch.tensor([slab.data_ptr() for slab in self.slabs])
        tokens = sum(count for _, count in rows)
        padding = 3
        self.qkv = torch.randn(tokens + padding, heads + 2 * kv_heads, d, generator=generator).to(
            dtype
        )
        tables, tiles, first = [], [], 0
        for (past, count), blocks in zip(rows, counts, strict=True):
            table = [numbers.pop() for _ in range(blocks)]
            for position in range(past):
                keys, values = blocks_by_address.block_at(
                    self.addresses.tolist(), table[position // BLOCK], self.slabs[0]
                )
                slot = position % BLOCK
                shape = keys[..., slot].shape
                keys[..., slot] = torch.randn(shape, generator=generator).to(dtype)
                values[:, :, slot] = torch.randn(shape, generator=generator).to(dtype)
            for start in range(0, count, most):
                size = min(most, count - start)
                tiles.append((first + start, size, past + start, len(tables)))
            tables += table
            first += count
        self.heads, self.tokens = heads, tokens
        self.tiles = torch.tensor([*tiles, (0, 0, 0, 0)])  # the last is padding
        self.tables = torch.tensor(tables)

    def attend(self, attend_blocks, layer=1):
        return attend_blocks(
            *(self.qkv, self.tiles, self.tables, self.addresses, self.slabs[0]),
            *(layer, self.heads, self.tiling),
        )[: self.tokens]


CASES = {
    "one token of each row": ([(0, 1), (63, 1), (64, 1), (200, 1)], 64, 9, 3, True),
    "few tokens": ([(3, 5), (62, 4)], 16, 4, 1, True),
    "a prompt": ([(0, 70), (10, 1)], 32, 4, 2, False),
    "odd sizes": ([(0, 2), (66, 3)], 24, 6, 2, True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # not bfloat16 in its interpreter
@pytest.mark.parametrize("name", CASES)
def test_it_is_attention_over_blocks(name, dtype):
    """The oracle is attention in float64; what is stored must be equal, bit by bit."""
    *sizes, few = CASES[name]
    ours, theirs = (Case(*sizes, dtype, few) for _ in range(2))
    got, want = (
        ours.attend(attend_blocks),
        theirs.attend(blocks_by_address.attend_blocks),
    )
    error = 1e-5 if dtype == torch.float32 else 3e-3
    torch.testing.assert_close(got, want, rtol=error, atol=error)
    for mine, other in zip(ours.slabs, theirs.slabs, strict=True):
        assert torch.equal(mine.nan_to_num(), other.nan_to_num())
        assert torch.equal(mine.isnan(), other.isnan())


def test_a_row_does_not_depend_on_the_others():
    """To the last bit: the keys of a row are divided by its length alone."""
    rows = [(200, 1), (7, 1), (64, 1)]
    together = Case(rows, 32, 4, 2, torch.float32, True)
    alone = Case(rows, 32, 4, 2, torch.float32, True)
    alone.tiles = alone.tiles[:1]
    got = together.attend(attend_blocks)
    assert torch.equal(got[0], alone.attend(attend_blocks)[0])
