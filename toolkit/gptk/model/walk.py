"""Passes over keys and values in blocks by gptk's kernels: all blocks of a GPT in one call.

Python makes a plan once: where which weights lie, and of which kind. What is computed is what the
modules of gptk.model.gpt compute, to the last bit; these are what is read, trained, and run where
the kernels cannot be.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gptk import kernels
from gptk.kernels.structures import Matrix, Norm
from gptk.kernels.walk import matrix_in_panels, model_of, norm_of, quantized_matrix
from gptk.model.attention import attending_of
from gptk.model.attributes import are_found_directly, changes
from gptk.model.gpt import GPT, MLP, Attention, Block
from gptk.model.linear import Linear
from gptk.model.norms import Identity, LayerNorm, RMSNorm
from gptk.model.panels import Panels
from gptk.model.quantization import KernelGroups


class Plan:
    """What a pass through the blocks of a model is made of, as the kernel takes it.

    It holds as long as the model has the same modules, with the same weights and no hooks.
    """

    def __init__(self, model: GPT) -> None:
        """Raises NoPlanError for a model that the kernel cannot walk through."""
        self._changes = changes()
        self._parameters: list[tuple[Tensor, int]] = []
        """Each with its address."""
        self._attributes: list[dict[str, Any]] = []
        self._hooks: list[dict[int, Callable[..., Any]]] = []
        config = model.config
        self._dtype = model.dtype
        _require(config.norms != "after" and not config.parallel and not config.qk_norm_joint)
        layers = range(config.n_layers)
        # Not watched itself: no pass calls its `forward`, and what it holds may hold the model.
        _require(type(model) is GPT and are_found_directly(model))
        self._watch(model.blocks, nn.ModuleList)
        try:
            self.model = model_of(
                self._dtype,
                [self._layer(block) for block in model.blocks],
                self._norm(model.norm),
                windows=[attending_of(config, layer).window or 0 for layer in layers],
                ropes=[0 if rope is None else 1 + rope for rope in map(config.rope_of, layers)],
                activation=config.mlp,
                width=config.width,
                heads=config.n_heads,
                kv_heads=config.n_kv_heads,
                head_size=config.head_dim,
            )
        except ValueError as error:
            raise NoPlanError from error

    @property
    def holds(self) -> bool:
        """Whether the model is still what the plan was made of."""
        return (
            self._changes == changes()
            and not any(self._hooks)
            and not any("forward" in attributes for attributes in self._attributes)
            and all(tensor.data_ptr() == address for tensor, address in self._parameters)
        )

    def _layer(self, block: Any) -> tuple[Norm | Matrix, ...]:
        self._watch(block, Block)
        self._watch(block.attn, Attention)
        self._watch(block.mlp, MLP)
        attention = block.attn
        _require(attention.attending.is_usual)
        return (
            *(self._norm(block.attn_norm), self._norm(attention.q_norm)),
            *(self._norm(attention.k_norm), self._norm(block.attn_post_norm)),
            *(self._norm(block.mlp_norm), self._norm(block.mlp_post_norm)),
            *(self._matrix(attention.qkv), self._matrix(attention.out)),
            *(self._matrix(block.mlp.up), self._matrix(block.mlp.down)),
        )

    def _norm(self, norm: nn.Module | None) -> Norm:
        if norm is None:
            return Norm()
        self._watch(norm, RMSNorm, LayerNorm, Identity)
        if isinstance(norm, Identity):
            return Norm()
        assert isinstance(norm, RMSNorm | LayerNorm)
        weight, bias = self._parameter(norm, "weight"), self._parameter(norm, "bias")
        _require(weight is not None)
        assert weight is not None
        eps = torch.finfo(self._dtype).eps if norm.eps is None else norm.eps
        return norm_of(self._dtype, weight, bias, eps, is_layer_norm=isinstance(norm, LayerNorm))

    def _matrix(self, linear: nn.Module) -> Matrix:
        self._watch(linear, Linear)
        assert isinstance(linear, Linear)
        packed, bias = linear.in_use, self._parameter(linear, "bias")
        if isinstance(packed, Panels):
            return matrix_in_panels(self._dtype, packed.numbers, linear.out_features, bias)
        _require(isinstance(packed, KernelGroups))
        assert isinstance(packed, KernelGroups)
        return quantized_matrix(self._dtype, packed.kernel_segments(), packed.shape[1], bias)

    def _parameter(self, module: nn.Module, name: str) -> Tensor | None:
        """A parameter, if there is one; the plan holds as long as its address is the same."""
        tensor = module._parameters.get(name)
        if tensor is not None:
            self._parameters.append((tensor, tensor.data_ptr()))
        return tensor

    def _watch(self, module: nn.Module, *types: type[nn.Module]) -> None:
        """The module does what its class says, and tells of changes."""
        hooks = module._forward_hooks, module._forward_pre_hooks
        _require(type(module) in types and "forward" not in module.__dict__ and not any(hooks))
        _require(are_found_directly(module))
        self._attributes.append(module.__dict__)
        self._hooks += hooks


class NoPlanError(Exception):
    """A model that the kernel cannot walk through."""


def plan_of(model: GPT) -> Plan | None:
    """The model's plan; None if it has none, or if kernels cannot be run now."""
    if model.device.type != "cpu" or torch.is_grad_enabled() or not kernels.available():
        return None
    known = _plans.get(model)
    if known is not None and known.holds:
        return known
    _plans.pop(model, None)
    try:
        plan = _plans[model] = Plan(model)
    except NoPlanError:
        return None
    return plan


def _require(condition: bool) -> None:
    if not condition:
        raise NoPlanError


_plans: "weakref.WeakKeyDictionary[GPT, Plan]" = weakref.WeakKeyDictionary()
