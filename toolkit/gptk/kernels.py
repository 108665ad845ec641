"""gptk's own kernels, in the folder cpp: compiled once by the machine's compiler, and kept.

PyTorch's kernels for quantized weights are bound by arithmetic on CPUs with AVX-512: they read
SmolLM2's int4 layers at 16 GB/s where memory gives 31. Ours read them at 31. They need Linux, a
processor with AVX-512 and VNNI, and g++ (or what $CXX names); where one is missing, PyTorch's do.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptk import operators
from gptk.data import cache_folder

_SOURCES = Path(__file__).with_name("cpp")
_NEEDED = ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "avx512_vnni", "f16c", "fma3")
_FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-mavx2", "-mfma", "-mf16c"),
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"),
)


def available() -> bool:
    """Whether this machine can run them; the first call compiles them, in a few seconds."""
    return reason_against() is None


def reason_against() -> str | None:
    """Why this machine cannot run them, or None."""
    library = _library()
    return library if isinstance(library, str) else None


def suit(x: Tensor, other: Tensor) -> bool:
    """Whether they can be run on x, for a result that needs no gradient.

    other: what has to be of x's dtype.
    """
    dtype = x.dtype
    return (
        (dtype == torch.bfloat16 or dtype == torch.float32)
        and dtype == other.dtype
        and x.is_cpu
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and available()
    )


def suit_causal_attention(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attend_causally` should be run. Under a compiler only once `available` was asked.

    Not for gradients in float32: there a step is the book's to the last digits that AdamW leaves,
    with PyTorch's operations a little closer than with ours.
    """
    dtype = q.dtype
    alone = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    return (
        (dtype == torch.bfloat16 or (dtype == torch.float32 and alone))
        and dtype == k.dtype == v.dtype
        and q.is_cpu
        and q.shape[3] in HEAD_DIMS
        and (operators.defined() if torch.compiler.is_compiling() else available())
    )


def suit_products(*given: Tensor) -> bool:
    """Whether `product` can be run on these, and is the fastest there is: on processors with
    AVX512-BF16 that have no AMX. Under a compiler only once `available` was asked.
    """
    return (
        all(x.is_cpu and x.dtype in (torch.bfloat16, torch.float32) for x in given)
        and _multiplies_bfloat16()
        and (operators.defined() if torch.compiler.is_compiling() else available())
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
@functools.cache
def _multiplies_bfloat16() -> bool:
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16")) and not has.get("amx_bf16") and not has.get("amx_tile")


def product(
    a: Tensor, b: Tensor, y: Tensor, bias: Tensor | None = None, *, add: bool = False
) -> None:
    """y = a b, plus the bias, plus y itself, float32, with `add`; in bfloat16, summed in float32.

    a: (rows, depth), bfloat16; b: (depth, columns) and y: (rows, columns), bfloat16 or float32,
    which is rounded on the way; bias: (columns,), float32. y's rows are without gaps.
    """
    assert y.dtype == torch.float32 or not add
    a, b = (x if 1 in x.stride() else x.contiguous() for x in (a, b))
    a_along, b_along = a.stride(1) == 1, b.stride(0) == 1
    _run().gptk_product(
        *(a.data_ptr(), a.stride(0 if a_along else 1), a_along),
        *(b.dtype == torch.bfloat16, b.data_ptr(), b.stride(1 if b_along else 0), b_along),
        *(y.dtype == torch.bfloat16, y.data_ptr(), y.stride(0)),
        *(None if bias is None else bias.data_ptr(), add, *y.shape, a.shape[1]),
    )


def autocast_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (…, inputs) times weights (outputs, inputs), plus the bias, as under autocast: bfloat16.

    weight and bias: float32, as their gradients are.
    """
    rows = x.flatten(0, -2).to(torch.bfloat16)
    y: Tensor = torch.ops.gptk.product(rows, weight.t(), bias, False)
    return y.view(*x.shape[:-1], len(weight))


def _product(a: Tensor, b: Tensor, bias: Tensor | None, single: bool) -> Tensor:
    y = a.new_empty(len(a), b.shape[1], dtype=torch.float32 if single else torch.bfloat16)
    product(a, b, y, None if bias is None else bias.float())
    return y


def column_sums(x: Tensor) -> Tensor:
    """The sums of the columns of x (rows, columns), float32."""
    x = x.contiguous()
    y = x.new_empty(x.shape[1], dtype=torch.float32)
    _run().gptk_column_sums(x.dtype == torch.bfloat16, x.data_ptr(), y.data_ptr(), *x.shape)
    return y


def suit_cross_entropy(logits: Tensor) -> bool:
    """Whether `cross_entropy` can be run."""
    return logits.is_cpu and logits.dtype in (torch.bfloat16, torch.float32) and available()


def cross_entropy(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    """-log softmax(logits)[target] of each row: (rows,), float32.

    logits: (rows, vocab), bfloat16 or float32, rows without gaps; targets: (rows,). In the logits'
    place stands then scale · their gradient, unless scale is 0.
    """
    targets = targets.contiguous()
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    _run().gptk_cross_entropy(
        *(logits.dtype == torch.bfloat16, logits.data_ptr(), targets.data_ptr()),
        *(losses.data_ptr(), scale, *logits.shape, logits.stride(0)),
    )
    return losses


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean x² + eps) · weight over the last axis, of a size that 16 divides."""
    x = x.contiguous()
    y, size = torch.empty_like(x), x.shape[-1]
    _run().gptk_rms_norm(
        *(x.dtype == torch.bfloat16, x.data_ptr(), weight.data_ptr(), eps, y.data_ptr()),
        *(x.numel() // size, size),
    )
    return y


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) · up. x: (…, gate and up), each of a size that 16 divides."""
    x = x.contiguous()
    size = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], size)
    _run().gptk_swiglu(
        x.dtype == torch.bfloat16, x.data_ptr(), y.data_ptr(), x.numel() // (2 * size), size
    )
    return y


def suit_gelu(x: Tensor) -> bool:
    """Whether `gelu` should be run; a compiler makes as good a one of PyTorch's.

    For float32 see `suit_causal_attention`.
    """
    alone = not torch.is_grad_enabled()
    return (
        x.is_cpu
        and (x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and alone))
        and not torch.compiler.is_compiling()
        and available()
    )


def gelu(x: Tensor) -> Tensor:
    """GELU by tanh, as GPT-2 has it, with gradients where they are on."""
    if torch.is_grad_enabled():
        y: Tensor = torch.ops.gptk.gelu(x)
        return y
    return _gelu(x, None)


def _gelu(x: Tensor, dy: Tensor | None) -> Tensor:
    x = x.contiguous()
    if dy is not None:
        dy = dy.contiguous()
    y = torch.empty_like(x)
    _run().gptk_gelu(
        *(x.dtype == torch.bfloat16, x.data_ptr(), None if dy is None else dy.data_ptr()),
        *(y.data_ptr(), x.numel()),
    )
    return y


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """gptk.model.rotate, for heads of a size that 32 divides."""
    x, cosines, sines = x.contiguous(), cosines.contiguous(), sines.contiguous()
    y, size = torch.empty_like(x), x.shape[-1]
    _run().gptk_rotate(
        *(x.dtype == torch.bfloat16, x.data_ptr(), cosines.data_ptr(), sines.data_ptr()),
        *(y.data_ptr(), x.numel() // size, cosines.numel() // size, size),
    )
    return y


def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, trees: int) -> Tensor:
    """softmax(q kᵀ / √d + mask) v for few queries: (rows, heads, d), as q is.

    q: (rows, heads, d), the rows of a tree next to each other, and heads without gaps; keys and
    values: (trees · kv_heads, 1, length, d), of one layout, the keys of a head without gaps; mask:
    (1 or trees, rows of a tree, length), for all heads. d: one of HEAD_DIMS.
    """
    rows, heads, d = q.shape
    y = q.new_empty(rows, heads, d)
    tree_stride = mask_stride = 0
    if mask is not None:
        tree_stride, mask_stride = mask.stride(0) if len(mask) > 1 else 0, mask.stride(1)
    batch, _, length, _ = keys.shape
    _run().gptk_attend(
        *(q.dtype == torch.bfloat16, q.data_ptr(), keys.data_ptr(), values.data_ptr()),
        *(None if mask is None else mask.data_ptr(), y.data_ptr(), d**-0.5),
        *(trees, rows // trees, heads, batch // trees, length, d),
        *(q.stride(0), keys.stride(0), tree_stride, mask_stride),
    )
    return y


def attend_causally(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """gptk.model.attend_causally, as (rows, time, heads, d). d: one of HEAD_DIMS.

    With gradients in bfloat16, where they are on.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        y: Tensor = torch.ops.gptk.causal_attention(q, k, v)[0]
        return y
    return _attend_causally(q, k, v, None)


def _attend_causally(q: Tensor, k: Tensor, v: Tensor, logsums: Tensor | None) -> Tensor:
    q, k, v = _strided(q, k, v)
    rows, time, heads, d = q.shape
    y = q.new_empty(rows, time, heads, d)
    _run().gptk_attend_causally(
        *(q.dtype == torch.bfloat16, q.data_ptr(), k.data_ptr(), v.data_ptr(), y.data_ptr()),
        *(None if logsums is None else logsums.data_ptr(), *_causal(q, k)),
    )
    return y


def _strided(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Without gaps between heads, and keys and values with the same strides."""
    q, k, v = (x if x.stride()[2:] == (x.shape[3], 1) else x.contiguous() for x in (q, k, v))
    return (q, k, v) if k.stride() == v.stride() else (q, k.contiguous(), v.contiguous())


def _causal(q: Tensor, k: Tensor) -> tuple[float, *tuple[int, ...]]:
    rows, time, heads, d = q.shape
    return (d**-0.5, rows, time, heads, k.shape[2], d, *q.stride()[:2], *k.stride()[:2])


def _causal_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and log Σ exp of each query's scores: (rows, heads, time)."""
    logsums = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    return _attend_causally(q, k, v, logsums), logsums


def _causal_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, y: Tensor, logsums: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    assert q.dtype == torch.bfloat16, "see suit_causal_attention"
    q, k, v = _strided(q, k, v)
    y, logsums, dy = y.contiguous(), logsums.contiguous(), dy.contiguous()
    made = [x.new_empty(x.shape) for x in (q, k, v)]
    _run().gptk_attend_causally_backward(
        *(x.data_ptr() for x in (q, k, v, y, dy, logsums, *made)), *_causal(q, k)
    )
    return made[0], made[1], made[2]


def exponential(keys: Tensor, tokens: Tensor) -> Tensor:
    """gptk.random.exponential: (count,) for one key (2,), or (count, 2). All int32."""
    keys, tokens = keys.contiguous(), tokens.contiguous()
    y = tokens.new_empty(tokens.shape, dtype=torch.float32)
    _run().gptk_exponential(
        *(keys.data_ptr(), keys.stride(0) if keys.dim() == 2 else 0, tokens.data_ptr()),
        *(y.data_ptr(), len(tokens)),
    )
    return y


def sums(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of x (rows, size) float32, the highest number and Σ w and Σ w · (x - highest).

    w = exp(x - highest). Returns (rows, 1) each.
    """
    x = x.contiguous()
    highest, weight, weighted = x.new_empty(3, len(x), 1).unbind()
    _run().gptk_sums(
        *(x.data_ptr(), highest.data_ptr(), weight.data_ptr(), weighted.data_ptr(), *x.shape)
    )
    return highest, weight, weighted


def last_key(keys: Tensor, logits: Tensor, p: float) -> Tensor:
    """gptk.vocabulary.last_key."""
    same = keys is logits
    logits = logits.contiguous()
    keys = logits if same else keys.contiguous()
    y = keys.new_empty(len(keys), 1)
    _run().gptk_last_key(keys.data_ptr(), logits.data_ptr(), p, y.data_ptr(), *keys.shape)
    return y


def keep_from(x: Tensor, least: Tensor, keys: Tensor) -> Tensor:
    """gptk.vocabulary.keep_from."""
    x, keys = x.contiguous(), keys.expand_as(x).contiguous()
    least = least.expand(len(x), 1).contiguous()
    y = torch.empty_like(x)
    _run().gptk_keep_from(
        *(x.data_ptr(), least.data_ptr(), keys.data_ptr(), y.data_ptr(), *x.shape)
    )
    return y


def top(x: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """gptk.vocabulary.top, the first of equal numbers first; None if some are NaN."""
    x = x.contiguous()
    values, tokens = x.new_empty(len(x), k), x.new_empty(len(x), k, dtype=torch.int64)
    found = x.new_empty(len(x), dtype=torch.int32)
    _run().gptk_top(
        *(x.data_ptr(), values.data_ptr(), tokens.data_ptr(), found.data_ptr(), *x.shape, k)
    )
    return (values, tokens) if all(found.tolist()) else None


def draw(logits: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """gptk.random.draw."""
    logits, keys = logits.contiguous(), keys.expand(len(logits), 2).contiguous()
    tokens, logprobs = keys.new_empty(len(keys), dtype=torch.int64), logits.new_empty(len(keys))
    _run().gptk_draw(
        *(logits.data_ptr(), keys.data_ptr(), tokens.data_ptr(), logprobs.data_ptr()),
        *logits.shape,
    )
    return tokens, logprobs


def permutation(size: int, seed: int, count: int) -> Tensor:
    """gptk.vocabulary.permutation, of fewer than 2²⁷ numbers."""
    y = torch.empty(count, dtype=torch.int32)
    _run().gptk_permutation(seed & 0xFFFFFFFF, size, count, y.data_ptr())
    return y


HEAD_DIMS = (32, 64, 96, 128)
FEW_QUERIES = 16
"""From there on PyTorch's attention is faster, which takes queries together."""


def linear(x: Tensor, weights: Tensor, bias: Tensor | None, bits: int, outputs: int) -> Tensor:
    """x (rows, inputs) times weights in groups of 32, plus the bias: (rows, outputs), as x is.

    weights: uint8, as gptk.quantization.Groups packs them; bits: 4 or 8.
    """
    x = x.contiguous()
    if torch.compiler.is_compiling():
        y: Tensor = torch.ops.gptk.few_rows_linear(x, weights, bits, outputs)
        return y if bias is None else y + bias
    return _linear(x, weights, bias, bits, outputs)


def _linear(x: Tensor, weights: Tensor, bias: Tensor | None, bits: int, outputs: int) -> Tensor:
    if bias is not None:
        bias = bias.to(x.dtype)
    rows, inputs = x.shape
    y = x.new_empty(rows, outputs)
    _run().gptk_linear(
        *(x.dtype == torch.bfloat16, bits, x.data_ptr(), weights.data_ptr()),
        *(None if bias is None else bias.data_ptr(), y.data_ptr(), rows, inputs, outputs),
    )
    return y


def dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (…, inputs) times weights as they are, (outputs, inputs), plus the bias, for few rows.

    All of one dtype; inputs a multiple of 32. See FEW_ROWS.
    """
    outputs, inputs = weight.shape
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], outputs)
    _run().gptk_dense(
        *(x.dtype == torch.bfloat16, x.data_ptr(), weight.data_ptr()),
        *(None if bias is None else bias.data_ptr(), y.data_ptr()),
        *(x.numel() // inputs, inputs, outputs),
    )
    return y


FEW_ROWS = {torch.float32: 24, torch.bfloat16: 32}
"""From there on PyTorch's products are as fast."""


def pack(codes: Tensor, scale: Tensor, offset: Tensor, bits: int, y: Tensor) -> None:
    """The weights of `linear` from those of some gptk.Levels, into y: uint8, 16 outputs a block."""
    codes, scale, offset = codes.contiguous(), scale.contiguous(), offset.contiguous()
    _run().gptk_pack(
        *(bits, codes.data_ptr(), scale.data_ptr(), offset.data_ptr(), y.data_ptr(), *codes.shape)
    )


def dequantize(codes: Tensor, scale: Tensor, offset: Tensor, y: Tensor) -> None:
    """y = codes · scale + offset for some gptk.Levels, into y: float32 or bfloat16, contiguous."""
    codes, scale, offset = codes.contiguous(), scale.contiguous(), offset.contiguous()
    _run().gptk_dequantize(
        *(y.dtype == torch.bfloat16, codes.data_ptr(), scale.data_ptr(), offset.data_ptr()),
        *(y.data_ptr(), scale.numel()),
    )


def expand(weights: Tensor, bits: int, outputs: int, inputs: int, dtype: torch.dtype) -> Tensor:
    """The weights of `linear` as numbers: (outputs, inputs), bfloat16 or float32."""
    y = weights.new_empty(outputs, inputs, dtype=dtype)
    _run().gptk_expand(
        dtype == torch.bfloat16, bits, weights.data_ptr(), y.data_ptr(), inputs, outputs
    )
    return y


def shims() -> dict[Any, list[str]]:
    """For AOTInductor: how its programs call them without PyTorch's dispatcher between."""
    if not available():
        return {}
    function = (
        "AOTITorchError aoti_torch_cpu_few_rows_linear(AtenTensorHandle x, "
        "AtenTensorHandle weights, int64_t bits, int64_t outputs, AtenTensorHandle* y)"
    )
    return {torch.ops.gptk.few_rows_linear.default: [function]}


def _run() -> ctypes.CDLL:
    library = _library()
    assert not isinstance(library, str), library
    return library


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The kernels, loaded; or why they cannot be."""
    if sys.platform != "linux":
        return "they need Linux"
    has = torch.cpu.get_capabilities()
    if missing := [one for one in _NEEDED if not has.get(one)]:
        return f"the processor has no {', '.join(missing)}"
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if not compiler:
        return "there is no C++ compiler: neither g++ nor $CXX"
    flags = (*_FLAGS, "-mavx512bf16") if has.get("avx512_bf16") else _FLAGS
    sources = [path.read_text() for path in sorted(_SOURCES.iterdir())]
    key = (*sources, torch.__version__, compiler, *flags)
    path = cache_folder() / f"kernels-{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}.so"
    with contextlib.suppress(OSError):
        return _load(path)  # raises OSError where the file is missing or damaged
    try:
        _compile([*shlex.split(compiler), *flags], path)
        return _load(path)
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        return f"{compiler} fails: {said or error}"
    except OSError as error:
        return str(error)


def _compile(compiler: list[str], path: Path) -> None:
    if sys.stderr and sys.stderr.isatty():
        print("gptk: compiling its kernels for this machine, once…", file=sys.stderr)
    libraries = Path(torch.__file__).parent / "lib"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, ThreadPoolExecutor() as pool:

        def run(*words: str) -> None:
            subprocess.run([*compiler, *words], check=True, capture_output=True)

        parts = {str(one): f"{folder}/{one.stem}.o" for one in _SOURCES.glob("*.cpp")}
        list(pool.map(lambda part: run("-c", part[0], "-o", part[1]), parts.items()))
        made = Path(folder) / path.name
        run(*parts.values(), f"-L{libraries}", "-ltorch_cpu", "-o", str(made))
        made.replace(path)


def _load(path: Path) -> ctypes.CDLL:
    # Global, so that a program by AOTInductor finds them.
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    flag, real, to, size = ctypes.c_int, ctypes.c_float, ctypes.c_void_p, ctypes.c_int64
    takes: dict[str, list[Any]] = {
        "gptk_linear": [flag, flag, to, to, to, to, size, size, size],
        "gptk_dense": [flag, to, to, to, to, size, size, size],
        "gptk_pack": [flag, to, to, to, to, size, size],
        "gptk_dequantize": [flag, to, to, to, to, size],
        "gptk_expand": [flag, flag, to, to, size, size],
        "gptk_product": [
            to,
            size,
            flag,
            flag,
            to,
            size,
            flag,
            flag,
            to,
            size,
            to,
            flag,
            *[size] * 3,
        ],
        "gptk_column_sums": [flag, to, to, size, size],
        "gptk_cross_entropy": [flag, to, to, to, real, size, size, size],
        "gptk_rms_norm": [flag, to, to, real, to, size, size],
        "gptk_swiglu": [flag, to, to, size, size],
        "gptk_gelu": [flag, to, to, to, size],
        "gptk_rotate": [flag, to, to, to, to, size, size, size],
        "gptk_exponential": [to, size, to, to, size],
        "gptk_sums": [to, to, to, to, size, size],
        "gptk_last_key": [to, to, ctypes.c_double, to, size, size],
        "gptk_keep_from": [to, to, to, to, size, size],
        "gptk_top": [to, to, to, to, size, size, size],
        "gptk_draw": [to, to, to, to, size, size],
        "gptk_permutation": [size, size, size, to],
        "gptk_attend_causally": [flag, *[to] * 5, real, *[size] * 9],
        "gptk_attend_causally_backward": [*[to] * 9, real, *[size] * 9],
        "gptk_attend": [flag, to, to, to, to, to, real, *[size] * 10],
    }
    for name, types in takes.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
    operators.define(
        few_rows_linear=lambda x, *rest: _linear(x, rest[0], None, *rest[1:]),
        product=_product,
        column_sums=column_sums,
        gelu=lambda x: _gelu(x, None),
        gelu_backward=_gelu,
        causal_attention=_causal_attention,
        causal_attention_backward=_causal_attention_backward,
    )
    return library
