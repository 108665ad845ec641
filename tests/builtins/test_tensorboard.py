"""The TensorBoard observer, read back with TensorBoard's own reader."""

import html
import math
import re
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html

import gptk
from gptk.plugins.creating import create
from gptk.training.trainer import Trainer
from training_runs import config


def events(path):
    reader = EventAccumulator(str(path))
    reader.Reload()
    return reader


def test_a_run_and_its_continuation_show_each_step_once(tmp_path):
    run = tmp_path / "run"
    settings = config(steps=6, eval_every=3, observers=["tensorboard"])
    Trainer.start(settings, run).train()
    Trainer.resume(run, ["steps=9"]).train()
    reader = events(run / "tensorboard")
    assert [event.step for event in reader.Scalars("train/loss")] == list(range(1, 10))
    assert [event.step for event in reader.Scalars("evaluation/validation_loss")] == [0, 3, 6, 9]
    assert {"train/lr", "train/grad_norm", "train/tokens_per_second"} <= set(
        reader.Tags()["scalars"]
    )
    assert len(reader.Tensors("sample/text_summary")) == 4


def test_going_back_takes_back_what_came_after(tmp_path):
    observer = create("training-observer", f'tensorboard:path="{tmp_path}"', gptk.TrainingObserver)
    for steps, loss in ((range(1, 6), 1.0), (range(3, 8), 2.0)):
        listener = observer.start(None)
        for step in steps:
            listener.record({"kind": "step", "step": step, "tokens": step, "loss": loss})
        listener.close()
    found = [(event.step, event.value) for event in events(tmp_path).Scalars("train/loss")]
    assert found == [(1, 1), (2, 1), (3, 2), (4, 2), (5, 2), (6, 2), (7, 2)]


def test_a_record_is_there_before_the_run_ends(tmp_path):
    listener = create("training-observer", "tensorboard", gptk.TrainingObserver).start(tmp_path)
    listener.record({"kind": "step", "step": 1, "tokens": 64, "loss": 2.5, "lr": 0.1})
    reader = events(tmp_path / "tensorboard")
    assert [event.value for event in reader.Scalars("train/loss")] == [2.5]
    assert [event.value for event in reader.Scalars("train/tokens")] == [64]
    listener.close()


def test_numbers_that_are_missing_or_not_finite_do_no_harm(tmp_path):
    listener = create("training-observer", "tensorboard", gptk.TrainingObserver).start(tmp_path)
    nan = float("nan")
    listener.record({"kind": "step", "step": 1, "loss": nan, "lr": None, "skipped": True})
    listener.close()
    reader = events(tmp_path / "tensorboard")
    assert reader.Tags()["scalars"] == ["train/loss"]
    assert math.isnan(reader.Scalars("train/loss")[0].value)


def test_a_sample_is_shown_as_it_was_written(tmp_path):
    listener = create("training-observer", "tensorboard", gptk.TrainingObserver).start(tmp_path)
    prompt, text = "# Not a title", "\n*one*\n\n  <b>two</b>\nthree"
    listener.record({"kind": "sample", "step": 7, "prompt": prompt, "text": text})
    listener.close()
    (sample,) = events(tmp_path / "tensorboard").Tensors("sample/text_summary")
    assert sample.step == 7
    shown = markdown_to_safe_html(sample.tensor_proto.string_val[0])
    (code,) = re.fullmatch(r"<pre><code>(.*)</code></pre>", shown, re.DOTALL).groups()
    assert html.unescape(code).rstrip("\n") == prompt + text


def test_without_a_directory_it_needs_a_path():
    with pytest.raises(gptk.OptionError, match="give tensorboard:path="):
        create("training-observer", "tensorboard", gptk.TrainingObserver).start(None)


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(gptk.PluginError, match=r"pip install 'gptk-decoding\[tensorboard\]'"):
        create("training-observer", "tensorboard", gptk.TrainingObserver).start(tmp_path)
