"""gptk's kernels, compared with PyTorch's operations in float64; and what runs without them."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import gptk
from gptk import kernels
from gptk.cli import cli
from gptk.model.attention import attend, attend_causally
from gptk.model.cache import KVCache
from gptk.model.gpt import swiglu
from gptk.model.levels import GROUP, Levels
from gptk.model.linear import Linear
from gptk.model.panels import Panels
from gptk.model.quantization import KernelGroups, pack
from gptk.model.quantized_by_pytorch import PyTorchInt4, PyTorchInt8Groups
from gptk.model.rotary import rotate
from gptk.testing import tiny_gpt
from toys import CONFIGS

NEEDS_KERNELS = pytest.mark.skipif(
    not kernels.available(), reason=f"gptk's kernels do not run here: {kernels.why_not()}"
)
NEEDS_PRODUCTS = pytest.mark.skipif(
    not kernels.should_run_product(torch.ones(1)), reason="needs AVX512-BF16, and no AMX"
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
SEEDS = st.integers(0, 2**16)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def numbers(seed, *shape, dtype=torch.float32, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (size * torch.randn(shape, generator=generator)).to(dtype)


def close(got, want, error=1e-6):
    """Within an error relative to the largest result, and bfloat16's rounding error of 2⁻⁸."""
    assert got.shape == want.shape
    difference = (got.double() - want).abs()
    rounded = 2**-8 * want.abs() if got.dtype == torch.bfloat16 else 0
    scale = want.abs().max() if want.numel() else 0
    assert (difference <= rounded + error * scale + 1e-30).all()


def as_exact(got, theirs, want):
    """Within twice the error that PyTorch makes in the same precision, and float32's last digit."""
    ours, pytorchs = ((result.double() - want).abs().max() for result in (got, theirs))
    assert ours <= 2 * pytorchs + 1e-6 * want.abs().max()


@st.composite
def levels(draw):
    bits = draw(st.sampled_from([4, 8]))
    outputs, groups = draw(st.integers(1, 70)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    codes = torch.randint(
        2**bits, (outputs, groups * GROUP), generator=generator, dtype=torch.uint8
    )
    scale = torch.rand(outputs, groups, generator=generator).half().float() / 16
    offset = torch.randn(outputs, groups, generator=generator).half().float()
    return Levels(codes, scale, offset, bits)


@NEEDS_KERNELS
@settings(max_examples=80)
@given(levels(), st.integers(1, 11), DTYPES, st.booleans(), SEEDS)
def test_products_are_those_with_the_levels(weights, rows, dtype, with_bias, seed):
    x = numbers(seed, rows, weights.shape[1], dtype=dtype)
    bias = numbers(seed + 1, weights.shape[0], dtype=dtype) if with_bias else None
    exact = weights.dense(torch.float64)
    want = x.double() @ exact.T + (0 if bias is None else bias.double())
    got = KernelGroups(weights).linear(x, bias)
    assert got.dtype == dtype
    # Half a step of x, which has 15 bits and a sign in each group; sums in float32; the result.
    step = (x.double().view(rows, -1, GROUP).abs().amax(2) / 16256).repeat_interleave(GROUP, 1)
    bound = 0.51 * step @ exact.abs().T + 2e-6 * (x.double().abs() @ exact.abs().T + 1)
    bound += 2**-8 * want.abs() if dtype == torch.bfloat16 else 0
    assert ((got.double() - want).abs() <= bound).all()


@NEEDS_KERNELS
@settings(max_examples=30)
@given(levels(), st.integers(2, 11), DTYPES, SEEDS)
def test_a_rows_product_does_not_depend_on_other_rows(weights, rows, dtype, seed):
    packed = KernelGroups(weights)
    x = numbers(seed, rows, weights.shape[1], dtype=dtype)
    together = packed.linear(x, None)
    for row in range(rows):
        assert torch.equal(packed.linear(x[row : row + 1], None)[0], together[row])


@NEEDS_KERNELS
@settings(max_examples=60)
@given(
    rows=st.integers(1, 40), outputs=st.integers(1, 130), pairs=st.integers(1, 90), dtype=DTYPES,
    with_bias=st.booleans(), seed=SEEDS,
)  # fmt: skip
def test_products_with_plain_weights(rows, outputs, pairs, dtype, with_bias, seed):
    layer = gptk.model.linear.Linear(2 * pairs, outputs, bias=with_bias).to(dtype)
    layer.load_state_dict(
        {
            name: numbers(seed + i, *tensor.shape, dtype=dtype)
            for i, (name, tensor) in enumerate(layer.state_dict().items())
        }
    )
    x = numbers(seed - 1, rows, 1, 2 * pairs, dtype=dtype)
    got = layer(x)
    packed = copy.deepcopy(layer)
    packed.pack()
    assert "weight" not in packed._parameters
    assert torch.equal(packed(x), got)
    exact = copy.deepcopy(layer).double()
    want = F.linear(x.double(), exact.weight, exact.bias)
    size = F.linear(x.double().abs(), exact.weight.abs()) + 1
    bound = 2e-6 * size + (2**-8 * want.abs() if dtype == torch.bfloat16 else 0)
    assert got.dtype == dtype
    assert ((got.double() - want).abs() <= bound).all()
    for row in range(rows):
        assert torch.equal(layer(x[row : row + 1])[0], got[row])
        assert torch.equal(packed(x[row : row + 1])[0], got[row])
    packed.unpack()
    assert torch.equal(packed.weight, layer.weight)


@NEEDS_KERNELS
@settings(max_examples=60)
@given(
    rows=st.integers(0, 30), outputs=st.integers(1, 70), inputs=st.integers(1, 60), dtype=DTYPES,
    with_bias=st.booleans(), seed=SEEDS,
)  # fmt: skip
def test_products_with_weights_in_panels(rows, outputs, inputs, dtype, with_bias, seed):
    weight = numbers(seed, outputs, 2 * inputs, dtype=dtype)
    bias = numbers(seed + 1, outputs, dtype=dtype) if with_bias else None
    panels = Panels(weight, dtype)
    assert torch.equal(panels.dense(dtype), weight)
    x = numbers(seed + 2, rows, 2 * inputs, dtype=dtype)
    got = panels.linear(x, bias)
    exact = [None if part is None else part.double() for part in (x, weight, bias)]
    size = F.linear(exact[0].abs(), exact[1].abs()) + 1
    want = F.linear(*exact)
    bound = 2e-6 * size + (2**-8 * want.abs() if dtype == torch.bfloat16 else 0)
    assert ((got.double() - want).abs() <= bound).all()
    for row in range(rows):
        assert torch.equal(panels.linear(x[row : row + 1], bias)[0], got[row])


@NEEDS_KERNELS
@settings(max_examples=40)
@given(
    st.integers(0, 9), st.integers(1, 200), DTYPES, st.sampled_from([1e-3, 1.0, 40.0]),
    st.booleans(), SEEDS,
)  # fmt: skip
def test_layer_norm(rows, size, dtype, scale, with_bias, seed):
    x = numbers(seed, rows, size, dtype=dtype, size=scale) + scale
    weight = numbers(seed + 1, size, dtype=dtype)
    bias = numbers(seed + 2, size, dtype=dtype) if with_bias else None
    exact = [None if part is None else part.double() for part in (weight, bias)]
    want = F.layer_norm(x.double(), (size,), *exact, 1e-5)
    close(kernels.layer_norm(x, weight, bias, 1e-5), want, 2e-6)


@NEEDS_KERNELS
@settings(max_examples=30)
@given(levels())
def test_packed_weights_are_the_levels(weights):
    assert torch.equal(KernelGroups(weights).dense(torch.bfloat16), weights.dense().bfloat16())


@NEEDS_KERNELS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e37, 1e-37, 0.0])
def test_extreme_numbers(value):
    weights = Levels(torch.full((20, 64), 3, dtype=torch.uint8), *2 * [torch.ones(20, 2)], 4)
    x = torch.zeros(2, 64)
    x[0, 40] = value
    got = KernelGroups(weights).linear(x, None)
    assert torch.equal(got[1], torch.zeros(20))
    if value != value or value == float("inf"):
        assert not got[0].isfinite().any()
    else:
        assert torch.allclose(got[0], torch.full((20,), 4 * value), rtol=1e-4, atol=1e-36)


@NEEDS_KERNELS
@settings(max_examples=60)
@given(st.integers(1, 9), st.integers(1, 50), DTYPES, st.sampled_from([1e-3, 1.0, 40.0]), SEEDS)
def test_small_operations(rows, sixteens, dtype, size, seed):
    x = numbers(seed, rows, 2 * 16 * sixteens, dtype=dtype, size=size)
    weight = numbers(seed + 1, x.shape[1], dtype=dtype)
    want = F.rms_norm(x.double(), (x.shape[1],), weight.double(), 1e-5)
    close(kernels.rms_norm(x, weight, 1e-5), want)
    gate, up = x.double().chunk(2, dim=-1)
    close(swiglu(x), F.silu(gate) * up)
    for rotary in ((1, 3, 5, 64), (rows, 3, 5, 64)):
        x = numbers(seed, rows, 3, 5, 64, dtype=dtype, size=size)
        angles = [numbers(seed + i, *rotary, dtype=dtype) for i in (1, 2)]
        got, want = rotate(x, *angles), rotate(x.double(), *[angle.double() for angle in angles])
        close(got, want)


@NEEDS_KERNELS
@settings(max_examples=60)
@given(st.integers(1, 9), st.integers(1, 50), DTYPES, st.sampled_from([1e-3, 1.0, 40.0]), SEEDS)
def test_gelu_and_its_gradient(rows, size, dtype, scale, seed):
    x, dy = (numbers(seed + i, rows, size, dtype=dtype, size=scale) for i in range(2))
    close(kernels.gelu(x), F.gelu(x.double(), approximate="tanh"), 2e-7)

    def gradient(gelu, x, dy):
        with torch.inference_mode(False), torch.enable_grad():
            x = x.clone().requires_grad_()
            return torch.autograd.grad(gelu(x), x, dy.clone())[0]

    theirs = partial(F.gelu, approximate="tanh")
    want = gradient(theirs, x.double(), dy.double())
    as_exact(gradient(kernels.gelu, x, dy), gradient(theirs, x, dy), want)


@NEEDS_KERNELS
def test_gelu_of_extreme_numbers():
    x = torch.tensor([-torch.inf, -3e38, -17.0, -0.0, 0.0, 17.0, 3e38, torch.inf, torch.nan])
    want = F.gelu(x, approximate="tanh")
    torch.testing.assert_close(kernels.gelu(x), want, rtol=0, atol=0, equal_nan=True)


@NEEDS_PRODUCTS
@settings(max_examples=120)
@given(data=st.data(), rows=st.integers(1, 100), columns=st.integers(1, 120), seed=SEEDS)
def test_products_of_matrices(data, rows, columns, seed):
    depth = data.draw(st.one_of(st.integers(1, 70), st.integers(1530, 1700)), "depth")
    draw = data.draw
    a = laid_out(draw, numbers(seed, rows, depth, dtype=torch.bfloat16))
    b = laid_out(draw, numbers(seed + 1, depth, columns, dtype=draw(DTYPES)))
    y = numbers(seed + 2, rows, columns + 3, dtype=draw(DTYPES))[:, :columns]
    bias = numbers(seed + 3, columns) if draw(st.booleans()) else None
    add = y.dtype == torch.float32 and draw(st.booleans())
    want = a.double() @ b.bfloat16().double() + (0 if bias is None else bias.double())
    want += y.double() if add else 0
    alone = y[-1:].clone()
    kernels.product(a, b, y, bias, add=add)
    close(y, want, 2e-6)
    kernels.product(a[-1:], b, alone, bias, add=add)
    assert torch.equal(alone, y[-1:])


@NEEDS_PRODUCTS
def test_a_product_of_no_rows():
    weight = numbers(1, 40, 50)
    assert kernels.autocast_linear(numbers(2, 0, 50), weight, None).shape == (0, 40)


def laid_out(draw, x):
    """The same matrix as a part of a larger one, row-major or column-major."""
    larger = x.new_zeros(*(size + 5 for size in x.shape))
    if draw(st.booleans()):
        larger = larger.t().contiguous().t()
    larger[: len(x), : x.shape[1]] = x
    return larger[: len(x), : x.shape[1]]


@NEEDS_PRODUCTS
def test_a_linear_layer_under_autocast_is_pytorchs(monkeypatch):
    results = []
    for enabled in (True, False):
        monkeypatch.setattr(kernels.checks, "enabled", enabled)
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu"):
            torch.manual_seed(0)
            layer, x = Linear(702, 750), numbers(1, 3, 20, 702).requires_grad_()
            y = layer(x)
            assert y.dtype == torch.bfloat16
            (y * numbers(2, *y.shape, dtype=y.dtype)).sum().backward()
        results.append([y, x.grad, layer.weight.grad, layer.bias.grad])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.stride() == theirs.stride()
        torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=1e-2)


@NEEDS_KERNELS
@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(1, 200), DTYPES, SEEDS)
def test_column_sums(rows, columns, dtype, seed):
    x = numbers(seed, rows, columns, dtype=dtype)
    close(kernels.column_sums(x), x.double().sum(0), 2e-6)


@NEEDS_KERNELS
@settings(max_examples=60)
@given(st.integers(1, 9), st.integers(1, 300), DTYPES, st.sampled_from([1e-3, 1.0, 40.0]), SEEDS)
def test_cross_entropy_and_its_gradient(rows, vocab, dtype, size, seed):
    logits = numbers(seed, rows, vocab + 2, dtype=dtype, size=size)[:, :vocab]
    targets = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(seed))
    exact = logits.double()
    want = F.cross_entropy(exact, targets, reduction="none")
    gradient = (exact.softmax(1) - F.one_hot(targets, vocab)) * 0.3
    before = logits.clone()
    close(kernels.cross_entropy(logits, targets, 0.0), want, 2e-6)
    assert torch.equal(logits, before)
    close(kernels.cross_entropy(logits, targets, 0.3), want, 2e-6)
    close(logits, gradient, 2e-6)


@NEEDS_KERNELS
@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 200), heads=st.sampled_from([(4, 4), (4, 2), (6, 2), (3, 1)]),
    head_dim=st.sampled_from(kernels.HEAD_DIMS), rows=st.integers(1, 3), dtype=DTYPES, seed=SEEDS,
)  # fmt: skip
def test_attention_over_a_cache(length, heads, head_dim, rows, dtype, seed):
    """Over one, two and four chunks of keys, with a row for each tree and with forked rows."""
    for forked in (False, True):
        cache = KVCache(
            1, heads[1], head_dim, rows=rows, capacity=length, device=torch.device("cpu"),
            dtype=dtype,
        )  # fmt: skip
        new = numbers(seed, rows, length, 2, heads[1], head_dim, dtype=dtype)
        slots = cache.plan(length)
        slots.write(0, new)
        cache.advance([length] * rows, slots)
        if forked:
            cache.select([0, *range(rows)])
        slots = cache.plan(1, heads[0] // heads[1])
        count = len(cache.lengths)
        slots.write(0, numbers(seed + 1, count, 1, 2, heads[1], head_dim, dtype=dtype))
        q = numbers(seed + 2, count, 1, heads[0], head_dim, dtype=dtype, size=3)
        got = attend(q, 0, slots)
        assert kernels.can_run(q, slots.keys[0])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels.checks, "enabled", False)
            keys, values = ([x.double() for x in part] for part in (slots.keys, slots.values))
            mask = None if slots.mask is None else slots.mask.double()
            in_float64 = gptk.model.cache.Slots(
                **{**vars(slots), "keys": keys, "values": values, "mask": mask}
            )
            close(got, attend(q.double(), 0, in_float64), error=2e-6)


CAUSAL = {
    "time": st.integers(1, 200), "heads": st.sampled_from([(4, 4), (4, 2), (6, 2), (3, 1)]),
    "head_dim": st.sampled_from(kernels.HEAD_DIMS), "rows": st.integers(1, 3), "seed": SEEDS,
    "fused": st.booleans(),
}  # fmt: skip
"""One to four chunks; queries, keys and values are separate, or parts of one tensor if `fused`."""


@NEEDS_KERNELS
@settings(max_examples=40)
@given(**CAUSAL, dtype=DTYPES)
def test_causal_attention(time, heads, head_dim, rows, dtype, seed, fused):
    count = heads[0] + 2 * heads[1]
    both = numbers(seed, rows, time, count, head_dim, dtype=dtype, size=2)
    parts = both.split((heads[0], heads[1], heads[1]), dim=2)
    q, k, v = parts if fused else (part.contiguous() for part in parts)
    got = attend_causally(q, k, v)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.checks, "enabled", False)
        theirs = attend_causally(q, k, v)
        want = attend_causally(q.double(), k.double(), v.double())
    as_exact(got, theirs, want)
    last_row = attend_causally(q[-1:], k[-1:], v[-1:])
    assert torch.equal(last_row, got.view(rows, time, -1)[-1])


@NEEDS_KERNELS
@settings(max_examples=40)
@given(**CAUSAL)
def test_gradients_of_causal_attention(time, heads, head_dim, rows, seed, fused):
    counts, dtype = (heads[0], heads[1], heads[1]), torch.bfloat16
    both = numbers(seed, rows, time, sum(counts), head_dim, dtype=dtype)
    dy = numbers(seed + 1, rows * time, heads[0] * head_dim, dtype=dtype)

    def gradient(x, dy):
        with torch.inference_mode(False), torch.enable_grad():
            x = x.clone().requires_grad_()
            parts = x.split(counts, dim=2)
            y = attend_causally(*(parts if fused else [part.contiguous() for part in parts]))
            return torch.autograd.grad(y, x, dy.clone())[0]

    got = gradient(both, dy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.checks, "enabled", False)
        theirs = gradient(both, dy)
        want = gradient(both.double(), dy.double())
    as_exact(got, theirs, want)


@NEEDS_KERNELS
def test_kernels_are_what_pytorch_expects_of_operators():
    with torch.inference_mode(False), torch.enable_grad():
        qkv = [
            numbers(seed, 2, 70, 4, 32, dtype=torch.bfloat16).requires_grad_() for seed in range(3)
        ]
        torch.library.opcheck(torch.ops.gptk.causal_attention.default, qkv)
        torch.library.opcheck(torch.ops.gptk.gelu.default, [numbers(1, 5, 7).requires_grad_()])
        x = numbers(1, 5, 40, dtype=torch.bfloat16).requires_grad_()
        weight, bias = (numbers(2, *shape).requires_grad_() for shape in ((30, 40), (30,)))
        for in_float32 in (True, False):
            arguments = [x, weight.t(), bias, in_float32]
            torch.library.opcheck(torch.ops.gptk.product.default, arguments)


@NEEDS_KERNELS
def test_second_derivatives_are_refused_as_by_pytorchs_attention(monkeypatch):
    for enabled in (True, False):
        monkeypatch.setattr(kernels.checks, "enabled", enabled)
        with torch.inference_mode(False), torch.enable_grad():
            q, k, v = (
                numbers(seed, 1, 5, 2, 32, dtype=torch.bfloat16).requires_grad_()
                for seed in range(3)
            )
            (gradient,) = torch.autograd.grad(
                attend_causally(q, k, v).square().sum(), q, create_graph=True
            )
            with pytest.raises(RuntimeError, match=r"not implemented|no second derivatives"):
                gradient.sum().backward()


@NEEDS_KERNELS
def test_of_equal_numbers_the_first_are_taken():
    x = torch.tensor([[1.0, 2, 2, 0, 2, 1] + [1.0] * 30])
    assert kernels.top(x, 5)[1].tolist() == [[1, 2, 4, 0, 5]]
    assert kernels.top(torch.full((1, 40), -torch.inf), 3)[1].tolist() == [[0, 1, 2]]


@NEEDS_KERNELS
def test_causal_attention_of_a_prefix_is_the_same():
    q, k, v = (numbers(seed, 1, 150, heads, 64) for seed, heads in ((0, 6), (1, 2), (2, 2)))
    whole = attend_causally(q, k, v)
    for time in (1, 2, 63, 64, 65, 130):
        prefix = attend_causally(*(x[:, :time] for x in (q, k, v)))
        assert torch.equal(prefix, whole[:time])


@NEEDS_KERNELS
def test_attention_does_not_depend_on_threads():
    q, kv = numbers(0, 1, 9, 64), numbers(1, 2, 3, 1, 700, 64)
    threads_before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            causal = attend_causally(*numbers(2, 3, 2, 150, 4, 64))
            results.append((kernels.attend(q, *kv.unbind(0), None, 1), causal))
    finally:
        torch.set_num_threads(threads_before)
    for by_one, by_two, by_three in zip(*results, strict=True):
        assert torch.equal(by_one, by_two)
        assert torch.equal(by_one, by_three)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_without_kernels_pytorch_gives_the_same_tokens(name, monkeypatch):
    settings = {"sampler": "beam:width=3", "max_new_tokens": 8}
    with_them = gptk.LanguageModel(tiny_gpt(CONFIGS[name])).generate([1, 2, 3], **settings)
    monkeypatch.setattr(kernels.checks, "enabled", False)
    without = gptk.LanguageModel(tiny_gpt(CONFIGS[name])).generate([1, 2, 3], **settings)
    assert with_them.tokens == without.tokens
    assert with_them.score == pytest.approx(without.score, rel=1e-5)


@NEEDS_KERNELS
@pytest.mark.parametrize("name", list(CONFIGS))
def test_without_kernels_quantized_weights_are_for_pytorchs(name, monkeypatch):
    ids = torch.tensor([[1, 2, 3, 250]])
    model = tiny_gpt(CONFIGS[name]).quantize("int4")
    monkeypatch.setattr(kernels.checks, "enabled", False)
    other = tiny_gpt(CONFIGS[name]).quantize("int4")
    assert isinstance(model.head.packed, KernelGroups)
    assert isinstance(other.head.packed, PyTorchInt4)
    monkeypatch.undo()
    got, want = model.logits(model(ids)), other.logits(other(ids))
    assert (got - want).norm() < 0.15 * want.norm()  # levels are rounded differently, too


def test_without_kernels_eight_bits_are_for_pytorchs_too(monkeypatch):
    levels = Levels(torch.zeros(2, 32, dtype=torch.uint8), torch.ones(2, 1), torch.ones(2, 1), 8)
    monkeypatch.setattr(kernels.checks, "enabled", False)
    assert isinstance(pack(levels), PyTorchInt8Groups)


def test_kernels_that_are_switched_off_say_so(monkeypatch):
    monkeypatch.setattr(kernels.checks, "enabled", False)
    assert kernels.why_not() == "they are switched off"
    assert not kernels.available()


def test_info_says_which_kernels_run(tmp_path, monkeypatch):
    gptk.LanguageModel(tiny_gpt()).save(tmp_path / "model")
    shown = [f"PyTorch ({kernels.why_not()})"]
    if kernels.available():
        shown = [f"gptk ({kernels.build.load().instructions.words}, ", "compiled on this machine"]
    out = CliRunner().invoke(cli, ["info", str(tmp_path / "model")]).stdout
    (line,) = [line for line in out.splitlines() if line.startswith("kernels: ")]
    assert all(words in line for words in shown)
    monkeypatch.setattr(kernels.checks, "enabled", False)
    out = CliRunner().invoke(cli, ["info", str(tmp_path / "model")]).stdout
    assert "\nkernels: PyTorch (they are switched off)\n" in out
