"""Plug-ins that write into what they are given, or keep it: nothing else changes by it.

Each is compared with the same plug-in that leaves its arguments alone.
"""

import json
from types import SimpleNamespace

import pytest
import torch

import gptk
from gptk.testing import tiny_lm

LM = tiny_lm()
PROMPTS = ["one two", "three"]
SAMPLERS = [
    *("greedy", "multinomial", "beam:width=3", "contrastive:k=3", "dola:layers=high", "mirostat"),
    "best-of-n:n=2",
]


class Polite(gptk.LogitsProcessor):
    """Takes out all tokens below 40, except EOS."""

    name = "polite"

    def __call__(self, logits, rows):
        return logits.index_fill(1, torch.arange(40), -torch.inf)


class InPlace(Polite):
    """The same, written into the logits that it gets."""

    name = "in-place"

    def __call__(self, logits, rows):
        logits[:, :40] = -torch.inf
        return logits


class Rude(Polite):
    """The same; then overwrites everything that it can reach."""

    name = "rude"

    def __call__(self, logits, rows):
        result = super().__call__(logits, rows)
        logits.fill_(3.0)
        rows.tokens.zero_()
        rows.mask.zero_()
        for name in ("lengths", "prompt_lengths", "prompts", "streams", "groups"):
            with pytest.raises(TypeError):
                getattr(rows, name)[0] = 0
        return result


class Follows(gptk.Follower):
    """Checks that it is told the right tokens, and overwrites them."""

    def __init__(self, process, rows):
        self.process = process
        self.rows = [row[mask].tolist() for row, mask in zip(rows.tokens, rows.mask, strict=True)]

    def extend(self, tokens):
        self.rows = [row + new for row, new in zip(self.rows, tokens.tolist(), strict=True)]
        tokens.fill_(77)

    def select(self, parents):
        self.rows = [list(self.rows[parent]) for parent in parents]
        with pytest.raises(TypeError):
            parents[0] = 0

    def rewind(self, counts):
        self.rows = [row[: len(row) - n] for row, n in zip(self.rows, counts, strict=True)]
        with pytest.raises(TypeError):
            counts[0] = 0

    def __call__(self, logits, rows):
        masked = zip(rows.tokens, rows.mask, strict=True)
        assert self.rows == [row[mask].tolist() for row, mask in masked]
        return self.process(logits, rows)


class RudeFollower(Polite):
    """Has a state that overwrites the moves that it is told of."""

    name = "rude-follower"

    def start(self, rows):
        return Follows(Polite(), rows)


def results(**settings):
    outs = LM.generate_batch(PROMPTS, seed=4, max_new_tokens=6, **settings)
    return [
        (result.tokens, result.token_logprobs, result.score)
        for out in outs
        for result in (out, *out.alternatives)
    ]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("processor", [InPlace(), Rude(), RudeFollower()])
def test_a_processor_that_writes_into_its_arguments_changes_nothing_else(sampler, processor):
    polite = results(sampler=sampler, processors=[Polite()])
    assert results(sampler=sampler, processors=[processor, RudeFollower()]) == polite


@pytest.mark.parametrize("draft", ["lookup:ngram=1,tokens=3", LM])
@pytest.mark.parametrize("processor", [InPlace(), Rude(), RudeFollower()])
def test_nor_with_a_draft(draft, processor):
    settings = {"sampler": "multinomial", "draft": draft}
    polite = results(processors=[Polite()], **settings)
    assert results(processors=[processor], **settings) == polite


@pytest.mark.parametrize("processor", [Polite(), InPlace(), Rude(), RudeFollower()])
def test_the_trace_counts_what_a_processor_removed_even_in_place(processor, tmp_path):
    path = tmp_path / "t.jsonl"
    settings = {"sampler": "greedy", "max_new_tokens": 4}
    first = "top-k:k=100"
    LM.generate("x", processors=[first, processor], observers=[f"trace:path={path}"], **settings)
    _, *steps = map(json.loads, path.read_text().splitlines())
    polite = tmp_path / "polite.jsonl"
    LM.generate("x", processors=[first, Polite()], observers=[f"trace:path={polite}"], **settings)
    _, *want = map(json.loads, polite.read_text().splitlines())
    for step, expected in zip(steps, want, strict=True):
        assert step["removed"][processor.name] == expected["removed"]["polite"] > 0
        assert step["entropy"] == expected["entropy"]


class SecondBest(gptk.Sampler):
    """The second likeliest token, found by masking the likeliest."""

    name = "second"
    in_place: bool = False

    def step(self, logits, rows):
        masked = logits if self.in_place else logits.clone()
        masked[torch.arange(len(logits)), logits.argmax(-1)] = -torch.inf
        choice = gptk.Choice.one_each(masked.argmax(-1), masked, rows)
        if self.in_place:
            rows.scores.fill_(-5)
            rows.logprobs.fill_(-5)
        return choice


@pytest.mark.parametrize("processors", [[], [Polite()]])
def test_a_sampler_that_writes_into_the_logits_changes_no_trace(processors, tmp_path):
    traces, outs = [], []
    for in_place in (False, True):
        path = tmp_path / f"{in_place}.jsonl"
        sampler = SecondBest(in_place=in_place)
        settings = {"sampler": sampler, "processors": processors, "max_new_tokens": 6, "seed": 0}
        outs.append(LM.generate("x", observers=[f"trace:path={path}"], top_logprobs=3, **settings))
        traces.append([line["entropy"] for line in map(json.loads, path.open()) if "step" in line])
        plain = LM.generate("x", **settings)
        assert plain.tokens == outs[-1].tokens
        assert plain.token_logprobs == outs[-1].token_logprobs
    assert traces[0] == traces[1]
    assert outs[0] == outs[1]


class ReusesItsTensor(gptk.Sampler):
    """Greedy; returns the same tensors each time, with new numbers in them."""

    name = "reuses"

    def start(self, run):
        return SimpleNamespace(tokens=None)

    def advance(self, run):
        logits = run.processed_logits()
        if run.state.tokens is None:
            run.state.tokens = torch.zeros(len(logits), dtype=torch.int64)
        run.state.tokens[: len(logits)] = logits.argmax(-1)
        run.commit(gptk.Choice.one_each(run.state.tokens[: len(logits)], logits, run.session.rows))


def test_a_sampler_may_use_its_tensors_again():
    steps = []

    class Keeps(gptk.DecodingObserver, gptk.DecodingListener):
        name = "keeps"

        def start(self, run):
            return self

        def step(self, step):
            steps.append(step)

    out = LM.generate("x", sampler=ReusesItsTensor(), observers=[Keeps()], max_new_tokens=8)
    assert out.tokens == LM.generate("x", max_new_tokens=8).tokens
    assert [int(step.choice.tokens[0]) for step in steps][: len(out.tokens)] == out.tokens
    # What an observer has kept is still that of its step.
    assert [int(step.logits[0].argmax()) for step in steps][: len(out.tokens)] == out.tokens


class RudeObserver(gptk.DecodingObserver, gptk.DecodingListener):
    """Overwrites all that it is shown."""

    name = "rude-observer"

    def start(self, run):
        return self

    def step(self, step):
        for tensor in (step.logits, step.processed, step.choice.logprobs, step.choice.scores):
            tensor.fill_(1)
        step.choice.tokens.zero_()
        for count in step.removed.values():
            count.zero_()
        for sequence in (step.rows, step.waiting, step.outcomes):
            with pytest.raises(TypeError):
                sequence[0] = None
        with pytest.raises(TypeError):
            step.removed["polite"] = 0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_observer_that_overwrites_a_step_changes_nothing_and_no_other_observer(
    sampler, tmp_path
):
    paths = [tmp_path / "alone.jsonl", tmp_path / "beside.jsonl"]
    for path, others in zip(paths, ([], [RudeObserver()]), strict=True):
        observers = [*others, f"trace:path={path}", *others]
        outs = results(sampler=sampler, processors=[Polite()], observers=observers)
        assert outs == results(sampler=sampler, processors=[Polite()])
    assert paths[0].read_text() == paths[1].read_text()


def test_tokens_that_a_plugin_keeps_stay_those_of_their_step():
    kept = []

    class Keeps(gptk.LogitsProcessor):
        name = "keeps-tokens"

        def __call__(self, logits, rows):
            kept.append((rows.tokens, rows.tokens.tolist(), logits, logits.clone()))
            return logits

    LM.generate_batch(PROMPTS, sampler="multinomial", n=2, processors=[Keeps()], max_new_tokens=8)
    assert len(kept) == 8 * len(PROMPTS)
    for tokens, then, logits, logits_then in kept:
        assert tokens.tolist() == then
        assert torch.equal(logits, logits_then)


def test_an_error_names_the_processor_that_left_no_token_and_not_the_model():
    class Nothing(gptk.LogitsProcessor):
        name = "nothing"

        def __call__(self, logits, rows):
            logits.fill_(-torch.inf)
            return logits

    with pytest.raises(gptk.DecodingError, match="processor nothing left no token"):
        LM.generate("x", processors=[InPlace(), Nothing()])
