"""The training loss from hidden states, in chunks, so that few logits are in memory at a time.

    logits = h Wᵀ,  loss = mean over positions of -log softmax(logits)[target]
    ∂loss/∂h = G W,  ∂loss/∂W = Gᵀ h,  with G = ∂loss/∂logits

With GPT-2's vocabulary the logits of 8,192 tokens take 1.6 GB in float32, and a plain backward
pass has three such tensors. Here the forward pass already computes the gradients, chunk by chunk:
the logits of some positions, their loss and G in the same buffer, and what G adds to both
gradients. Nothing is computed twice (as in Liger Kernel's fused linear cross entropy, Hsu et al.
2024). On a CPU only a part of each chunk is in float32 at a time.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptk import kernels

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A function of some positions: of their mean cross entropy, their logits, float32, (1, positions,
vocab), and their targets, (1, positions). Returns the value to minimize, a mean over them."""

_CHUNK = 2**25
"""The most logits in a chunk (which has at least one position): 667 positions with GPT-2's
vocabulary, 67 MB in bfloat16. With half as many a step of GPT-2 124M takes 1 % longer."""
_PIECE = 2**20
"""The most logits of a chunk that are in float32 at a time on a CPU: 4 MB."""


def chunked_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, objective: Objective | None = None
) -> tuple[Tensor, Tensor]:
    """Mean cross entropy and objective of hidden states under a head without a bias.

    hidden: (n, width); weight: (vocab, width); targets: (n,). objective: by default the cross
    entropy itself. Matrix products are in autocast's dtype if autocast is on. Only the objective
    has gradients, for `hidden` and `weight`. torch.compile does not compile it.
    """
    pair: tuple[Tensor, Tensor] = _chunked_loss(hidden, weight, targets, objective)
    return pair


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _chunked_loss(*arguments: Any) -> Any:
    if torch.is_grad_enabled():
        return _ChunkedLoss.apply(*arguments)  # type: ignore[no-untyped-call]
    return _in_chunks(*arguments, gradients=False)[:2]


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, objective: Objective | None
    ) -> tuple[Tensor, Tensor]:
        loss, value, *ctx.gradients = _in_chunks(hidden, weight, targets, objective, gradients=True)
        ctx.mark_non_differentiable(loss)
        return loss, value

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        factor, gradients = outer[1], ctx.gradients
        del ctx.gradients  # autograd may make them the parameters' .grad, and change them
        if factor.device.type != "cpu" or factor != 1:  # times 1 would be a pass over all weights
            gradients = [gradient.mul_(factor) for gradient in gradients]
        return *gradients, None, None


def _in_chunks(
    hidden: Tensor, weight: Tensor, targets: Tensor, objective: Objective | None, *, gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, objective, and the objective's gradients for hidden states and weights.

    Without `gradients`, the last two mean nothing.
    """
    kind, n, vocab = hidden.device.type, len(hidden), len(weight)
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else weight.dtype
    rows = -(-n // -(-n * vocab // _CHUNK))
    piece = max(_PIECE // vocab, 1) if kind == "cpu" else rows
    # Each row begins a cache line: the product for the weights' gradient is an eighth faster.
    buffer = hidden.new_empty(rows, -(-vocab // 64) * 64, dtype=dtype)[:, :vocab]
    totals = torch.zeros(2, device=hidden.device)
    hidden_gradient, weight_gradient = hidden, weight
    if gradients:
        hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.empty_like(weight)
    with torch.no_grad(), torch.autocast(kind, enabled=False):
        inputs, matrix = hidden.to(dtype), weight
        if not (dtype == torch.bfloat16 and kernels.should_run_product(hidden, weight)):
            matrix = weight.to(dtype)
        for start in range(0, n, rows):
            h = inputs[start : start + rows]
            logits = buffer[: len(h)]
            _product(h, matrix.t(), logits)
            if objective is None and kernels.can_run_cross_entropy(logits):
                totals += _cross_entropy(logits, targets[start : start + rows], n, gradients)
            else:
                for first in range(0, len(h), piece):
                    part = logits[first : first + piece]
                    part_targets = targets[start + first : start + first + len(part)]
                    totals += _weighted_loss(
                        part, part_targets, objective, len(part) / n, gradients
                    )
            if gradients:
                _product(logits, matrix, hidden_gradient[start : start + rows])
                # Summed in the weights' dtype, whatever that of the product.
                _product(logits.t(), h, weight_gradient, add=start > 0)
    loss, value = totals.unbind()
    return loss, value, hidden_gradient, weight_gradient


def _product(a: Tensor, b: Tensor, y: Tensor, *, add: bool = False) -> None:
    """y = a b, or with `add` y + a b."""
    by_kernel = a.dtype == torch.bfloat16 and kernels.should_run_product(a, b, y)
    if by_kernel and (y.dtype == torch.float32 or not add):
        kernels.product(a, b, y, add=add)
    elif add:
        y += torch.mm(a, b)
    elif y.dtype == a.dtype:
        torch.mm(a, b, out=y)
    else:
        y.copy_(torch.mm(a, b))


def _cross_entropy(logits: Tensor, targets: Tensor, n: int, gradients: bool) -> Tensor:
    """`_weighted_loss` of a whole chunk by a kernel, for the cross entropy as the objective.

    n: the positions of all chunks. Raises IndexError for a target outside the vocabulary.
    """
    low, high = targets.aminmax()
    if not 0 <= low <= high < logits.shape[1]:
        raise IndexError(f"targets from {low} to {high} for a vocabulary of {logits.shape[1]}")
    losses = kernels.cross_entropy(logits, targets, 1 / n if gradients else 0.0)
    return (losses.sum() / n).expand(2)


def _weighted_loss(
    logits: Tensor, targets: Tensor, objective: Objective | None, share: float, gradients: bool
) -> Tensor:
    """Loss and objective of some positions, times their share of all positions.

    With `gradients`, G overwrites the logits.
    """
    with torch.set_grad_enabled(gradients):
        leaf = logits.float().detach().requires_grad_(gradients)
        loss = value = F.cross_entropy(leaf, targets)
        if objective is not None:
            value = objective(loss, leaf[None], targets[None])
        if gradients:
            (gradient,) = torch.autograd.grad(value * share, leaf)
            logits.copy_(gradient)
        return torch.stack((loss.detach(), value.detach().to(loss.dtype))) * share
