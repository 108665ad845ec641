"""Processors on SmolLM2's own logits and tokens: equal to transformers, row by row.

Those that run the model once more are in test_adapters.py.
"""

import json

import pytest
import torch
import transformers
from test_truncations import ORACLES as TRUNCATIONS
from test_truncations import check_against_transformers

import gptk
from gptk.plugins.creating import create

TEXT = """The cat sat on the mat. The dog sat on the log. The cat and the dog sat in the sun.

def fibonacci(n):
    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)

"What is the capital of France?" she asked. "The capital of France is"""
PLACES = (1, 9, 25, 40, 60, -1)


@pytest.fixture(scope="module")
def real():
    """The texts up to each position, and SmolLM2's logits after them, (positions, vocab)."""
    lm = gptk.load("smollm2", device="cpu", dtype="float32")
    tokens = lm.encode(TEXT)
    with torch.inference_mode():
        logits = lm.model.logits(lm.model(torch.tensor([tokens])))[0]
    ends = [place % len(tokens) for place in PLACES]
    return [tokens[: end + 1] for end in ends], logits[ends].clone()


@pytest.mark.parametrize("name", TRUNCATIONS)
def test_truncations_equal_transformers(real, name):
    for x in (0, 0.1, 0.5, 0.9, 1):
        check_against_transformers(name, x, real[1])


EOS = [2]
WIDTH = 49_152
# gptk's spec and the processor of transformers, built for the length of a row's prompt.
OTHERS = {
    "temperature": (
        "temperature:temperature=0.7",
        lambda start: transformers.TemperatureLogitsWarper(0.7),
    ),
    "repetition-penalty": (
        "repetition-penalty:penalty=1.3",
        lambda start: transformers.RepetitionPenaltyLogitsProcessor(1.3),
    ),
    "no-repeat-ngram": (
        "no-repeat-ngram:size=2",
        lambda start: transformers.NoRepeatNGramLogitsProcessor(2),
    ),
    "min-new-tokens": (
        "min-new-tokens:n=6",
        lambda start: transformers.MinNewTokensLengthLogitsProcessor(start, 6, EOS),
    ),
    "suppress-tokens": (
        "suppress-tokens:tokens=[28, 30, 260]",
        lambda start: transformers.SuppressTokensLogitsProcessor([28, 30, 260]),
    ),
    "suppress-tokens at the beginning": (
        "suppress-tokens:tokens=[28, 30],begin=true",
        lambda start: transformers.SuppressTokensAtBeginLogitsProcessor([28, 30], start),
    ),
    "length-decay": (
        "length-decay:after=2,factor=1.3",
        lambda start: transformers.ExponentialDecayLengthPenalty((2, 1.3), EOS, start),
    ),
    "forced-tokens, a beginning": (
        "forced-tokens:tokens=[28]",
        # transformers' own counts from the length 1.
        lambda start: transformers.PrefixConstrainedLogitsProcessor(
            lambda _, ids: [28] if len(ids) == start else list(range(WIDTH)), 1
        ),
    ),
    "forced-tokens, an end": (
        "forced-tokens:eos_at=5",
        lambda start: transformers.ForcedEOSTokenLogitsProcessor(start + 6, EOS),
    ),
    "watermark": (
        "watermark",
        lambda start: transformers.WatermarkLogitsProcessor(WIDTH, "cpu"),
    ),
    "watermark selfhash": (
        "watermark:seeding_scheme=selfhash",
        lambda start: transformers.WatermarkLogitsProcessor(
            WIDTH, "cpu", seeding_scheme="selfhash"
        ),
    ),
}


def check_equal(spec, theirs, texts, logits, new):
    """Equal within 1e-5 and with the same support: all rows in one call, and each row alone."""
    prompts = [text[: len(text) - min(new, len(text) - 1)] for text in texts]
    rows = gptk.Rows(texts, eos=tuple(EOS), prompt_lengths=[len(prompt) for prompt in prompts])
    got = create("processor", spec, gptk.LogitsProcessor).start(rows)(logits, rows)
    for row, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        want = theirs(len(prompt))(torch.tensor([text]), logits[row : row + 1].clone())[0]
        if "forced" in spec:
            # A forced token has the logit 0 in gptk; its probability is 1 in both.
            got[row], want = got[row].log_softmax(-1), want.log_softmax(-1)
        assert torch.equal(got[row] == -torch.inf, want == -torch.inf)
        torch.testing.assert_close(got[row], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("new", [0, 5])
@pytest.mark.parametrize("name", OTHERS)
def test_others_equal_transformers(real, name, new):
    check_equal(*OTHERS[name], *real, new)


@pytest.mark.parametrize("new", [0, 5])
def test_sequences_equal_transformers(real, new):
    sequences = [[28], [30, 198], *([*text[-2:], 260] for text in real[0])]
    biases = [[sequence, 1.5 + place] for place, sequence in enumerate(sequences)]
    check_equal(
        f"sequence-bias:biases={json.dumps(biases)}",
        lambda start: transformers.SequenceBiasLogitsProcessor(biases),
        *real,
        new,
    )
    check_equal(
        f"bad-words:words={json.dumps(sequences)}",
        lambda start: transformers.NoBadWordsLogitsProcessor(sequences, EOS),
        *real,
        new,
    )
