"""The training loss from hidden states, in chunks: however large a batch, few logits at a time.

    logits = h Wᵀ,  loss = mean over positions of -log softmax(logits)[target]
    ∂loss/∂h = G W,  ∂loss/∂W = Gᵀ h,  with G = ∂loss/∂logits

With GPT-2's vocabulary the logits of 8,192 tokens take 1.6 GB in float32, and a plain backward
pass has three such tensors. Here a chunk of positions goes through all of this at once: its logits,
loss and G in one buffer, and what G adds to both gradients; nothing is computed twice (as in Liger
Kernel's fused linear cross entropy, Hsu et al. 2024). On a CPU only a few positions at a time are
in float32.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptk import kernels

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""What is minimized, from the mean cross entropy of some positions, their logits, float32,
(1, positions, vocab), and their targets, (1, positions): itself a mean over positions."""

_CHUNK = 2**25
"""Logits at a time, at most (but those of one position): 667 positions with GPT-2's vocabulary,
67 MB in bfloat16. With half of it a step of GPT-2 124M takes 1 % longer."""
_PIECE = 2**20
"""Of them on a CPU, those whose loss is computed at a time: 4 MB."""


def chunked_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, objective: Objective | None = None
) -> tuple[Tensor, Tensor]:
    """Mean cross entropy and objective of hidden states under a head without a bias.

    hidden: (n, width); weight: (vocab, width); targets: (n,). objective: by default the cross
    entropy itself. Products are in autocast's dtype, where it is on. Only the second result has
    gradients, for `hidden` and `weight`. torch.compile leaves it as it is.
    """
    pair: tuple[Tensor, Tensor] = _chunked_loss(hidden, weight, targets, objective)
    return pair


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _chunked_loss(*given: Any) -> Any:
    if torch.is_grad_enabled():
        return _ChunkedLoss.apply(*given)  # type: ignore[no-untyped-call]
    return _in_chunks(*given, gradients=False)[:2]


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
        del ctx.gradients  # they may be the parameters' own from now on
        if factor.device.type != "cpu" or factor != 1:  # one pass over a large matrix less
            gradients = [one.mul_(factor) for one in gradients]
        return *gradients, None, None


def _in_chunks(
    hidden: Tensor, weight: Tensor, targets: Tensor, objective: Objective | None, *, gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, objective, and the gradients of the objective for hidden states and weights."""
    kind, n, vocab = hidden.device.type, len(hidden), len(weight)
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else weight.dtype
    rows = -(-n // -(-n * vocab // _CHUNK))
    piece = max(_PIECE // vocab, 1) if kind == "cpu" else rows
    # Rows of whole cache lines: the product for the weights is an eighth faster.
    buffer = hidden.new_empty(rows, -(-vocab // 64) * 64, dtype=dtype)[:, :vocab]
    totals = torch.zeros(2, device=hidden.device)
    hidden_gradient, weight_gradient = hidden, weight
    if gradients:
        hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.empty_like(weight)
    with torch.no_grad(), torch.autocast(kind, enabled=False):
        inputs, matrix = hidden.to(dtype), weight
        if not (dtype == torch.bfloat16 and kernels.suit_products(hidden, weight)):
            matrix = weight.to(dtype)
        for at in range(0, n, rows):
            h = inputs[at : at + rows]
            logits = buffer[: len(h)]
            _product(h, matrix.t(), logits)
            if objective is None and kernels.suit_cross_entropy(logits):
                wanted = targets[at : at + rows]
                totals += _cross_entropy(logits, wanted, n, gradients)
            else:
                for first in range(0, len(h), piece):
                    part = logits[first : first + piece]
                    wanted = targets[at + first : at + first + len(part)]
                    totals += _loss(part, wanted, objective, len(part) / n, gradients)
            if gradients:
                _product(logits, matrix, hidden_gradient[at : at + rows])
                # Summed in float32, whatever the product is in.
                _product(logits.t(), h, weight_gradient, add=at > 0)
    loss, value = totals.unbind()
    return loss, value, hidden_gradient, weight_gradient


def _product(a: Tensor, b: Tensor, y: Tensor, *, add: bool = False) -> None:
    """y = a b, or with `add` y + a b."""
    own = a.dtype == torch.bfloat16 and kernels.suit_products(a, b, y)
    if own and (y.dtype == torch.float32 or not add):
        kernels.product(a, b, y, add=add)
    elif add:
        y += torch.mm(a, b)
    elif y.dtype == a.dtype:
        torch.mm(a, b, out=y)
    else:
        y.copy_(torch.mm(a, b))


def _cross_entropy(logits: Tensor, targets: Tensor, n: int, gradients: bool) -> Tensor:
    """As `_loss` of all of a chunk's positions, where nothing else looks at their logits.

    n: the positions of all chunks. Raises IndexError for a target that is no token.
    """
    low, high = targets.aminmax()
    if not 0 <= low <= high < logits.shape[1]:
        raise IndexError(f"targets from {low} to {high} for a vocabulary of {logits.shape[1]}")
    losses = kernels.cross_entropy(logits, targets, 1 / n if gradients else 0.0)
    return (losses.sum() / n).expand(2)


def _loss(
    logits: Tensor, targets: Tensor, objective: Objective | None, share: float, gradients: bool
) -> Tensor:
    """Loss and objective of some positions, times their share of all; G in the logits' place."""
    with torch.set_grad_enabled(gradients):
        leaf = logits.float().detach().requires_grad_(gradients)
        loss = value = F.cross_entropy(leaf, targets)
        if objective is not None:
            value = objective(loss, leaf[None], targets[None])
        if gradients:
            (gradient,) = torch.autograd.grad(value * share, leaf)
            logits.copy_(gradient)
        return torch.stack((loss.detach(), value.detach().to(loss.dtype))) * share
