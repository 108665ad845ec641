"""The loss of a batch of tokens, and the objective: the loss as regularizers change it."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptk import kernels
from gptk.errors import TrainingError
from gptk.hooks.training import Regularizer
from gptk.model.gpt import GPT
from gptk.model.linear import Linear
from gptk.plugins.blame import expect
from gptk.system.compiled_code import use_private_inductor_folder
from gptk.training import processes as distributed
from gptk.training.loader import Batch
from gptk.training.objective import Objective, chunked_loss
from gptk.training.processes import Processes
from gptk.training.recomputation import ActivationCheckpointing


class BatchLoss:
    """Loss and objective of a batch under a model, in one process or several.

    Both are means over the positions of the batch: the loss is the cross entropy, the objective
    is what training minimizes. Logits are computed in chunks, unless a regularizer needs those of
    the whole batch or the head is not a plain matrix.

    dtype: of autocast. compile: use torch.compile, with `shard` on each block. recompute: use
    activation checkpointing.
    """

    def __init__(
        self,
        model: GPT,
        regularizers: Sequence[Regularizer],
        processes: Processes,
        *,
        dtype: torch.dtype,
        shard: bool,
        compile: bool,
        recompute: bool,
    ) -> None:
        self._model, self._dtype = model, dtype
        self._processes, self._shard = processes, shard
        changing = [regularizer for regularizer in regularizers if _changes_loss(regularizer)]
        self._on_weights = [r for r in changing if r.logits == "none"]
        self._on_logits = [r for r in changing if r.logits != "none"]
        needed = any(r.logits == "batch" for r in self._on_logits)
        self._whole_logits = needed or not _has_plain_head(model)
        self._recomputation = ActivationCheckpointing(model.blocks) if recompute else None
        module = _NextToken(
            model,
            chunked=not self._whole_logits,
            objective=self._regularized if self._on_logits else None,
        )
        if compile:
            kernels.available()  # registers the kernels' operators, before torch.compile traces
            try:
                use_private_inductor_folder()
            except OSError as error:
                raise TrainingError(f"the model cannot be compiled: {error}") from None
            for part in model.blocks if shard else [module]:
                part.compile()
        self._module = processes.parallelize(module, model.blocks, shard=shard)

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss and objective; in evaluation mode both are the loss."""
        device, training = self._model.device, self._model.training
        inputs, targets = (part.to(device, non_blocking=True) for part in batch)
        with self._forward_context():
            result = self._module(inputs, targets)
        if self._whole_logits:
            loss = objective = F.cross_entropy(result.flatten(0, 1), targets.flatten())
            if training:
                objective = self._regularized(loss, result, targets)
        else:
            loss, objective = result
        if training and self._on_weights:  # these get logits of no positions
            logits = torch.empty(1, 0, self._model.config.vocab_size, device=device)
            objective = _regularize(
                self._on_weights, self._model, objective, logits, targets[:1, :0]
            )
        return loss, objective

    def without_sync(self) -> AbstractContextManager[None]:
        """Backward passes inside only accumulate gradients; one outside averages over processes."""
        if self._processes.count == 1:
            return nullcontext()
        return distributed.without_sync(self._module)

    def reshard(self) -> None:
        """Free the whole weights that forward passes without a backward pass have gathered."""
        if self._shard:
            distributed.reshard(self._module)

    def _forward_context(self) -> ExitStack:
        """Autocast, and activation checkpointing where a backward pass may follow."""
        stack = ExitStack()
        kind = self._model.device.type
        stack.enter_context(torch.autocast(kind, self._dtype, enabled=self._dtype != torch.float32))
        if self._recomputation is not None and torch.is_grad_enabled():
            stack.enter_context(self._recomputation.enabled())
        return stack

    def _regularized(self, loss: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of positions, changed by the regularizers that read their logits."""
        return _regularize(self._on_logits, self._model, loss, logits, targets)


class _NextToken(nn.Module):
    """Predicts the next tokens: the one module that torch.compile, DDP and FSDP2 wrap.

    With `chunked` it returns loss and objective (in training mode that of `objective`), else the
    logits.
    """

    def __init__(self, model: GPT, *, chunked: bool, objective: Objective | None) -> None:
        super().__init__()
        self.model = model
        self._chunked, self._objective = chunked, objective

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        hidden: Tensor = self.model(ids)
        if not self._chunked:
            return self.model.logits(hidden)
        return chunked_loss(
            hidden.flatten(0, 1),
            self.model.head.weight,
            targets.flatten(),
            self._objective if self.model.training else None,
        )


def _changes_loss(regularizer: Regularizer) -> bool:
    """Whether it changes the loss or adds a penalty, and not only gradients or weights."""
    kind = type(regularizer)
    return kind.loss is not Regularizer.loss or kind.penalty is not Regularizer.penalty


def _has_plain_head(model: GPT) -> bool:
    """Whether logits are a product with the head's weights and no more; a plug-in may change it."""
    head = model.head
    return type(head) is Linear and head.bias is None and type(model).logits is GPT.logits


def _regularize(
    regularizers: Iterable[Regularizer], model: GPT, loss: Tensor, logits: Tensor, targets: Tensor
) -> Tensor:
    """The loss, changed by each regularizer in turn, plus the penalties of all."""
    objective = loss
    for regularizer in regularizers:
        changed = regularizer.loss(objective, logits, targets)
        objective = expect(regularizer, "loss", changed, Tensor, "a tensor, the loss")
    for regularizer in regularizers:
        penalty = regularizer.penalty(model, logits, targets)
        objective = objective + expect(
            regularizer, "penalty", penalty, (Tensor, Real), "a tensor or a number"
        )
    return objective
