"""Each kernel, compiled for each instruction set, within the same error of float64.

The properties are those of test_kernels.py and test_vocabulary.py, which run in this process with
the instruction set that gptk has chosen.
"""

import pytest
import test_kernels
import test_vocabulary
import torch
from served import INSTRUCTION_SETS, Served, compile_program
from test_kernels import NEEDS_KERNELS, numbers

from gptk import kernels

PROPERTIES = [
    test_kernels.test_products_are_those_with_the_levels,
    test_kernels.test_a_rows_product_does_not_depend_on_other_rows,
    test_kernels.test_packed_weights_are_the_levels,
    test_kernels.test_small_operations,
    test_kernels.test_gelu_and_its_gradient,
    test_kernels.test_gelu_of_extreme_numbers,
    test_kernels.test_products_of_matrices,
    test_kernels.test_column_sums,
    test_kernels.test_cross_entropy_and_its_gradient,
    test_kernels.test_attention_over_a_cache,
    test_kernels.test_causal_attention,
    test_kernels.test_gradients_of_causal_attention,
    test_vocabulary.test_sums_are_those_of_float64,
    test_vocabulary.test_the_largest_are_found,
]
SETS = [
    name if name == "avx2" else pytest.param(name, marks=pytest.mark.slow)
    for name in INSTRUCTION_SETS
]
pytestmark = NEEDS_KERNELS


@pytest.fixture(scope="module")
def served(request, tmp_path_factory):
    process = Served(compile_program(request.param, tmp_path_factory.mktemp("served")))
    yield process
    process.close()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("served", SETS, indirect=True)
@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda test: test.__name__[5:])
def test_what_holds_with_each_instruction_set(served, holds):
    with served.in_use():
        holds()


@pytest.mark.parametrize("served", SETS, indirect=True)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e37, 1e-37, 0.0])
def test_extreme_numbers(served, value):
    with served.in_use():
        test_kernels.test_extreme_numbers(value)


@pytest.mark.parametrize("served", SETS, indirect=True)
@pytest.mark.parametrize("bits", [4, 8])
def test_results_are_the_same_bit_for_bit(served, bits):
    """Sums have one order on every processor. Products of pairs of bfloat16 numbers, which
    AVX-512 BF16 sums in another order, are not among these."""
    x = 3 * numbers(bits, 5, 96)
    weights = test_kernels.Levels(
        torch.randint(2**bits, (37, 96), generator=torch.Generator().manual_seed(bits)).byte(),
        numbers(1, 37, 3).half().float(),
        numbers(2, 37, 3).half().float(),
        bits,
    )
    q, k, v = (numbers(seed, 2, 70, 2, 64) for seed in range(3))

    def results():
        packed = test_kernels.KernelGroups(weights)
        for dtype in (torch.float32, torch.bfloat16):
            yield packed.linear(x.to(dtype), None)
            yield kernels.gelu(x.to(dtype))
            yield kernels.rms_norm(x.to(dtype), x[0].to(dtype), 1e-5)
        yield test_kernels.attend_causally(q, k, v)
        yield kernels.softmax_sums(x)[1]

    here = list(results())
    with served.in_use():
        there = list(results())
    for ours, theirs in zip(here, there, strict=True):
        assert torch.equal(ours, theirs)
