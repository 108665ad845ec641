"""Regularizers: their formulas in float64, torch as a peer, and no effect at strength 0."""

import copy
import functools
import math
import os

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import gptk
from gptk.plugins.creating import create
from gptk.plugins.registry import provided
from gptk.testing import tiny_gpt
from toys import CONFIGS, GPT2_LIKE, LLAMA_LIKE, VOCABULARY


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """For tensors this small, several threads are slower than one on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def regularizer(spec):
    return create("regularizer", spec, gptk.Regularizer)


STRENGTH = st.floats(0, 10)
OPTIONS = {
    "confidence-penalty": {"strength": STRENGTH},
    "dropout": {"p": st.floats(0, 1, exclude_max=True)},
    "ema": {"decay": st.floats(0, 1, exclude_max=True), "warm_start": st.booleans()},
    "grad-clip": {"max_norm": STRENGTH},
    "l1": {"strength": STRENGTH},
    "label-smoothing": {"strength": st.floats(0, 1)},
    "weight-decay": {
        "strength": STRENGTH,
        "norms": st.booleans(),
        "biases": st.booleans(),
        "embeddings": st.booleans(),
    },
    "z-loss": {"strength": STRENGTH},
}


def test_every_built_in_regularizer_is_tested_here():
    assert set(OPTIONS) == set(provided("regularizer"))


@pytest.mark.parametrize("name", OPTIONS)
@settings(max_examples=20)
@given(st.data())
def test_a_regularizer_is_made_again_from_its_spec(name, data):
    options = {key: data.draw(values) for key, values in OPTIONS[name].items()}
    tested = provided("regularizer")[name].item(**options)
    assert regularizer(tested.spec) == tested


# --- A training step, as short as it can be


def batch(rows=3, time=12):
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(VOCABULARY, (rows, time + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def backward(model, regularizers, inputs, targets, forward=None):
    """Gradients of the regularized loss, and that loss."""
    logits = (forward or (lambda ids: model.logits(model(ids))))(inputs)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    for regularizer in regularizers:
        loss = regularizer.loss(loss, logits, targets)
    for regularizer in regularizers:
        loss = loss + regularizer.penalty(model, logits, targets)
    loss.backward()
    return loss.detach()


def optimizer_options(model, regularizers):
    """Each parameter's options. A tied weight has two owners, which must agree."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    options = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            name = names[id(parameter)]
            mine = {}
            for regularizer in regularizers:
                mine |= regularizer.parameter_options(module, name, parameter)
            assert options.setdefault(name, mine) == mine
    return options


def trained(config, regularizers, steps=3):
    """(losses, gradients of the last step, weights) of a small model after a few steps."""
    model = tiny_gpt(config).train()
    for regularizer in regularizers:
        regularizer.setup(model)
    options = optimizer_options(model, regularizers)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.0} | options[n] for n, p in parameters.items()], lr=0.01
    )
    states = [{} for _ in regularizers]
    losses = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(steps):
            optimizer.zero_grad()
            losses.append(backward(model, regularizers, *batch()))
            for regularizer in regularizers:
                regularizer.before_step(model)
            optimizer.step()
            for regularizer, state in zip(regularizers, states, strict=True):
                regularizer.after_step(model, state)
    gradients = {name: p.grad for name, p in parameters.items()}
    return torch.stack(losses), gradients, {n: p.detach() for n, p in parameters.items()}


@functools.cache
def plain(config):
    """The run of a small model without regularizers."""
    return trained(CONFIGS[config], [])


def assert_same_run(got, want):
    assert torch.equal(got[0], want[0])
    for ours, theirs in zip(got[1:], want[1:], strict=True):
        for name in theirs:
            assert torch.equal(ours[name], theirs[name]), name


ZERO = {
    "confidence-penalty": "strength=0",
    "dropout": "p=0",
    "ema": "decay=0",
    "grad-clip": "max_norm=0",
    "l1": "strength=0",
    "label-smoothing": "strength=0",
    "weight-decay": "strength=0",
    "z-loss": "strength=0",
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", OPTIONS)
def test_at_strength_zero_losses_gradients_and_weights_are_the_same_bits(name, config):
    run = trained(CONFIGS[config], [regularizer(f"{name}:{ZERO[name]}")])
    assert_same_run(run, plain(config))


@pytest.mark.parametrize("name", OPTIONS)
def test_at_strength_zero_nothing_is_computed_from_the_logits(name):
    tested, loss = regularizer(f"{name}:{ZERO[name]}"), torch.tensor(2.0)
    assert tested.loss(loss, None, None) is loss
    assert tested.penalty(None, None, None) == 0


@pytest.mark.parametrize("name", sorted(set(OPTIONS) - {"ema"}))
def test_with_strength_a_run_is_another(name):
    strong = {"dropout": "p=0.5", "grad-clip": "max_norm=0.01"}.get(name, "strength=0.5")
    weights = trained(GPT2_LIKE, [regularizer(f"{name}:{strong}")])[2]
    assert not torch.equal(weights["embed.weight"], plain("gpt2-like")[2]["embed.weight"])


def test_averaging_leaves_the_run_alone_at_any_decay():
    assert_same_run(trained(GPT2_LIKE, [regularizer("ema")]), plain("gpt2-like"))


# --- Losses and penalties


@st.composite
def predictions(draw, vocabulary=30):
    """(logits, targets) of two rows of three tokens: peaked, flat, with ties, far from zero."""
    value = st.one_of(st.floats(-50, 50, width=32), st.sampled_from([0.0, 1.0, -1.0]))
    size = 6 * vocabulary
    logits = torch.tensor(draw(st.lists(value, min_size=size, max_size=size)))
    targets = draw(st.lists(st.integers(0, vocabulary - 1), min_size=6, max_size=6))
    return logits.view(2, 3, vocabulary), torch.tensor(targets).view(2, 3)


def value_and_gradient(function, logits):
    logits = logits.clone().requires_grad_()
    value = function(logits)
    (gradient,) = torch.autograd.grad(value, logits)
    return value.detach(), gradient


@settings(max_examples=40)
@given(predictions(), st.floats(0, 1))
def test_label_smoothing_is_torch_s_cross_entropy(example, strength):
    logits, targets = example
    smoothing = regularizer(f"label-smoothing:strength={strength}")

    def ours(x):
        loss = F.cross_entropy(x.flatten(0, 1), targets.flatten())
        return smoothing.loss(loss, x, targets)

    def torch_s(x):
        flat = x.double().flatten(0, 1)
        return F.cross_entropy(flat, targets.flatten(), label_smoothing=strength).float()

    for got, want in zip(
        value_and_gradient(ours, logits), value_and_gradient(torch_s, logits), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def z_loss(logits, strength):
    return strength * logits.exp().sum(-1).log().pow(2).mean()


def confidence(logits, strength):
    """The paper's -H(p), and the log V that makes it positive."""
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    return strength * (math.log(logits.shape[-1]) - entropy).mean()


@pytest.mark.parametrize(
    ("name", "formula"), [("z-loss", z_loss), ("confidence-penalty", confidence)]
)
@settings(max_examples=40)
@given(example=predictions(), strength=st.floats(1e-4, 1))
def test_a_penalty_on_logits_is_its_formula_in_float64_and_not_negative(
    name, formula, example, strength
):
    logits, targets = example
    tested = regularizer(f"{name}:strength={strength}")
    got, gradient = value_and_gradient(lambda x: tested.penalty(None, x, targets), logits)
    want, wanted = value_and_gradient(lambda x: formula(x, strength), logits.double())
    assert got >= 0
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-5)


@given(st.floats(-50, 50, width=32), st.integers(1, 300))
def test_a_uniform_prediction_has_no_confidence_penalty(value, vocabulary):
    logits = torch.full((1, 2, vocabulary), value)
    penalty = regularizer("confidence-penalty:strength=1").penalty(None, logits, None)
    assert 0 <= penalty < 1e-5


def test_a_penalty_stays_finite_where_probabilities_vanish():
    logits = torch.tensor([[[0.0, 1000.0, -1000.0]]], requires_grad=True)
    for name in ("confidence-penalty", "z-loss", "label-smoothing"):
        tested = regularizer(name)
        value = tested.penalty(None, logits, None) + tested.loss(logits.sum(), logits, None)
        (gradient,) = torch.autograd.grad(value, logits)
        assert value.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("strength", [1e-6, 0.3])
def test_l1_is_the_sum_over_matrices_in_float64(config, strength):
    model = tiny_gpt(config)
    penalty = regularizer(f"l1:strength={strength}").penalty(model, None, None)
    matrices = {n: p for n, p in model.named_parameters() if not n.endswith("bias") and p.dim() > 1}
    want = strength * sum(p.double().abs().sum() for p in matrices.values())
    assert penalty >= 0
    torch.testing.assert_close(penalty.double(), want, rtol=1e-6, atol=0)
    penalty.backward()
    for name, parameter in model.named_parameters():
        if name in matrices:
            torch.testing.assert_close(parameter.grad, strength * parameter.sign())
        else:
            assert parameter.grad is None, name


# --- Gradients


def with_gradients(scale, seed=0):
    model = tiny_gpt(GPT2_LIKE)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    return model


def all_gradients(model):
    return torch.cat([p.grad.double().flatten() for p in model.parameters()])


@settings(max_examples=40)
@given(st.floats(1e-6, 1e3), st.floats(1e-4, 1e4))
def test_clipping_keeps_the_direction_and_bounds_the_norm(scale, max_norm):
    model = with_gradients(scale)
    before = all_gradients(model)
    figures = regularizer(f"grad-clip:max_norm={max_norm}").before_step(model)
    after = all_gradients(model)
    assert float(figures["grad_norm"]) == pytest.approx(float(before.norm()), rel=1e-5)
    if before.norm() < 0.999 * max_norm:
        assert torch.equal(after, before)
    else:
        assert after.norm() <= max_norm * (1 + 1e-5)
        # torch divides by norm + 1e-6, which makes a difference for small norms.
        want = max_norm / (float(before.norm()) + 1e-6)
        torch.testing.assert_close(after, before * min(want, 1), rtol=1e-5, atol=0)


def test_clipping_at_zero_only_reports_the_norm():
    model = with_gradients(100.0)
    before = all_gradients(model)
    figures = regularizer("grad-clip:max_norm=0").before_step(model)
    assert torch.equal(all_gradients(model), before)
    assert float(figures["grad_norm"]) == pytest.approx(float(before.norm()), rel=1e-5)


# --- Weight decay


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_by_default_what_decays_is_what_decays_in_nanogpt(config):
    model = tiny_gpt(config)
    options = optimizer_options(model, [regularizer("weight-decay:strength=0.3")])
    for name, parameter in model.named_parameters():
        assert options[name] == {"weight_decay": 0.3 if parameter.dim() >= 2 else 0.0}, name


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@given(norms=st.booleans(), biases=st.booleans(), embeddings=st.booleans())
def test_norms_biases_and_embeddings_decay_as_asked(config, norms, biases, embeddings):
    tested = provided("regularizer")["weight-decay"].item(
        norms=norms, biases=biases, embeddings=embeddings
    )
    got = optimizer_options(tiny_gpt(config), [tested])
    for name, options in got.items():
        want = True
        if name in ("embed.weight", "embed_positions.weight"):
            want = embeddings
        elif name.endswith("bias"):
            want = biases
        elif "norm" in name:
            want = norms
        assert options["weight_decay"] == (0.1 if want else 0), name
    assert ("head.weight" in got) == (config is LLAMA_LIKE)


def test_without_a_gradient_a_weight_loses_strength_times_lr_of_itself():
    model = tiny_gpt(GPT2_LIKE)
    before = copy.deepcopy(model.state_dict())
    options = optimizer_options(model, [regularizer("weight-decay:strength=0.2")])
    groups = [{"params": [p]} | options[name] for name, p in model.named_parameters()]
    optimizer = torch.optim.AdamW(groups, lr=0.05)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        kept = 1 - 0.05 * 0.2 if parameter.dim() >= 2 else 1
        torch.testing.assert_close(parameter.detach(), before[name] * kept)


# --- Dropout


def with_dropout(p, config=GPT2_LIKE):
    model = tiny_gpt(config)
    regularizer(f"dropout:p={p}").setup(model)
    return model


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_dropout_changes_outputs_in_training_only(config):
    inputs, _ = batch()
    want = tiny_gpt(config)(inputs)
    assert torch.equal(with_dropout(0.4, config).eval()(inputs), want)
    assert torch.equal(with_dropout(0.0, config).train()(inputs), want)
    model = with_dropout(0.4, config).train()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first, second = model(inputs), model(inputs)
        torch.manual_seed(1)
        again = model(inputs)
    assert not torch.equal(first, want)
    assert not torch.equal(first, second)
    assert torch.equal(first, again)
    regularizer("dropout:p=0").setup(model)
    assert torch.equal(model(inputs), want)


@pytest.mark.parametrize("p", [0.1, 0.5])
@torch.no_grad()
def test_dropout_keeps_the_expected_value_at_each_of_its_places(p):
    """Embeddings; attention weights and what attention adds; what the MLP adds."""
    copies, model = 4000, with_dropout(p)
    block = model.blocks[0]
    seen = {}
    for name, module in {"embedded": block, "attended": block.mlp_norm}.items():
        module.register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0]}))
    inputs = batch(rows=1, time=4)[0]

    def draw(rows):
        """What comes out at each place of dropout, for the same input in `rows` rows."""
        model(inputs.expand(rows, -1))
        embedded = seen["embedded"]
        x = tiny_gpt(GPT2_LIKE).embed(inputs).expand(rows, -1, -1).flatten(0, 1)
        with block.mlp.register_forward_pre_hook(lambda *_: (x,)):  # whatever attention adds
            added = block(x, rows, None, None) - seen["attended"]
        places = {"embedded": embedded, "attended": seen["attended"], "added": added}
        return {name: values.view(rows, 4, -1) for name, values in places.items()}

    want = {name: values[0] for name, values in draw(1).items()}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.train()
        got = draw(copies)
    dropped = (got["embedded"] == 0).float().mean()
    assert float(dropped) == pytest.approx(p, abs=0.01)
    for name, values in got.items():
        error = (values.mean(dim=0) - want[name]) / (values.std(dim=0) / copies**0.5)
        assert error.abs().max() < 5, name  # standard errors, over 128 values


def test_the_gradient_norm_is_torch_s():
    model = tiny_gpt(GPT2_LIKE)
    backward(model, [], *batch())
    model.blocks[0].mlp.up.weight.grad = None
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    want = torch.nn.utils.get_total_norm(gradients)
    torch.testing.assert_close(gptk.gradient_norm(model.parameters()), want)
    assert gptk.gradient_norm([]) == 0


# --- Averages


def walk(model, steps, regularizers, states, seed=0):
    """Change the weights a little at each step, and call the regularizers' after_step."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        for regularizer, state in zip(regularizers, states, strict=True):
            regularizer.after_step(model, state)
        yield model


def averages_of(average):
    return {name.removeprefix("module."): p for name, p in average.named_parameters()}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("warm", [False, True])
@settings(max_examples=10)
@given(decay=st.floats(0, 0.9999))
def test_an_average_is_torch_s(config, warm, decay):
    def warming(averages, weights, n):
        n = int(n)
        torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + n) / (10 + n)))

    model = tiny_gpt(config)
    peer = AveragedModel(model, multi_avg_fn=warming if warm else get_ema_multi_avg_fn(decay))
    ema = regularizer(f"ema:decay={decay},warm_start={str(warm).lower()}")
    state = {}
    assert ema.averaged(state) is None
    for _ in walk(model, 12, [ema], [state]):
        peer.update_parameters(model)
        averaged = ema.averaged(state)
        assert set(averaged) == {name for name, _ in model.named_parameters()}
        for name, want in averages_of(peer).items():
            assert torch.equal(averaged[name], want), name


def test_an_average_is_its_formula_in_float64():
    model, ema, state = tiny_gpt(), regularizer("ema:decay=0.9,warm_start=false"), {}
    want = None
    for _ in walk(model, 30, [ema], [state]):
        now = model.embed.weight.detach().double()
        want = now if want is None else 0.9 * want + 0.1 * now
    torch.testing.assert_close(
        ema.averaged(state)["embed.weight"].double(), want, rtol=1e-6, atol=1e-6
    )
    assert int(state["updates"]) == 30


def test_a_decay_of_zero_is_the_weights_themselves():
    model, ema, state = tiny_gpt(), regularizer("ema:decay=0"), {}
    for _ in walk(model, 3, [ema], [state]):
        for name, weight in model.named_parameters():
            assert torch.equal(ema.averaged(state)[name], weight)
    kept = {name: average.clone() for name, average in ema.averaged(state).items()}
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    for name, average in ema.averaged(state).items():
        assert torch.equal(average, kept[name])  # an average shares no memory with the weights


def test_a_warm_start_forgets_the_first_weights():
    model, state, plain_state = tiny_gpt(), {}, {}
    both = [regularizer("ema:decay=0.999"), regularizer("ema:decay=0.999,warm_start=false")]
    first = last = None
    for _ in walk(model, 100, both, [state, plain_state]):
        last = model.embed.weight.detach().clone()
        first = last if first is None else first

    def nearer_the_last(state):
        average = state["embed.weight"]
        return (average - last).norm() < (average - first).norm()

    assert nearer_the_last(state)
    assert not nearer_the_last(plain_state)


@settings(max_examples=10)
@given(st.integers(1, 15), st.booleans())
def test_an_average_goes_on_bit_for_bit_from_its_state(stop, warm):
    ema = regularizer(f"ema:decay=0.97,warm_start={str(warm).lower()}")
    model, unbroken, broken = tiny_gpt(), {}, {}
    for step, _ in enumerate(walk(model, 16, [ema, ema], [unbroken, broken]), start=1):
        if step == stop:
            saved = safetensors.torch.save(broken)
            broken.clear()
            broken |= safetensors.torch.load(saved)
    assert set(broken) == set(unbroken)
    for name in unbroken:
        assert torch.equal(unbroken[name], broken[name]), name


# --- Sharded models


class NextToken(nn.Module):
    """Tokens to logits in one forward pass, which is what FSDP wraps."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model.logits(self.model(ids))


SHARDED = ["l1:strength=0.001", "z-loss:strength=0.01", "grad-clip:max_norm=0.5", "ema:decay=0.5"]


def train_in_part(rank, count, folder):
    """One process of `count`: three steps on its part of the batch, then all averaged weights."""
    model = tiny_gpt(GPT2_LIKE).train()
    forward = NextToken(model)
    if count > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        torch.set_num_threads(1)
        meeting = f"file://{folder}/meeting"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)
        mesh = init_device_mesh("cpu", (count,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(forward, mesh=mesh)
    regularizers = [regularizer(spec) for spec in SHARDED]
    states = [{} for _ in regularizers]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs, targets = (part[rank::count] for part in batch(rows=4))
    norms = []
    for _ in range(3):
        optimizer.zero_grad()
        backward(model, regularizers, inputs, targets, forward)
        figures = {}
        for built in regularizers:
            figures |= built.before_step(model) or {}
        assert not hasattr(figures["grad_norm"], "full_tensor")
        norms.append(float(figures["grad_norm"]))
        optimizer.step()
        for built, state in zip(regularizers, states, strict=True):
            built.after_step(model, state)
    averaged = regularizers[-1].averaged(states[-1])
    if count > 1:
        assert all(hasattr(average, "full_tensor") for average in averaged.values())
        averaged = {name: average.full_tensor() for name, average in averaged.items()}
        dist.destroy_process_group()
    name = f"{folder}/{rank}-of-{count}"
    safetensors.torch.save_file(averaged | {"norms": torch.tensor(norms)}, name)
    if count > 1:
        os._exit(0)  # gloo's threads may outlive the interpreter, and then abort the process


def test_sharded_over_two_processes_a_run_is_that_of_one(tmp_path):
    train_in_part(0, 1, tmp_path)
    torch.multiprocessing.spawn(train_in_part, (2, tmp_path), nprocs=2)
    want = safetensors.torch.load_file(tmp_path / "0-of-1")
    for rank in range(2):
        got = safetensors.torch.load_file(tmp_path / f"{rank}-of-2")
        assert got["norms"].min() > 0.5  # all three steps were clipped
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6)
