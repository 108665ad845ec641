"""The contract of regularizers."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor

import gptk
from gptk.testing._decoding import SEEDS
from gptk.testing._plugin import PluginContract
from gptk.testing._promises import check, examples, instance, promise, undisturbed
from gptk.testing.models import tiny_gpt


class RegularizerContract(PluginContract):
    """What a regularizer promises."""

    _base: ClassVar[type] = gptk.Regularizer
    off: ClassVar[Mapping[str, Any] | None] = None
    """Options with which it does nothing, such as {"strength": 0}; None if it has none."""

    @promise
    @examples(8)
    @given(seed=SEEDS)
    def test_a_penalty_is_never_negative(self, seed: int) -> None:
        """The penalty is a finite number, 0 or more, with a gradient unless it is 0.

        Computing it does not change the weights.
        """
        for scale in (1.0, 0.0, 50.0):
            model, logits, targets = _example(seed, scale)
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            penalty = torch.as_tensor(self.plugin().penalty(model, logits, targets))
            value = float(penalty.detach())
            what = f"with logits times {scale:g} the penalty"
            check(math.isfinite(value) and value >= 0, f"{what} is {value}")
            check(
                value == 0 or penalty.requires_grad,
                f"{what} of {value} has no gradient: it changes nothing",
            )
            for name, parameter in model.named_parameters():
                check(torch.equal(parameter, before[name]), f"it changed {name}")

    @promise
    @examples(8)
    @given(seed=SEEDS)
    def test_a_loss_is_a_number_that_leads_back_to_the_weights(self, seed: int) -> None:
        """`loss` returns a finite scalar, and gradients flow through it."""
        for scale in (1.0, 0.0, 50.0):
            model, logits, targets = _example(seed, scale)
            before = logits.detach().clone(), targets.clone()
            plugin = self.plugin()
            objective = plugin.loss(_cross_entropy(logits, targets), logits, targets)
            scalar = isinstance(objective, Tensor) and objective.dim() == 0
            check(scalar, "the loss is not a scalar")
            check(bool(objective.isfinite()), f"the loss is {objective.item()}")
            objective = objective + plugin.penalty(model, logits, targets)
            objective.backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            check(gradients, "no weight gets a gradient")
            check(all(bool(g.isfinite().all()) for g in gradients), "a gradient is not finite")
            same = torch.equal(logits.detach(), before[0]) and torch.equal(targets, before[1])
            check(same, "it changed logits or targets")

    @promise
    @examples(5)
    @given(seed=SEEDS)
    def test_gradients_keep_their_shape(self, seed: int) -> None:
        """`before_step` returns numbers; gradients keep their shapes and stay finite."""
        for size in (1.0, 0.0, 1e-20, 1e10):
            model, logits, targets = _example(seed)
            _cross_entropy(logits, targets).backward()  # type: ignore[no-untyped-call]
            model.embed.weight.grad = None  # a frozen weight has none
            for gradient in _gradients(model).values():
                gradient.mul_(size)
            shapes = {name: g.shape for name, g in _gradients(model).items()}
            figures = self.plugin().before_step(model) or {}
            after = _gradients(model)
            same = {name: g.shape for name, g in after.items()} == shapes
            check(same, "gradients changed their shape, appeared or disappeared")
            finite = all(bool(g.isfinite().all()) for g in after.values())
            check(finite, f"with gradients times {size:g} one of them is not finite after it")
            for name, value in figures.items():
                check(math.isfinite(float(value)), f"the figure {name} is {value}")

    @promise
    def test_parameter_options_are_numbers(self) -> None:
        """The options are weight_decay and lr_scale, finite numbers, 0 or more."""
        model = tiny_gpt().train()
        plugin = self.plugin()
        for name, module in model.named_modules():
            for short_name, parameter in module.named_parameters(recurse=False):
                full_name = f"{name}.{short_name}".lstrip(".")
                for key, value in plugin.parameter_options(module, full_name, parameter).items():
                    check(
                        key in ("weight_decay", "lr_scale"),
                        f"{key} of {full_name} is no option; weight_decay and lr_scale are",
                    )
                    check(
                        isinstance(value, int | float) and math.isfinite(value) and value >= 0,
                        f"{key} of {full_name} is {value!r}",
                    )

    @promise
    @examples(2)
    @given(seed=SEEDS)
    def test_a_resumed_run_equals_an_unbroken_one(self, seed: int) -> None:
        """All that it remembers is in `state`, as tensors.

        Four steps give the same weights and state as two steps, a copy of `state`, and two more.
        """
        unbroken, state = _trained(instance(self), seed, steps=range(4))
        half, saved = _trained(self.plugin(), seed, steps=range(2))
        for key, value in saved.items():
            check(isinstance(value, Tensor), f"state[{key!r}] is {value!r:.40}, not a tensor")
        copy = {key: value.clone() for key, value in saved.items()}
        resumed, resumed_state = _trained(
            instance(self), seed, steps=range(2, 4), state=copy, weights=half.state_dict()
        )
        for name, weight in resumed.state_dict().items():
            same = torch.equal(weight, unbroken.state_dict()[name])
            check(same, f"{name} differs after resuming")
        check(state.keys() == resumed_state.keys(), "the state has other keys after resuming")
        for key, value in resumed_state.items():
            check(torch.equal(value, state[key]), f"state[{key!r}] differs after resuming")

    @promise
    @examples(2)
    @given(seed=SEEDS)
    def test_one_instance_serves_several_calls(self, seed: int) -> None:
        """An instance does to a run what a new one does, whatever other runs it has served."""
        want, other = (_trained(instance(self), s, steps=range(3)) for s in (seed, seed + 1))
        for _ in range(2):
            for first, right in ((seed, want), (seed + 1, other)):
                model, state = _trained(self.plugin(), first, steps=range(3))
                for name, weight in model.state_dict().items():
                    same = torch.equal(weight, right[0].state_dict()[name])
                    check(same, f"used again it leads to another {name}")
                check(state.keys() == right[1].keys(), "used again it leads to another state")
                for key, value in state.items():
                    check(torch.equal(value, right[1][key]), f"used again state[{key!r}] differs")

    @promise
    @examples(5)
    @given(seed=SEEDS)
    def test_averaged_weights_fit_the_model(self, seed: int) -> None:
        """`averaged` returns weights with names and shapes of the model's, or None."""
        plugin = self.plugin()
        model, state = _trained(plugin, seed, steps=range(2))
        weights = plugin.averaged(state)
        if weights is None:
            pytest.skip("it averages no weights")
        shapes = {name: p.shape for name, p in model.named_parameters()}
        for name, weight in weights.items():
            check(name in shapes, f"{name} is no weight of the model")
            check(weight.shape == shapes[name], f"{name} has the shape {tuple(weight.shape)}")

    @promise
    @examples(5)
    @given(seed=SEEDS)
    def test_equal_input_gives_equal_output(self, seed: int) -> None:
        """It does not use the global random generators; only dropout in the model does."""
        model, logits, targets = _example(seed)
        plugin = self.plugin()

        def added() -> list[float]:
            loss = _cross_entropy(logits, targets)
            return [
                float(plugin.loss(loss, logits, targets).detach()),
                float(torch.as_tensor(plugin.penalty(model, logits, targets)).detach()),
            ]

        with undisturbed():
            first = added()
        check(added() == first, "it gives another loss the second time")

    @promise
    @examples(5)
    @given(seed=SEEDS)
    def test_at_no_strength_it_does_nothing(self, seed: int) -> None:
        """With the options `off`, if the test has any, loss and gradients do not change."""
        if self.off is None:
            pytest.skip("the test names no options `off`")
        plugin = self.plugin()
        plugin = type(plugin)(**{**plugin.model_dump(exclude_defaults=True), **self.off})
        model, logits, targets = _example(seed)
        loss = _cross_entropy(logits, targets)
        plugin.setup(model)
        changed = plugin.loss(loss, logits, targets) + plugin.penalty(model, logits, targets)
        check(torch.equal(changed, loss), f"the loss {loss.item()} becomes {changed.item()}")
        loss.backward()  # type: ignore[no-untyped-call]
        before = {name: g.clone() for name, g in _gradients(model).items()}
        plugin.before_step(model)
        after = _gradients(model)
        check(all(torch.equal(after[name], g) for name, g in before.items()), "gradients changed")


def _example(seed: int, scale: float = 1.0) -> tuple[gptk.GPT, Tensor, Tensor]:
    """A model, its logits for a batch, times `scale`, and the targets."""
    model = tiny_gpt(vocabulary=31).train()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(31, (2, 9), generator=generator)
    return model, scale * model.logits(model(ids[:, :-1])), ids[:, 1:]


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _gradients(model: gptk.GPT) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _trained(
    plugin: Any,
    seed: int,
    *,
    steps: range,
    state: dict[str, Tensor] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> tuple[gptk.GPT, dict[str, Tensor]]:
    """The model and the regularizer's state after steps of plain gradient descent with it."""
    state = {} if state is None else state
    model = tiny_gpt(vocabulary=31).train()
    if weights is not None:
        model.load_state_dict(weights)
    plugin.setup(model)
    for step in steps:
        torch.manual_seed(step)  # dropout's
        generator = torch.Generator().manual_seed(seed + step)
        ids = torch.randint(31, (2, 9), generator=generator)
        logits, targets = model.logits(model(ids[:, :-1])), ids[:, 1:]
        loss = plugin.loss(_cross_entropy(logits, targets), logits, targets)
        objective = loss + plugin.penalty(model, logits, targets)
        objective.backward()
        plugin.before_step(model)
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        model.zero_grad()
        plugin.after_step(model, state)
    return model, state
