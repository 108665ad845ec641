"""What a user gets without options, beside the expanded model (`quantize="none"`): the same tokens,
sooner and in less memory."""

import sys

import pytest

import gptk
from engines import generate, smollm2_file
from models import prompt
from programs import run
from test_beside_itself import MEMORY
from turns import in_turns

TEXT = "The lighthouse keeper had not spoken to anyone for"
NEW = 64


@pytest.fixture(scope="module")
def both():
    path = str(smollm2_file())
    return gptk.load(path, device="cpu"), gptk.load(path, device="cpu", quantize="none")


@pytest.mark.peers
@pytest.mark.parametrize("sampler", ["greedy", "top-p:p=0.9"])
def test_decoding(both, sampler, table):
    kept, expanded = both
    settings = {"sampler": sampler, "seed": 0, "max_new_tokens": NEW, "ignore_eos": True}
    assert kept.generate(TEXT, **settings).tokens == expanded.generate(TEXT, **settings).tokens
    times = in_turns(
        {
            "kept": lambda: kept.generate(TEXT, **settings),
            "expanded": lambda: expanded.generate(TEXT, **settings),
        }
    )
    tell(table, f"decoding, {sampler}", times, NEW, 2.5)


@pytest.mark.peers
def test_prompt(both, table):
    kept, expanded = both
    ids = prompt(512, vocabulary=40_000)
    times = in_turns(
        {"kept": lambda: generate(kept, ids, 1), "expanded": lambda: generate(expanded, ids, 1)},
        rounds=7,
    )
    tell(table, "a prompt of 512 tokens", times, len(ids), 0.85)


@pytest.mark.peers
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_memory(table):
    words = ["generate", TEXT, "--model", smollm2_file(), "--max-new-tokens", NEW]
    kept, expanded = (
        int(run(sys.executable, "-c", MEMORY, *words, *options).splitlines()[-1])
        for options in ((), ("--quantize", "none"))
    )
    table.bound(
        "peak memory of gptk generate without options, beside --quantize none",
        f"{kept / 1e6:.0f} MB beside {expanded / 1e6:.0f} MB",
        "at most 0.58 of it",
        is_kept=kept <= 0.58 * expanded,
    )


def tell(table, what, times, tokens, least):
    ratio = times["expanded"] / times["kept"]
    table.bound(
        f"{what}, without options beside --quantize none",
        f"{tokens / times['kept']:.1f} beside {tokens / times['expanded']:.1f} tokens/s, "
        f"{ratio:.2f} times",
        f"at least {least:g} times",
        is_kept=ratio >= least,
    )
