"""Quantized matrices in the blocks of a GGUF file: the weights that the package gguf reads."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptk import kernels
from gptk.model.levels import Levels
from gptk.model.quantization import KernelGroups, pack

FORMATS = sorted(kernels.BLOCK_BYTES)


def random_blocks(format, outputs, groups, seed):
    """Blocks with any codes, and scales and offsets that are any finite float16."""
    numbers = np.random.default_rng(seed)
    size = kernels.BLOCK_BYTES[format]
    blocks = numbers.integers(0, 256, (outputs, groups, size), dtype=np.uint8)
    halves = numbers.integers(0, 2**16, (outputs, groups, 2), dtype=np.uint16)
    halves &= np.uint16(0xBFFF)  # below 2: so that all weights are finite in float16, too
    count = 2 if format == "Q4_1" else 1
    blocks[:, :, : 2 * count] = halves[:, :, :count].copy().view(np.uint8)
    return torch.from_numpy(blocks)


def oracle(blocks, format):
    """The weights, by the package gguf."""
    kind = gguf.GGMLQuantizationType[format]
    rows = blocks.reshape(len(blocks), -1).numpy()
    return torch.from_numpy(gguf.quants.dequantize(rows, kind))


@st.composite
def matrices(draw):
    """Levels in blocks, with rows selected and stacked in any way, and their weights."""
    format, groups = draw(st.sampled_from(FORMATS)), draw(st.integers(1, 4))
    parts, weights = [], []
    for _ in range(draw(st.integers(1, 3))):
        blocks = random_blocks(format, draw(st.integers(1, 40)), groups, draw(st.integers(0, 999)))
        rows = draw(
            st.one_of(
                st.lists(st.integers(0, len(blocks) - 1), min_size=1, max_size=50).map(
                    torch.tensor
                ),
                st.builds(slice, st.integers(0, 20), st.integers(-3, 40)),
                st.just(slice(None, None, -1)),
            )
        )
        if isinstance(rows, slice) and rows.step == -1:
            rows = torch.arange(len(blocks)).flip(0)
        parts.append(Levels.from_blocks(blocks, format)[rows])
        weights.append(oracle(blocks, format)[rows])
    stacked = Levels.stack(parts)
    rows = draw(
        st.one_of(st.just(slice(None)), st.builds(slice, st.integers(0, 40), st.just(None)))
    )
    return stacked[rows], torch.cat(weights)[rows]


@given(matrices())
def test_weights_are_those_that_gguf_reads(matrix):
    levels, want = matrix
    assert levels.shape == want.shape
    torch.testing.assert_close(levels.dense(), want, rtol=1e-6, atol=0)
    copied = Levels(levels.codes, levels.scale, levels.offset, levels.bits)
    assert torch.equal(copied.dense(), levels.dense())
    assert levels.nbytes == copied.nbytes


@pytest.mark.skipif(not kernels.available(), reason="gptk's kernels do not run here")
@given(matrices())
def test_packing_from_blocks_is_packing_their_codes(matrix):
    levels, _ = matrix
    copied = Levels(levels.codes, levels.scale, levels.offset, levels.bits)
    assert torch.equal(KernelGroups(levels).weights, KernelGroups(copied).weights)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.usefixtures("either_kernels")
def test_blocks_are_packed_for_every_kernel(format):
    levels = Levels.from_blocks(random_blocks(format, 70, 3, 0), format)
    copied = Levels(levels.codes, levels.scale, levels.offset, levels.bits)
    assert torch.equal(pack(levels).dense(torch.float32), pack(copied).dense(torch.float32))


def test_matrices_in_different_formats_are_stacked():
    parts = [
        Levels.from_blocks(random_blocks(format, 20, 2, 0), format) for format in ("Q4_0", "Q4_1")
    ]
    want = torch.cat([part.dense() for part in parts])
    assert torch.equal(Levels.stack(parts).dense(), want)
    other = Levels.from_blocks(random_blocks("Q4_0", 20, 3, 0), "Q4_0")
    with pytest.raises(RuntimeError, match="different inputs"):
        Levels.stack([parts[0], other])


@pytest.mark.parametrize(
    ("blocks", "format"),
    [
        (torch.zeros(2, 3, 18), "Q4_0"),
        (torch.zeros(2, 3, 18, dtype=torch.uint8), "Q4_1"),
        (torch.zeros(2, 18, dtype=torch.uint8), "Q4_0"),
        (torch.zeros(2, 3, 22, dtype=torch.uint8), "Q5_0"),
    ],
)
def test_other_blocks_are_refused(blocks, format):
    with pytest.raises(ValueError, match=f"not the blocks of a matrix in {format}"):
        Levels.from_blocks(blocks, format)
