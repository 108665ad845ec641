"""Data that is prepared ahead of a step is the same as data prepared when the step begins."""

import numpy as np
import pytest
import torch

from gptk.data.windows import Windows
from gptk.training.loader import StepLoader
from training_runs import tokens


def make_loader(n=23, **changes):
    settings = {"step_windows": 4, "batch_size": 2, "seed": 1, "shuffle": True, "drop_last": True}
    return StepLoader(Windows(tokens(8 * n + 1, 100), 8), **{**settings, **changes})


def equal(a, b):
    assert (a.epoch, a.position) == (b.epoch, b.position)
    assert np.array_equal(a.windows, b.windows)
    assert np.array_equal(a.local_windows, b.local_windows)
    for batch, other in zip(a.batches, b.batches, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(batch, other, strict=True))


@pytest.mark.parametrize("drop_last", [True, False])
def test_one_step_after_another_is_what_each_is_alone(drop_last):
    loader = make_loader(drop_last=drop_last)
    epoch = position = 0
    for _ in range(15):
        step = loader.take(epoch, position)
        equal(step, make_loader(drop_last=drop_last).take(epoch, position))
        epoch, position = step.epoch, step.position + len(step.windows)
    assert epoch == 2
    loader.close()


def test_a_jump_in_the_data_is_followed():
    loader = make_loader()
    loader.take(0, 0)
    equal(loader.take(3, 8), make_loader().take(3, 8))
    equal(loader.take(0, 4), make_loader().take(0, 4))
    loader.close()
    equal(loader.take(0, 0), make_loader().take(0, 0))


def test_the_next_step_is_prepared_before_it_is_asked_for():
    loader = make_loader()
    step = loader.take(0, 0)
    start, future = loader._ahead
    assert start == (0, 4)
    ahead = future.result()
    assert loader.take(step.epoch, 4) is ahead


def test_processes_take_turns_in_a_steps_windows():
    parts = [make_loader(rank=rank, count=2).take(0, 0) for rank in range(2)]
    taken = np.stack([part.local_windows for part in parts])
    assert np.array_equal(taken.T.flatten(), parts[0].windows)
