"""Greedy and beam search on SmolLM2: token for token what transformers gives on the same file."""

import itertools
from unittest import mock

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

import gptk

NEW_TOKENS = 40


def chat(text):
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


# Plain ones run to the limit; most chats reach the end of the text within it.
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):",
    "1, 2, 3, 4, 5,",
    "Water boils at a temperature of",
    chat("What is the capital of Japan?"),
    chat("Say hello."),
    chat("What is 2 + 2?"),
    chat("Name three colours."),
    chat("Is the sky blue? Answer yes or no."),
]
WIDTHS, PENALTIES, EARLY = (3, 4, 6), (0.5, 1.0, 2.0), (True, False, "never")
EVERY = list(itertools.product(PENALTIES, EARLY))


@pytest.fixture(scope="module")
def lm():
    return gptk.load("smollm2", device="cpu", dtype="float32")


def theirs(model, lm, prompt, **settings):
    """transformers' results as lists of new tokens, without EOS, and their scores."""
    ids = torch.tensor([lm.encode(prompt)])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores="num_beams" in settings,
        **settings,
    )
    eos = lm.tokenizer.eos[0]
    tokens = [row[ids.shape[1] :].tolist() for row in out.sequences]
    cut = [row[: row.index(eos)] if eos in row else row for row in tokens]
    return cut, getattr(out, "sequences_scores", None)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy(hf_smollm2, lm, prompt):
    (want,), _ = theirs(hf_smollm2, lm, prompt)
    assert lm.generate(prompt, max_new_tokens=NEW_TOKENS).tokens == want


def check_beam(model, lm, prompt, width, penalty, early, n=1, **settings):
    want, scores = theirs(
        model,
        lm,
        prompt,
        num_beams=width,
        length_penalty=penalty,
        early_stopping=early,
        num_return_sequences=n,
        **settings,
    )
    spec = f"beam:width={width},length_penalty={penalty},early_stopping={str(early).lower()}"
    out = lm.generate(prompt, sampler=spec, max_new_tokens=NEW_TOKENS, n=n)
    results = [out, *out.alternatives]
    assert [result.tokens for result in results] == want
    assert [result.score for result in results] == pytest.approx(scores.tolist(), abs=1e-3)


@pytest.mark.parametrize("index", range(0, len(PROMPTS), 3))
def test_beam_some_prompts(hf_smollm2, lm, index):
    """Widths, penalties and early stopping take turns; all of all are in the slow test."""
    penalty, early = EVERY[index % len(EVERY)]
    check_beam(hf_smollm2, lm, PROMPTS[index], WIDTHS[index % 3], penalty, early)


def test_beam_all_results(hf_smollm2, lm):
    check_beam(hf_smollm2, lm, PROMPTS[6], 4, 1.0, False, n=4)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(PROMPTS)))
def test_beam_every_combination(hf_smollm2, lm, index):
    """All 27 combinations, each on three or four prompts: a Latin square of nine for a prompt.

    Each prefix goes through transformers' model once.
    """
    with mock.patch.object(hf_smollm2, "forward", remembering(hf_smollm2)):
        for w, (number, (penalty, early)) in itertools.product(range(3), enumerate(EVERY)):
            if (w + number // 3 + number % 3 + index) % 3 == 0:
                check_beam(
                    hf_smollm2, lm, PROMPTS[index], WIDTHS[w], penalty, early, use_cache=False
                )


def remembering(model):
    """The model's forward without a cache, for last-token logits, kept for each row's tokens."""
    forward, known = model.forward, {}

    def last_logits(input_ids, **_):
        rows = list(map(tuple, input_ids.tolist()))
        new = [list(row) for row in dict.fromkeys(rows) if row not in known]
        if new:
            logits = forward(input_ids=torch.tensor(new), use_cache=False, logits_to_keep=1).logits
            known.update(zip(map(tuple, new), logits, strict=True))
        return CausalLMOutputWithPast(logits=torch.stack([known[row] for row in rows]))

    return last_logits


@pytest.mark.parametrize("sampler", ["greedy", "multinomial", "top-k", "top-p", "beam"])
def test_a_prompt_gives_the_same_tokens_alone_and_in_a_batch(lm, sampler):
    prompts = [PROMPTS[0], PROMPTS[5], PROMPTS[3], PROMPTS[1]]
    together = lm.generate_batch(prompts, sampler=sampler, seed=0, max_new_tokens=16)
    for ordinal, (prompt, out) in enumerate(zip(prompts, together, strict=True)):
        alone = lm.generate(prompt, sampler=sampler, seed=0, ordinal=ordinal, max_new_tokens=16)
        assert out.tokens == alone.tokens
        assert out.text == alone.text
