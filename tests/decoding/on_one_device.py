"""Decodes with every strategy on a device that is none of the CPU's, see tests/as_on_gpu.py.

Run by test_devices.py in a process of its own, as it changes PyTorch's functions before gptk is
imported. Prints a line for each strategy: ok, or what is wrong.
"""

import sys

import torch

import as_on_gpu

if __name__ == "__main__":  # and not where pytest looks for examples in docstrings
    # Tensors of an inference mode have no versions, which modes and subclasses need.
    torch.inference_mode = lambda mode=True: torch.no_grad()
    torch.tensor, torch.as_tensor = map(as_on_gpu.tensor_function, (torch.tensor, torch.as_tensor))
    of_cpu = torch.is_autocast_enabled
    torch.is_autocast_enabled = lambda device="cpu": of_cpu("cpu")

import blocks_by_address
import gptk
from gptk.engine.engine import Engine
from gptk.model import budget, graphs, passes
from gptk.plugins.registry import provided
from gptk.testing import tiny_gpt
from toys import CONFIGS, PROCESSOR_OPTIONS, byte_tokenizer


def as_on_cuda():
    """Passes are those on a GPU, with stand-ins for Triton's kernel and for recording."""
    attend, work = blocks_by_address.attend_blocks, Engine._work

    def attend_blocks(*args):
        return as_on_gpu.OnGPU(attend(*map(as_on_gpu._inner, args)))

    def work_within(engine):
        with as_on_gpu.Devices():
            work(engine)

    blocks_by_address.attend_blocks = attend_blocks
    Engine._work = work_within
    sys.modules["gptk.kernels.triton_attention"] = blocks_by_address
    passes.can_attend = lambda device, *sizes: device == as_on_gpu.DEVICE
    graphs.CUDARecorder = lambda device: lambda run: run
    budget.available_memory = lambda device: 1e9


def strategies():
    for name, sampler in sorted(provided("sampler").items()):
        example = sampler.item.example
        yield name, {"sampler": f"{name}:{example}" if example else name}
    for name, processor in sorted(provided("processor").items()):
        options = PROCESSOR_OPTIONS.get(name, processor.item.example)
        spec = f"{name}:{options}" if options else name
        yield name, {"sampler": "multinomial", "processors": [spec]}
    yield "draft", {"draft": "lookup:1"}
    yield "slide", {"overflow": "slide", "max_new_tokens": 60}
    yield "top_logprobs", {"top_logprobs": 3}


def outcome(model, settings):
    """The tokens; or the error, as where a constraint is fulfilled and EOS is ignored."""
    lm = gptk.LanguageModel(model, byte_tokenizer())
    settings = {"max_new_tokens": 10, "ignore_eos": True, "seed": 1} | settings
    try:
        return lm.generate([1, 2, 3, 1, 2], **settings).tokens
    except gptk.GptkError as error:
        return str(error)


def main():
    as_on_cuda()
    cpu = tiny_gpt(CONFIGS["llama-like"])
    gpu = as_on_gpu.on_gpu(tiny_gpt(CONFIGS["llama-like"]))
    for name, settings in strategies():
        got, want = (outcome(model, settings) for model in (gpu, cpu))
        print(name, "ok" if got == want else f"{got} and not {want}", flush=True)


if __name__ == "__main__":
    main()
