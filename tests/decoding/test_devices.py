"""No strategy mixes tensors of the CPU with those on the model's device."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import as_on_gpu


@pytest.mark.slow
def test_every_strategy_decodes_on_a_device_that_is_not_the_cpu():
    """The oracle is the model on the CPU; an operation between devices raises, as on CUDA."""
    file = Path(__file__).with_name("on_one_device.py")
    path = os.pathsep.join([str(file.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(file)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) > 40
    assert [line for line in lines if not line.endswith(" ok")] == []


def test_operations_between_devices_are_errors():
    with as_on_gpu.Devices():
        ours, theirs = torch.ones(3, device=as_on_gpu.DEVICE), torch.ones(3)
        assert (ours + ours).tolist() == [2, 2, 2]
        assert (ours + torch.tensor(1.0)).device == as_on_gpu.DEVICE
        assert ours[torch.tensor([0, 1])].tolist() == [1, 1]
        assert ours.to("cpu").device.type == "cpu"
        with pytest.raises(RuntimeError, match="on the same device"):
            ours + theirs
        with pytest.raises(RuntimeError, match="on the same device"):
            theirs[ours.long()]
        with pytest.raises(TypeError, match="cannot be converted"):
            ours.numpy()
