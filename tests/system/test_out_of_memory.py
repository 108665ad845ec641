"""Lack of memory is recognized, whoever reports it."""

import json
import subprocess
import sys

import pytest

import gptk
from gptk.system.memory import explaining_out_of_memory, is_out_of_memory

# The errors are the libraries' own: the process may use only 100 MB more than it has.
PROGRAM = """
import json, mmap, os, resource, sys, tempfile

import numpy, safetensors.torch, torch

from gptk.system.memory import is_out_of_memory

SIZE = 400_000_000
file = tempfile.NamedTemporaryFile()
safetensors.torch.save_file({"a": torch.zeros(SIZE // 4)}, file.name)
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + 100_000_000, -1))
found = {}
for name, allocate in {
    "Python": lambda: bytes(SIZE),
    "NumPy": lambda: numpy.zeros(SIZE),
    "PyTorch": lambda: torch.empty(SIZE),
    "a matrix product": lambda: torch.ones(20_000, 1) @ torch.ones(1, 20_000),
    "memory": lambda: mmap.mmap(-1, SIZE),
    "a file": lambda: mmap.mmap(os.open(file.name, os.O_RDONLY), 0, access=mmap.ACCESS_READ),
    "a storage": lambda: torch.UntypedStorage.from_file(file.name, shared=False, nbytes=SIZE),
    "safetensors": lambda: safetensors.safe_open(file.name, framework="pt").get_tensor("a"),
}.items():
    try:
        allocate()
    except Exception as error:
        found[name] = is_out_of_memory(error)
print(json.dumps(found))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
def test_a_failed_allocation_is_recognized_in_every_librarys_error():
    out = subprocess.run(
        [sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True
    )
    found = json.loads(out.stdout)
    assert len(found) == 8
    assert set(found.values()) == {True}, found


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        OSError(28, "No space left on device"),
        FileNotFoundError("Cannot allocate memory.txt"),
        ValueError("out of memory"),
        gptk.SourceError("Cannot allocate memory"),
    ],
)
def test_other_errors_are_no_lack_of_memory(error):
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)), explaining_out_of_memory("it", "buy some"):
        raise error


def test_the_line_says_what_needs_memory_and_how_much():
    import torch

    with (
        pytest.raises(gptk.OutOfMemory) as caught,
        explaining_out_of_memory("the test", "take a smaller one"),
        explaining_out_of_memory("its tensor", "take a smaller one"),
    ):
        torch.empty(2**50)
    assert str(caught.value) == (
        "its tensor needs more memory than there is: the last piece takes "
        f"{2**52:,} bytes; take a smaller one"
    )
