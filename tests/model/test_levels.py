"""The levels of a quantized matrix: what is refused, and what is computed."""

import dataclasses

import pytest
import torch

from gptk.model.levels import Levels
from gptk.model.quantization import pack

pytestmark = pytest.mark.usefixtures("either_kernels")

CODES = torch.arange(20 * 64, dtype=torch.uint8).view(20, 64) % 16
SCALE = torch.linspace(-1, 1, 40).view(20, 2)
OFFSET = torch.linspace(-9, 3, 40).view(20, 2)
GOOD = Levels(CODES, SCALE, OFFSET, 4)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"scale": SCALE.half()}, "the scale is float32, not torch.float16"),
        ({"offset": OFFSET.double()}, "the offset is float32, not torch.float64"),
        ({"scale": torch.ones(40, 2)}, r"the scale is \(20, 2\) on cpu, not \(40, 2\) on cpu"),
        ({"offset": torch.ones(20, 1)}, r"the offset is \(20, 2\) on cpu, not \(20, 1\)"),
        ({"offset": torch.ones(40)}, r"the offset is \(20, 2\) on cpu, not \(40,\)"),
        ({"scale": SCALE.to("meta")}, r"the scale is \(20, 2\) on cpu, not \(20, 2\) on meta"),
        ({"codes": CODES.int()}, "codes are uint8, not torch.int32"),
        ({"codes": CODES[:, :40]}, r"codes are \(outputs, groups · 32\), not \(20, 40\)"),
        ({"codes": CODES.flatten()}, r"codes are .*, not \(1280,\)"),
        ({"codes": CODES[0, 0]}, r"codes are .*, not \(\)"),
        ({"bits": 5}, "bits are 4 or 8, not 5"),
    ],
)
def test_levels_that_do_not_fit_are_refused(changes, problem):
    with pytest.raises(ValueError, match=f"^not the levels of a quantized matrix: {problem}"):
        dataclasses.replace(GOOD, **changes)


def test_levels_with_gaps_in_memory_are_the_same_weights():
    want = CODES.double() * SCALE.double().repeat_interleave(32, 1)
    want += OFFSET.double().repeat_interleave(32, 1)
    spread = [torch.stack((x, x), dim=-1)[..., 0] for x in (CODES, SCALE, OFFSET)]
    assert not any(x.is_contiguous() for x in spread)
    for levels in (GOOD, Levels(*spread, 4)):
        torch.testing.assert_close(levels.dense().double(), want)
        torch.testing.assert_close(levels.dense(torch.float64), want)
        packed, good = pack(levels), pack(GOOD)
        assert torch.equal(packed.dense(torch.float32), good.dense(torch.float32))


def test_weights_are_written_only_where_they_fit():
    for out in (torch.empty(20, 32), torch.empty(64, 20).T):
        with pytest.raises(ValueError, match=r"weights \(20, 64\) into"):
            GOOD.dense(out=out)


def test_codes_beyond_their_bits_are_refused(either_kernels):
    from gptk import kernels

    if not kernels.available():
        pytest.skip("PyTorch's kernels take the low bits")
    with pytest.raises(ValueError, match="a code has no more than `bits` bits"):
        pack(dataclasses.replace(GOOD, codes=CODES + 1))


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0, 0)])
def test_a_matrix_of_nothing(shape):
    groups = torch.ones(shape[0], shape[1] // 32)
    levels = Levels(torch.ones(shape, dtype=torch.uint8), groups, groups, 8)
    assert levels.dense().shape == shape
