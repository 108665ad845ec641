"""The watermark and its detector: equal to transformers', and each detects the other's."""

import functools
import json

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import gptk
from gptk.plugins.creating import create
from gptk.plugins.registry import provided
from gptk.testing import tiny_lm

LM = tiny_lm()
KEY = 15_485_863
SETTINGS = [
    {},
    {"greenlist_ratio": 0.4, "bias": 3.0, "hashing_key": 101, "context_width": 2},
    {"seeding_scheme": "selfhash"},
    {"seeding_scheme": "selfhash", "hashing_key": 2**40 + 7, "context_width": 3, "bias": 4.0},
]


def watermark(**options):
    return type(create("processor", "watermark", gptk.LogitsProcessor))(**options)


@functools.cache
def theirs(vocabulary, **options):
    return transformers.WatermarkLogitsProcessor(vocabulary, "cpu", **options)


def apply(processor, scores, prompts):
    rows = gptk.Rows(prompts)
    return processor.start(rows)(scores, rows)


@settings(max_examples=100)
@given(
    vocabulary=st.sampled_from([41, 300]),
    options=st.fixed_dictionaries(
        {
            "greenlist_ratio": st.sampled_from([0.25, 0.5, 0.613]),
            "bias": st.sampled_from([2.0, -1.5]),
            "hashing_key": st.sampled_from([KEY, 1, 2**62 + 5]),
            "seeding_scheme": st.sampled_from(["lefthash", "selfhash"]),
            "context_width": st.integers(1, 4),
        }
    ),
    ids=st.lists(st.lists(st.integers(0, 40), min_size=4, max_size=4), min_size=1, max_size=3),
)
def test_it_is_transformers_watermark(vocabulary, options, ids):
    generator = torch.Generator().manual_seed(sum(map(sum, ids)))
    scores = torch.randn(len(ids), vocabulary, generator=generator) * 4
    want = theirs(vocabulary, **options)(torch.tensor(ids), scores)
    assert torch.equal(apply(watermark(**options), scores, ids), want)


@pytest.mark.parametrize("options", SETTINGS)
def test_it_is_transformers_watermark_on_a_real_vocabulary(options):
    scores = torch.randn(2, 49_152, generator=torch.Generator().manual_seed(0)) * 4
    ids = [[49_151, 7, 262, 13], [13, 49_151, 0, 464]]
    want = theirs(49_152, **options)(torch.tensor(ids), scores)
    assert torch.equal(apply(watermark(**options), scores, ids), want)


@pytest.mark.parametrize("scheme", ["lefthash", "selfhash"])
def test_rows_shorter_than_the_context_are_left_alone(scheme):
    scores = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    processor = watermark(seeding_scheme=scheme, context_width=3)
    got = apply(processor, scores, [[1, 2], [1, 2, 3], [5, 6, 1, 2, 3]])
    assert torch.equal(got[0], scores[0])
    for row, ids in ((1, [1, 2, 3]), (2, [5, 6, 1, 2, 3])):
        want = theirs(50, seeding_scheme=scheme, context_width=3)(
            torch.tensor([ids]), scores[row : row + 1]
        )
        assert torch.equal(got[row : row + 1], want)


# Detection


def their_detector(options, *, bos=None, **more):
    bos = -1 if bos is None else bos  # transformers does not accept None
    config = transformers.GPT2Config(vocab_size=257, bos_token_id=bos)
    return transformers.WatermarkDetector(
        config, "cpu", transformers.WatermarkingConfig(**options), **more
    )


def judged(options, tokens, *, bos=None, ignore_repeated_ngrams=False, z_threshold=3.0):
    """gptk's detection, checked to be equal to that of transformers."""
    got = watermark(**options).detect(
        tokens,
        257,
        bos=bos,
        ignore_repeated_ngrams=ignore_repeated_ngrams,
        z_threshold=z_threshold,
    )
    detector = their_detector(options, bos=bos, ignore_repeated_ngrams=ignore_repeated_ngrams)
    want = detector(torch.tensor([tokens]), z_threshold=z_threshold, return_dict=True)
    assert got.tokens_scored == want.num_tokens_scored[0]
    assert got.green_tokens == want.num_green_tokens[0]
    assert got.green_fraction == pytest.approx(want.green_fraction[0])
    assert got.z_score == pytest.approx(want.z_score[0])
    assert got.p_value == pytest.approx(want.p_value[0], rel=1e-6, abs=1e-12)
    assert got.prediction == want.prediction[0]
    return got


def generated(*processors, seed=0):
    return LM.generate(
        [1, 2, 3],
        sampler="multinomial:temperature=1.2",
        processors=processors,
        max_new_tokens=90,
        ignore_eos=True,
        seed=seed,
    ).tokens


@pytest.mark.parametrize("options", SETTINGS)
def test_our_text_is_detected_by_both_and_other_text_is_not(options):
    for seed in range(2):
        marked = judged(options, generated(watermark(**options), seed=seed))
        assert marked.z_score > 4
        assert marked.p_value < 1e-4
        assert marked.prediction
        plain = judged(options, generated(seed=seed))
        assert not plain.prediction
        wrong_key = options | {"hashing_key": 12_345}
        assert not judged(wrong_key, generated(watermark(**options), seed=seed)).prediction


@pytest.mark.parametrize("options", SETTINGS)
def test_the_text_of_transformers_is_detected_by_both(options):
    config = transformers.GPT2Config(
        vocab_size=257,
        n_positions=128,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    common = {"do_sample": True, "max_new_tokens": 90, "pad_token_id": 0, "temperature": 0.5}
    prompt = torch.tensor([[1, 2, 3]])
    marked = model.generate(
        prompt, watermarking_config=transformers.WatermarkingConfig(**options), **common
    )
    assert judged(options, marked[0, 3:].tolist()).z_score > 4
    plain = model.generate(prompt, **common)
    assert not judged(options, plain[0, 3:].tolist()).prediction


@settings(max_examples=40)
@given(
    options=st.sampled_from(SETTINGS),
    tokens=st.lists(st.integers(0, 5), min_size=6, max_size=40),
    bos=st.sampled_from([None, 0, 1]),
    ignore=st.booleans(),
    threshold=st.sampled_from([0.0, 3.0]),
)
def test_any_tokens_are_judged_as_by_transformers(options, tokens, bos, ignore, threshold):
    judged(options, tokens, bos=bos, ignore_repeated_ngrams=ignore, z_threshold=threshold)


@pytest.mark.parametrize("options", SETTINGS)
def test_chance_gives_a_z_score_of_about_0(options):
    generator = np.random.default_rng(0)
    scores = [
        watermark(**options).detect(generator.integers(0, 257, 60).tolist(), 257).z_score
        for _ in range(40)
    ]
    assert abs(np.mean(scores)) < 0.5
    assert 0.6 < np.std(scores) < 1.5


def test_a_text_that_is_too_short_to_judge_is_an_error():
    for options in SETTINGS:
        width = options.get("context_width", 1)
        watermark(**options).detect([1] * (width + 1), 257)
        with pytest.raises(gptk.DataError, match=rf"tokens? is too short .*={width}"):
            watermark(**options).detect([1] * width, 257)
    with pytest.raises(gptk.DataError):
        watermark().detect([5, 1], 257, bos=5)


# The command

LETTERS = [*range(97, 123), 32]
ONLY_LETTERS = f"suppress-tokens:tokens={[t for t in range(257) if t not in LETTERS]}"


def run(*arguments, **more):
    command = provided("command")["detect-watermark"].item
    return CliRunner().invoke(command, list(arguments), catch_exceptions=False, **more)


def text_of(*processors):
    return bytes(generated(ONLY_LETTERS, *processors)).decode()


def test_the_command_says_in_one_line_what_a_text_is(tmp_path):
    options = ["--tokenizer", "bytes", "--spec", "watermark:bias=4,hashing_key=77"]
    marked = text_of("watermark:bias=4,hashing_key=77")
    result = run(marked, *options)
    assert result.exit_code == 0
    assert result.output.startswith("watermarked: ")
    assert result.output.count("\n") == 1
    found = watermark(hashing_key=77).detect(list(marked.encode()), 257)
    assert f"{found.green_tokens} of {found.tokens_scored} tokens" in result.output
    assert f"z = {found.z_score:.2f}" in result.output
    assert run(text_of(), *options).output.startswith("not watermarked: ")
    assert run(marked, "--tokenizer", "bytes").output.startswith("not watermarked: ")
    path = tmp_path / "text.txt"
    path.write_text(f"{marked}\n", encoding="utf-8")
    assert run("--file", str(path), *options).output == result.output
    assert run(*options, input=marked).output == result.output


def test_the_command_gives_json():
    marked = text_of("watermark:bias=4")
    got = json.loads(run(marked, "--tokenizer", "bytes", "--json").output)
    tokens = list(marked.encode())
    want = their_detector({})(torch.tensor([tokens]), return_dict=True)
    assert got["z_score"] == pytest.approx(want.z_score[0])
    assert got["tokens_scored"] == len(tokens) - 1
    assert got["prediction"] is True


def test_the_size_of_the_vocabulary_decides_on_the_lists():
    marked = text_of("watermark:bias=4")
    smaller = run(marked, "--tokenizer", "bytes", "--vocab-size", "256").output
    assert smaller != run(marked, "--tokenizer", "bytes", "--vocab-size", "257").output


def test_mistakes_on_the_command_line():
    both = run("text", "--file", __file__, "--tokenizer", "bytes")
    assert both.exit_code == 2
    assert "give TEXT or --file, not both" in both.output
    other = run("text", "--spec", "temperature", "--tokenizer", "bytes")
    assert other.exit_code == 2
    assert "--spec is 'temperature'; it must be the processor watermark" in other.output
    with pytest.raises(gptk.DataError, match="a text of one token is too short"):
        run("x", "--tokenizer", "bytes")
