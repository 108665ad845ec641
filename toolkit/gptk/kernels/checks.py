"""Whether the kernels can be run, on this machine and on these tensors, and whether they should.

They should be run where they are the fastest implementation, and exact enough.
"""

import torch
from torch import Tensor

from gptk.kernels import operators
from gptk.kernels.attention import HEAD_DIMS
from gptk.kernels.build import load
from gptk.system.devices import has_fast_products
from gptk.system.processor import features

enabled = True
"""If False, PyTorch's operations are used, as on a machine that cannot run the kernels."""


def available() -> bool:
    """Whether this machine can run the kernels. The first call compiles them, in a few seconds."""
    # Asked a hundred times for each token; once all is loaded, `why_not` has nothing to do.
    return (enabled and operators.defined() and not isinstance(load(), str)) or why_not() is None


def why_not() -> str | None:
    """Why gptk's kernels do not run here, and what to do about it; None if they run.

    A clause for a message, such as "there is no C++ compiler; install g++". The first call compiles
    the kernels, or loads them, and defines PyTorch's operators for them.
    """
    if not enabled:
        return "they are switched off"
    loaded = load()
    if isinstance(loaded, str):
        return loaded
    operators.define()
    _products_are_fast()
    return None


def instructions() -> str | None:
    """The instruction set that the kernels run with, such as `avx512-bf16`; None if none run."""
    loaded = load() if enabled else ""
    return None if isinstance(loaded, str) else loaded.instructions.name


def described() -> str:
    """Which kernels run, for people: those of gptk and their instruction set, or why none do."""
    if reason := why_not():
        return f"PyTorch ({reason})"
    loaded = load()
    assert not isinstance(loaded, str)
    origin = "installed with gptk" if loaded.installed else "compiled on this machine"
    return f"gptk ({loaded.instructions.words}, {origin}) and PyTorch"


def can_run(x: Tensor, other: Tensor) -> bool:
    """Whether kernels without gradients can be run on x.

    other: another operand, which must have x's dtype.
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


def should_run_causal_attention(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attend_causally` should be run.

    Not in float32 with gradients: float32 training stays on PyTorch's operations, to match the
    book within 1e-5. While a compiler traces, only if `available` was called before.
    """
    dtype = q.dtype
    inference = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    return (
        (dtype == torch.bfloat16 or (dtype == torch.float32 and inference))
        and dtype == k.dtype == v.dtype
        and q.is_cpu
        and q.shape[3] in HEAD_DIMS
        and (operators.defined() if torch.compiler.is_compiling() else available())
    )


def should_run_product(*operands: Tensor) -> bool:
    """Whether `product` can be run on these, and is the fastest there is.

    It is with AVX-512 on processors that have no AMX, and elsewhere where PyTorch has no fast
    products in bfloat16: a hundred times with AVX2. While a compiler traces, only if `available`
    was called before.
    """
    return (
        all(x.is_cpu and x.dtype in (torch.bfloat16, torch.float32) for x in operands)
        and _products_are_fast()
        and (operators.defined() if torch.compiler.is_compiling() else available())
    )


def _products_are_fast() -> bool:
    """Found out once. `why_not` asks before a compiler traces: by a decorator,
    torch.compiler.assume_constant_result, torch._dynamo would be imported, which takes a second."""
    if not _found:
        loaded = load()
        if isinstance(loaded, str):
            return False
        if loaded.instructions.name.startswith("avx512"):
            _found.append(not features() & {"amx_bf16", "amx_tile"})
        else:
            _found.append(not has_fast_products(torch.bfloat16))
    return _found[0]


_found: list[bool] = []


def can_run_cross_entropy(logits: Tensor) -> bool:
    """Whether `cross_entropy` can be run."""
    return logits.is_cpu and logits.dtype in (torch.bfloat16, torch.float32) and available()


def should_run_gelu(x: Tensor) -> bool:
    """Whether `gelu` should be run.

    Not while a compiler traces, which makes as fast a kernel of PyTorch's operations, and not in
    float32 with gradients, see `should_run_causal_attention`.
    """
    inference = not torch.is_grad_enabled()
    return (
        x.is_cpu
        and (x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and inference))
        and not torch.compiler.is_compiling()
        and available()
    )
