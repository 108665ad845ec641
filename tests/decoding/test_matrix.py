"""Every sampler with every kind of model, processor, constraint, draft and batch.

Each combination runs, or is refused with a reason; docs/combinations.md has those for drafts.
"""

import functools
import json
import os
from pathlib import Path

import pytest
import regex
import torch

import gptk
from architectures import small_model
from gptk import DecodeSession, Follower, IncompatibleError
from gptk.plugins import create, provided
from gptk.testing import tiny_lm
from toys import byte_tokenizer, table_model


def noisy_lm():
    """The tiny random model with noise on its weights."""
    lm = tiny_lm()
    with torch.no_grad():
        for weight in lm.model.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    return lm


def table_lm(noise=0.0):
    return gptk.LanguageModel(table_model(noise=noise), byte_tokenizer())


def transformers_lm(kind, noise=0.0):
    model = gptk.TransformersModel(small_model(kind, noise=noise))
    return gptk.LanguageModel(model, byte_tokenizer())


MODELS = {"gpt": tiny_lm, "table": table_lm}
DRAFTING = {"gpt": noisy_lm, "table": functools.partial(table_lm, noise=0.3)}
"""For each model one that is a little different, to draft for it."""
BY_TRANSFORMERS = [
    *("cohere", "deepseek_v3", "gemma", "glm4", "gpt_bigcode", "gpt_oss", "granite", "olmoe"),
    *("phi", "starcoder2"),
]
"""Architectures that gptk has no code for."""
QUICK = [("granite", name) for name in ("greedy", "beam", "contrastive", "dola")]
"""What is not left to the slow tests of them."""
MODELS |= {kind: functools.partial(transformers_lm, kind) for kind in BY_TRANSFORMERS}
DRAFTING |= {kind: functools.partial(transformers_lm, kind, 0.02) for kind in BY_TRANSFORMERS}


def is_slow(model, name):
    return model in BY_TRANSFORMERS and (model, name) not in QUICK


def runs(model, name):
    """Whether a sampler is tried with a model. With $GPTK_TEST_MATRIX it is with all of them, else
    with two architectures of transformers'."""
    if model == "table" and name in NEED_HIDDEN_STATES:
        return False
    if not is_slow(model, name) or "GPTK_TEST_MATRIX" in os.environ:
        return True
    return (3 * list(SAMPLERS).index(name) - BY_TRANSFORMERS.index(model)) % 5 == 0


@functools.cache
def model_of(name):
    return MODELS[name]()


@functools.cache
def drafting_for(name):
    return DRAFTING[name]()


PROMPTS = [[1, 2, 3], [104, 101, 108, 108, 111, 32], [7] * 11]
SETTINGS = {"max_new_tokens": 9, "seed": 5}
SAMPLERS = {
    name: f"{name}:{plugin.item.example}" if plugin.item.example else name
    for name, plugin in provided("sampler").items()
}
NEED_HIDDEN_STATES = {"contrastive": "compares hidden states", "dola": "contrasts layers"}
"""Samplers that refuse a model whose configuration has width 0 or no layers, and why."""
RUNNING = [
    pytest.param(model, name, marks=pytest.mark.slow if is_slow(model, name) else ())
    for model in MODELS
    for name in SAMPLERS
    if runs(model, name)
]
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
DRAFTS = ["none", "lookup", "model"]
COMBINATIONS = Path(__file__).parents[2] / "docs/combinations.md"


def drafter(draft, model):
    if draft == "model":
        return drafting_for(model)
    return {"none": None, "lookup": "lookup:ngram=2,tokens=4"}[draft]


def results(outs):
    return [
        (result.tokens, result.finish_reason, result.complete)
        for out in outs
        for result in (out, *out.alternatives)
    ]


@torch.inference_mode()
def teacher_forced(lm, sampler, processors, prompt, tokens):
    """The log-probability of each token, and of EOS after them, in a run that is given them."""
    session = DecodeSession(
        lm.model, [prompt], layers=sampler.hidden_layers(lm.model.config), use_cache=False
    )
    session.rows.set_tokenizer(lm.tokenizer, lm.tokenizer.eos)
    processes = [part.start(session.rows) for part in (*processors, *sampler.processors())]
    for process in processes:
        if isinstance(process, Follower):
            session.follow(process)
    logprobs = []
    for token in (*tokens, lm.tokenizer.eos[0]):
        logits = sampler.logits(session)
        for process in processes:
            logits = process(logits, session.rows)
        logprobs.append(logits.log_softmax(-1)[0, token].item())
        session.extend(torch.tensor([token]))
    return logprobs[:-1], logprobs[-1]


def check_scores(lm, out, sampler, processors):
    want, end = teacher_forced(lm, sampler, processors, out.prompt_tokens, out.tokens)
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
@pytest.mark.parametrize(("model", "name"), RUNNING)
def test_combination(model, name, processor, draft):
    lm = model_of(model)
    sampler = create("sampler", SAMPLERS[name], gptk.Sampler)
    processors = [create("processor", p, gptk.LogitsProcessor) for p in PROCESSORS[processor]]
    chosen = {"sampler": sampler, "processors": processors, **SETTINGS}

    def run(prompts, **more):
        return lm.generate_batch(prompts, **chosen, draft=drafter(draft, model), **more)

    reason = sampler.refuses_draft()
    if draft != "none" and reason is not None:
        with pytest.raises(IncompatibleError) as refused:
            run(PROMPTS)
        assert reason in str(refused.value)
        assert reason in COMBINATIONS.read_text("utf-8")
        return
    batch = run(PROMPTS)
    alone = [run([prompt], ordinal=ordinal)[0] for ordinal, prompt in enumerate(PROMPTS)]
    assert results(batch) == results(alone)
    assert results(batch) == results(run(PROMPTS, use_cache=False))
    if draft != "none":
        assert results(batch) == results(lm.generate_batch(PROMPTS, **chosen))
    for out in batch:
        check_scores(lm, out, sampler, processors)
        if processor in LANGUAGES:
            check_constraint(out, LANGUAGES[processor])
        else:
            assert out.complete is None


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", NEED_HIDDEN_STATES)
def test_a_model_without_hidden_states_is_refused(name, use_cache):
    for draft in DRAFTS:
        with pytest.raises(IncompatibleError, match=f"sampler {name} "):
            model_of("table").generate(
                PROMPTS[0],
                sampler=SAMPLERS[name],
                draft=drafter(draft, "table"),
                use_cache=use_cache,
                **SETTINGS,
            )
    with pytest.raises(IncompatibleError) as refused:
        model_of("table").generate(PROMPTS[0], sampler=SAMPLERS[name], use_cache=use_cache)
    assert NEED_HIDDEN_STATES[name] in str(refused.value)


def by_hand(table, prompt, count):
    """The tokens that greedy search chooses on a table, and all tokens' log-probabilities."""
    line, tokens, logprobs = 0, [], []
    for token in prompt:
        logprobs.append(table.log_table[line, token].item())
        line = table.next_line(line, token)
    for _ in range(count):
        tokens.append(int(table.log_table[line].argmax()))
        logprobs.append(table.log_table[line, tokens[-1]].item())
        line = table.next_line(line, tokens[-1])
    return tokens, logprobs[1:]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("draft", DRAFTS)
def test_a_language_model_of_a_table(draft, use_cache):
    """generate, generate_batch, stream and score of a model that is no GPT."""
    lm = model_of("table")
    settings = {
        "max_new_tokens": 12,
        "ignore_eos": True,
        "use_cache": use_cache,
        "draft": drafter(draft, "table"),
    }
    batch = lm.generate_batch(PROMPTS, **settings)
    for prompt, out in zip(PROMPTS, batch, strict=True):
        tokens, logprobs = by_hand(lm.model, prompt, 12)
        assert out.tokens == tokens
        assert out.token_logprobs == pytest.approx(logprobs[-12:], abs=1e-5)
        assert lm.generate(prompt, **settings).tokens == tokens
        stream = lm.stream(prompt, **settings)
        assert "".join(stream) == stream.result.text == out.text
        assert stream.result.tokens == tokens
        if draft == "model":
            assert stream.acceptance.accepted > 0
        assert lm.score(prompt + tokens).token_logprobs == pytest.approx(logprobs, abs=1e-5)


@pytest.mark.parametrize("name", ["greedy", "multinomial", "mirostat", "dola", "best-of-n"])
def test_strategies_that_choose_one_token_take_a_draft(name):
    assert create("sampler", SAMPLERS[name], gptk.Sampler).refuses_draft() is None
