"""Each kernel, compiled for each instruction set, within the same error of float64.

The properties are those of test_kernels.py and test_vocabulary.py, which run in this process with
the instruction set that gptk has chosen.
"""

import ctypes
import math

import pytest
import test_kernels
import test_vocabulary
import torch
import torch.nn.functional as F
from served import NAMES, Served, compile_program
from test_kernels import NEEDS_KERNELS, numbers

from gptk import kernels
from gptk.kernels.signatures import KERNELS
from stored_blocks import FORMATS, random_blocks

PROPERTIES = [
    test_kernels.test_products_are_those_with_the_levels,
    test_kernels.test_a_rows_product_does_not_depend_on_other_rows,
    test_kernels.test_packed_weights_are_the_levels,
    test_kernels.test_products_with_plain_weights,
    test_kernels.test_products_with_weights_in_panels,
    test_kernels.test_layer_norm,
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
SLOW_SETS = [pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
SETS = [name if name == "avx2" else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
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


@pytest.mark.parametrize("served", SLOW_SETS, indirect=True)
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


@pytest.mark.parametrize("served", SETS, indirect=True)
@pytest.mark.parametrize("format", FORMATS)
def test_products_of_every_format_are_the_same_bit_for_bit(served, format):
    """Laid out there, too, from the blocks of a file; of one row, and of several."""
    blocks = random_blocks(format, 37, 2, 3)
    levels = test_kernels.Levels.from_blocks(blocks, format)
    number, unit = levels.format.number, levels.format.unit
    x = 3 * numbers(1, 7, 2 * unit)
    x[:, 5] *= 100

    def results(packed):
        yield packed.dense(torch.float32)
        yield packed.rows(torch.tensor([36, 0, 17]), torch.float32)
        for dtype in (torch.float32, torch.bfloat16):
            yield packed.linear(x.to(dtype), None)
            yield packed.linear(x[:1].to(dtype), None)

    packed = test_kernels.KernelGroups(levels)
    here = list(results(packed))
    with served.in_use():
        there = list(results(packed))
        weights = torch.zeros_like(packed.weights)
        types = [ctypes.c_int64, ctypes.c_void_p] * 2 + [ctypes.c_int64] * 2
        row = blocks[0].nbytes
        pack = served.function("pack_rows", types)
        assert pack(number, blocks.data_ptr(), row, weights.data_ptr(), 37, 2 * unit) == 0
    assert torch.equal(weights, packed.weights)
    for ours, theirs in zip(here, there, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("served", SETS, indirect=True)
def test_the_process_gets_no_more_than_a_tensors_bytes(served):
    """Not those of one that began there earlier, and was given to a kernel with no work."""
    memory = torch.ones(100)
    address = memory.data_ptr()
    with served.in_use():
        kernels.layer_norm(torch.ones(0, 100), memory, None, 1e-5)
        kernels.layer_norm(torch.ones(1, 10), memory[:10], None, 1e-5)
        assert served._bytes_at[address] == 10 * memory.element_size()


@pytest.mark.parametrize("served", SETS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "window"), [(32, 0), (96, 3), (256, 0), (256, 66)])
def test_attention_to_keys_and_values_in_blocks(served, dtype, head_dim, window):
    """70 tokens of one text, then one more, and another text of three tokens beside it."""
    heads, kv_heads, texts = 4, 2, (71, 3)
    parts = [
        numbers(seed, count, heads + 2 * kv_heads, head_dim, dtype=dtype)
        for seed, count in enumerate(texts)
    ]
    slab = torch.full((1, 2, 4, kv_heads, 64, head_dim), math.nan, dtype=dtype)
    tables = torch.tensor([2, 0, 3], dtype=torch.int32)  # two blocks of the first text, and one

    def attend(qkv, sequences):
        y = qkv.new_empty(len(qkv), heads, head_dim)
        sequences = torch.tensor(sequences)
        half = slab.numel() // 2
        types = next(kernel.ctypes for kernel in KERNELS if kernel.name == "attend_blocks")
        status = served.function("attend_blocks_in_slab", types)(
            *(dtype is torch.bfloat16, qkv.data_ptr(), y.data_ptr(), sequences.data_ptr()),
            *(tables.data_ptr(), slab.data_ptr(), len(qkv), len(sequences), len(tables)),
            *(1, 2, heads, kv_heads, head_dim, 0, half, window),
        )
        assert status == 0
        return y

    with served.in_use():
        first = attend(parts[0][:70].contiguous(), [[0, 70, 0, 0]])
        both = attend(torch.cat([parts[0][70:], parts[1]]), [[0, 1, 70, 0], [1, 3, 0, 2]])
    for got, qkv in zip((torch.cat([first, both[:1]]), both[1:]), parts, strict=True):
        q, k, v = qkv.double().transpose(0, 1).split((heads, kv_heads, kv_heads))
        seen = torch.ones(len(qkv), len(qkv), dtype=torch.bool).tril()
        if window:
            seen &= seen.new_ones(seen.shape).triu(1 - window)
        want = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        # In bfloat16 the weights of the sum are rounded, too.
        error = 2e-6 if dtype == torch.float32 else 2**-8
        test_kernels.close(got, want.transpose(0, 1), error)
