"""LR schedulers: the properties that all have, and torch, transformers and nanoGPT as peers."""

import itertools
import json
import math

import pytest
import torch
import transformers
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

import gptk
from gptk.plugins.creating import create
from gptk.plugins.registry import provided
from gptk_plugins.schedulers import torch_schedulers


def scheduler(spec):
    return create("scheduler", spec, gptk.LRScheduler)


def rates(schedule, total_steps):
    return [schedule(step, total_steps) for step in range(total_steps)]


# --- What all have in common

TORCH = {
    "StepLR": {"step_size": 7, "gamma": 0.5},
    "MultiStepLR": {"milestones": [5, 20], "gamma": 0.3},
    "ConstantLR": {"factor": 0.25, "total_iters": 9},
    "LinearLR": {"start_factor": 0.1, "total_iters": 12},
    "ExponentialLR": {"gamma": 0.9},
    "PolynomialLR": {"total_iters": 30, "power": 1.5},
    "CosineAnnealingLR": {"T_max": 40, "eta_min": 0.1},
    "CosineAnnealingWarmRestarts": {"T_0": 8, "T_mult": 2},
    "CyclicLR": {"base_lr": 0.1, "max_lr": 0.9, "step_size_up": 6},
    "OneCycleLR": {"max_lr": 1.0, "total_steps": 200},
    "SequentialLR": {
        "schedulers": [
            {"scheduler": "LinearLR", "options": {"start_factor": 0.1, "total_iters": 10}},
            {"scheduler": "CosineAnnealingLR", "options": {"T_max": 30}},
        ],
        "milestones": [10],
    },
    "ChainedScheduler": {
        "schedulers": [
            {"scheduler": "ConstantLR"},
            {"scheduler": "ExponentialLR", "options": {"gamma": 0.9}},
        ]
    },
}
"""Options for every scheduler of torch that can be named in a spec."""

OPTIONS = {
    "constant": {},
    "linear": {"floor": st.floats(0, 1)},
    "cosine": {"floor": st.floats(0, 1)},
    "warmup-cosine": {"floor": st.floats(0, 1)},
    "inverse-sqrt": {"timescale": st.none() | st.integers(1, 1000)},
    "polynomial": {"floor": st.floats(0, 1), "power": st.floats(0.1, 5)},
    "one-cycle": {
        "rise": st.floats(0, 1, exclude_max=True),
        "start_divisor": st.floats(1, 100),
        "final_divisor": st.floats(1, 1e6),
    },
    "warmup-stable-decay": {
        "floor": st.floats(0, 1),
        "decay": st.floats(0, 1, exclude_min=True),
        "shape": st.sampled_from(["linear", "cosine", "sqrt"]),
    },
    "torch": {"scheduler": st.sampled_from(sorted(TORCH))},
}
FALLING = ["linear", "cosine", "warmup-cosine", "polynomial", "warmup-stable-decay"]


@st.composite
def schedulers(draw, names=tuple(OPTIONS)):
    name = draw(st.sampled_from(names))
    options = {key: draw(values) for key, values in OPTIONS[name].items()}
    if name == "torch":
        options["options"] = TORCH[options["scheduler"]]
    if draw(st.booleans()):
        options["warmup"] = draw(st.integers(0, 150))
    return provided("scheduler")[name].item(**options)


TOTAL = st.integers(1, 130)


def warmup_in(schedule, total_steps):
    """Steps of warmup in a run: those with `warmup` in their name take half of it at most."""
    capped = "warmup" in schedule.name
    return min(schedule.warmup, total_steps // 2) if capped else schedule.warmup


def test_every_built_in_scheduler_is_tested_here():
    assert set(OPTIONS) == set(provided("scheduler"))


@given(schedulers(), TOTAL)
def test_a_factor_is_from_0_to_1_and_steps_past_the_end_have_the_last_one(schedule, total):
    got = rates(schedule, total)
    assert all(0 <= rate <= 1 for rate in got)
    assert schedule(total, total) == schedule(total + 7, total) == got[-1]


@given(schedulers(), TOTAL)
def test_warmup_begins_above_zero_and_never_falls(schedule, total):
    warmup = warmup_in(schedule, total)
    rising = rates(schedule, total)[: warmup + 1]
    assert all(a <= b for a, b in itertools.pairwise(rising))
    # It rises by equal amounts, from 0 before the first step.
    assert rising == pytest.approx([rising[0] * (n + 1) for n in range(len(rising))], rel=1e-12)
    if schedule.name not in ("one-cycle", "torch") and warmup < total:
        assert rising[-1] == 1


@given(schedulers([name for name in OPTIONS if name != "torch"]), TOTAL)
def test_no_step_is_steeper_than_the_formula_anywhere(schedule, total):
    """Hence no jump where warmup, plateau and decay meet."""
    warmup = warmup_in(schedule, total)
    n = max(total - warmup - 1, 1)  # steps from the first one after warmup to the last
    fall = 1 - getattr(schedule, "floor", 0)
    match schedule.name:
        case "constant":
            steepest = 0
        case "linear":
            steepest = fall / n
        case "cosine" | "warmup-cosine":
            steepest = fall * math.pi / 2 / n
        case "polynomial":
            steepest = fall * (schedule.power / n if schedule.power >= 1 else n**-schedule.power)
        case "inverse-sqrt":
            scale = schedule.timescale or (schedule.warmup + 1 if schedule.warmup else 10_000)
            steepest = 1 - math.sqrt(scale / (scale + 1))
        case "one-cycle":
            peak = max(schedule.rise * (n + 1) - 1, 0)
            steepest = math.pi / 2 / max(min(peak or n, n - peak), 1e-9)
        case "warmup-stable-decay":
            steps = min(max(round(schedule.decay * total), 1), n)
            slope = {"linear": 1, "cosine": math.pi / 2, "sqrt": math.sqrt(steps)}
            steepest = fall * slope[schedule.shape] / steps
    got = rates(schedule, total)
    in_warmup = schedule.factor(0, n + 1) / (warmup + 1)
    for before, after in itertools.pairwise(got):
        assert abs(after - before) <= max(steepest, in_warmup) + 1e-12


@given(schedulers(FALLING), TOTAL)
def test_after_the_peak_it_never_rises_and_the_last_step_has_the_floor_exactly(schedule, total):
    warmup = warmup_in(schedule, total)
    assume(warmup < total)
    got = rates(schedule, total)[warmup:]
    assert got[0] == 1
    assert all(a >= b for a, b in itertools.pairwise(got))
    if len(got) > 1:
        assert got[-1] == schedule.floor


@given(schedulers(["one-cycle"]), st.integers(2, 130))
@example(provided("scheduler")["one-cycle"].item(rise=1 - 2**-53), 100)
def test_one_cycle_ends_at_its_last_rate_exactly(schedule, total):
    got = rates(schedule.model_copy(update={"warmup": 0}), total)
    assert got[-1] == 1 / schedule.start_divisor / schedule.final_divisor
    if schedule.rise * total > 1:
        assert got[0] == pytest.approx(1 / schedule.start_divisor, rel=1e-12)


@given(schedulers(), TOTAL, st.data())
def test_a_resumed_run_goes_on_with_the_same_numbers(schedule, total, data):
    unbroken = rates(schedule, total)
    resumed_at = data.draw(st.integers(0, total - 1))
    fresh = scheduler(schedule.spec)
    assert [fresh(step, total) for step in range(resumed_at, total)] == unbroken[resumed_at:]
    backwards = scheduler(schedule.spec)
    assert [backwards(step, total) for step in reversed(range(total))] == unbroken[::-1]


@given(schedulers())
def test_a_scheduler_is_made_again_from_its_spec(schedule):
    schedule(5, 10)  # calls do not change it
    assert scheduler(schedule.spec) == schedule


@pytest.mark.parametrize("name", OPTIONS)
def test_the_shown_example_is_a_schedule(name):
    assert 0 < scheduler(f"{name}:{provided('scheduler')[name].item.example}")(0, 1000) <= 1


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "torch"])
def test_a_run_of_one_step_has_the_peak_rate(name):
    assert scheduler(f"{name}:warmup=0")(0, 1) == 1


@given(st.sampled_from(["warmup-cosine", "warmup-stable-decay"]), st.integers(3, 400))
def test_the_default_warmup_is_100_steps_and_half_of_a_short_run(name, total):
    got = rates(scheduler(f"{name}:floor=0.1"), total)
    peak = got.index(1)
    assert peak == min(100, total // 2)
    assert got[-1] == 0.1
    assert rates(scheduler(f"{name}:floor=0.1,warmup={peak}"), total) == got


# --- Peers


def torch_rates(make, steps):
    """The rates of a torch scheduler for a learning rate of 1, stepped after the optimizer."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0, momentum=0.9)
    schedule = make(optimizer)
    got = []
    for _ in range(steps):
        got.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return got


def transformers_rates(make, steps, **options):
    """The rates of a schedule of transformers for these steps."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    factor = make(optimizer, **options).lr_lambdas[0]
    return [factor(step) for step in steps]


@settings(max_examples=30)
@given(st.floats(0, 1), st.integers(2, 130))
def test_linear_is_torch_s(floor, total):
    want = torch_rates(lambda o: lr_scheduler.LinearLR(o, 1.0, floor, total - 1), total)
    assert rates(scheduler(f"linear:floor={floor}"), total) == pytest.approx(want, abs=1e-9)


@settings(max_examples=30)
@given(st.floats(0, 1), st.integers(2, 130))
def test_cosine_is_torch_s(floor, total):
    want = torch_rates(lambda o: lr_scheduler.CosineAnnealingLR(o, total - 1, floor), total)
    assert rates(scheduler(f"cosine:floor={floor}"), total) == pytest.approx(want, abs=1e-9)


@settings(max_examples=30)
@given(st.floats(0.1, 5), st.integers(2, 130))
def test_polynomial_is_torch_s(power, total):
    want = torch_rates(lambda o: lr_scheduler.PolynomialLR(o, total - 1, power), total)
    assert rates(scheduler(f"polynomial:power={power}"), total) == pytest.approx(want, abs=1e-9)


@settings(max_examples=50)
@given(st.floats(0.05, 0.95), st.floats(1, 100), st.floats(1, 1e6), st.integers(2, 130))
def test_one_cycle_is_torch_s(rise, start, final, total):
    # With rise · steps below 1 the peak of torch is before step 0, that of gptk at step 0; with
    # exactly 1 torch divides by zero.
    assume(rise * total > 1)
    want = torch_rates(
        lambda o: lr_scheduler.OneCycleLR(
            o, 1.0, total, pct_start=rise, div_factor=start, final_div_factor=final
        ),
        total,
    )
    spec = f"one-cycle:rise={rise},start_divisor={start},final_divisor={final}"
    assert rates(scheduler(spec), total) == pytest.approx(want, abs=1e-12)


# transformers begins its warmup with a step of rate 0, and would reach the floor one step after
# the last. So its step n + 1 with a warmup of w + 1 equals gptk's step n with w, and after the peak
# its schedule for steps - 1 equals gptk's for steps.
WARMUP = st.integers(0, 60)


@given(WARMUP, st.integers(1, 60))
def test_constant_with_warmup_is_transformers(warmup, after):
    total = warmup + after
    want = transformers_rates(
        transformers.get_constant_schedule_with_warmup,
        range(1, total + 1),
        num_warmup_steps=warmup + 1,
    )
    got = rates(scheduler(f"constant:warmup={warmup}"), total)
    assert got == pytest.approx(want, abs=1e-12)


@given(WARMUP, st.integers(2, 60), st.floats(0, 0.99))
def test_warmup_cosine_is_transformers(warmup, after, floor):
    total = warmup + after
    assume(warmup <= total // 2)
    got = rates(scheduler(f"warmup-cosine:warmup={warmup},floor={floor}"), total)
    want = transformers_rates(
        transformers.get_cosine_with_min_lr_schedule_with_warmup,
        range(warmup, total),
        num_warmup_steps=warmup,
        num_training_steps=total - 1,
        min_lr_rate=floor,
    )
    assert got[warmup:] == pytest.approx(want, abs=1e-12)
    want = transformers_rates(
        transformers.get_cosine_schedule_with_warmup,
        range(1, warmup + 2),
        num_warmup_steps=warmup + 1,
        num_training_steps=total,
    )
    assert got[: warmup + 1] == pytest.approx(want, abs=1e-12)


def nanogpt_rate(step, *, learning_rate, warmup_iters, lr_decay_iters, min_lr):
    """nanoGPT's get_lr: linear warmup, cosine from there to lr_decay_iters, then min_lr."""
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    if step > lr_decay_iters:
        return min_lr
    share = (step - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1 + math.cos(math.pi * share)) * (learning_rate - min_lr)


@given(st.integers(0, 50), st.integers(52, 120), st.floats(0, 1))
def test_warmup_cosine_is_nanogpt_s(warmup, after, floor):
    total = warmup + after
    options = {"warmup_iters": warmup, "lr_decay_iters": total - 1, "min_lr": floor}
    want = [nanogpt_rate(step, learning_rate=1.0, **options) for step in range(total)]
    got = rates(scheduler(f"warmup-cosine:warmup={warmup},floor={floor}"), total)
    assert got == pytest.approx(want, abs=1e-12)


@given(WARMUP, st.integers(1, 200), st.none() | st.integers(1, 500))
def test_inverse_sqrt_is_transformers(warmup, after, timescale):
    total = warmup + after
    options = {} if timescale is None else {"timescale": timescale}
    schedule = scheduler(
        gptk.plugins.find("scheduler", "inverse-sqrt").item(warmup=warmup, **options)
    )
    shift = 1 if warmup else 0  # without warmup there is no step of rate 0 to skip
    want = transformers_rates(
        transformers.get_inverse_sqrt_schedule,
        range(shift, total + shift),
        num_warmup_steps=warmup + shift,
        timescale=timescale,
    )
    assert rates(schedule, total) == pytest.approx(want, abs=1e-12)


@given(st.integers(1, 4000), st.integers(0, 100_000))
def test_inverse_sqrt_is_the_transformer_s_formula(warmup, step):
    def vaswani(n, w):
        return min(n**-0.5, n * w**-1.5)

    n, w = step + 1, warmup + 1
    got = scheduler(f"inverse-sqrt:warmup={warmup}")(step, 1_000_000)
    assert got == pytest.approx(vaswani(n, w) / vaswani(w, w), rel=1e-12)


@settings(max_examples=60)
@given(
    WARMUP, st.integers(2, 100), st.floats(0.01, 1), st.sampled_from(["linear", "cosine", "sqrt"])
)
def test_warmup_stable_decay_is_transformers(warmup, after, decay, shape):
    total = warmup + after
    assume(warmup <= total // 2)
    spec = f"warmup-stable-decay:warmup={warmup},decay={decay},shape={shape},floor=0.05"
    got = rates(scheduler(spec), total)
    steps = min(max(round(decay * total), 1), after - 1)
    want = transformers_rates(
        transformers.get_wsd_schedule,
        range(warmup, total),
        num_warmup_steps=warmup,
        num_stable_steps=after - 1 - steps,
        num_decay_steps=steps,
        decay_type="1-sqrt" if shape == "sqrt" else shape,
        min_lr_ratio=0.05,
    )
    assert got[warmup:] == pytest.approx(want, abs=1e-12)


@given(st.integers(60, 200), st.integers(1, 300))
def test_until_its_decay_a_stable_schedule_knows_nothing_of_the_run_s_length(total, longer):
    schedule = scheduler("warmup-stable-decay:warmup=20,decay=0.1")
    stable = total - 1 - round(0.1 * total)
    assert rates(schedule, total)[:stable] == rates(schedule, total + longer)[:stable]


# --- torch's schedulers


def adapted(name):
    return scheduler(f"torch:scheduler={name},options='{json.dumps(TORCH[name])}'")


def made_by_torch(name, options, optimizer):
    options = dict(options)
    if "schedulers" in options:
        options["schedulers"] = [
            made_by_torch(part["scheduler"], part.get("options", {}), optimizer)
            for part in options["schedulers"]
        ]
    return getattr(lr_scheduler, name)(optimizer=optimizer, **options)


def test_every_scheduler_of_torch_is_tested_here_or_refused():
    refused = {"LRScheduler", "LambdaLR", "MultiplicativeLR", "ReduceLROnPlateau"}
    assert set(TORCH) | refused == set(lr_scheduler.__all__)


@pytest.mark.filterwarnings("ignore:The epoch parameter in")  # SequentialLR warns of itself
@pytest.mark.parametrize("name", TORCH)
def test_a_scheduler_of_torch_gives_what_it_gives_by_itself(name):
    want = torch_rates(lambda o: made_by_torch(name, TORCH[name], o), 100)
    # Exactly the same numbers, except that CosineAnnealingLR rounds one to 1.00000000000003.
    assert rates(adapted(name), 100) == [min(rate, 1.0) for rate in want]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", TORCH)
def test_no_warning_of_torch_is_seen(name):
    rates(adapted(name), 20)


def test_the_spec_of_the_documentation():
    schedule = scheduler(r'torch:scheduler=StepLR,options="{\"step_size\": 30, \"gamma\": 0.5}"')
    assert schedule == torch_schedulers.Torch(
        scheduler="StepLR", options={"step_size": 30, "gamma": 0.5}
    )
    assert [schedule(step, 100) for step in (0, 29, 30, 59, 60, 99)] == [
        1,
        1,
        0.5,
        0.5,
        0.25,
        0.125,
    ]


def test_warmup_comes_before_a_scheduler_of_torch():
    schedule = torch_schedulers.Torch(scheduler="StepLR", options={"step_size": 2}, warmup=3)
    assert rates(schedule, 7) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.1, 0.1])


def test_each_step_of_torch_is_taken_once(monkeypatch):
    steps = []
    real = lr_scheduler.ExponentialLR.step
    monkeypatch.setattr(
        lr_scheduler.ExponentialLR, "step", lambda self, *a: (steps.append(1), real(self, *a))
    )
    schedule = torch_schedulers.Torch(scheduler="ExponentialLR", options={"gamma": 0.999})
    for step in [250, 3, 299, 0, *range(300)]:
        schedule(step, 300)
    assert len(steps) == 300
    # Of a long run only the first steps are computed ahead.
    schedule(0, 10**9)
    assert len(steps) == torch_schedulers.LOOK_AHEAD + 1


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("StepLr", {}, gptk.UnknownNameError, "no scheduler 'StepLr'; did you mean StepLR? "),
        ("Zzz", {}, gptk.UnknownNameError, "no scheduler 'Zzz'; schedulers: ChainedScheduler, "),
        ("Optimizer", {}, gptk.UnknownNameError, "no scheduler 'Optimizer'"),
        ("ReduceLROnPlateau", {}, gptk.OptionError, "follows a loss"),
        ("LambdaLR", {}, gptk.OptionError, "needs a function"),
        ("MultiplicativeLR", {}, gptk.OptionError, "needs a function"),
        ("LRScheduler", {}, gptk.OptionError, "is the base class"),
        ("StepLR", {}, gptk.OptionError, "missing 1 required positional argument: 'step_size'"),
        ("StepLR", {"size": 3}, gptk.OptionError, "unexpected keyword argument 'size'"),
        ("StepLR", {"step_size": 0}, gptk.OptionError, "refuses its options at step 1: ZeroDiv"),
        ("StepLR", {"step_size": "x"}, gptk.OptionError, "torch's StepLR refuses its options"),
        ("StepLR", {"step_size": 3, "last_epoch": 5}, gptk.OptionError, "KeyError"),
        ("LinearLR", {"start_factor": 0}, gptk.OptionError, "ValueError: Starting multiplicative"),
        ("ExponentialLR", {"gamma": 1.1}, gptk.OptionError, "gives 1.1 at step 1; a share of"),
        ("ExponentialLR", {"gamma": -1}, gptk.OptionError, "gives -1 at step 1; a share of"),
        ("SequentialLR", {"schedulers": [{}], "milestones": []}, gptk.OptionError, "KeyError"),
        (
            "ChainedScheduler",
            {"schedulers": [{"scheduler": "LambdaLR"}]},
            gptk.OptionError,
            "LambdaLR needs a function",
        ),
    ],
)
def test_what_cannot_be_a_schedule_is_refused_in_one_line(name, options, error, message):
    with pytest.raises(error) as caught:
        torch_schedulers.Torch(scheduler=name, options=options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("CyclicLR", {"base_lr": 0.1, "max_lr": 3, "step_size_up": 100}, "CyclicLR with these"),
        ("OneCycleLR", {"max_lr": 1, "total_steps": 50}, "Tried to step 51 times"),
    ],
)
def test_a_run_that_would_fail_later_is_refused_at_its_first_step(name, options, message):
    schedule = torch_schedulers.Torch(scheduler=name, options=options)
    with pytest.raises(gptk.OptionError, match=message):
        schedule(0, 1000)


def test_options_are_json_only():
    with pytest.raises(gptk.OptionError, match=r"options=.* is not allowed"):
        torch_schedulers.Torch(scheduler="LambdaLR", options={"lr_lambda": len})
    with pytest.raises(gptk.OptionError, match="options is object"):
        scheduler("torch:scheduler=StepLR,options='{oops'")
