"""No arguments crash the process: each is computed right, or refused with an exception."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from gptk import kernels
from gptk.kernels import attention
from gptk.model.linear import Linear

NEEDS_KERNELS = pytest.mark.skipif(
    not kernels.available(), reason=f"gptk's kernels do not run here: {kernels.why_not()}"
)
NEEDS_PRODUCTS = pytest.mark.skipif(
    not kernels.should_run_product(torch.ones(1)), reason="needs AVX512-BF16, and no AMX"
)
pytestmark = NEEDS_KERNELS
BFLOAT16 = torch.bfloat16


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@NEEDS_PRODUCTS
@pytest.mark.parametrize("shape", [(0, 1024), (0, 3, 1024), (2, 0, 1024), (1024,), (1, 1024)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_under_autocast_takes_any_rows(shape, bias):
    """0 rows are a product with a depth of 0 in the backward pass, which divided by 0."""
    gradients = []
    for enabled in (True, False):
        torch.manual_seed(0)
        layer, x = Linear(1024, 520, bias=bias), torch.randn(shape).requires_grad_()
        with (
            pytest.MonkeyPatch.context() as patch,
            torch.enable_grad(),
            torch.autocast("cpu", dtype=BFLOAT16),
        ):
            patch.setattr(kernels.checks, "enabled", enabled)
            y = layer(x)
            y.float().sum().backward()
        gradients.append([y, x.grad, *(p.grad for p in layer.parameters())])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=1e-2)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("bias", [None, torch.arange(50.0)])
def test_a_product_without_depth_is_the_bias(add, bias):
    y = torch.ones(7, 50)
    kernels.product(torch.ones(7, 0, dtype=BFLOAT16), torch.ones(0, 50), y, bias, add=add)
    want = torch.full((7, 50), float(add)) + (0 if bias is None else bias)
    assert torch.equal(y, want)


def test_one_product_of_large_depth_is_exact_enough():
    """The bound is that of a sum, Σ|a||b|; relative to the result itself, which nearly cancels, the
    error is larger. These are the numbers of a case that test_products_of_matrices has drawn."""
    rows, columns, depth, seed = 1, 1, 1594, 101
    a, b = (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)).to(BFLOAT16)
        for i, shape in enumerate([(rows, depth), (depth, columns)])
    )
    y = torch.empty(rows, columns)
    kernels.product(a, b, y)
    error = (y.double() - a.double() @ b.double()).abs()
    assert (error <= 2e-6 * (a.double().abs() @ b.double().abs())).all()


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
def test_without_inputs_a_linear_layer_gives_its_bias(dtype):
    bias = torch.arange(20.0).to(dtype)
    for shape in ((3, 0), (0, 0), (2, 3, 0)):
        x, weight = torch.ones(shape, dtype=dtype), torch.ones(20, 0, dtype=dtype)
        for b in (bias, None):
            want = F.linear(x, weight, b)
            assert torch.equal(kernels.linear(x, weight, b), want)
            weights = torch.empty(0, dtype=torch.uint8)
            got = kernels.quantized_linear(x.flatten(0, -2), weights, b, Q4_1, 20)
            assert torch.equal(got, want.flatten(0, -2))


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
def test_what_is_empty_stays_empty(dtype):
    def empty(*shape):
        return torch.ones(shape, dtype=dtype)

    assert kernels.rms_norm(empty(0, 32), empty(32), 1e-5).shape == (0, 32)
    assert kernels.rms_norm(empty(4, 0), empty(0), 1e-5).shape == (4, 0)
    assert kernels.swiglu(empty(0, 64)).shape == (0, 32)
    assert kernels.swiglu(empty(3, 0)).shape == (3, 0)
    assert kernels.gelu(empty(0)).shape == (0,)
    assert kernels.rotate(empty(2, 0, 3, 64), *2 * [empty(1, 0, 3, 64)]).shape == (2, 0, 3, 64)
    assert kernels.rotate(empty(0, 2, 3, 64), *2 * [empty(1, 2, 3, 64)]).shape == (0, 2, 3, 64)
    assert kernels.linear(empty(0, 32), empty(7, 32), None).shape == (0, 7)
    assert kernels.linear(empty(3, 32), empty(0, 32), None).shape == (3, 0)
    assert torch.equal(kernels.column_sums(empty(0, 5)), torch.zeros(5))
    assert kernels.column_sums(empty(5, 0)).shape == (0,)
    assert kernels.cross_entropy(empty(0, 5), torch.ones(0, dtype=torch.int64), 1.0).shape == (0,)
    assert kernels.attend_causally(empty(2, 0, 4, 32), *2 * [empty(2, 0, 2, 32)]).numel() == 0
    assert kernels.attend_causally(empty(0, 3, 4, 32), *2 * [empty(0, 3, 2, 32)]).numel() == 0
    few = kernels.attend(empty(0, 4, 32), *2 * [empty(2, 1, 5, 32)], None, 1)
    assert few.shape == (0, 4, 32)


def test_gradients_of_nothing_are_nothing():
    q, k = torch.ones(2, 0, 4, 32, dtype=BFLOAT16), torch.ones(2, 0, 2, 32, dtype=BFLOAT16)
    y, logsums = attention.causal_attention(q, k, k)
    dq, dk, dv = attention.causal_attention_backward(q, k, k, y, logsums, y)
    assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, k.shape)


def test_a_vocabulary_of_nothing():
    x, rows = torch.ones(0, 9), torch.ones(3, 0)
    assert all(part.shape == (0, 1) for part in kernels.softmax_sums(x))
    highest, weight, weighted = kernels.softmax_sums(rows)
    assert highest.isneginf().all()
    assert not weight.any()
    assert not weighted.any()
    assert kernels.last_key(x, x, 0.5).shape == (0, 1)
    assert kernels.last_key(rows, rows, 0.5).isneginf().all()
    assert kernels.keep_from(rows, torch.ones(3, 1), rows).shape == (3, 0)
    assert kernels.top(torch.ones(2, 4), 0)[1].shape == (2, 0)
    assert kernels.permutation(0, 1, 0).shape == (0,)
    keys, tokens = torch.ones(0, 2, dtype=torch.int32), torch.ones(0, dtype=torch.int32)
    assert kernels.exponential(keys, tokens).shape == (0,)
    assert kernels.draw(x, torch.ones(1, 2, dtype=torch.int32))[0].shape == (0,)


def f32(*shape):
    return torch.ones(shape)


def ints(*shape, dtype=torch.int32):
    return torch.zeros(shape, dtype=dtype)


Q4_0, Q4_1, Q8_OFFSET = (kernels.FORMATS[name] for name in ("Q4_0", "Q4_1", "Q8_OFFSET"))
PACKED = torch.zeros(kernels.packed_bytes(Q4_1.number, 20, 64), dtype=torch.uint8)
BLOCKS = kernels.StoredRows(torch.zeros(20, 2, 18, dtype=torch.uint8))
CODES, SCALE = torch.zeros(20, 64, dtype=torch.uint8), torch.ones(20, 2)
REFUSED = {
    "a size that is no multiple": lambda: kernels.rms_norm(f32(2, 20), f32(20), 1e-5),
    "a weight of another size": lambda: kernels.rms_norm(f32(2, 32), f32(16), 1e-5),
    "float64": lambda: kernels.rms_norm(f32(2, 32).double(), f32(32).double(), 1e-5),
    "two dtypes": lambda: kernels.rms_norm(f32(2, 32), f32(32).bfloat16(), 1e-5),
    "another device": lambda: kernels.rms_norm(f32(2, 32).to("meta"), f32(32), 1e-5),
    "a weight on another device": lambda: kernels.rms_norm(f32(2, 32), f32(32).to("meta"), 1e-5),
    "an odd gate": lambda: kernels.swiglu(f32(2, 48)),
    "an integer": lambda: kernels.gelu(ints(4)),
    "a gradient of another shape": lambda: kernels.layers.gelu_or_gradient(f32(4), f32(3)),
    "angles of other rows": lambda: kernels.rotate(f32(3, 2, 4, 64), *2 * [f32(2, 2, 4, 64)]),
    "no angles": lambda: kernels.rotate(f32(3, 2, 4, 64), *2 * [f32(0, 2, 4, 64)]),
    "inputs of another size": lambda: kernels.linear(f32(2, 64), f32(5, 32), None),
    "a bias of another size": lambda: kernels.linear(f32(2, 32), f32(5, 32), f32(4)),
    "a bias of another dtype": lambda: kernels.linear(f32(2, 32), f32(5, 32), f32(5).half()),
    "x beyond the weights": lambda: kernels.quantized_linear(f32(2, 96), PACKED, None, Q4_1, 20),
    "more outputs": lambda: kernels.quantized_linear(f32(2, 64), PACKED, None, Q4_1, 40),
    "negative outputs": lambda: kernels.quantized_linear(f32(2, 64), PACKED, None, Q4_1, -20),
    "another format": lambda: kernels.quantized_linear(f32(2, 64), PACKED, None, Q4_0, 20),
    "no format": lambda: kernels.quantized_linear(
        f32(2, 64), PACKED, None, dataclasses.replace(Q4_1, number=14), 20
    ),
    "weights that are cut": lambda: kernels.quantized_linear(
        f32(2, 64), PACKED[9:], None, Q4_1, 20
    ),
    "a short bias": lambda: kernels.quantized_linear(f32(2, 64), PACKED, f32(3), Q4_1, 20),
    "float16 scales": lambda: kernels.pack(CODES, SCALE.half(), SCALE, 4, PACKED.clone()),
    "too few scales": lambda: kernels.pack(CODES, SCALE[:9], SCALE, 4, PACKED.clone()),
    "too many scales": lambda: kernels.pack(CODES, f32(40, 2), f32(40, 2), 4, PACKED.clone()),
    "too many codes": lambda: kernels.pack(CODES, SCALE, SCALE, 8, PACKED.clone()),
    "codes of 5 bits": lambda: kernels.pack(CODES + 16, SCALE, SCALE, 4, PACKED.clone()),
    "blocks of another size": lambda: kernels.pack_stored([BLOCKS], Q4_1, PACKED.clone()),
    "a format of no file": lambda: kernels.pack_stored([BLOCKS], Q8_OFFSET, PACKED.clone()),
    "no blocks": lambda: kernels.pack_stored([], Q4_0, PACKED.clone()),
    "too many blocks": lambda: kernels.pack_stored([BLOCKS] * 2, Q4_0, PACKED.clone()),
    "an order in int32": lambda: kernels.pack_stored(
        [BLOCKS._replace(order=ints(20))], Q4_0, PACKED.clone()
    ),
    "a short result": lambda: kernels.dequantize(CODES, SCALE, SCALE, f32(20, 32)),
    "a result in stripes": lambda: kernels.dequantize(CODES, SCALE, SCALE, f32(64, 20).T),
    "a result in float16": lambda: kernels.dequantize_packed(PACKED, Q4_1, 20, 64, torch.float16),
    "other inputs": lambda: kernels.dequantize_packed(PACKED, Q4_1, 20, 96, torch.float32),
    "an output that there is not": lambda: kernels.dequantize_rows(
        PACKED, Q4_1, 20, 64, torch.tensor([0, 20]), torch.float32
    ),
    "a negative output": lambda: kernels.dequantize_rows(
        PACKED, Q4_1, 20, 64, torch.tensor([-1]), torch.float32
    ),
    "outputs in int32": lambda: kernels.dequantize_rows(
        PACKED, Q4_1, 20, 64, ints(1), torch.float32
    ),
    "other depths": lambda: kernels.product(f32(2, 3).bfloat16(), f32(4, 5), f32(2, 5)),
    "a in float32": lambda: kernels.product(f32(2, 3), f32(3, 5), f32(2, 5)),
    "a small y": lambda: kernels.product(f32(2, 3).bfloat16(), f32(3, 5), f32(2, 4)),
    "rows that overlap": lambda: kernels.product(
        f32(2, 3).bfloat16(), f32(3, 5), f32(1, 5).expand(2, 5)
    ),
    "a sum in bfloat16": lambda: kernels.product(
        f32(2, 3).bfloat16(), f32(3, 5), f32(2, 5).bfloat16(), add=True
    ),
    "a vector": lambda: kernels.column_sums(f32(5)),
    "a negative target": lambda: kernels.cross_entropy(f32(1, 5), ints(1).long() - 100, 0.0),
    "a target beyond": lambda: kernels.cross_entropy(f32(1, 5), ints(1).long() + 5, 1.0),
    "a target of no vocabulary": lambda: kernels.cross_entropy(f32(1, 0), ints(1).long(), 1.0),
    "int32 targets": lambda: kernels.cross_entropy(f32(1, 5), ints(1), 0.0),
    "fewer targets": lambda: kernels.cross_entropy(f32(2, 5), ints(1).long(), 0.0),
    "logits that overlap": lambda: kernels.cross_entropy(
        f32(1, 5).expand(3, 5), ints(3).long(), 1.0
    ),
    "a column of logits": lambda: kernels.cross_entropy(f32(5, 3).T, ints(3).long(), 1.0),
    "keys of other tokens": lambda: kernels.exponential(ints(3, 2), ints(4)),
    "int64 keys": lambda: kernels.exponential(ints(2, dtype=torch.int64), ints(4)),
    "a cube": lambda: kernels.softmax_sums(f32(2, 3, 4)),
    "keys of another shape": lambda: kernels.last_key(f32(2, 5), f32(2, 9), 0.5),
    "float64 bounds": lambda: kernels.keep_from(f32(2, 5), f32(2, 1).double(), f32(2, 5)),
    "k beyond the vocabulary": lambda: kernels.top(f32(2, 5), 6),
    "a negative k": lambda: kernels.top(f32(2, 5), -1),
    "a draw from nothing": lambda: kernels.draw(f32(2, 0), ints(2, 2)),
    "a size below zero": lambda: kernels.permutation(-1, 1, 0),
    "a count beyond the size": lambda: kernels.permutation(5, 1, 6),
    "a size of 2^31": lambda: kernels.permutation(2**31, 1, 1),
    "a head of 48": lambda: kernels.attend_causally(*3 * [f32(1, 2, 4, 48)]),
    "heads in no groups": lambda: kernels.attend_causally(
        f32(1, 2, 3, 32), *2 * [f32(1, 2, 2, 32)]
    ),
    "no key heads": lambda: kernels.attend_causally(f32(1, 2, 3, 32), *2 * [f32(1, 2, 0, 32)]),
    "values of other tokens": lambda: kernels.attend_causally(
        *2 * [f32(1, 3, 2, 32)], f32(1, 2, 2, 32)
    ),
    "gradients in float32": lambda: attention.causal_attention_backward(
        *4 * [f32(1, 2, 2, 32)], f32(1, 2, 2), f32(1, 2, 2, 32)
    ),
    "17 queries": lambda: kernels.attend(f32(17, 1, 32), *2 * [f32(1, 1, 9, 32)], None, 1),
    "no trees": lambda: kernels.attend(f32(2, 1, 32), *2 * [f32(1, 1, 9, 32)], None, 0),
    "trees of no queries": lambda: kernels.attend(f32(3, 1, 32), *2 * [f32(2, 1, 9, 32)], None, 2),
    "a short mask": lambda: kernels.attend(
        f32(2, 1, 32), *2 * [f32(1, 1, 9, 32)], f32(1, 2, 8), 1
    ),
    "a mask in float64": lambda: kernels.attend(
        f32(2, 1, 32), *2 * [f32(1, 1, 9, 32)], f32(1, 2, 9).double(), 1
    ),
    "slabs that share memory": lambda: attention.slabs_of(2 * [f32(1, 2, 1, 1, 64, 32)]),
    "keys in stripes": lambda: kernels.attend(
        f32(2, 1, 32), *2 * [f32(1, 1, 32, 9).transpose(2, 3)], None, 1
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_kernel_cannot_take_is_refused(what):
    with pytest.raises(ValueError, match=r"^gptk\.kernels\.\w+ cannot take |out of range"):
        REFUSED[what]()


def test_the_message_says_what_was_given():
    x = torch.ones(3, 20).T
    with pytest.raises(ValueError, match="cannot take") as raised:
        kernels.column_sums(x.half())
    assert str(raised.value) == (
        "gptk.kernels.column_sums cannot take x: float16 (20, 3) with strides (1, 20) on cpu; it "
        "must be a tensor on the CPU, of float32 or bfloat16, (rows, columns)"
    )


def test_the_message_says_what_is_needed():
    with pytest.raises(ValueError, match="cannot take") as raised:
        kernels.top(torch.ones(2, 5), 6)
    assert str(raised.value) == (
        "gptk.kernels.top cannot take k: 6, size: 5; it needs 0 <= k <= size"
    )


class Wrapper(torch.Tensor):
    """A tensor without data of its own, as DTensor and torchao's are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device
        )

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return NotImplemented


def test_tensors_without_data_are_refused():
    freed = torch.ones(32)
    freed.untyped_storage().resize_(0)
    for weight in (Wrapper(torch.ones(32)), freed, torch._efficientzerotensor(32)):
        with pytest.raises(ValueError, match=r"weight: .+ it has no data"):
            kernels.rms_norm(torch.ones(2, 32), weight, 1e-5)


def test_logits_stay_as_they_are_where_a_target_is_refused():
    logits = torch.arange(10.0).view(2, 5)
    with pytest.raises(ValueError, match="out of range"):
        kernels.cross_entropy(logits, torch.tensor([1, 7]), 1.0)
    assert torch.equal(logits, torch.arange(10.0).view(2, 5))


def test_parts_of_larger_tensors_are_read_right():
    """A bias, a weight and a mask with gaps were read as if they had none."""
    x, weight = torch.randn(3, 64), torch.randn(40, 128)[:, ::2]
    bias = torch.randn(80)[::2]
    want = F.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(kernels.linear(x, weight, bias).double(), want, rtol=0, atol=1e-4)
    scale = torch.randn(128)[::2]
    want = F.rms_norm(x, (64,), scale, 1e-5)
    torch.testing.assert_close(kernels.rms_norm(x, scale, 1e-5), want)
    y = torch.empty(3, 40)
    a = x.to(BFLOAT16)
    kernels.product(a, weight.T, y, bias)
    want = a.double() @ weight.T.to(BFLOAT16).double() + bias.double()
    torch.testing.assert_close(y.double(), want, rtol=0, atol=1e-3)


def test_a_product_is_the_same_with_any_number_of_threads():
    """Few threads pack the operands each for itself, many together."""
    generator = torch.Generator().manual_seed(1)
    a, b = (
        torch.randn(shape, generator=generator).to(BFLOAT16) for shape in ((70, 3100), (3100, 130))
    )
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 4, 6):
            torch.set_num_threads(threads)
            for left, right in ((a, b), (b.t(), a.t())):
                y = torch.empty(len(left), right.shape[1])
                kernels.product(left, right, y)
                results.append(y)
    finally:
        torch.set_num_threads(before)
    for rows, columns in zip(results[2::2], results[3::2], strict=True):
        assert torch.equal(rows, results[0])
        assert torch.equal(columns, results[1])
    bound = 2e-6 * (a.double().abs() @ b.double().abs())
    assert ((results[0].double() - a.double() @ b.double()).abs() <= bound).all()
