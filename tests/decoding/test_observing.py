"""Decoding observers: what they are shown is what happened, and they change nothing."""

import json
import math
import warnings

import pytest
import torch

import gptk
from gptk.testing import tiny_lm
from program import failing
from program import gptk as run_gptk

LM = tiny_lm()
PROMPTS = ["one two", "three", "four five six"]


def traced(path, prompts=PROMPTS, **settings):
    outs = LM.generate_batch(prompts, observers=[f"trace:path={path}"], **settings)
    return outs, *read(path)


def read(path):
    """The first line of the first run, and the steps of all."""
    lines = path.read_text(encoding="utf-8").splitlines()
    read = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    return read[0], [line for line in read if "step" in line]


@pytest.mark.parametrize("sampler", ["greedy", "top-p:p=0.8"])
def test_a_trace_has_the_tokens_that_were_chosen(sampler, tmp_path):
    settings = {"sampler": sampler, "seed": 5, "max_new_tokens": 12, "n": 1}
    outs, head, steps = traced(tmp_path / "t.jsonl", **settings)
    assert head["sampler"] == gptk.plugins.create("sampler", sampler, gptk.Sampler).spec
    assert outs == LM.generate_batch(PROMPTS, **settings)
    assert [out.ordinal for out in outs] == [0, 1, 2]
    for out in outs:
        lines = [line for line in steps if line["ordinal"] == out.ordinal]
        assert [line["length"] for line in lines] == list(range(len(lines)))
        chosen = [candidate for line in lines for candidate in line["candidates"]]
        tokens = [candidate["token"] for candidate in chosen]
        eos = tokens[-1] == 256
        assert tokens[: len(tokens) - eos] == out.tokens
        logprobs = [candidate["logprob"] for candidate in chosen]
        assert logprobs[: len(out.tokens)] == out.token_logprobs
        ends = [candidate.get("ends") for candidate in chosen]
        assert ends == [None] * (len(lines) - 1) + [out.finish_reason]
        assert all(candidate["taken"] for candidate in chosen)


def test_runs_of_one_observer_share_a_file_that_another_overwrites(tmp_path):
    path = tmp_path / "t.jsonl"
    for _ in range(2):
        observer = gptk.plugins.create("decoding-observer", f"trace:{path}", gptk.DecodingObserver)
        for ordinal in range(3):
            LM.generate("abc", ordinal=ordinal, max_new_tokens=2, observers=[observer])
        heads = [line for line in map(json.loads, path.open()) if "step" not in line]
        assert [head["ordinal"] for head in heads] == [0, 1, 2]
        assert [line["ordinal"] for line in read(path)[1]] == [0, 0, 1, 1, 2, 2]


def test_requests_with_settings_of_their_own_share_the_observers_of_the_call(tmp_path):
    requests = [gptk.Request("a", settings={"max_new_tokens": 1}), gptk.Request("b"), "c"]
    spec = f"trace:path={tmp_path / 't.jsonl'}"
    processors = (spec for spec in ["top-k:k=7", "min-p:p=0.1"])  # can be read once only
    settings = {"max_new_tokens": 2, "observers": [spec], "processors": processors}
    list(LM.generate_many(requests, seed=0, **settings))
    lines = list(map(json.loads, (tmp_path / "t.jsonl").open()))
    assert sorted(line["ordinal"] for line in lines if "step" in line) == [0, 1, 1, 2, 2]
    assert all(len(line["processors"]) == 2 for line in lines if "step" not in line)


def test_entropies_and_what_each_processor_took_out(tmp_path):
    outs, head, steps = traced(
        tmp_path / "t.jsonl",
        prompts=["abc"],
        sampler="multinomial",
        processors=["top-k:k=20", "suppress-tokens:tokens=[1,2]", "min-p:p=0.3"],
        max_new_tokens=6,
        seed=1,
    )
    assert [spec.partition(":")[0] for spec in head["processors"][:3]] == [
        "top-k",
        "suppress-tokens",
        "min-p",
    ]
    with torch.inference_mode():
        ids = torch.tensor([outs[0].prompt_tokens + outs[0].tokens])
        logits = LM.model.logits(LM.model(ids))[0, len(outs[0].prompt_tokens) - 1 :]
    for line, given in zip(steps, logits, strict=False):
        kept = given.topk(20).indices.tolist()
        suppressed = len({1, 2} & set(kept))
        left = [token for token in kept if token not in (1, 2)]
        p = given[left].softmax(0)
        staying = p >= 0.3 * p.max() * (1 - 1e-5)
        assert line["removed"] == {
            "top-k": 257 - 20,
            "suppress-tokens": suppressed,
            "min-p": len(left) - int(staying.sum()),
        }
        q = p[staying] / p[staying].sum()
        assert line["entropy"] == pytest.approx(-float((q * q.log()).sum()), abs=1e-4)


def test_a_trace_of_beams_leads_to_the_results(tmp_path):
    settings = {"sampler": "beam:width=3", "n": 3, "max_new_tokens": 8}
    outs, _, steps = traced(tmp_path / "t.jsonl", prompts=["abc"], **settings)
    by_step = {}
    for line in steps:
        by_step.setdefault(line["step"], []).append(line)
    assert sorted(by_step) == list(range(len(by_step)))
    ended = [c["score"] for line in steps for c in line["candidates"] if "ends" in c]
    for out in (outs[0], *outs[0].alternatives):
        total = out.score * (len(out.tokens) + (out.finish_reason == "eos"))
        assert any(score == pytest.approx(total, abs=1e-4) for score in ended)
    for number in range(len(by_step) - 1):
        candidates = [c for line in by_step[number] for c in line["candidates"]]
        going_on = [c for c in candidates if c["taken"] and "ends" not in c]
        assert len(going_on) == len(by_step[number + 1])


def test_a_draft_leaves_the_same_trace(tmp_path):
    def decided(path, **more):
        _, _, steps = traced(path, sampler="multinomial", seed=3, max_new_tokens=15, **more)
        keep = ("ordinal", "length", "removed")
        return sorted(
            (
                [line[key] for key in keep], round(line["entropy"], 3),
                [candidate["token"] for candidate in line["candidates"]],
            )
            for line in steps
        )  # fmt: skip

    plain = decided(tmp_path / "a.jsonl")
    assert decided(tmp_path / "b.jsonl", draft="lookup:ngram=1") == plain


class Fails(gptk.DecodingObserver):
    """Fails at its second step."""

    name = "fails"

    class Listener(gptk.DecodingListener):
        def __init__(self):
            self.steps = 0

        def step(self, step):
            self.steps += 1
            assert self.steps < 3
            if self.steps == 2:
                raise ZeroDivisionError("oh")

    def start(self, decoding):
        return self.Listener()


def test_an_observer_that_fails_is_named_once_and_hears_no_more(tmp_path):
    plain = LM.generate("abc", max_new_tokens=6, seed=0)
    path = tmp_path / "t.jsonl"
    with pytest.warns(gptk.PluginWarning) as warned:
        out = LM.generate(
            "abc", max_new_tokens=6, seed=0, observers=[Fails(), f"trace:path={path}"]
        )
    (message,) = [str(warning.message) for warning in warned]
    assert message.startswith("decoding-observer fails of ")
    assert "ZeroDivisionError: oh" in message
    assert message.endswith("hears no more of this run")
    assert out == plain
    assert len(path.read_text().splitlines()) == 7


def test_a_sampler_that_never_asks_for_processed_logits(tmp_path):
    class First(gptk.Sampler):
        """Token 65, whatever the model says."""

        name = "first"

        def advance(self, decoding):
            rows = decoding.session.rows
            tokens = torch.full((len(rows),), 65)
            choice = gptk.Choice.one_each(tokens, decoding.session.logits, rows)
            decoding.commit(choice)

    path = tmp_path / "t.jsonl"
    out = LM.generate("x", sampler=First(), max_new_tokens=3, observers=[f"trace:path={path}"])
    assert out.text == "AAA"
    assert [line["removed"] for line in read(path)[1]] == [{}] * 3


def test_the_sums_of_a_traces_log_probabilities_are_the_scores(tmp_path):
    outs, _, steps = traced(tmp_path / "t.jsonl", sampler="greedy", max_new_tokens=10)
    for out in outs:
        of_prompt = [line for line in steps if line["ordinal"] == out.ordinal]
        chosen = [line["candidates"][0] for line in of_prompt]
        assert chosen[-1]["score"] == pytest.approx(
            math.fsum(candidate["logprob"] for candidate in chosen)
        )
        assert len(chosen) >= len(out.tokens)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    LM.save(path)
    return path


class TestCommand:
    def test_trace_writes_a_line_for_each_step(self, model, tmp_path):
        path = tmp_path / "steps.jsonl"
        common = ["generate", "abc", "--model", model, "--max-new-tokens", "5", "--seed", "0"]
        out = run_gptk(*common, "--trace", path)
        assert out.returncode == 0, out.stderr
        assert out.stdout == run_gptk(*common).stdout
        assert len(path.read_text().splitlines()) == 6
        again = tmp_path / "again.jsonl"
        assert run_gptk(*common, "--observer", f"trace:path={again}").returncode == 0
        assert again.read_text() == path.read_text()

    def test_what_cannot_be_is_told(self, model, tmp_path):
        common = ["generate", "abc", "--model", model, "--max-new-tokens", "5"]
        line = failing(*common, "--trace", tmp_path / "no" / "t.jsonl", code=2)
        assert "cannot be written: No such file" in line
        line = failing(*common, "--observer", "tracer", code=2)
        assert "did you mean trace?" in line


class Breaks(gptk.Scorer):
    """Fails."""

    name = "breaks"

    def score(self, result):
        return 1 / 0


class BreaksAtTheEnd(gptk.LogitsProcessor):
    """Fails after three tokens, in a function beside it."""

    name = "breaks-at-the-end"

    def __call__(self, logits, rows):
        return helper(logits, rows)


def helper(logits, rows):
    if rows.lengths[0] - rows.prompt_lengths[0] == 3:
        raise IndexError("no fourth")
    return logits


class TestWhoFailed:
    """Whoever fails in the middle of decoding is named, with where."""

    def test_a_processor(self):
        stream = LM.stream("abc", processors=[BreaksAtTheEnd()])
        with pytest.raises(
            gptk.PluginError,
            match=r"^processor breaks-at-the-end of module test_observing failed in helper, "
            r"line \d+ of test_observing: IndexError: no fourth$",
        ):
            list(stream)
        assert len(stream.interrupt()) >= 0
        assert len(stream.result.tokens) == 3  # nothing is lost

    def test_a_scorer(self):
        module = type("Module", (), {})()
        module.gptk_scorers = gptk.hookimpl(_scorers)
        gptk.plugins.register(module, origin="their-scorers 1.2")
        try:
            with pytest.raises(
                gptk.PluginError,
                match=r"^scorer breaks of their-scorers 1.2 \(hook gptk_scorers\) failed in",
            ):
                LM.generate("x", sampler="best-of-n:n=2,scorer=breaks", max_new_tokens=2)
        finally:
            gptk.plugins.unregister(module)

    def test_what_no_plugin_had_a_part_in_is_left_as_it_is(self, monkeypatch):
        def fails(*_, **__):
            raise RuntimeError("of the model")

        monkeypatch.setattr(type(LM.model), "logits", fails)
        with pytest.raises(RuntimeError, match="of the model"):
            LM.generate("x", sampler="top-p")


def gptk_scorers():
    return [Breaks]


_scorers = gptk_scorers


def test_nothing_is_warned_of_in_an_ordinary_run(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        traced(tmp_path / "t.jsonl", sampler="beam", max_new_tokens=3)
