"""gptk beside its own greedy decoding, its memory, and its quality when quantized."""

import pydoc_data.topics
import sys

import pytest

import gptk
import models
from engines import generate, smollm2_file
from programs import run
from turns import in_turns

NEW = 128


@pytest.fixture(scope="module", params=["bfloat16", "kept-bfloat16"])
def lm(request):
    lm = gptk.load(str(smollm2_file()), device="cpu", **models.precision(request.param))
    return lm, "" if request.param == "bfloat16" else "-q41"


@pytest.mark.peers("beam-positions", "beam-positions-q41", "top-p", "top-p-q41")
def test_beams_and_top_p(lm, table):
    """The positions that a beam search computes are counted as the tokens of its result."""
    lm, kind = lm
    ids = lm.encode("The capital of France is")
    times = in_turns(
        {
            "greedy": lambda: generate(lm, ids, NEW),
            "beam": lambda: generate(lm, ids, NEW, sampler="beam:width=4"),
            "top-p": lambda: generate(lm, ids, NEW, sampler="top-p:p=0.9"),
        },
        rounds=7,
    )
    table.row(f"beam-positions{kind}", times, ["beam"], ["greedy"], tokens=NEW)
    table.row(f"top-p{kind}", times, ["top-p"], ["greedy"], tokens=NEW)


# Not ru_maxrss, which starts from the size of the parent process.
MEMORY = """
import sys
from pathlib import Path
from gptk.cli import main
sys.argv[0] = "gptk"
try:
    main()
finally:
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    print(1024 * int(peak))
"""


@pytest.mark.peers
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize(
    ("options", "most"),
    [
        ([], 700e6),
        (["--quantize", "none", "--dtype", "bfloat16"], None),
        (["--quantize", "none"], None),
    ],
    ids=["kept", "bfloat16", "float32"],
)
def test_memory(options, most, table):
    """The peak resident size of a process of `gptk generate`."""
    words = ["generate", "The capital of France is", "--model", smollm2_file(), *options]
    peak = int(run(sys.executable, "-c", MEMORY, *words).splitlines()[-1])
    table.bound(
        f"peak resident size, gptk generate {' '.join(options) or 'without options'}",
        f"{peak / 1e6:.0f} MB",
        "" if most is None else f"under {most / 1e6:.0f} MB",
        is_kept=most is None or peak < most,
    )


@pytest.mark.peers
def test_quality(table):
    """The mean NLL of 2,000 tokens of English, in one window."""
    text = "\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
    losses = {}
    for kind in models.DTYPES:
        lm = gptk.load(str(smollm2_file()), device="cpu", **models.precision(kind))
        losses[kind] = lm.score(lm.encode(text[:20_000])[:2000]).loss
    for kind, reference, most in (
        ("kept", "float32", 1e-5),
        ("kept-bfloat16", "float32", 0.005),
        ("int8", "bfloat16", 0.005),
        ("int4", "bfloat16", None),
    ):
        change = losses[kind] / losses[reference] - 1
        table.bound(
            f"NLL of 2,000 tokens, {kind} beside {reference}",
            f"{losses[kind]:.4f} beside {losses[reference]:.4f}, {100 * change:+.2f} %",
            "" if most is None else f"within {100 * most:g} %",
            is_kept=most is None or abs(change) <= most,
        )
