"""Quantized matrices in the blocks of a GGUF file: the weights that the package gguf reads."""

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptk import kernels
from gptk.model.levels import GROUP, Levels
from gptk.model.quantization import KernelGroups, pack
from gptk.model.segments import Segments
from stored_blocks import FORMATS, random_blocks

WITH_CODES = ["Q4_0", "Q4_1", "Q8_0"]
NEEDS_KERNELS = pytest.mark.skipif(not kernels.available(), reason="gptk's kernels do not run here")


def oracle(blocks, format):
    """The weights, by the package gguf."""
    kind = gguf.GGMLQuantizationType[format]
    rows = blocks.reshape(len(blocks), -1).numpy()
    return torch.from_numpy(gguf.quants.dequantize(rows, kind))


@st.composite
def matrices(draw):
    """Levels in blocks, with rows selected and stacked in any way, and their weights."""
    several = st.lists(st.sampled_from(FORMATS), min_size=1, max_size=3)
    formats = draw(st.one_of(several, st.sampled_from(FORMATS).map(lambda format: [format] * 3)))
    inputs = draw(st.sampled_from([256, 512]))
    if all(kernels.FORMATS[format].unit == 32 for format in formats):
        inputs = draw(st.sampled_from([32, 96]))
    parts, weights = [], []
    for format in formats:
        count = inputs // kernels.FORMATS[format].unit
        blocks = random_blocks(format, draw(st.integers(1, 40)), count, draw(st.integers(0, 999)))
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
    assert levels.equals(levels[:])
    if levels.has_codes and len(levels.segments) == 1:
        copied = Levels(levels.codes, levels.scale, levels.offset, levels.bits)
        assert torch.equal(copied.dense(), levels.dense())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.usefixtures("both_kernels")
def test_expanded_weights_are_those_of_gguf_bit_for_bit(format):
    """With the kernels and without."""
    blocks = random_blocks(format, 37, 3, 5)
    levels = Levels.from_blocks(blocks, format)
    assert torch.equal(levels.dense(), oracle(blocks, format))
    assert levels.nbytes == blocks.nbytes
    bfloat16 = oracle(blocks, format).bfloat16()
    # Some processors have 0 for bfloat16 numbers below 2⁻¹²⁶.
    torch.testing.assert_close(levels.dense(torch.bfloat16), bfloat16, rtol=0, atol=2**-126)


@NEEDS_KERNELS
@settings(max_examples=150)
@given(matrices(), st.integers(1, 9), st.integers(0, 999))
def test_products_are_those_of_ggufs_weights(matrix, rows, seed):
    levels, want = matrix
    if not Segments.of(levels).can_be_packed or not levels.shape[0]:
        return
    packed = KernelGroups(levels)
    assert packed.packs(levels)
    assert torch.equal(packed.dense(torch.float32), levels.dense())
    x = torch.randn(rows, want.shape[1], generator=torch.Generator().manual_seed(seed))
    bias = torch.randn(len(want), generator=torch.Generator().manual_seed(seed))
    got, exact = packed.linear(x, bias), x.double() @ want.double().T + bias
    # Relative to what is summed, as a sum itself may be near 0; x is rounded to 2⁻²² of the largest
    # number of a group.
    groups = x.double().abs().view(rows, -1, GROUP)
    largest = groups.amax(2, keepdim=True).expand_as(groups).flatten(1)
    assert ((got - exact).abs() <= 1e-5 * (largest @ want.double().abs().T + bias.abs())).all()
    for row in range(rows):
        assert torch.equal(packed.linear(x[row : row + 1], bias)[0], got[row])


@NEEDS_KERNELS
@pytest.mark.parametrize("format", FORMATS)
def test_products_are_as_exact_as_float32(format):
    blocks = random_blocks(format, 160, 4, 1)
    weight = oracle(blocks, format)
    if format == "MXFP4":
        blocks[:, :, 0] = 120
        weight = oracle(blocks, format)
    x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(0))
    want = x.double() @ weight.double().T
    got = KernelGroups(Levels.from_blocks(blocks, format)).linear(x, None)
    assert (got - want).norm() < 1e-6 * want.norm()


@NEEDS_KERNELS
@pytest.mark.parametrize("format", FORMATS)
def test_rows_are_looked_up(format):
    blocks = random_blocks(format, 37, 2, 2)
    packed = KernelGroups(Levels.from_blocks(blocks, format))
    wanted = torch.tensor([36, 0, 17, 0])
    assert torch.equal(packed.rows(wanted, torch.float32), oracle(blocks, format)[wanted])


@pytest.mark.parametrize("format", WITH_CODES)
@pytest.mark.usefixtures("both_kernels")
def test_blocks_are_packed_for_every_kernel(format):
    levels = Levels.from_blocks(random_blocks(format, 70, 3, 0), format)
    copied = Levels(levels.codes, levels.scale, levels.offset, levels.bits)
    assert torch.equal(pack(levels).dense(torch.float32), pack(copied).dense(torch.float32))


@NEEDS_KERNELS
def test_memory_is_hardly_more_than_the_files():
    for format in FORMATS:
        levels = Levels.from_blocks(random_blocks(format, 32, 4, 0), format)
        assert levels.nbytes <= KernelGroups(levels).nbytes <= 1.04 * levels.nbytes, format


def test_matrices_in_different_formats_are_stacked():
    parts = [
        Levels.from_blocks(random_blocks(format, 20, 2, 0), format) for format in ("Q4_0", "Q4_1")
    ]
    want = torch.cat([part.dense() for part in parts])
    stacked = Levels.stack(parts)
    assert stacked.has_codes
    assert torch.equal(stacked.dense(), want)
    other = Levels.from_blocks(random_blocks("Q4_0", 20, 3, 0), "Q4_0")
    with pytest.raises(RuntimeError, match="different inputs"):
        Levels.stack([parts[0], other])


@pytest.mark.parametrize(
    ("blocks", "format"),
    [
        (torch.zeros(2, 3, 18), "Q4_0"),
        (torch.zeros(2, 3, 18, dtype=torch.uint8), "Q4_1"),
        (torch.zeros(2, 18, dtype=torch.uint8), "Q4_0"),
        (torch.zeros(2, 3, 22, dtype=torch.uint8), "Q5_1"),
        (torch.zeros(2, 3, 36, dtype=torch.uint8), "Q8_OFFSET"),
        (torch.zeros(2, 3, 74, dtype=torch.uint8), "IQ2_XS"),
    ],
)
def test_other_blocks_are_refused(blocks, format):
    with pytest.raises(ValueError, match=f"not the blocks of a matrix in {format}"):
        Levels.from_blocks(blocks, format)
