"""Every sampler with every kind of processor, constraint, draft and batch.

Each combination runs, or is refused with a reason that docs/combinations.md gives, too.
"""

import json
from pathlib import Path

import pytest
import regex
import torch

import gptk
from gptk import DecodeSession, Follower, IncompatibleError
from gptk.plugins.creating import create
from gptk.plugins.registry import provided
from gptk.testing import tiny_lm

LM = tiny_lm()
DRAFT = tiny_lm()
with torch.no_grad():
    for weight in DRAFT.model.parameters():
        weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))

PROMPTS = [[1, 2, 3], [104, 101, 108, 108, 111, 32], [7] * 11]
SETTINGS = {"max_new_tokens": 9, "seed": 5}
SAMPLERS = {
    name: f"{name}:{one.item.example}" if one.item.example else name
    for name, one in provided("sampler").items()
}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["a"],
    "additionalProperties": False,
}
REGEX = "[a-f]{2,}(xy)?[0-9]{1,3}"
PROCESSORS = {
    "none": [],
    "repetition-penalty": ["repetition-penalty:penalty=1.3"],
    "no-repeat-ngram": ["no-repeat-ngram:size=2"],
    "regex": [f'regex:pattern="{REGEX}"'],
    "json-schema": [
        create(
            "processor",
            f"json-schema:schema={json.dumps(json.dumps(SCHEMA))}",
            gptk.LogitsProcessor,
        )
    ],
}
LANGUAGES = {"regex": REGEX, "json-schema": r'\{\s*"a"\s*:\s*[1-9]?[0-9]\s*\}'}
DRAFTS = {"none": None, "lookup": "lookup:ngram=2,tokens=4", "model": DRAFT}
COMBINATIONS = Path(__file__).parents[2] / "docs/combinations.md"


def everything(out):
    return [out, *out.alternatives]


def results(outs):
    return [
        (one.tokens, one.finish_reason, one.complete) for out in outs for one in everything(out)
    ]


@torch.inference_mode()
def teacher_forced(sampler, processors, prompt, tokens):
    """The log-probability of each token, and of EOS after them, in a run that decides nothing."""
    session = DecodeSession(
        LM.model, [prompt], layers=sampler.hidden_layers(LM.model.config), use_cache=False
    )
    session.rows.eos, session.rows.tokenizer = LM.tokenizer.eos, LM.tokenizer
    processes = [one.start(session.rows) for one in (*processors, *sampler.processors())]
    for process in processes:
        if isinstance(process, Follower):
            session.follow(process)
    logprobs = []
    for token in (*tokens, LM.tokenizer.eos[0]):
        logits = sampler.logits(session)
        for process in processes:
            logits = process(logits, session.rows)
        logprobs.append(logits.log_softmax(-1)[0, token].item())
        session.extend(torch.tensor([token]))
    return logprobs[:-1], logprobs[-1]


def check_scores(out, sampler, processors):
    want, end = teacher_forced(sampler, processors, out.prompt_tokens, out.tokens)
    assert out.token_logprobs == pytest.approx(want, abs=2e-4)
    if out.finish_reason == "eos":
        want.append(end)
    if sampler.name == "best-of-n":
        assert out.score == pytest.approx(sum(want[: len(out.tokens)]) / len(out.tokens), abs=2e-4)
    elif sampler.name != "stochastic-beam":  # whose scores are drawn
        assert out.score == pytest.approx(sampler.rank(sum(want), len(want)), abs=2e-3)


def check_constraint(out, language):
    text = bytes(out.tokens)
    whole = regex.fullmatch(language.encode(), text)
    assert regex.fullmatch(language.encode(), text, partial=True), text
    assert out.complete == bool(whole)
    if out.finish_reason == "eos":
        assert whole


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_combination(name, processor, draft):
    sampler = create("sampler", SAMPLERS[name], gptk.Sampler)
    processors = [create("processor", p, gptk.LogitsProcessor) for p in PROCESSORS[processor]]
    chosen = {"sampler": sampler, "processors": processors, **SETTINGS}

    def run(prompts, **more):
        return LM.generate_batch(prompts, **chosen, draft=DRAFTS[draft], **more)

    reason = sampler.refuses_draft()
    if draft != "none" and reason is not None:
        with pytest.raises(IncompatibleError) as refused:
            run(PROMPTS)
        assert reason in str(refused.value)
        assert reason in COMBINATIONS.read_text("utf-8")
        return
    batch = run(PROMPTS)
    assert results(batch) == results([run([prompt])[0] for prompt in PROMPTS])
    assert results(batch) == results(run(PROMPTS, use_cache=False))
    if draft != "none":
        assert results(batch) == results(LM.generate_batch(PROMPTS, **chosen))
    for out in batch:
        check_scores(out, sampler, processors)
        if processor in LANGUAGES:
            check_constraint(out, LANGUAGES[processor])
        else:
            assert out.complete is None


@pytest.mark.parametrize("name", ["greedy", "multinomial", "mirostat", "dola", "best-of-n"])
def test_strategies_that_choose_one_token_take_a_draft(name):
    assert create("sampler", SAMPLERS[name], gptk.Sampler).refuses_draft() is None
