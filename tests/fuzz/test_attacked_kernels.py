"""Random calls of every kernel: right, compared with PyTorch in float64, or a Python exception."""

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptk import kernels
from gptk.kernels import attention

FLOATS = (torch.float32, torch.bfloat16)
DTYPES = (*FLOATS, torch.float16, torch.float64, torch.int32, torch.int64, torch.uint8, torch.bool)
SIZES = (0, 1, 2, 3, 5, 15, 16, 17, 31, 32, 33, 64, 65, 96, 130, 300)
SPECIAL = (float("nan"), float("inf"), -float("inf"), 1e38, -1e38, 1e-40, 0.0)


@dataclass
class Call:
    """A call of a kernel, and what it should give: None if that cannot be said."""

    kernel: str
    arguments: list[Any]
    want: Callable[[], Any] | None = None
    error: float = 1e-4
    """Allowed, relative to the largest result; bfloat16 gets 2⁻⁷ more."""


class Maker:
    """Makes arguments; some of them are spoiled, and then `tame` is False."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.tame = rng, True
        self.spoil = rng.random() < 0.5
        self.dtype = rng.choice(FLOATS)
        self.generator = torch.Generator().manual_seed(rng.randrange(2**31))

    def size(self, multiple: int = 1) -> int:
        return self.rng.choice(SIZES) // multiple * multiple

    def spoiled(self, chance: float = 0.15) -> bool:
        """Whether to spoil something now."""
        now = self.spoil and self.rng.random() < chance
        self.tame = self.tame and not now
        return now

    def tensor(self, *shape: int, dtype: torch.dtype | None = None, high: int = 100) -> Tensor:
        """A tensor of that shape, its numbers from 0 to below `high` if they are integers."""
        dtype = dtype or self.dtype
        sizes = list(shape)
        if self.spoiled() and sizes:
            sizes[self.rng.randrange(len(sizes))] = self.rng.choice(SIZES[:-1])
        if self.spoiled(0.05):
            sizes = sizes[1:] if self.rng.random() < 0.5 else [1, *sizes]
        if self.spoiled(0.1):
            dtype = self.rng.choice(DTYPES)
        if dtype.is_floating_point:
            x = torch.randn(sizes, generator=self.generator).to(dtype)
        else:
            x = torch.randint(max(1, high), sizes, generator=self.generator).to(dtype)
        if dtype.is_floating_point and x.numel() and self.spoiled():
            for _ in range(self.rng.choice([1, 5, 100])):
                x.view(-1)[self.rng.randrange(x.numel())] = self.rng.choice(SPECIAL)
        if not dtype.is_floating_point and x.numel() and self.spoiled(0.1):
            bad = self.rng.choice([-1, 255, 2**31 - 1, -100, high])
            x.view(-1)[self.rng.randrange(x.numel())] = bad if dtype != torch.uint8 else bad % 256
        return self.laid_out(x)

    def laid_out(self, x: Tensor) -> Tensor:
        """The same numbers, otherwise in memory."""
        kind = self.rng.randrange(7)
        if kind == 0:
            return torch.stack((x, x), dim=-1)[..., 1]
        if kind == 1 and x.dim() > 1:
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        if kind == 2 and x.dim():
            return torch.cat((x[:1], x, x[:1]))[len(x[:1]) : len(x[:1]) + len(x)]
        if kind == 3 and x.dim() and len(x):
            return x[:1].clone().expand(x.shape)
        return x

    def number(self, usual: int, *others: int) -> int:
        return self.rng.choice([*others, -1, 2**40]) if self.spoiled(0.3) else usual


def make_layer(m: Maker) -> Call:
    rows, size = m.size(), m.size(32)
    x, weight = m.tensor(rows, size), m.tensor(size)
    return m.rng.choice(
        [
            Call(
                "rms_norm",
                [x, weight, 1e-5],
                lambda: F.rms_norm(x.double(), (size,), weight.double(), 1e-5),
            ),
            Call("swiglu", [x], lambda: F.silu(x.double().chunk(2, -1)[0]) * x.chunk(2, -1)[1]),
            Call("gelu", [x], lambda: F.gelu(x.double(), approximate="tanh")),
        ]
    )


def make_rotation(m: Maker) -> Call:
    rows, time, heads, size = m.size() % 7, m.size() % 9, m.size() % 5, m.size(32)
    x = m.tensor(rows, time, heads, size)
    cosines, sines = (m.tensor(m.rng.choice([1, rows]), time, heads, size) for _ in range(2))
    if cosines.shape != sines.shape:
        m.tame = False
    return Call(
        "rotate",
        [x, cosines, sines],
        lambda: (
            x.double() * cosines.double() + x.double().roll(size // 2, dims=-1) * sines.double()
        ),
    )


def make_product(m: Maker) -> Call:
    rows, depth, columns = m.size(), m.rng.choice([m.size(), 1537, 3000]), m.size()
    a = m.tensor(rows, depth, dtype=torch.bfloat16)
    b = m.tensor(depth, columns, dtype=m.rng.choice(FLOATS))
    y = torch.empty(rows, columns, dtype=m.rng.choice(FLOATS))
    if m.spoiled():
        y = m.tensor(rows, columns)
    bias = m.tensor(columns, dtype=torch.float32) if m.rng.random() < 0.5 else None

    def want() -> Tensor:
        product = a.double() @ b.bfloat16().double()
        return product if bias is None else product + bias.double()

    return Call("product", [a, b, y, bias], want)


def make_linear(m: Maker) -> Call:
    rows, inputs, outputs = m.size(), m.size(32), m.size()
    x, weight = m.tensor(rows, inputs), m.tensor(outputs, inputs)
    bias = m.tensor(outputs) if m.rng.random() < 0.5 else None
    return Call(
        "linear",
        [x, weight, bias],
        lambda: F.linear(x.double(), weight.double(), None if bias is None else bias.double()),
    )


def make_quantized(m: Maker) -> Call:
    outputs, inputs, bits = m.size(), m.size(32), m.rng.choice([4, 8])
    codes = m.tensor(outputs, inputs, dtype=torch.uint8, high=2**bits)
    scale, offset = (m.tensor(outputs, inputs // 32, dtype=torch.float32) for _ in range(2))
    format = kernels.FORMATS[kernels.FORMAT_OF_BITS[bits]]
    size = kernels.packed_bytes(format.number, outputs, inputs)
    packed = torch.zeros(size, dtype=torch.uint8)
    if m.spoiled():
        packed = m.tensor(m.size() * 32, dtype=torch.uint8, high=256)
    if m.rng.random() < 0.3:
        y = torch.empty(outputs, inputs, dtype=m.dtype)
        return Call(
            "dequantize",
            [codes, scale, offset, m.tensor(outputs, inputs) if m.spoiled() else y],
            lambda: dense(codes, scale, offset),
        )
    try:
        kernels.pack(codes, scale, offset, m.number(bits, 4, 8, 3), packed)
    except ValueError:
        m.tame = False
    rounded = [part.half() for part in (scale, offset)]
    outputs, inputs = m.number(outputs, 0, 16, 17), m.number(inputs, 0, 32, 33)
    format = dataclasses.replace(format, number=m.number(format.number, 0, 2, 13, 14))
    if m.rng.random() < 0.3:
        return Call(
            "dequantize_packed",
            [packed, format, outputs, inputs, m.rng.choice(DTYPES) if m.spoiled() else m.dtype],
            lambda: dense(codes, *rounded),
        )
    x = m.tensor(m.size(), max(0, inputs) % 1000)
    bias = m.tensor(max(0, outputs) % 1000) if m.rng.random() < 0.5 else None
    return Call(
        "quantized_linear",
        [x, packed, bias, format, outputs],
        lambda: x.double() @ dense(codes, *rounded).T + (0 if bias is None else bias.double()),
        2e-3,
    )


def make_stored(m: Maker) -> Call:
    """Rows of blocks in any order; what `pack` writes for their codes is the right result."""
    format = m.rng.choice([found for found in kernels.FORMATS.values() if found.stored])
    rows, count = m.size(), m.size() % 5
    parts = []
    for _ in range(m.rng.choice([1, 1, 2])):
        blocks = m.tensor(rows, count, format.stored, dtype=torch.uint8, high=256)
        order = m.tensor(m.size(), dtype=torch.int64, high=rows) if rows else None
        parts.append(kernels.StoredRows(blocks, m.rng.choice([order, None])))
    size = kernels.packed_bytes(format.number, 2 * max(map(_outputs, parts)), format.unit * count)
    y = torch.zeros(m.number(size, 0, 100) % 2**24, dtype=torch.uint8)
    if m.spoiled():
        format = m.rng.choice([kernels.FORMATS["Q8_OFFSET"], kernels.FORMATS["Q6_K"]])
    return Call("pack_stored", [parts, format, y])


def _outputs(part: kernels.StoredRows) -> int:
    return part.blocks.shape[0] if part.order is None else part.order.numel()


def dense(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """The weights that codes stand for."""
    scale, offset = (part.double().repeat_interleave(32, dim=1) for part in (scale, offset))
    return codes.double() * scale + offset


def make_sums(m: Maker) -> Call:
    x = m.tensor(m.size(), m.size())
    return Call("column_sums", [x], lambda: x.double().sum(0))


def make_loss(m: Maker) -> Call:
    rows, size = m.size(), m.size()
    logits, targets = m.tensor(rows, size), m.tensor(rows, dtype=torch.int64, high=size)
    before = logits.double().clone()
    return Call(
        "cross_entropy",
        [logits, targets, m.rng.choice([0.0, 0.3])],
        lambda: F.cross_entropy(before, targets, reduction="none"),
    )


def make_vocabulary(m: Maker) -> Call:
    m.dtype = torch.float32
    rows, size = m.size() % 6, m.rng.choice([m.size(), 1030, 5000])
    x, keys = m.tensor(rows, size), m.tensor(rows, size)
    least = m.tensor(m.rng.choice([1, rows]), 1)
    count = m.size()
    k = m.number(min(count, size), size, size + 1)
    tokens = m.tensor(count, dtype=torch.int32, high=50_000)
    streams = m.tensor(m.rng.choice([1, rows]), 2, dtype=torch.int32, high=2**31 - 1)
    streams_of_tokens = m.tensor(count, 2, dtype=torch.int32, high=2**31 - 1)
    permuted = m.number(size, 0, 2**26)
    call = m.rng.choice(
        [
            Call("softmax_sums", [x], lambda: softmax_sums(x.double())),
            Call(
                "last_key",
                [x if m.rng.random() < 0.5 else keys, x, m.rng.choice([0.0, 0.5, 0.999, 1.0, 2.0])],
            ),
            Call(
                "keep_from",
                [x, least, keys],
                lambda: torch.where(keys < least, -torch.inf, x).double(),
            ),
            Call("top", [x, k], lambda: x.double().topk(k)[0]),
            Call("draw", [x, streams]),
            Call("exponential", [streams_of_tokens, tokens]),
            Call(
                "permutation",
                [permuted, m.rng.randrange(2**64), m.number(min(count, size), size, 0)],
            ),
        ]
    )
    if call.kernel == "draw" and size == 0:
        m.tame = False  # no token can be drawn
    return call


def softmax_sums(x: Tensor) -> Tensor:
    return x.logsumexp(1, keepdim=True)


def make_causal(m: Maker) -> Call:
    rows, time, kv_heads = m.size() % 4, m.size(), m.size() % 3 + 1
    heads, d = kv_heads * m.rng.choice([0, 1, 2, 3]), m.rng.choice(kernels.HEAD_DIMS)
    q = m.tensor(rows, time, heads, d)
    k, v = (m.tensor(rows, time, kv_heads, d) for _ in range(2))

    def want() -> Tensor:
        group = heads // kv_heads
        parts = [q, *(x.repeat_interleave(group, dim=2) for x in (k, v))]
        y = F.scaled_dot_product_attention(
            *(x.double().transpose(1, 2) for x in parts), is_causal=True
        )
        return y.transpose(1, 2)

    if m.dtype == torch.bfloat16 and m.rng.random() < 0.4:
        rest = [m.tensor(rows, time, heads, d) for _ in range(2)]
        logsums = m.tensor(rows, heads, time, dtype=torch.float32)
        return Call("causal_attention_backward", [q, k, v, rest[0], logsums, rest[1]])
    return Call("attend_causally", [q, k, v], want, 0.02 if m.dtype == torch.bfloat16 else 1e-4)


def make_attention(m: Maker) -> Call:
    trees, rows, kv_heads = m.rng.choice([1, 1, 2, 3]), m.rng.choice([1, 2, 4]), m.size() % 3 + 1
    group, d, length = m.rng.choice([1, 2, 3, 4]), m.rng.choice(kernels.HEAD_DIMS), m.size()
    q = m.tensor(trees * rows, kv_heads * group, d)
    keys, values = (m.tensor(trees * kv_heads, 1, length, d) for _ in range(2))
    mask = None
    if m.rng.random() < 0.5:
        mask = m.tensor(m.rng.choice([1, trees]), rows, length)

    def want() -> Tensor:
        # (trees, kv_heads, group, rows, d) over (trees, kv_heads, 1, length, d)
        queries = q.double().view(trees, rows, kv_heads, group, d).permute(0, 2, 3, 1, 4)
        parts = [x.double().view(trees, kv_heads, 1, length, d) for x in (keys, values)]
        scores = queries @ parts[0].transpose(-1, -2) * d**-0.5
        if mask is not None:
            scores = scores + mask.double()[:, None, None]
        y = scores.softmax(-1) @ parts[1]
        return y.permute(0, 3, 1, 2, 4).reshape(q.shape)

    if length == 0:
        m.tame = False
    return Call("attend", [q, keys, values, mask, m.number(trees, 0, 1, 2, 3)], want)


MAKERS = [
    make_layer, make_rotation, make_product, make_linear, make_quantized, make_stored, make_sums,
    make_loss, make_vocabulary, make_causal, make_attention,
]  # fmt: skip


def run(made: tuple[Call, bool]) -> None:
    """Call the kernel; compare its result, if nothing was spoiled."""
    call, tame = made
    function = getattr(kernels, call.kernel, None) or getattr(attention, call.kernel)
    with torch.no_grad():
        try:
            got = function(*call.arguments)
        except (ValueError, TypeError, IndexError, RuntimeError, OverflowError):
            # Of layouts, only views that kernels write into, or read as they are, may be refused.
            assert not tame or call.kernel in ("product", "cross_entropy", "attend"), call.kernel
            return
        if not tame or call.want is None:
            return
        want = call.want()
    if call.kernel == "product":
        got = call.arguments[2]
    if call.kernel == "softmax_sums":
        got = got[0] + got[1].log()
    if call.kernel == "top":
        got = got[0]
    if call.kernel in ("dequantize", "dequantize_packed"):
        got = call.arguments[3] if call.kernel == "dequantize" else got
    assert got.shape == want.shape, (call.kernel, got.shape, want.shape)
    rounded = 2**-7 * want.abs() if got.dtype == torch.bfloat16 else 0
    largest = want[want.isfinite()].abs().max() if want.isfinite().any() else 0
    close = (got.double() - want).abs() <= rounded + call.error * largest + 1e-6
    same = (got.double() == want) | (got.isnan() & want.isnan())
    assert (close | same).all(), (call.kernel, got, want)


def make(rng: random.Random) -> tuple[Call, bool]:
    maker = Maker(rng)
    call = rng.choice(MAKERS)(maker)
    return call, maker.tame


def test_calls_of_every_kernel(attack: Any) -> None:
    if reason := kernels.why_not():
        pytest.skip(f"gptk's kernels do not run here: {reason}")
    attack(make, run)


@pytest.mark.slow
def test_twenty_thousand_calls_raise_exceptions_at_most() -> None:
    if reason := kernels.why_not():
        pytest.skip(f"gptk's kernels do not run here: {reason}")
    for seed in range(20_000):
        run(make(random.Random(seed)))
