"""AdamW (Loshchilov and Hutter 2019), with parameter groups that the regularizers choose."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gptk.hooks.training import Regularizer
from gptk.plugins.blame import blaming, expect
from gptk.training.config import TrainConfig


def make_optimizer(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    regularizers: Sequence[Regularizer],
    config: TrainConfig,
) -> torch.optim.AdamW:
    """The optimizer of a model's parameters, by name; its groups also have an lr_scale."""
    with blaming(regularizers):
        groups = _parameter_groups(model, parameters, regularizers)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def _parameter_groups(
    model: nn.Module, parameters: Mapping[str, Tensor], regularizers: Sequence[Regularizer]
) -> list[dict[str, Any]]:
    """Parameters for which the regularizers give the same options share a group."""
    options: defaultdict[str, dict[str, float]] = defaultdict(dict)
    names = {id(parameter): name for name, parameter in parameters.items()}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            name = names.pop(id(parameter), None)
            if name is None:
                continue  # shared: the options of its first module count
            for regularizer in regularizers:
                options[name] |= expect(
                    regularizer,
                    "parameter_options",
                    regularizer.parameter_options(module, name, parameter),
                    Mapping,
                    "options by name, such as {}",
                )
    groups: dict[tuple[tuple[str, float], ...], list[Tensor]] = defaultdict(list)
    for name, tensor in parameters.items():
        chosen = {"weight_decay": 0.0, "lr_scale": 1.0} | options[name]
        groups[tuple(sorted(chosen.items()))].append(tensor)
    return [{"params": tensors, **dict(chosen)} for chosen, tensors in groups.items()]
