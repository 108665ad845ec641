"""gptk beside transformers: SmolLM2 from the same file, in the same precision."""

import functools
import sys

import pytest
import torch

import gptk
from engines import (
    decode_seconds,
    forget,
    generate,
    smollm2_file,
    transformers_smollm2,
)
from models import load, precision, prompt
from programs import GPTK, run
from turns import in_turns

PROMPT = "The capital of France is"
NEW = 128
BATCH = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "Water boils at",
    "def fibonacci(n):",
    "A recipe for pancakes:",
    "The three laws of robotics are",
    "Dear Sir or Madam,",
    "To be, or not to be, that is",
    "In the beginning",
    "The speed of light in a vacuum is about",
    "My favourite book is",
    "The quick brown fox",
    "How do plants make their food?",
    "List five animals that live in Africa:",
    "It was a dark and stormy night;",
    "One, two, three, four,",
]
FOUR_BEAMS = {"num_beams": 4}
TOP_P = {"do_sample": True, "top_p": 0.9, "top_k": 0}


@functools.cache
def ours(dtype):
    return gptk.load(str(smollm2_file()), device="cpu", **precision(dtype))


@pytest.mark.peers("bf16")
def test_greedy_bfloat16(table):
    lm, peer = ours("bfloat16"), transformers_smollm2("bfloat16")
    ids = lm.encode(PROMPT)
    functions = {
        "gptk": lambda: generate(lm, ids, NEW),
        "transformers": lambda: peer.generate(ids, NEW),
    }
    times = in_turns(functions)
    table.row("bf16", times, ["gptk"], ["transformers"], tokens=NEW)


@pytest.mark.peers("beams-bf16", "beams-q41")
def test_beams(table):
    lm, kept, peer = ours("bfloat16"), ours("kept-bfloat16"), transformers_smollm2("bfloat16")
    ids = lm.encode(PROMPT)
    times = in_turns(
        {
            "gptk": lambda: generate(lm, ids, NEW, sampler="beam:width=4"),
            "kept": lambda: generate(kept, ids, NEW, sampler="beam:width=4"),
            "transformers": lambda: peer.generate(ids, NEW, **FOUR_BEAMS),
        }
    )
    table.row("beams-bf16", times, ["gptk"], ["transformers"], tokens=NEW)
    table.row("beams-q41", times, ["kept"], ["transformers"], tokens=NEW)


@pytest.mark.peers("prompt-bf16")
def test_prompt_bfloat16(table):
    prompt_row(table, "prompt-bf16", "bfloat16")


def prompt_row(table, key, dtype):
    lm, peer = ours(dtype), transformers_smollm2(dtype)
    ids = prompt(512, vocabulary=40_000)
    times = in_turns(
        {"gptk": lambda: generate(lm, ids, 1), "transformers": lambda: peer.generate(ids, 1)},
        rounds=7,
    )
    table.row(key, times, ["gptk"], ["transformers"], tokens=len(ids))


@pytest.mark.peers("long-beams")
def test_beams_after_a_long_prompt(table):
    """Decoding only, without the prefill."""
    lm, peer = ours("bfloat16"), transformers_smollm2("bfloat16")
    ids = prompt(512, vocabulary=40_000)
    times = in_turns(
        {
            "gptk": lambda: decode_seconds(lm, ids, NEW, sampler="beam:width=4"),
            "transformers": lambda: peer.decode_seconds(ids, NEW, **FOUR_BEAMS),
        }
    )
    note = "the time after the prompt's pass"
    table.row("long-beams", times, ["gptk"], ["transformers"], tokens=NEW - 1, note=note)


@pytest.mark.peers("batch")
def test_batch(table):
    """16 prompts of unequal lengths, which transformers pads on the left; 64 new tokens each."""
    lm, peer = ours("bfloat16"), transformers_smollm2("bfloat16")
    new = 64
    ids = [lm.encode(text) for text in BATCH]
    longest = max(map(len, ids))
    padded = torch.tensor([[0] * (longest - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])

    def batch():
        forget(lm)
        outs = lm.generate_batch(ids, max_new_tokens=new, ignore_eos=True)
        assert [len(out.tokens) for out in outs] == [new] * len(ids)

    times = in_turns({"gptk": batch, "transformers": lambda: peer.generate(padded, new, mask=mask)})
    table.row("batch", times, ["gptk"], ["transformers"], tokens=new * len(ids))


THEIR_START = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, file, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file)
ids = tokenizer(prompt, return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=1, do_sample=False)[0]))
"""


@pytest.mark.peers("start", "start-q41")
def test_process_start_to_first_token(table):
    pytest.importorskip("transformers", reason="transformers is not installed")
    path = smollm2_file()
    command = [GPTK, "generate", PROMPT, "--model", path, "--max-new-tokens", "1"]
    times = in_turns(
        {
            "gptk": lambda: run(*command, "--quantize", "none"),
            "kept": lambda: run(*command),
            "transformers": lambda: run(
                sys.executable, "-c", THEIR_START, path.parent, path.name, PROMPT
            ),
        }
    )
    table.row("start", times, ["gptk"], ["transformers"])
    table.row("start-q41", times, ["kept"], ["transformers"])


# Reported only


@pytest.mark.full
@pytest.mark.peers("greedy-float32", "beams-float32", "top-p-float32")
def test_decode_float32(table):
    """Without sampling, both give the same tokens, too."""
    lm, peer = ours("float32"), transformers_smollm2("float32")
    ids, new = lm.encode(PROMPT), 64
    works = {
        "greedy-float32": ("greedy", {}),
        "beams-float32": ("beam:width=4", FOUR_BEAMS),
        "top-p-float32": ("top-p:p=0.9", TOP_P),
    }
    for key, (sampler, settings) in works.items():
        if not settings.get("do_sample"):
            # As in transformers, EOS is masked.
            processors = [f"min-new-tokens:n={new}"]
            out = lm.generate(ids, sampler=sampler, processors=processors, max_new_tokens=new)
            assert [out.tokens] == peer.generate(ids, new, **settings)
        functions = {
            "gptk": functools.partial(generate, lm, ids, new, sampler=sampler),
            "transformers": functools.partial(peer.generate, ids, new, **settings),
        }
        table.row(key, in_turns(functions), ["gptk"], ["transformers"], tokens=new)


@pytest.mark.full
@pytest.mark.peers("top-p-bf16")
def test_top_p_bfloat16(table):
    lm, peer = ours("bfloat16"), transformers_smollm2("bfloat16")
    ids = lm.encode(PROMPT)
    times = in_turns(
        {
            "gptk": lambda: generate(lm, ids, 64, sampler="top-p:p=0.9"),
            "transformers": lambda: peer.generate(ids, 64, **TOP_P),
        }
    )
    table.row("top-p-bf16", times, ["gptk"], ["transformers"], tokens=64)


@pytest.mark.full
@pytest.mark.peers("prompt-float32")
def test_prompt_float32(table):
    prompt_row(table, "prompt-float32", "float32")


@pytest.mark.full
@pytest.mark.peers("lookup", "lookup-gain")
def test_prompt_lookup(table):
    """Copying a text, as in editing, with and without lookup."""
    lm, peer = load("smollm2", "float32"), transformers_smollm2("float32")
    text = (
        "The quick brown fox jumps over the lazy dog. A stitch in time saves nine. "
        "All that glitters is not gold. "
    )
    ids, new = lm.encode(text * 3), 64

    def copied(draft):
        # As in transformers, EOS is masked.
        processors = [f"min-new-tokens:n={new}"]
        return lm.generate(ids, draft=draft, processors=processors, max_new_tokens=new).tokens

    def theirs():
        return peer.generate(ids, new, prompt_lookup_num_tokens=8)

    assert [copied("lookup")] == [copied(None)] == theirs()
    times = in_turns(
        {
            "gptk": lambda: copied(None),
            "with lookup": lambda: copied("lookup"),
            "transformers": lambda: peer.generate(ids, new),
            "transformers, lookup": theirs,
        }
    )
    gain = times["transformers"] / times["transformers, lookup"]
    note = f"lookup makes transformers {gain:.2f} times as fast"
    table.row("lookup", times, ["with lookup"], ["transformers, lookup"], tokens=new, note=note)
    table.row("lookup-gain", times, ["with lookup"], ["gptk"], tokens=new)
