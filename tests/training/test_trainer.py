"""The training loop: the book's, step for step; accumulation; faults; what a run leaves behind."""

import ctypes
import itertools
import json
import math
import os
import pydoc_data.topics
import signal
from itertools import chain
from unittest import mock

import numpy as np
import pytest
import tiktoken
import torch
from llms_from_scratch import ch05
from llms_from_scratch.ch02 import create_dataloader_v1
from llms_from_scratch.ch04 import GPTModel
from llms_from_scratch.ch05 import calc_loss_batch
from safetensors.torch import load_file

import gptk
from gptk.data.windows import Windows
from gptk.testing import tiny_gpt
from gptk.training.trainer import Trainer
from gptk.weights.building import build_model
from toys import GPT2_LIKE
from training_runs import SMALL, config, tokens

BOOK_124M = {
    "vocab_size": 50257,
    "context_length": 256,
    "emb_dim": 768,
    "n_heads": 12,
    "n_layers": 12,
    "drop_rate": 0.0,
    "qkv_bias": False,
}
BOOK_SMALL = {**BOOK_124M, "context_length": 64, "emb_dim": 64, "n_heads": 4, "n_layers": 3}


def make_trainer(model=None, train_tokens=2000, *, tokenizer=None, **changes):
    """A trainer in memory, on random tokens."""
    model = model or tiny_gpt(GPT2_LIKE)
    length = changes.pop("context_length", 16)
    data = tokens(train_tokens, model.config.vocab_size)
    return Trainer(
        model,
        Windows(data, length),
        Windows(tokens(300, model.config.vocab_size, seed=1), length),
        config(**changes),
        tokenizer=tokenizer,
    )


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(BOOK_SMALL, id="small"),
        pytest.param(BOOK_124M, id="124M", marks=pytest.mark.slow),
    ],
)
def test_five_steps_are_the_books(settings, tmp_path):
    """The book's model, loader, optimizer and loop, seed 123, beside the trainer."""
    torch.manual_seed(123)
    theirs = GPTModel(settings)
    torch.save(theirs.state_dict(), tmp_path / "model.pth")
    loader = f'llms-from-scratch:path="{tmp_path}/model.pth",n_heads={settings["n_heads"]}'
    length = settings["context_length"]
    batches = book_batches(5, length)
    # The book's batches in its order, as windows that share no token, each with its last target.
    tokens = [torch.cat((inputs, targets[:, -1:]), 1).flatten() for inputs, targets in batches]
    windows = Windows(torch.cat(tokens).numpy(), length, stride=length + 1)
    ours = Trainer(
        build_model(gptk.load_checkpoint(loader), "cpu", torch.float32),
        windows,
        windows,
        config(
            batch_size=2,
            shuffle=False,
            drop_last=False,
            lr=4e-4,
            betas=(0.9, 0.999),
            scheduler="constant",
            regularizers=["weight-decay:strength=0.1,norms=true,biases=true,embeddings=true"],
        ),
    )
    wanted = book_losses(theirs, batches)
    losses = [ours.step()["loss"] for _ in range(5)]
    assert ours.epoch == 0
    torch.save(theirs.state_dict(), tmp_path / "model.pth")
    weights = dict(ours.model.named_parameters())
    differences = [
        (weights[name] - weight).abs().max().item()
        for name, weight in gptk.load_checkpoint(loader).state.items()
    ]
    print(f"losses {losses}, the book's {wanted}; weights differ by {max(differences):.1e}")
    assert losses == pytest.approx(wanted, abs=1e-4)
    assert max(differences) < 1e-5


def book_batches(count, length):
    """The first batches of the book's loader: GPT-2's tokens of English, shuffled."""
    topics = pydoc_data.topics.topics
    text = "".join(topics[name] for name in sorted(topics))[: 20 * count * length]
    gpt2 = gptk.load_tokenizer("gpt2").encoding
    with mock.patch.object(tiktoken, "get_encoding", return_value=gpt2):
        loader = create_dataloader_v1(text, batch_size=2, max_length=length, stride=length)
    return list(itertools.islice(loader, count))


def book_losses(model, batches):
    """The losses in the book's training loop, a step for each batch, without its evaluations."""
    losses = []

    def calc_and_note(*args):
        loss = calc_loss_batch(*args)
        losses.append(loss.item())
        return loss

    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1)
    with mock.patch.multiple(
        ch05,
        calc_loss_batch=calc_and_note,
        evaluate_model=lambda *_: (0.0, 0.0),
        generate_and_print_sample=lambda *_: None,
    ):
        ch05.train_model_simple(
            model,
            batches,
            None,
            optimizer,
            "cpu",
            num_epochs=1,
            eval_freq=5,
            eval_iter=5,
            start_context="",
            tokenizer=None,
        )
    return losses


def test_an_untrained_gpt2_is_as_unsure_as_its_vocabulary_is_large():
    """GPT-2 124M, newly made, on four windows of English."""
    shape = gptk.TrainConfig(
        architecture="gpt2", n_layers=12, n_heads=12, width=768, context_length=256
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = gptk.GPT(shape.new_model_config(50257)).eval()
    text = gptk.prepare_tokens(["builtin:python-docs"], gptk.load_tokenizer("gpt2"))
    inputs, targets = Windows(text.tokens, 256).batch(np.arange(0, 400, 100))
    with torch.no_grad():
        logits = model.logits(model(inputs)).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, targets.flatten())
    assert loss.item() == pytest.approx(math.log(50257), abs=0.2)


@pytest.mark.parametrize("k", [2, 3])
def test_accumulating_k_batches_of_b_equals_one_batch_of_k_times_b(k):
    # An epsilon above the rounding errors of gradients, which Adam would otherwise scale up to lr.
    at_once = make_trainer(batch_size=4 * k, eps=1e-4)
    accumulated = make_trainer(batch_size=4, accumulate=k, eps=1e-4)
    for _ in range(3):
        a, b = at_once.step(), accumulated.step()
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], abs=1e-6)
    for p, q in zip(at_once.model.parameters(), accumulated.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_the_last_short_batch_counts_by_its_size():
    """With drop_last off, an epoch's last step is that of a smaller batch."""
    whole = make_trainer(train_tokens=16 * 10 + 1, batch_size=8, drop_last=False)
    parts = make_trainer(train_tokens=16 * 10 + 1, batch_size=4, accumulate=2, drop_last=False)
    for _ in range(4):
        assert whole.step()["loss"] == pytest.approx(parts.step()["loss"], abs=1e-6)
    assert whole.steps_per_epoch == 2
    assert whole.epoch == 1


def test_an_epoch_takes_each_window_once_and_the_next_another_order():
    data = np.arange(16 * 20 + 1)
    trainer = Trainer(tiny_gpt(), Windows(data % 257, 16), Windows(data % 257, 16), config())
    seen = []
    step = trainer._loader.take(0, 0)
    for _ in range(2 * trainer.steps_per_epoch):
        seen.append(step.windows.tolist())
        step = trainer._loader.take(step.epoch, step.position + 4)
    first, second = (list(chain(*half)) for half in (seen[:5], seen[5:]))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second


def test_dropout_and_order_follow_from_the_seed_not_from_the_global_generator():
    records = []
    for noise in range(2):
        torch.manual_seed(noise)
        before = torch.random.get_rng_state()
        trainer = make_trainer(regularizers=["dropout:p=0.2"])
        records.append([trainer.step()["loss"] for _ in range(3)])
        assert torch.equal(torch.random.get_rng_state(), before)
    assert records[0] == records[1]
    trainer = make_trainer(regularizers=["dropout:p=0.2"], seed=1)
    assert [trainer.step()["loss"] for _ in range(3)] != records[0]


def test_evaluation_is_over_a_fixed_set_and_leaves_training_as_it_was():
    trainer, undisturbed = make_trainer(), make_trainer()
    for _ in range(2):
        assert trainer.evaluate() | {"seconds": 0} == trainer.evaluate() | {"seconds": 0}
        assert trainer.step() == undisturbed.step()


def test_the_evaluation_loss_is_the_mean_over_the_windows():
    trainer = make_trainer(eval_batches=100, batch_size=5)
    windows = trainer.validation_windows
    inputs, targets = windows.batch(np.arange(len(windows)))
    with torch.no_grad():
        logits = trainer.model.logits(trainer.model(inputs))
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert trainer.evaluate()["validation_loss"] == pytest.approx(want.item(), abs=1e-6)


def test_the_learning_rate_is_the_schedulers():
    trainer = make_trainer(scheduler="linear:warmup=4", lr=0.01, steps=10)
    rates = [trainer.step()["lr"] for _ in range(10)]
    assert rates[:5] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01])
    assert rates[-1] == 0


def test_penalties_count_in_the_objective_not_in_the_loss():
    record = make_trainer(regularizers=["z-loss:strength=0.1"]).step()
    assert record["objective"] > record["loss"]
    assert record["loss"] == make_trainer(regularizers=[]).step()["loss"]


def test_a_trainer_leaves_the_settings_of_malloc_alone(monkeypatch):
    """They are set through the C library, which nothing opens in a training step."""
    opened, load = [], ctypes.CDLL
    monkeypatch.setattr(
        ctypes, "CDLL", lambda name, *more: opened.append(name) or load(name, *more)
    )
    trainer = make_trainer()
    trainer.step()
    trainer.evaluate()
    assert None not in opened


def test_one_process_cannot_shard():
    with pytest.raises(gptk.OptionError, match="torchrun"):
        Trainer.start(config(), shard=True)


def test_a_regularizer_given_twice_is_refused():
    with pytest.raises(gptk.OptionError, match="l1 is given twice"):
        make_trainer(regularizers=["l1:strength=0.1", "l1:strength=0.2"])


class TestNotFinite:
    def broken(self, **changes):
        trainer = make_trainer(**changes)
        with torch.no_grad():
            trainer.model.blocks[0].mlp.up.weight[0, 0] = math.nan
        return trainer

    def test_a_loss_that_is_not_finite_stops_and_names_step_and_batch(self):
        trainer = self.broken(shuffle=False)
        with pytest.raises(gptk.TrainingError) as caught:
            trainer.step()
        assert str(caught.value).startswith(
            "step 1: the loss is nan; its windows begin at the tokens 0, 16, 32, 48 of "
        )
        assert trainer.step_count == 0

    def test_or_the_step_is_skipped_and_changes_nothing(self):
        trainer = self.broken(on_nan="skip")
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        record = trainer.step()
        assert record["skipped"]
        assert math.isnan(record["loss"])
        assert (trainer.step_count, trainer.position) == (1, 4)
        for name, p in trainer.model.named_parameters():
            assert torch.equal(p.nan_to_num(), before[name].nan_to_num())

    def test_a_penalty_that_is_not_finite_is_named_as_such(self):
        trainer = make_trainer(regularizers=["l1:strength=1e38"])
        with pytest.raises(gptk.TrainingError, match="but inf with the regularizers' terms"):
            trainer.step()

    def test_a_gradient_that_is_not_finite_is_found_before_the_step(self):
        trainer = make_trainer()
        handle = trainer.model.embed.weight.register_hook(lambda g: g * math.inf)
        with pytest.raises(gptk.TrainingError, match="step 1: the gradient's norm is"):
            trainer.step()
        handle.remove()
        assert math.isfinite(trainer.step()["loss"])


class TestRun:
    """What a run directory holds."""

    @pytest.fixture(scope="class")
    @staticmethod
    def run(tmp_path_factory):
        run = tmp_path_factory.mktemp("runs") / "run"
        settings = config(
            steps=30,
            keep=1,
            lr=0.01,
            regularizers=["weight-decay", "grad-clip", "ema:decay=0.5"],
        )
        assert Trainer.start(settings, run).train() == "finished"
        return run

    def test_holds_settings_metrics_checkpoints_samples_and_a_plot(self, run):
        assert {path.name for path in run.iterdir()} == {
            "config.toml",
            "metrics.jsonl",
            "checkpoints",
            "samples.txt",
            "losses.png",
            ".lock",
        }

    def test_metrics_tell_steps_evaluations_and_samples(self, run):
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [record for record in records if record["kind"] == "step"]
        assert [record["step"] for record in steps] == list(range(1, 31))
        assert steps[-1]["tokens"] == 30 * 4 * 16
        assert {"loss", "lr", "grad_norm", "tokens_per_second"} <= set(steps[0])
        evaluations = [record for record in records if record["kind"] == "evaluation"]
        assert [record["step"] for record in evaluations] == [0, 10, 20, 30]
        assert evaluations[-1]["validation_loss"] < evaluations[0]["validation_loss"]
        assert "averaged_validation_loss" in evaluations[-1]
        assert sum(record["kind"] == "sample" for record in records) == 4
        assert (run / "samples.txt").read_text().count("--- step") == 4

    def test_keeps_the_last_checkpoints_and_the_best(self, run):
        best = gptk.best_checkpoint(run)
        names = {path.name for path in (run / "checkpoints").iterdir()}
        assert names == {"step-00000030", best.name}

    def test_loads_as_a_model(self, run):
        """With the weights whose validation loss is the best, here the averaged weights."""
        lm = gptk.load(str(run))
        assert lm.generate("The", max_new_tokens=5).tokens
        best = gptk.best_checkpoint(run)
        averaged = load_file(best / "averaged/model.safetensors")
        assert torch.equal(lm.model.embed.weight, averaged["embed.weight"])
        trained = gptk.load(str(best))
        assert not torch.equal(trained.model.embed.weight, averaged["embed.weight"])

    def test_is_not_started_twice(self, run):
        with pytest.raises(gptk.TrainingError, match="holds a run already"):
            Trainer.start(config(), run)

    def test_a_finished_one_goes_on_with_more_steps(self, run):
        trainer = Trainer.resume(run, ["steps=32"])
        assert (trainer.step_count, trainer.total_steps) == (30, 32)
        assert trainer.train() == "finished"
        assert trainer.step_count == 32

    def test_its_shape_cannot_change(self, run):
        with pytest.raises(gptk.OptionError, match=r"width=64 cannot change .* with width=32"):
            Trainer.resume(run, ["width=64"])


def test_too_large_a_model_is_told_with_what_training_has(tmp_path, monkeypatch):
    def load(source):
        raise gptk.OutOfMemory(
            "the model big needs more memory than there is; take --quantize int8"
        )

    monkeypatch.setattr("gptk.training.preparation.load_checkpoint", load)
    with pytest.raises(gptk.TrainingError, match="out of memory for the model; take a smaller one"):
        gptk.Trainer.start(gptk.TrainConfig(model="big"), tmp_path / "run")


def test_too_large_a_batch_is_told_with_the_settings_to_change(tmp_path):
    trainer = Trainer.start(config(save_every=2), tmp_path / "run")
    step = trainer.step

    def step_that_takes_too_much():
        if trainer.step_count == 3:
            torch.empty(2**50)
        return step()

    trainer.step = step_that_takes_too_much
    with pytest.raises(gptk.TrainingError) as caught:
        trainer.train()
    assert str(caught.value).startswith(
        "out of memory on cpu: lower batch_size (and raise accumulate) or context_length; the last "
        f"good checkpoint is {tmp_path}/run/checkpoints/step-00000002"
    )


def test_patience_ends_a_run_that_gets_no_better(tmp_path):
    trainer = Trainer.start(
        config(lr=1e-9, eval_every=2, patience=2, scheduler="constant"), tmp_path
    )
    trainer.best_loss = 0.0
    assert trainer.train() == "patience"
    assert trainer.step_count == 4
    again = Trainer.resume(tmp_path)
    assert again.train() == "patience"
    assert again.step_count == 4
    assert Trainer.resume(tmp_path, ["patience=null", "steps=5"]).train() == "finished"


def test_ctrl_c_finishes_the_step_saves_and_ends(tmp_path):
    trainer = Trainer.start(config(), tmp_path / "run")
    before = signal.getsignal(signal.SIGINT)
    step = trainer.step

    def step_and_interrupt():
        if trainer.step_count == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return step()

    trainer.step = step_and_interrupt
    assert trainer.train() == "interrupted"
    assert trainer.step_count == 7
    assert gptk.best_checkpoint(tmp_path / "run").name == "step-00000007"
    assert signal.getsignal(signal.SIGINT) is before
    trainer.step = step
    assert trainer.train() == "finished"
    assert trainer.step_count == 20


def test_a_text_that_changed_is_warned_of(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh" * 200)
    settings = config(steps=2, data=[str(text)])
    Trainer.start(settings, tmp_path / "run").train()
    lines = []
    Trainer.resume(tmp_path / "run", ["steps=3"], warn=lines.append).train()
    assert not lines
    text.write_text("hgfedcba" * 200)
    Trainer.resume(tmp_path / "run", ["steps=4"], warn=lines.append)
    (line,) = lines
    assert "the data is not what" in line


def test_one_process_trains_a_run_at_a_time(tmp_path):
    run = tmp_path / "run"
    Trainer.start(config(steps=2), run).train()
    first = Trainer.resume(run, ["steps=3"])
    with pytest.raises(gptk.TrainingError, match="is in use by another trainer"):
        Trainer.resume(run)
    assert first.train() == "finished"
    assert Trainer.resume(run, ["steps=4"]).train() == "finished"


def test_a_directory_with_a_configuration_of_its_own_is_left_alone(tmp_path):
    (tmp_path / "config.toml").write_text("lr = 1")
    with pytest.raises(gptk.TrainingError, match=r"has a config\.toml of its own"):
        Trainer.start(config(), tmp_path)
    assert (tmp_path / "config.toml").read_text() == "lr = 1"


def test_steps_taken_by_hand_can_be_saved_and_resumed(tmp_path):
    trainer = Trainer.start(config(), tmp_path / "run")
    trainer.step()
    trainer.save()
    trainer.close()
    assert Trainer.resume(tmp_path / "run").step_count == 1


def test_epochs_take_the_place_of_steps_on_the_way(tmp_path):
    Trainer.start(config(steps=2), tmp_path).train()
    assert Trainer.resume(tmp_path, ["epochs=0.01"]).total_steps == 66


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_bfloat16_autocast_learns_as_float32_does(architecture):
    settings = SMALL | {"architecture": architecture, "n_kv_heads": 1}
    shape = gptk.TrainConfig(**settings).new_model_config(257)
    exact, rounded = (make_trainer(tiny_gpt(shape), dtype=d) for d in ("float32", "bfloat16"))
    for _ in range(10):
        a, b = exact.step()["loss"], rounded.step()["loss"]
        assert a == pytest.approx(b, abs=0.01)
    assert a != b
    a, b = exact.evaluate()["validation_loss"], rounded.evaluate()["validation_loss"]
    assert a == pytest.approx(b, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_compiling_changes_no_loss(architecture):
    settings = SMALL | {"architecture": architecture, "n_kv_heads": 1}
    shape = gptk.TrainConfig(**settings).new_model_config(257)
    plain, compiled = (
        make_trainer(tiny_gpt(shape), compile=compile, eval_batches=3) for compile in (False, True)
    )
    for _ in range(3):
        assert plain.step()["loss"] == pytest.approx(compiled.step()["loss"], abs=1e-5)
        assert plain.evaluate()["validation_loss"] == pytest.approx(
            compiled.evaluate()["validation_loss"], abs=1e-5
        )


@pytest.mark.slow
def test_without_settings_it_learns_english_below_145_hundredths_nats_a_byte(tmp_path):
    trainer = Trainer.start(run=tmp_path / "run")
    trainer.train()
    print(f"validation loss {trainer.best_loss:.4f} nats a byte")
    assert trainer.best_loss < 1.45
