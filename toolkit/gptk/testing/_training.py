"""Contracts of what takes part in training: LR schedulers and regularizers."""

import itertools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gptk.model.gpt import GPT
from gptk.testing._promises import (
    PluginContract,
    check,
    examples,
    options_schema,
    promise,
    undisturbed,
)
from gptk.testing.models import tiny_gpt

TOTALS = st.integers(1, 300)
WARMUPS = st.integers(0, 40)
SEEDS = st.integers(0, 2**16)


class SchedulerContract(PluginContract):
    """What an LR scheduler promises."""

    def scheduler(self, warmup: int = 0) -> Any:
        """The scheduler to test, with some steps of warmup."""
        made = self.plugin()
        bounds = options_schema(made).get("warmup", {})
        warmup = max(warmup, bounds.get("minimum", 0))
        return type(made)(**{**made.model_dump(exclude_defaults=True), "warmup": warmup})

    @promise
    @examples(25)
    @given(total=TOTALS, warmup=WARMUPS)
    def test_it_is_a_share_of_the_peak(self, total: int, warmup: int) -> None:
        """At every step it is a number from 0 to 1: the setting `lr` is the largest rate."""
        scheduler = self.scheduler(warmup)
        for step in range(total + 3):
            factor = scheduler(step, total)
            check(
                isinstance(factor, int | float) and -1e-9 <= factor <= 1 + 1e-9,
                f"step {step} of {total} with {warmup} steps of warmup has {factor!r}",
            )

    @promise
    @examples(25)
    @given(total=TOTALS, warmup=WARMUPS, data=st.data())
    def test_a_resumed_schedule_equals_an_unbroken_one(
        self, total: int, warmup: int, data: st.DataObject
    ) -> None:
        """It is a function of the step: what was asked before, and by whom, makes no difference.

        A run that is resumed makes its scheduler anew and begins in the middle.
        """
        unbroken = self.scheduler(warmup)
        whole = [unbroken(step, total) for step in range(total)]
        start = data.draw(st.integers(0, total - 1), label="resumed at")
        resumed = self.scheduler(warmup)
        rest = [resumed(step, total) for step in range(start, total)]
        check(
            rest == whole[start:],
            f"resumed at step {start} of {total} it has {rest[:3]}, unbroken "
            f"{whole[start : start + 3]}",
        )
        check(unbroken(0, total) == whole[0], "asked again for step 0 it has another factor")

    @promise
    @examples(25)
    @given(total=TOTALS, warmup=WARMUPS)
    def test_warmup_never_falls(self, total: int, warmup: int) -> None:
        """In warmup the rate rises, from less than it comes to, up to where the schedule begins."""
        scheduler = self.scheduler(min(warmup, total // 2))  # a schedule may hold it to that
        warmup = scheduler.warmup
        rates = [scheduler(step, total) for step in range(min(warmup + 1, total))]
        check(
            all(a <= b + 1e-12 for a, b in itertools.pairwise(rates))
            and (warmup < 2 or warmup > total // 2 or rates[0] < rates[warmup - 1]),
            f"with {warmup} steps of warmup, of {total}, it has {[round(r, 4) for r in rates[:9]]}",
        )

    @promise
    @examples(10)
    @given(total=TOTALS)
    def test_after_the_last_step_nothing_changes(self, total: int) -> None:
        """Steps past the end have the last one's factor."""
        scheduler = self.scheduler()
        last = scheduler(total - 1, total)
        check(scheduler(total + 7, total) == last, "it changes after the last step")


class RegularizerContract(PluginContract):
    """What a regularizer promises."""

    off: ClassVar[Mapping[str, Any] | None] = None
    """Options with which it does nothing, such as {"strength": 0}, if there are any."""

    @promise
    @examples(8)
    @given(seed=SEEDS)
    def test_a_penalty_is_never_negative(self, seed: int) -> None:
        """What is added to the loss is a finite number, 0 or more, with a gradient unless it is 0.

        It is a look at the model, and leaves the weights alone.
        """
        model, logits, targets = _example(seed)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        given_ = torch.as_tensor(self.plugin().penalty(model, logits, targets))
        penalty = float(given_.detach())
        check(math.isfinite(penalty) and penalty >= 0, f"the penalty is {penalty}")
        check(
            penalty == 0 or given_.requires_grad,
            f"the penalty of {penalty} has no gradient: it changes nothing",
        )
        for name, parameter in model.named_parameters():
            check(torch.equal(parameter, before[name]), f"it changed {name}")

    @promise
    @examples(8)
    @given(seed=SEEDS)
    def test_a_loss_is_a_number_that_leads_back_to_the_weights(self, seed: int) -> None:
        """`loss` gives a finite scalar, and gradients flow through it."""
        model, logits, targets = _example(seed)
        before = logits.detach().clone(), targets.clone()
        plugin = self.plugin()
        objective = plugin.loss(_cross_entropy(logits, targets), logits, targets)
        check(isinstance(objective, Tensor) and objective.dim() == 0, "the loss is no scalar")
        check(bool(objective.isfinite()), f"the loss is {objective.item()}")
        objective = objective + plugin.penalty(model, logits, targets)
        objective.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        check(gradients, "no weight gets a gradient")
        check(all(bool(g.isfinite().all()) for g in gradients), "a gradient is not a number")
        same = torch.equal(logits.detach(), before[0]) and torch.equal(targets, before[1])
        check(same, "it changed logits or targets")

    @promise
    @examples(5)
    @given(seed=SEEDS)
    def test_gradients_keep_their_shape(self, seed: int) -> None:
        """`before_step` changes gradients in place; they stay finite, and figures are numbers."""
        model, logits, targets = _example(seed)
        _cross_entropy(logits, targets).backward()  # type: ignore[no-untyped-call]
        model.embed.weight.grad = None  # a frozen weight has none
        shapes = _gradients(model)
        figures = self.plugin().before_step(model) or {}
        after = _gradients(model)
        check(
            {name: g.shape for name, g in after.items()}
            == {name: g.shape for name, g in shapes.items()},
            "gradients changed their shape, came or went",
        )
        check(all(bool(g.isfinite().all()) for g in after.values()), "a gradient is not a number")
        for name, value in figures.items():
            check(math.isfinite(float(value)), f"the figure {name} is {value}")

    @promise
    def test_parameter_options_are_numbers(self) -> None:
        """Options of parameter groups are weight_decay and lr_scale: numbers, none negative."""
        model = tiny_gpt().train()
        plugin = self.plugin()
        for name, module in model.named_modules():
            for own, parameter in module.named_parameters(recurse=False):
                full = f"{name}.{own}".lstrip(".")
                for key, value in plugin.parameter_options(module, full, parameter).items():
                    check(
                        key in ("weight_decay", "lr_scale"),
                        f"{key} of {full} is no option; weight_decay and lr_scale are",
                    )
                    check(
                        isinstance(value, int | float) and math.isfinite(value) and value >= 0,
                        f"{key} of {full} is {value!r}",
                    )

    @promise
    @examples(2)
    @given(seed=SEEDS)
    def test_a_resumed_run_equals_an_unbroken_one(self, seed: int) -> None:
        """All it remembers is in `state`, as tensors: four steps are two, saved, and two more."""
        unbroken, state = _trained(self.plugin(), seed, steps=range(4))
        half, saved = _trained(self.plugin(), seed, steps=range(2))
        for key, value in saved.items():
            check(isinstance(value, Tensor), f"state[{key!r}] is {value!r:.40}, not a tensor")
        copy = {key: value.clone() for key, value in saved.items()}
        resumed, resumed_state = _trained(
            self.plugin(), seed, steps=range(2, 4), state=copy, weights=half.state_dict()
        )
        for name, weight in resumed.state_dict().items():
            check(
                torch.equal(weight, unbroken.state_dict()[name]), f"{name} differs after resuming"
            )
        check(state.keys() == resumed_state.keys(), "the state has other keys after resuming")
        for key, value in resumed_state.items():
            check(torch.equal(value, state[key]), f"state[{key!r}] differs after resuming")

    @promise
    @examples(5)
    @given(seed=SEEDS)
    def test_averaged_weights_fit_the_model(self, seed: int) -> None:
        """What `averaged` gives are weights by the model's names, of its shapes."""
        plugin = self.plugin()
        model, state = _trained(plugin, seed, steps=range(2))
        weights = plugin.averaged(state)
        if weights is None:
            return
        shapes = {name: p.shape for name, p in model.named_parameters()}
        for name, weight in weights.items():
            check(name in shapes, f"{name} is no weight of the model")
            check(weight.shape == shapes[name], f"{name} has the shape {tuple(weight.shape)}")

    @promise
    @examples(5)
    @given(seed=SEEDS)
    def test_equal_input_gives_equal_output(self, seed: int) -> None:
        """It leaves the global generators alone, but for dropout inside the model."""
        model, logits, targets = _example(seed)
        plugin = self.plugin()

        def once() -> list[float]:
            loss = _cross_entropy(logits, targets)
            return [
                float(plugin.loss(loss, logits, targets).detach()),
                float(torch.as_tensor(plugin.penalty(model, logits, targets)).detach()),
            ]

        with undisturbed():
            one = once()
        check(once() == one, "it gives another loss the second time")

    @promise
    @examples(5)
    @given(seed=SEEDS)
    def test_at_no_strength_it_does_nothing(self, seed: int) -> None:
        """With the options `off` (if the test names any) loss and gradients are untouched."""
        if self.off is None:
            return
        made = self.plugin()
        plugin = type(made)(**{**made.model_dump(exclude_defaults=True), **self.off})
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


def _example(seed: int) -> tuple[GPT, Tensor, Tensor]:
    """A model, its logits for a batch, and the targets."""
    model = tiny_gpt(vocabulary=31).train()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(31, (2, 9), generator=generator)
    return model, model.logits(model(ids[:, :-1])), ids[:, 1:]


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _gradients(model: GPT) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _trained(
    plugin: Any,
    seed: int,
    *,
    steps: range,
    state: dict[str, Tensor] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> tuple[GPT, dict[str, Tensor]]:
    """A few steps of plain gradient descent with the regularizer, and its state after them."""
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
