"""gptk beside CTranslate2: GPT-2 124M, the same random weights, 4 beams, best settings of each."""

import pytest

import gptk
from engines import CTranslate2, ctranslate2_types, generate, gpt2_folder
from models import precision, prompt
from turns import in_turns

NEW = 128
DTYPES = ("float32", "bfloat16", "int8", "int4")


@pytest.mark.peers("gpt2-beams")
def test_gpt2_beams(table):
    peers = {f"CTranslate2 {name}": CTranslate2(name) for name in ctranslate2_types()}
    lms = {
        dtype: gptk.load(str(gpt2_folder()), device="cpu", **precision(dtype)) for dtype in DTYPES
    }
    ids = prompt(32)
    beams = {"sampler": "beam:width=4"}
    ours = generate(lms["float32"], ids, NEW, **beams)
    assert ours == peers["CTranslate2 float32"].generate(ids, NEW, width=4)
    functions = {dtype: lambda lm=lm: generate(lm, ids, NEW, **beams) for dtype, lm in lms.items()}
    functions |= {
        name: lambda peer=peer: peer.generate(ids, NEW, width=4) for name, peer in peers.items()
    }
    table.row("gpt2-beams", in_turns(functions), list(lms), list(peers), tokens=NEW)
