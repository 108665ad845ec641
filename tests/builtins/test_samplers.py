"""Samplers: invariants of each, on random models and on distributions known exactly."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gptk
from gptk import Choice, DecodingError, GptkError, LogitsProcessor, OptionError, Rows, Sampler
from gptk.plugins.creating import create
from gptk.plugins.registry import provided
from gptk.testing import batches, logits, prompts, tiny_lm
from gptk.testing._decoding import Together
from toys import LLAMA_LIKE

LM = tiny_lm()
# tests/decoding/test_matrix.py covers the other samplers.
SPECS = {
    "greedy": "greedy",
    "multinomial": "multinomial:temperature=0.8",
    "top-k": "top-k:k=5",
    "top-p": "top-p:p=0.8",
    "beam": "beam:width=3",
}

EVERY = {
    name: f"{name}:{sampler.item.example}" if sampler.item.example else name
    for name, sampler in provided("sampler").items()
}


def rows_of(tokens, seed=0):
    return Rows(tokens, seed=seed, device=torch.device("cpu"))


def result(out):
    return [(g.tokens, g.finish_reason) for g in (out, *out.alternatives)]


@pytest.mark.parametrize("spec", SPECS.values())
@given(prompt=prompts(), penalty=st.sampled_from([None, "repetition-penalty:penalty=1.5"]))
@settings(max_examples=10)
def test_scores_equal_a_teacher_forced_recomputation(spec, prompt, penalty):
    processors = [penalty] if penalty else []
    out = LM.generate(prompt, sampler=spec, processors=processors, max_new_tokens=6, seed=1)
    sampler = create("sampler", spec, Sampler)
    chain = [create("processor", p, LogitsProcessor) for p in processors]
    chain += sampler.processors()
    tokens = list(prompt)
    for token, logprob in zip(out.tokens, out.token_logprobs, strict=True):
        with torch.inference_mode():
            scores = LM.model.logits(LM.model(torch.tensor([tokens])))[:, -1]
        for process in chain:
            scores = process(scores, rows_of([tokens]))
        assert scores.log_softmax(-1)[0, token].item() == pytest.approx(logprob, abs=1e-3)
        tokens.append(token)
    if out.finish_reason == "length":
        assert out.score == pytest.approx(
            sampler.rank(math.fsum(out.token_logprobs), len(out.tokens)), abs=1e-3
        )


@pytest.mark.parametrize("spec", [s for n, s in SPECS.items() if n not in ("greedy", "beam")])
def test_equal_seeds_give_equal_texts_and_samples_differ(spec):
    out = LM.generate([1, 2, 3], sampler=spec, n=4, seed=7, max_new_tokens=10)
    again = LM.generate([1, 2, 3], sampler=spec, n=4, seed=7, max_new_tokens=10)
    assert result(out) == result(again)
    assert len({tuple(g.tokens) for g in (out, *out.alternatives)}) > 1
    first = LM.generate([1, 2, 3], sampler=spec, n=1, seed=7, max_new_tokens=10)
    assert first.tokens == out.tokens
    assert LM.generate([1, 2, 3], sampler=spec, seed=8, max_new_tokens=10).tokens != out.tokens


@given(logits(rows=1))
def test_greedy_takes_a_most_likely_token(scores):
    choice = create("sampler", "greedy", Sampler).step(scores, rows_of([[1]]))
    assert scores[0, choice.tokens[0]] == scores.max()
    assert choice.logprobs[0] == pytest.approx(scores.log_softmax(-1).max().item(), abs=1e-4)


@given(logits(rows=1), st.integers(0, 100))
def test_multinomial_never_draws_a_masked_token(scores, seed):
    choice = create("sampler", "multinomial", Sampler).step(scores, rows_of([[1]], seed))
    assert scores[0, choice.tokens[0]] > -torch.inf


@pytest.mark.parametrize("spec", ["multinomial", "top-k:k=4", "top-p:p=0.75"])
def test_draws_follow_the_distribution(spec):
    """A chi-squared test of 20,000 draws, each with the first number of its own stream."""
    scores = torch.tensor([2.0, 0.0, 1.0, -1.0, 1.5, 0.5, -torch.inf, -3.0])
    sampler = create("sampler", spec, Sampler)
    rows = rows_of([[i] for i in range(20_000)])
    batch = scores.expand(20_000, -1)
    for process in sampler.processors():
        batch = process(batch, rows)
    drawn = sampler.step(batch, rows).tokens.bincount(minlength=8)
    expected = 20_000 * batch[0].softmax(-1)
    assert (drawn[expected == 0] == 0).all()
    likely = expected > 0
    statistic = ((drawn - expected)[likely] ** 2 / expected[likely]).sum()
    assert statistic < 30  # the 0.9999 quantile at 7 degrees of freedom is 29.9


def test_a_truncation_changes_a_draw_only_if_it_cuts_it_off():
    rows = rows_of([[i] for i in range(2000)])
    logits = torch.randn(2000, 40, generator=torch.Generator().manual_seed(0))
    free = create("sampler", "multinomial", Sampler).step(logits, rows).tokens
    kept = create("processor", "top-k:k=10", LogitsProcessor)(logits, rows)
    cut = create("sampler", "multinomial", Sampler).step(kept, rows).tokens
    stays = kept.gather(1, free[:, None])[:, 0] > -torch.inf
    assert torch.equal(cut[stays], free[stays])
    assert 500 < stays.sum() < 1500


@given(prompts(max_tokens=4))
@settings(max_examples=10)
def test_beam_of_full_width_finds_the_likeliest_sequence(prompt):
    """Three tokens over a vocabulary cut to six: 216 sequences, all compared."""

    import gptk

    class FirstSix(gptk.LogitsProcessor):
        name = "first-six"

        def __call__(self, logits, rows):
            return logits.index_fill(1, torch.arange(6, logits.shape[1]), -torch.inf)

    out = LM.generate(
        prompt, sampler="beam:width=36", processors=[FirstSix()], max_new_tokens=3, n=5
    )
    ids = torch.cartesian_prod(*[torch.arange(6)] * 3)
    rows = torch.cat([torch.tensor([prompt]).expand(216, -1), ids], dim=1)
    with torch.inference_mode():
        scores = LM.model.logits(LM.model(rows[:, :-1]))[:, -3:, :6].log_softmax(-1)
    sums = scores.gather(2, ids[:, :, None])[:, :, 0].sum(1)
    best = sums.topk(5)
    got = [g.score * 3 for g in (out, *out.alternatives)]
    assert got == pytest.approx(best.values.tolist(), abs=1e-4)
    assert out.tokens == ids[best.indices[0]].tolist()


@given(batch=batches(), penalty=st.sampled_from([None, "repetition-penalty:penalty=1.5"]))
@settings(max_examples=12)
def test_one_beam_is_greedy(batch, penalty):
    chosen = {"processors": [penalty] if penalty else [], "max_new_tokens": 16}
    greedy = LM.generate_batch(batch, **chosen)
    for spec in ("beam:width=1", "diverse-beam:width=1,beam_groups=1"):
        for got, want in zip(LM.generate_batch(batch, sampler=spec, **chosen), greedy, strict=True):
            assert result(got) == result(want)
            assert got.token_logprobs == pytest.approx(want.token_logprobs, abs=1e-4)


def test_beam_results_come_best_first_and_are_distinct():
    out = LM.generate([1, 2, 3], sampler="beam:width=4", n=4, max_new_tokens=8)
    every = [out, *out.alternatives]
    assert len(every) == len({tuple(g.tokens) for g in every}) == 4
    assert [g.score for g in every] == sorted((g.score for g in every), reverse=True)


def test_more_results_than_a_sampler_can_give_are_refused():
    with pytest.raises(OptionError, match="n=5 results are more than the beam width 4"):
        LM.generate([1], sampler="beam", n=5)
    with pytest.raises(OptionError, match="greedy has one result"):
        LM.generate([1], sampler="greedy", n=2)


def test_a_sampler_in_ten_lines():
    class Coldest(Sampler):
        """Always the least likely token."""

        name = "coldest"

        def step(self, logits, rows):
            return Choice.one_each(logits.argmin(dim=-1), logits, rows)

    out = LM.generate([1, 2, 3], sampler=Coldest(), max_new_tokens=4)
    with torch.inference_mode():
        first = LM.model.logits(LM.model(torch.tensor([[1, 2, 3]])))[0, -1].argmin()
    assert out.tokens[0] == first


class Only(LogitsProcessor):
    """Allows only the tokens of a plan, by the number of new tokens; none after its end."""

    name = "only"
    plan: tuple[tuple[int, ...], ...]
    ordinal: int | None = None

    def __call__(self, logits, rows):
        out = torch.full_like(logits, -torch.inf)
        for row, length in enumerate(rows.lengths):
            step = length - rows.prompt_lengths[row]
            ids = list(self.plan[step]) if step < len(self.plan) else []
            if self.ordinal is not None and rows.ordinals[row] != self.ordinal:
                ids = list(range(logits.shape[1]))
            out[row, ids] = logits[row, ids]
        return out


@pytest.mark.parametrize("spec", EVERY.values())
def test_where_no_token_is_left_the_processor_responsible_is_named(spec):
    settings = {"sampler": spec, "seed": 0, "max_new_tokens": 5}
    with pytest.raises(DecodingError, match=r"processor only left no token .* after 2 new tokens"):
        LM.generate([1], processors=["top-k:k=300", Only(plan=((5,), (6,)))], **settings)
    with pytest.raises(DecodingError, match=r"processor only left no token .* after 0 new tokens"):
        LM.generate([1], processors=[Only(plan=())], **settings)


@pytest.mark.parametrize("spec", SPECS.values())
def test_a_dead_end_loses_nothing(spec):
    settings = {"sampler": spec, "seed": 0, "max_new_tokens": 5}
    only = Only(plan=((5,),), ordinal=1)
    stream = LM.stream([1, 2], ordinal=1, processors=[only], **settings)
    with pytest.raises(DecodingError, match="after 1 new tokens"):
        list(stream)
    stream.interrupt()
    assert (stream.result.tokens, stream.result.finish_reason) == ([5], "interrupted")

    responses = LM.generate_many([[3, 4], [1, 2]], ordered=True, processors=[only], **settings)
    first, second = responses
    assert first.generation.tokens == LM.generate([3, 4], **settings).tokens
    with pytest.raises(DecodingError, match="after 1 new tokens"):
        raise second.error


@pytest.mark.parametrize("spec", SPECS.values())
def test_a_dead_end_among_the_rows_of_a_session_names_its_prompt(spec):
    call = Together(LM, [[3, 4], [1, 2]], sampler=spec, processors=[Only(plan=((5,),), ordinal=1)])
    assert call.step()
    with pytest.raises(DecodingError, match="after 1 new tokens of prompt 2"):
        call.step()
    assert [result.tokens for result in call.results()[1]] == [[5]]


def test_a_beam_that_is_stuck_leaves_finished_results():
    out = LM.generate([1], sampler="beam:width=2", processors=[Only(plan=((256, 7),))], n=2)
    assert (out.tokens, out.finish_reason) == ([], "eos")


def test_a_sampler_that_takes_a_masked_token_is_told_so():
    class Coldest(Sampler):
        name = "coldest"

        def step(self, logits, rows):
            return Choice.one_each(logits.argmin(dim=-1), logits, rows)

    with pytest.raises(GptkError, match="coldest chose a token that the processors had taken out"):
        LM.generate([1], sampler=Coldest(), processors=["top-k:k=3"])


class NoNumbers(LogitsProcessor):
    """All logits become NaN."""

    name = "no-numbers"

    def __call__(self, logits, rows):
        return logits * torch.nan


@pytest.mark.parametrize("spec", EVERY.values())
@pytest.mark.parametrize("others", [[], ["typical"], ["top-k:k=3"], ["repetition-penalty"]])
def test_logits_that_are_not_numbers_are_named(spec, others):
    for before, after in ((others, []), ([], others)):
        processors = [*before, NoNumbers(), *after]
        with pytest.raises(GptkError, match="processor no-numbers gave logits that are not num"):
            LM.generate_batch([[1], [2, 3]], sampler=spec, processors=processors, seed=0)


@pytest.mark.parametrize("spec", EVERY.values())
def test_a_damaged_models_logits_are_named(spec):
    broken = tiny_lm()
    torch.nn.init.constant_(broken.model.head.weight, torch.nan)
    with pytest.raises(GptkError, match="model's logits are not numbers"):
        broken.generate([1], sampler=spec, seed=0)


class Recorder(gptk.Follower):
    """A follower and process that checks that it was told of every move."""

    def __init__(self, rows):
        self.tokens = [list(r[m]) for r, m in zip(rows.tokens, rows.mask, strict=True)]

    def extend(self, tokens):
        self.tokens = [row + list(new) for row, new in zip(self.tokens, tokens, strict=True)]

    def select(self, parents):
        self.tokens = [list(self.tokens[p]) for p in parents]

    def rewind(self, counts):
        self.tokens = [row[: len(row) - n] for row, n in zip(self.tokens, counts, strict=True)]

    def __call__(self, logits, rows):
        want = [r[m].tolist() for r, m in zip(rows.tokens, rows.mask, strict=True)]
        assert [list(map(int, row)) for row in self.tokens] == want
        return logits


class Stateful(LogitsProcessor):
    name = "stateful"

    def start(self, rows):
        return Recorder(rows)


@pytest.mark.parametrize("spec", SPECS.values())
def test_a_stateful_processor_follows_the_rows_under_every_sampler(spec):
    n = 1 if spec == "greedy" else 3
    settings = {"sampler": spec, "n": n, "seed": 0, "max_new_tokens": 10, "stop": ["a", "q"]}
    prompts = [[1, 2], [3], [1, 2]]
    plain = LM.generate_batch(prompts, **settings)
    followed = LM.generate_batch(prompts, processors=[Stateful()], **settings)
    assert [result(out) for out in plain] == [result(out) for out in followed]


def test_half_a_follower_is_refused():
    class Half(LogitsProcessor):
        name = "half"

        def start(self, rows):
            class State:
                def extend(self, tokens): ...

                def __call__(self, logits, rows):
                    return logits

            return State()

    with pytest.raises(gptk.PluginError, match="needs extend, select and rewind"):
        LM.generate([1], processors=[Half()])


def test_a_processor_of_another_shape_is_refused():
    class Short(LogitsProcessor):
        name = "short"

        def __call__(self, logits, rows):
            return logits[:, :5]

    with pytest.raises(gptk.PluginError, match=r"processor short returned shape \(1, 5\)"):
        LM.generate([1], processors=[Short()])


def test_a_sampler_that_drops_a_row_is_refused():
    class Lossy(Sampler):
        name = "lossy"
        random = True

        def step(self, logits, rows):
            return Choice.one_each(logits.argmax(dim=-1)[:1], logits[:1], rows)

    with pytest.raises(gptk.PluginError, match="lossy"):
        LM.generate([1], sampler=Lossy(), n=3)


def test_llama_like_window_is_long_enough_for_these_tests():
    assert LLAMA_LIKE.context_length > 12 + 64
