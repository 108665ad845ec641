"""The loss in chunks is the loss, and so are its gradients; recomputed activations change none."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import gptk
from gptk.data.windows import Windows
from gptk.testing import tiny_gpt
from gptk.training import objective
from gptk.training.objective import chunked_loss
from gptk.training.trainer import Trainer
from toys import GPT2_LIKE
from training_runs import config, tokens

ON_LOGITS = ["label-smoothing:strength=0.2", "z-loss:strength=0.01", "confidence-penalty"]


def states(n=23, width=32, vocabulary=101):
    """Hidden states, weights and targets."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(n, width, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).mul_(0.3).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (n,), generator=generator)


def gradients(hidden, weight, loss):
    return [loss, *torch.autograd.grad(loss, (hidden, weight))]


def relative(got, want):
    return float(((got - want).norm() / want.norm()).detach())


@pytest.mark.parametrize("chunk", [1, 101 * 4, 101 * 23])
@pytest.mark.parametrize("piece", [1, 101 * 3])
def test_loss_and_gradients_are_those_of_all_logits_at_once(chunk, piece, monkeypatch):
    monkeypatch.setattr(objective, "_CHUNK", chunk)
    monkeypatch.setattr(objective, "_PIECE", piece)
    hidden, weight, targets = states()
    want = gradients(hidden, weight, F.cross_entropy(hidden @ weight.t(), targets))
    got = gradients(hidden, weight, chunked_loss(hidden, weight, targets)[1])
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert relative(a, b) < 1e-6
    with torch.no_grad():
        assert relative(chunked_loss(hidden, weight, targets)[0], want[0]) < 1e-6


def test_gradients_are_scaled_by_the_outer_gradient():
    hidden, weight, targets = states()
    once = gradients(hidden, weight, chunked_loss(hidden, weight, targets)[1])
    thrice = gradients(hidden, weight, chunked_loss(hidden, weight, targets)[1] * 3)
    for a, b in zip(thrice, once, strict=True):
        torch.testing.assert_close(a, 3 * b)


def test_under_autocast_products_are_in_bfloat16_and_sums_in_float32(monkeypatch):
    hidden, weight, targets = states()
    exact = gradients(hidden, weight, chunked_loss(hidden, weight, targets)[1])
    errors = {}
    for chunk in (1, 2**20):
        monkeypatch.setattr(objective, "_CHUNK", chunk)
        with torch.autocast("cpu", torch.bfloat16):
            loss = chunked_loss(hidden, weight, targets)[1]
        got = gradients(hidden, weight, loss)
        assert [tensor.dtype for tensor in got] == [torch.float32] * 3
        errors[chunk] = [relative(a, b) for a, b in zip(got, exact, strict=True)]
    assert max(errors[2**20]) < 0.01
    assert max(errors[1]) < 0.01  # a sum over 23 chunks is as precise as over one


def test_weights_in_bfloat16_are_summed_in_it(monkeypatch):
    monkeypatch.setattr(objective, "_CHUNK", 101 * 6)
    hidden, weight, targets = states()
    exact = gradients(hidden, weight, chunked_loss(hidden, weight, targets)[1])
    hidden, weight = (x.detach().bfloat16().requires_grad_() for x in (hidden, weight))
    got = gradients(hidden, weight, chunked_loss(hidden, weight, targets)[1])
    assert [tensor.dtype for tensor in got] == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert max(relative(a, b) for a, b in zip(got, exact, strict=True)) < 0.02


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_losses_in_other_dtypes_are_pytorchs(dtype):
    hidden, weight, targets = states()
    want = F.cross_entropy(hidden @ weight.t(), targets)
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))
    got = chunked_loss(hidden, weight, targets)[1]
    assert relative(got, want) < 1e-3


def test_float64_states_under_autocast():
    hidden, weight, targets = states()
    exact = gradients(hidden, weight, chunked_loss(hidden, weight, targets)[1])
    hidden = hidden.detach().double().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_loss(hidden, weight, targets)[1]
    got = gradients(hidden, weight, loss)
    assert max(relative(a, b) for a, b in zip(got, exact, strict=True)) < 0.02


@pytest.mark.parametrize("target", [-1, 101])
def test_a_target_that_is_no_token_is_an_error(target):
    hidden, weight, targets = states()
    targets[4] = target
    with pytest.raises(IndexError, match=str(target)):
        chunked_loss(hidden, weight, targets)


def test_no_more_logits_than_a_chunk_are_ever_made(monkeypatch):
    monkeypatch.setattr(objective, "_CHUNK", 101 * 4)
    hidden, weight, targets = states()
    seen = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dim() == 2:
                seen.append(tuple(result.shape))
            return result

    with Sizes():
        chunked_loss(hidden, weight, targets)[1].backward()
    logits = [rows for rows, columns in seen if columns in (101, 128) and rows != 32]  # nor Wᵀ
    assert max(logits) == 4


def trainer_of(model, **changes):
    data = tokens(2000, model.config.vocab_size)
    return Trainer(model, Windows(data, 16), Windows(data, 16), config(**changes))


def make_trainer(**changes):
    return trainer_of(tiny_gpt(GPT2_LIKE), **changes)


def steps(trainer, n=3):
    records = [trainer.step() for _ in range(n)]
    return records, [p.detach().clone() for p in trainer.model.parameters()]


def same(got, want, tolerance):
    for a, b in zip(got[0], want[0], strict=True):
        assert a.pop("kind") == b.pop("kind")
        assert a == pytest.approx(b, rel=tolerance)
    for a, b in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("regularizers", [[], [*ON_LOGITS, "l1:strength=1e-5"]])
def test_steps_are_those_of_a_trainer_that_makes_all_logits(regularizers, tied, monkeypatch):
    def run():
        model = tiny_gpt(replace(GPT2_LIKE, tied_head=tied))
        return steps(trainer_of(model, regularizers=regularizers, accumulate=2, eps=1e-4))

    monkeypatch.setattr(objective, "_CHUNK", 257 * 5)
    chunked = run()
    monkeypatch.setattr("gptk.training.loss._has_plain_head", lambda _: False)
    same(chunked, run(), 1e-6)


class Whole(gptk.Regularizer):
    """Penalizes the largest logit of a batch, which is no mean over positions."""

    name = "whole"

    def penalty(self, model, logits, targets):
        assert logits.shape == (4, 16, model.config.vocab_size)
        return 0.1 * logits.max().clamp(min=0)


def test_by_default_a_regularizer_is_given_the_logits_of_the_whole_batch(monkeypatch):
    plugins = {"whole": Whole()}
    create = gptk.training.plugins.create
    monkeypatch.setattr(
        "gptk.training.plugins.create",
        lambda kind, spec, base: plugins.get(spec) or create(kind, spec, base),
    )
    record = make_trainer(regularizers=["whole", "z-loss"]).step()
    assert record["objective"] > record["loss"]
    assert record["loss"] == pytest.approx(make_trainer(regularizers=[]).step()["loss"], rel=1e-6)


@pytest.mark.parametrize("regularizers", [[], ["dropout:p=0.2"]])
def test_activation_checkpointing_changes_no_bit(regularizers):
    kept = steps(make_trainer(regularizers=regularizers))
    again = steps(make_trainer(regularizers=regularizers, activation_checkpointing=True))
    assert kept[0] == again[0]
    assert all(torch.equal(a, b) for a, b in zip(kept[1], again[1], strict=True))


def test_activation_checkpointing_runs_blocks_twice_and_keeps_less():
    counts, kept = {}, {}
    for option in (False, True):
        trainer = make_trainer(activation_checkpointing=option)
        calls = []
        for block in trainer.model.blocks:
            block.attn_norm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x
        ):
            trainer.step()
        counts[option], kept[option] = len(calls), sum(sizes)
    assert counts[True] == 2 * counts[False]
    assert kept[True] < kept[False]


def test_evaluation_recomputes_nothing():
    trainer = make_trainer(activation_checkpointing=True)
    assert trainer.evaluate() | {"seconds": 0} == make_trainer().evaluate() | {"seconds": 0}


def test_activation_checkpointing_leaves_the_blocks_as_they_were():
    """After steps, an evaluation, and a forward pass that failed."""
    model = tiny_gpt(GPT2_LIKE)
    first, second = model.blocks
    calls = []

    def callers_forward(*args):
        calls.append(args)
        return type(first).forward(first, *args)

    def failing(*args):
        raise ZeroDivisionError

    first.forward = callers_forward
    trainer = trainer_of(model, activation_checkpointing=True)
    trainer.step()
    assert len(calls) == 2  # in the backward pass again
    trainer.evaluate()
    second.mlp.register_forward_pre_hook(failing)
    with pytest.raises(ZeroDivisionError):
        trainer.step()
    assert first.forward is callers_forward
    assert "forward" not in vars(second)
