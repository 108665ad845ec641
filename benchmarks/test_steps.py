"""The time per step that strategies take besides the model: from SmolLM2's logits to the tokens.

The vocabulary has 49,152 tokens; the logits are those at positions of an English text. "nothing" is
the plain argmax.
"""

import itertools
import json
import pydoc_data.topics

import pytest
import torch

import gptk
import models
from gptk.plugins.creating import create
from gptk.plugins.registry import provided
from machine import Work

PROMPT = list(range(100, 400)) + list(range(250, 300))  # 350 tokens, some repeated
ROWS = [1, 4, 32]
ROUNDS = 20
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
OPTIONS = {
    "json-schema": f"json-schema:schema={json.dumps(json.dumps(SCHEMA))}",
    "regex": 'regex:pattern="[a-zA-Z ,]*\\\\."',
}
SAMPLERS = ["greedy", "multinomial", "top-k", "top-p", "min-p", "typical", "mirostat", "beam"]


@pytest.fixture(scope="module")
def lm():
    return models.load("smollm2", "bfloat16")


@pytest.fixture(scope="module")
def logits(lm):
    """The logits at 64 positions of an English text: (positions, vocab)."""
    tokens = torch.tensor([lm.encode(pydoc_data.topics.topics["with"])[:120]])
    tokens = tokens.to(lm.model.device)
    with torch.inference_mode():
        return lm.model.logits(lm.model(tokens))[0, -64:]


def spec(kind, name):
    example = provided(kind)[name].item.example
    return OPTIONS.get(name, f"{name}:{example}" if example else name)


def step(measure, lm, logits, count, choose):
    """Time steps of `count` rows. choose: a function that takes the rows, and returns a function
    from logits to tokens and the followers of the chosen tokens."""
    tokenizer = lm.tokenizer
    device = lm.model.device
    rows = gptk.Rows([PROMPT] * count, device=device, tokenizer=tokenizer, eos=tokenizer.eos)
    decide, followers = choose(rows)
    steps = itertools.cycle(
        [logits[torch.arange(start, start + count) % len(logits)] for start in range(0, 60, 3)]
    )
    chosen = []

    def run_step():
        tokens = decide(next(steps))[:, None]
        for follower in followers:
            follower.extend(tokens)
        chosen.append(tokens)

    def move():
        while chosen:
            rows.extend(chosen.pop())

    work = Work(tokens=count, bytes=count * logits[0].nbytes)
    with torch.inference_mode():
        measure(run_step, work, setup=move, rounds=ROUNDS, warmup=2)


def following(processes):
    """Those processes that are to be told the tokens of each step."""
    return [process for process in processes if isinstance(process, gptk.Follower)]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", ["nothing", *sorted(set(provided("processor")) - {"cfg"})])
def test_processor(name, rows, lm, logits, measure):
    def choose(rows):
        if name == "nothing":
            return lambda logits: logits.argmax(dim=-1), []
        process = create("processor", spec("processor", name), gptk.LogitsProcessor).start(rows)
        return lambda logits: process(logits, rows).argmax(dim=-1), following([process])

    step(measure, lm, logits, rows, choose)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler_step(name, rows, lm, logits, measure):
    sampler = create("sampler", spec("sampler", name), gptk.Sampler)

    def choose(rows):
        processes = [processor.start(rows) for processor in sampler.processors()]

        def decide(logits):
            for process in processes:
                logits = process(logits, rows)
            # A beam search returns more candidates; one for each row is enough here.
            return sampler.step(logits, rows).tokens[: len(rows)]

        return decide, following(processes)

    step(measure, lm, logits, rows, choose)
