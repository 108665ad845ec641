"""What training does to the process, and asks of the device."""

import gc
import os
import random
import signal
import sys
import warnings

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gptk.plugins import provided
from gptk.training.trainer import Trainer
from training_runs import config

REGULARIZERS = [
    f"{name}:strength=1e-4" if name == "l1" else name for name in provided("regularizer")
]


class NoFloat64(TorchDispatchMode):
    """Fails where a tensor in float64 is made, as a device without float64 does, MPS for example.

    In these runs the device is the CPU, so that tensors in float64 on the CPU beside a model on
    MPS would be found as well; training makes none.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, torch.Tensor):
                assert made.dtype not in (torch.float64, torch.complex128), func
        return result


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_needs_no_float64(architecture, dtype, tmp_path, either_kernels):
    settings = config(
        architecture=architecture,
        dtype=dtype,
        steps=2,
        eval_every=1,
        accumulate=2,
        sample_tokens=0,  # decoding chooses its types by the device, see gptk.session.rows
        regularizers=REGULARIZERS,
    )
    with NoFloat64():
        assert Trainer.start(settings, tmp_path / "run").train() == "finished"
        assert Trainer.resume(tmp_path / "run", ["steps=3"]).train() == "finished"


def test_the_check_for_float64_can_fail():
    with NoFloat64(), pytest.raises(AssertionError):
        torch.zeros(2, dtype=torch.float64)
    with NoFloat64(), pytest.raises(AssertionError):
        torch.zeros(2).double()


def state_of_the_process():
    return {
        "signals": {n: signal.getsignal(n) for n in signal.valid_signals()},
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "torch's random numbers": torch.get_rng_state().tolist(),
        "numpy's random numbers": str(np.random.get_state()),
        "Python's random numbers": random.getstate(),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "warnings": list(warnings.filters),
        "hooks": (sys.excepthook, sys.displayhook, sys.settrace and sys.gettrace()),
        "collector": (gc.isenabled(), gc.get_threshold()),
        "limits": sys.getrecursionlimit(),
    }


@pytest.mark.parametrize("settings", [{}, {"activation_checkpointing": True}])
def test_a_trainer_leaves_the_process_as_it_was(settings, tmp_path, monkeypatch):
    called = []  # how many objects are frozen says less: those of other tests may end meanwhile
    monkeypatch.setattr(gc, "freeze", lambda: called.append("freeze"))
    monkeypatch.setattr(gc, "unfreeze", lambda: called.append("unfreeze"))
    Trainer.start(config(steps=1), tmp_path / "first").train()  # imports what it needs
    before = state_of_the_process()
    trainer = Trainer.start(config(steps=2, **settings), tmp_path / "run")
    methods = [vars(module).get("forward") for module in trainer.model.modules()]
    assert state_of_the_process() == before
    trainer.train()
    assert not called
    assert state_of_the_process() == before
    assert methods == [None] * len(methods)
    assert [vars(m).get("forward") for m in trainer.model.modules()] == methods
