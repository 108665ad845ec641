"""Many prompts: each gets what it gets alone, in any order, and fails alone."""

import pytest

import gptk
from gptk.testing import tiny_lm

LM = tiny_lm()
PROMPTS = ["The cat", "A dog ran", "The cat", "Once"]


def is_as_alone(result, prompt, ordinal, **settings):
    """Tokens are the same; log-probabilities but for the rounding of passes of other sizes."""
    alone = LM.generate(prompt, ordinal=ordinal, **settings)
    assert result.ordinal == ordinal
    assert (result.tokens, result.text) == (alone.tokens, alone.text)
    assert result.token_logprobs == pytest.approx(alone.token_logprobs, abs=1e-4)
    assert [other.tokens for other in result.alternatives] == [
        other.tokens for other in alone.alternatives
    ]
    return True


@pytest.mark.parametrize("sampler", ["greedy", "multinomial", "beam:3", "top-p:0.8"])
def test_each_gets_what_it_gets_alone_with_its_ordinal(sampler):
    settings = {"sampler": sampler, "max_new_tokens": 6, "seed": 3}
    responses = list(LM.generate_many(PROMPTS, ordered=True, **settings))
    assert [response.index for response in responses] == [0, 1, 2, 3]
    for index, response in enumerate(responses):
        assert is_as_alone(response.generation, PROMPTS[index], index, **settings)


def test_requests_have_settings_ids_and_ordinals_of_their_own():
    requests = [
        gptk.Request("The cat", settings={"sampler": "multinomial", "max_new_tokens": 3}, id="a"),
        gptk.Request([1, 2, 3], ordinal=7),
        "A dog",
    ]
    first, second, third = LM.generate_many(
        requests, ordered=True, sampler="top-k:3", seed=1, ordinal=10, max_new_tokens=5
    )
    assert first.request.id == "a"
    own = {"sampler": "multinomial", "seed": 1, "max_new_tokens": 3}
    assert is_as_alone(first.generation, "The cat", 10, **own)
    common = {"sampler": "top-k:3", "seed": 1, "max_new_tokens": 5}
    assert is_as_alone(second.generation, [1, 2, 3], 7, **common)
    assert is_as_alone(third.generation, "A dog", 12, **common)


def test_prompts_are_read_as_there_is_room():
    read = []

    def endless():
        while True:
            read.append(1)
            yield "The cat"

    responses = LM.generate_many(endless(), max_new_tokens=2)
    assert next(responses).generation is not None
    responses.close()
    assert len(read) < 1000


def test_a_request_that_fails_has_its_error_and_the_others_go_on():
    too_long = [1] * LM.model.config.context_length
    requests = ["The cat", too_long, gptk.Request("x", settings={"sampler": "nope"}), "A dog"]
    responses = list(LM.generate_many(requests, ordered=True, max_new_tokens=3, seed=0))
    assert isinstance(responses[1].error, gptk.PromptError)
    assert isinstance(responses[2].error, gptk.UnknownNameError)
    assert responses[1].generation is responses[2].generation is None
    for index in (0, 3):
        assert responses[index].error is None
        result = responses[index].generation
        assert is_as_alone(result, requests[index], index, max_new_tokens=3, seed=0)


def test_settings_of_the_call_are_checked_before_it_returns():
    with pytest.raises(gptk.OptionError):
        LM.generate_many(["x"], max_new_tokens=0)
    with pytest.raises(gptk.PromptError, match="a list"):
        LM.generate_many("x")


def test_a_request_has_a_prompt_or_messages():
    with pytest.raises(gptk.PromptError, match="not both"):
        gptk.Request("x", messages=[{"role": "user", "content": "x"}])


def test_representations_are_short():
    assert len(repr(gptk.Request([1] * 9000, settings={"seed": 1}, id="a" * 500))) < 200
