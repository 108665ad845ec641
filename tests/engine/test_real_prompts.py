"""SmolLM2 in float32 with ten strategies side by side: each prompt gives what it gives alone, to
the last bit."""

import os
import pydoc_data.topics
import random

import pytest

import gptk

PROMPTS = int(os.environ.get("GPTK_TEST_PROMPTS", "30"))
"""How many prompts; 300 take three minutes."""

STRATEGIES = [
    {"sampler": "greedy"},
    {"sampler": "multinomial"},
    {"sampler": "top-p:0.9"},
    {"sampler": "beam:3"},
    {"sampler": "contrastive"},
    {"sampler": "diverse-beam:width=4,beam_groups=2"},
    {"sampler": "mirostat"},
    {"sampler": "greedy", "draft": "lookup"},
    {"sampler": "multinomial", "processors": ["repetition-penalty:1.2"]},
    {"sampler": "greedy", "processors": ['regex:pattern="[a-zA-Z ]{5,200}"']},
]


def texts(count):
    """Pieces of 5 to 200 words of Python's language reference."""
    topics = pydoc_data.topics.topics
    words = " ".join(topics[name] for name in sorted(topics)).split()
    chance = random.Random(0)
    for _ in range(count):
        size = chance.randint(5, 200)
        start = chance.randrange(len(words) - size)
        yield " ".join(words[start : start + size])


@pytest.mark.slow
def test_real_prompts_with_ten_strategies_give_what_they_give_alone(smollm2_path):
    lm = gptk.load(str(smollm2_path), quantize="none", dtype="float32")
    requests = [
        gptk.Request(text, settings=STRATEGIES[number % len(STRATEGIES)])
        for number, text in enumerate(texts(PROMPTS))
    ]
    limits = {"max_new_tokens": 24, "seed": 1}
    responses = list(lm.generate_many(requests, ordered=True, **limits))
    assert [response.index for response in responses] == list(range(PROMPTS))
    for request, response in zip(requests, responses, strict=True):
        alone = lm.generate(request.prompt, ordinal=response.index, **limits, **request.settings)
        together = response.generation
        assert together.tokens == alone.tokens
        assert together.text == alone.text
        assert together.token_logprobs == alone.token_logprobs
        assert together.score == alone.score
