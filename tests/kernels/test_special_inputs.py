"""NaN and infinity, views, odd sizes and no rows through every kernel of floats.

A special number is in one row. The other rows are the same to the last bit as without it; its own
is NaN and infinite where PyTorch's is.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from gptk import kernels
from gptk.kernels import attention

pytestmark = pytest.mark.skipif(not kernels.available(), reason="gptk's kernels do not run here")

ROWS, SPECIAL_ROW = 5, 3
SPECIALS = [math.nan, math.inf, -math.inf]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def numbers(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def aligned_panels(weight):
    outputs, inputs = weight.shape
    memory = torch.empty(64 + (outputs + -outputs % 16) * inputs * weight.itemsize).byte()
    start = -memory.data_ptr() % 64
    panels = memory[start : len(memory) - 64 + start].view(weight.dtype).view(-1, inputs)
    kernels.to_panels(weight, panels)
    return panels


def in_panels(x):
    weight = numbers(1, 17, x.shape[-1], dtype=x.dtype)
    return kernels.linear_in_panels(x, aligned_panels(weight), 17, None)


def over_a_cache(x):
    """Each row is a tree."""
    keys = numbers(2, 2 * len(x), 1, 9, 32, dtype=x.dtype)
    return kernels.attend(x.view(len(x), 2, 32), keys, keys, None, len(x)).flatten(1)


def rotated(x):
    angles = [numbers(seed, 1, 1, 2, 32, dtype=x.dtype) for seed in (1, 2)]
    return kernels.rotate(x.view(len(x), 1, 2, 32), *angles).flatten(1)


def theirs_rotated(x):
    cosines, sines = (numbers(seed, 1, 1, 2, 32).double() for seed in (1, 2))
    x = x.view(len(x), 1, 2, 32)
    return (x * cosines + x.roll(16, dims=-1) * sines).flatten(1)


def theirs_over_a_cache(x):
    keys = numbers(2, 2 * len(x), 1, 9, 32).double().view(len(x), 2, 9, 32)
    q = x.view(len(x), 2, 1, 32)
    return F.scaled_dot_product_attention(q, keys, keys).flatten(1)


WEIGHT, BIAS, MATRIX = numbers(5, 64), numbers(6, 64), numbers(1, 17, 64)
SAME_AS_PYTORCH = {
    "rms_norm": (
        lambda x: kernels.rms_norm(x, WEIGHT.to(x.dtype), 1e-5),
        lambda x: F.rms_norm(x, (64,), WEIGHT.double(), 1e-5),
    ),
    "layer_norm": (
        lambda x: kernels.layer_norm(x, WEIGHT.to(x.dtype), BIAS.to(x.dtype), 1e-5),
        lambda x: F.layer_norm(x, (64,), WEIGHT.double(), BIAS.double(), 1e-5),
    ),
    "swiglu": (kernels.swiglu, lambda x: F.silu(x[:, :32]) * x[:, 32:]),
    "gelu": (kernels.gelu, lambda x: F.gelu(x, approximate="tanh")),
    "rotate": (rotated, theirs_rotated),
    "linear": (
        lambda x: kernels.linear(x, MATRIX.to(x.dtype), None),
        lambda x: F.linear(x, MATRIX.double()),
    ),
    "linear_in_panels": (in_panels, lambda x: F.linear(x, MATRIX.double())),
    "attend": (over_a_cache, theirs_over_a_cache),
}


@pytest.mark.parametrize("special", SPECIALS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SAME_AS_PYTORCH)
def test_a_special_number_stays_in_its_row_and_is_pytorchs(name, dtype, special):
    ours, theirs = SAME_AS_PYTORCH[name]
    x = numbers(0, ROWS, 64, dtype=dtype)
    without = ours(x)
    x[SPECIAL_ROW, 5] = special
    got, want = ours(x), theirs(x.double())
    others = [row for row in range(ROWS) if row != SPECIAL_ROW]
    assert torch.equal(got[others], without[others])
    got, want = got[SPECIAL_ROW].double(), want[SPECIAL_ROW]
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())
    finite = want.isfinite()
    error = 2e-6 if dtype == torch.float32 else 2**-5
    assert torch.allclose(got[finite], want[finite], rtol=error, atol=error)


VIEWS = {
    "every other number": lambda x: torch.stack((x, x), dim=-1)[..., 1],
    "columns": lambda x: x.t().contiguous().t(),
    "a part": lambda x: F.pad(x, (3, 5, 1, 1), value=math.nan)[1 : len(x) + 1, 3:-5],
    "one row for all": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(set(SAME_AS_PYTORCH) - {"rotate", "attend"}))
def test_views_are_read_as_copies_of_them(name, dtype, view):
    x = VIEWS[view](numbers(0, ROWS, 64, dtype=dtype))
    assert not x.is_contiguous()
    ours, _ = SAME_AS_PYTORCH[name]
    assert torch.equal(ours(x), ours(x.clone(memory_format=torch.contiguous_format)))


@pytest.mark.parametrize("view", VIEWS)
def test_vocabularies_that_are_views_are_read_as_copies_of_them(view):
    x = VIEWS[view](numbers(0, ROWS, 37))
    keys = torch.arange(2 * ROWS, dtype=torch.int32).view(2, ROWS).t()
    targets = torch.arange(2 * ROWS)[::2]

    def results(x, keys, targets):
        yield from kernels.softmax_sums(x)
        yield kernels.last_key(x, x, 0.5)
        yield kernels.keep_from(x, x[:, 3:4], x)
        yield from kernels.top(x, 5)
        yield from kernels.draw(x, keys)
        yield kernels.exponential(keys, keys[:, 0])
        yield kernels.column_sums(x)
        yield kernels.cross_entropy(x.contiguous(), targets, 0.0)

    copies = [part.clone(memory_format=torch.contiguous_format) for part in (x, keys, targets)]
    for got, want in zip(results(x, keys, targets), results(*copies), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("rows", [0, 1, 15, 17, 31, 33, 37])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SAME_AS_PYTORCH)
def test_any_number_of_rows_is_pytorchs_result(name, dtype, rows):
    ours, theirs = SAME_AS_PYTORCH[name]
    if name == "attend" and not rows:
        pytest.skip("there is no tree")
    x = numbers(rows, rows, 64, dtype=dtype)
    got, want = ours(x), theirs(x.double())
    assert got.shape == want.shape
    error = 2e-6 if dtype == torch.float32 else 2**-5
    assert torch.allclose(got.double(), want, rtol=error, atol=4 * error)


@pytest.mark.parametrize("special", SPECIALS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_causal_attention_keeps_a_special_number_from_earlier_tokens(dtype, special):
    """Tokens before it are the same to the last bit; it and all that see it are NaN."""
    q = numbers(0, 1, 70, 2, 32, dtype=dtype)
    without = kernels.attend_causally(q, q, q)
    q[0, 20] = special
    got = kernels.attend_causally(q, q, q)
    assert torch.equal(got[:, :20], without[:, :20])
    assert got[:, 20].isnan().all()
    if math.isnan(special):
        assert got[:, 20:].isnan().all()


def test_gradients_of_causal_attention_keep_it_in_its_row():
    q = numbers(0, 2, 70, 2, 32, dtype=torch.bfloat16)

    def gradients():
        y, logsums = attention.causal_attention(q, q, q)
        return attention.causal_attention_backward(q, q, q, y, logsums, q)

    without = gradients()
    q[1, 20] = math.nan
    for got, before in zip(gradients(), without, strict=True):
        assert torch.equal(got[0], before[0])
        assert got[1].isnan().any()


@pytest.mark.parametrize("special", SPECIALS)
def test_passes_over_a_vocabulary(special):
    logits = numbers(0, ROWS, 100)
    targets, keys = torch.arange(ROWS), torch.arange(2 * ROWS, dtype=torch.int32).view(ROWS, 2)

    def results():
        losses = kernels.cross_entropy(logits.clone(), targets, 0.0)
        return [
            *(losses, *kernels.softmax_sums(logits), kernels.last_key(logits, logits, 0.5)),
            *kernels.draw(logits, keys),
        ]

    without = results()
    logits[SPECIAL_ROW, 40] = special
    exact = F.cross_entropy(logits.double(), targets, reduction="none")
    for got, before in zip(results(), without, strict=True):
        others = [row for row in range(ROWS) if row != SPECIAL_ROW]
        assert torch.equal(got[others], before[others])
    losses, *_, tokens, _ = results()
    assert losses[SPECIAL_ROW].isnan() == exact[SPECIAL_ROW].isnan()
    assert 0 <= tokens[SPECIAL_ROW] < 100
    if special == -math.inf:
        assert tokens[SPECIAL_ROW] != 40
        assert torch.allclose(losses.double(), exact, rtol=1e-5)


@pytest.mark.parametrize("special", SPECIALS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_column_sums(dtype, special):
    x = numbers(0, 7, 33, dtype=dtype)
    without = kernels.column_sums(x)
    x[2, 17] = special
    got, others = kernels.column_sums(x), [i for i in range(33) if i != 17]
    assert torch.equal(got[others], without[others])
    assert torch.equal(got[17], x[2, 17].float()) or (got[17].isnan() and math.isnan(special))


@pytest.mark.parametrize("special", SPECIALS)
def test_a_product_of_matrices(special):
    if not kernels.should_run_product(torch.ones(1)):
        pytest.skip("needs AVX512-BF16, and no AMX")
    a, b = numbers(0, ROWS, 40, dtype=torch.bfloat16), numbers(1, 40, 33)
    results = []
    for number in (0.5, special):
        a[SPECIAL_ROW, 7] = number
        y = torch.empty(ROWS, 33)
        kernels.product(a, b, y)
        results.append(y)
    others = [row for row in range(ROWS) if row != SPECIAL_ROW]
    assert torch.equal(results[0][others], results[1][others])
    want = a.double() @ b.bfloat16().double()
    assert torch.equal(results[1].isnan(), want.isnan())
    assert torch.equal(results[1].isinf(), want.isinf())
