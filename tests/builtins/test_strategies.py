"""Strategies against direct transcriptions of their papers, on small models without a cache."""

import dataclasses
import itertools
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import gptk
from gptk import OptionError, RandomStream
from gptk.plugins.creating import create
from gptk.plugins.registry import register, unregister
from gptk.session.random import as_keys, columns, exponential
from gptk.testing import prompts, tiny_gpt, tiny_lm
from toys import CONFIGS, LLAMA_LIKE

CPU = torch.device("cpu")
LMS = {name: tiny_lm(config) for name, config in CONFIGS.items()}
LM = LMS["llama-like"]
TINY = gptk.LanguageModel(tiny_gpt(dataclasses.replace(LLAMA_LIKE, vocab_size=5), seed=3))


def states(model, tokens):
    """The final state and logits after each token, from one plain pass."""
    with torch.inference_mode():
        hidden = model(torch.tensor([tokens]))[0]
        return hidden, model.logits(hidden)


def logprobs(model, tokens):
    return states(model, tokens)[1][-1].log_softmax(-1)


def everything(out):
    return [out, *out.alternatives]


def close_scores(outs, model, prompt):
    """Check that token_logprobs are those of a teacher-forced pass."""
    for out in outs:
        logits = states(model, [*prompt, *out.tokens])[1].log_softmax(-1)
        want = [logits[len(prompt) - 1 + i, t].item() for i, t in enumerate(out.tokens)]
        assert out.token_logprobs == pytest.approx(want, abs=1e-4)


# --- contrastive search -------------------------------------------------------------------------


def contrastive(model, tokens, k, alpha, steps):
    """Su et al. 2022, equation 5, with a pass over the whole text for every candidate."""
    tokens = list(tokens)
    for _ in range(steps):
        hidden, logits = states(model, tokens)
        top = logits[-1].softmax(-1).topk(k)
        scored = []
        for p, v in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            h = states(model, [*tokens, v])[0][-1]
            penalty = max(F.cosine_similarity(h, before, dim=0).item() for before in hidden)
            scored.append(((1 - alpha) * p - alpha * penalty, v))
        tokens.append(max(scored)[1])
    return tokens


@pytest.mark.parametrize("name", LMS)
@given(prompt=prompts(), k=st.integers(1, 5), alpha=st.sampled_from([0.0, 0.3, 0.6, 1.0]))
@settings(max_examples=12)
def test_contrastive_search_is_the_papers(name, prompt, k, alpha):
    lm = LMS[name]
    sampler = f"contrastive:k={k},alpha={alpha}"
    out = lm.generate(prompt, sampler=sampler, max_new_tokens=8, ignore_eos=True)
    assert [*prompt, *out.tokens] == contrastive(lm.model, prompt, k, alpha, 8)
    close_scores([out], lm.model, prompt)
    if k == 1 or alpha == 0:
        greedy = lm.generate(prompt, max_new_tokens=8, ignore_eos=True)
        assert out.tokens == greedy.tokens


def test_contrastive_search_uses_no_dropout_whatever_the_models_mode():
    model = tiny_gpt()
    lm = gptk.LanguageModel(model)
    wanted = lm.generate([1, 2, 3], sampler="contrastive", max_new_tokens=12, ignore_eos=True)
    model.set_dropout(0.5)
    model.train()
    for _ in range(3):
        out = lm.generate([1, 2, 3], sampler="contrastive", max_new_tokens=12, ignore_eos=True)
        assert out.tokens == wanted.tokens
    assert model.training


# --- diverse beam search ------------------------------------------------------------------------


def diverse_beams(model, prompt, width, groups, diversity, steps):
    """Vijayakumar et al. 2018, algorithm 1, with the Hamming diversity."""
    beams = [[((), 0.0)] for _ in range(groups)]
    for _ in range(steps):
        chosen = Counter()
        for g in range(groups):
            candidates = []
            for tokens, theta in beams[g]:
                for v, logprob in enumerate(logprobs(model, [*prompt, *tokens]).tolist()):
                    value = theta + logprob
                    candidates.append((value - diversity * chosen[v], value, (*tokens, v)))
            best = sorted(candidates, reverse=True)[: width // groups]
            beams[g] = [(tokens, value) for _, value, tokens in best]
            chosen.update(tokens[-1] for tokens, _ in beams[g])
    found = [beam for group in beams for beam in group]
    return sorted(found, key=lambda beam: beam[1], reverse=True)


@pytest.mark.parametrize(("width", "groups"), [(4, 2), (6, 3), (3, 3), (4, 1)])
@given(prompt=prompts(max_tokens=6), diversity=st.sampled_from([0.0, 0.5, 2.0, 20.0]))
@settings(max_examples=6)
def test_diverse_beam_search_is_the_papers(width, groups, diversity, prompt):
    sampler = f"diverse-beam:width={width},beam_groups={groups},diversity={diversity}"
    out = LM.generate(prompt, sampler=sampler, n=width, max_new_tokens=4, ignore_eos=True)
    want = diverse_beams(LM.model, prompt, width, groups, diversity, 4)
    assert [tuple(result.tokens) for result in everything(out)] == [tokens for tokens, _ in want]
    scores = [result.score for result in everything(out)]
    assert scores == pytest.approx([score / 4 for _, score in want], abs=1e-4)


def test_one_group_is_beam_search_and_many_are_diverse():
    chosen = {"n": 4, "max_new_tokens": 10}
    beam = LM.generate([1, 2], sampler="beam:width=4", **chosen)
    one_group = LM.generate([1, 2], sampler="diverse-beam:width=4,beam_groups=1", **chosen)
    assert [o.tokens for o in everything(one_group)] == [o.tokens for o in everything(beam)]
    diverse = "diverse-beam:width=4,beam_groups=4,diversity=100"
    firsts = [
        result.tokens[0] for result in everything(LM.generate([1, 2], sampler=diverse, **chosen))
    ]
    assert len(set(firsts)) == 4


def test_the_groups_of_a_prompt_end_where_its_own_window_is_full():
    lengths = [LLAMA_LIKE.context_length - 3, LLAMA_LIKE.context_length - 7]
    batch = [[1] * length for length in lengths]
    outs = LM.generate_batch(batch, sampler="diverse-beam:width=4,beam_groups=2", ignore_eos=True)
    assert [len(out.tokens) for out in outs] == [3, 7]
    assert {out.finish_reason for out in outs} == {"length"}


def test_groups_must_share_the_beams_equally():
    with pytest.raises(OptionError, match="3 groups cannot share 4 beams equally"):
        create("sampler", "diverse-beam:width=4,beam_groups=3", gptk.Sampler)


# --- DoLa ---------------------------------------------------------------------------------------


def dola(model, tokens, layers, alpha):
    """Chuang et al. 2024, equations 3 to 6, in float64: the next token's F."""
    with torch.inference_mode():
        ids = torch.tensor([tokens])
        x = model.embed(ids)
        rope = None
        if model.embed_positions is None:
            rope = model._rope_at(
                torch.arange(len(tokens))[None], model.position_table(len(tokens))[0]
            )
        else:
            x = x + model.embed_positions(torch.arange(len(tokens)))
        hidden = [x[0]]
        for block in model.blocks:
            hidden.append(block(hidden[-1], 1, rope, None))
        q_n = model.logits(model.norm(hidden[-1]))[-1].double().softmax(-1)
        qs = {j: model.logits(hidden[j])[-1].double().softmax(-1) for j in layers}

    def jsd(p, q):
        m = (p + q) / 2
        return ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()).item() / 2

    q_m = qs[max(layers, key=lambda j: jsd(q_n, qs[j]))]
    return torch.where(q_n >= alpha * q_n.max(), (q_n / q_m).log(), -torch.inf)


@pytest.mark.parametrize("name", LMS)
@given(prompt=prompts(), alpha=st.sampled_from([0.01, 0.1, 0.5]))
@settings(max_examples=12)
def test_dola_is_the_papers(name, prompt, alpha):
    lm = LMS[name]
    sampler = f'dola:layers="[0, 1]",alpha={alpha}'
    out = lm.generate(prompt, sampler=sampler, max_new_tokens=6, ignore_eos=True)
    for length, (token, logprob) in enumerate(zip(out.tokens, out.token_logprobs, strict=True)):
        want = dola(lm.model, [*prompt, *out.tokens[:length]], [0, 1], alpha).log_softmax(-1)
        assert logprob == pytest.approx(want[token].item(), abs=1e-4)
        assert want[token] >= want.max() - 1e-5


@pytest.mark.parametrize(
    ("layers", "n_layers", "tied", "want"),
    [
        # transformers 4.57, _dola_decoding
        ("low", 30, True, [2, 4, 6, 8, 10, 12, 14]),
        ("low", 32, False, [0, 2, 4, 6, 8, 10, 12, 14]),
        ("high", 30, True, [15, 17, 19, 21, 23, 25, 27, 29]),
        ("high", 48, False, [28, 30, 32, 34, 36, 38, 40, 42, 44, 46]),
        ("low", 48, False, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]),
        ("low", 2, True, [1]),
        ("low", 4, True, [2]),
    ],
)
def test_dola_takes_the_layers_that_its_authors_take(layers, n_layers, tied, want):
    config = dataclasses.replace(LLAMA_LIKE, n_layers=n_layers, tied_head=tied)
    sampler = create("sampler", f"dola:layers={layers}", gptk.Sampler)
    assert list(sampler.hidden_layers(config)) == want


def test_dola_names_the_layers_there_are():
    with pytest.raises(OptionError, match=r"\[7\] are not all earlier ones .* 0 to 1"):
        LM.generate([1], sampler='dola:layers="[7]"')


# --- stochastic beam search ---------------------------------------------------------------------


def perturbed(model, prompt, seed, steps):
    """Kool et al. 2019, section 3: G of all sequences, computed top-down, in float64."""
    stream = RandomStream.of(seed, prompt)
    level = {(): (0.0, -math.log(-math.log(stream.uniform(0, 1))))}
    for _ in range(steps):
        below = {}
        for tokens, (phi, g) in level.items():
            size = model.config.vocab_size
            key = as_keys([stream.bits([-1, *tokens])], CPU)
            noise = -exponential(key, columns(size, CPU)).double().log()
            phis = phi + logprobs(model, [*prompt, *tokens]).double()
            raw = phis + noise
            for v in range(size):
                inside = math.exp(-g) - math.exp(-raw.max()) + math.exp(-raw[v])
                below[(*tokens, v)] = (phis[v].item(), -math.log(inside))
        level = below
    return {tokens: g for tokens, (_, g) in level.items()}


@given(seed=st.integers(0, 10_000), width=st.integers(1, 6))
@settings(max_examples=15)
def test_stochastic_beams_are_the_largest_perturbed_sequences_of_all(seed, width):
    prompt = [1, 2]
    everywhere = perturbed(TINY.model, prompt, seed, 3)
    want = sorted(everywhere.items(), key=lambda item: item[1], reverse=True)[:width]
    sampler = f"stochastic-beam:width={width}"
    out = TINY.generate(prompt, sampler=sampler, n=width, seed=seed, max_new_tokens=3)
    assert [tuple(result.tokens) for result in everything(out)] == [tokens for tokens, _ in want]
    assert [result.score for result in everything(out)] == pytest.approx(
        [g for _, g in want], abs=1e-3
    )
    close_scores(everything(out), TINY.model, prompt)


def chi_square(observed, expected):
    return sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))


def test_stochastic_beams_are_drawn_without_replacement_at_the_right_rates():
    """Inclusion frequencies of all 25 sequences of two tokens among 3 drawn."""
    prompt, width, runs = [1, 2], 3, 3000
    phi = {}
    for first, p in enumerate(logprobs(TINY.model, prompt).tolist()):
        for second, q in enumerate(logprobs(TINY.model, [*prompt, first]).tolist()):
            phi[first, second] = math.exp(p + q)
    inclusion = Counter()
    for drawn in itertools.permutations(phi, width):
        chance, left = 1.0, 1.0
        for sequence in drawn:
            chance *= phi[sequence] / left
            left -= phi[sequence]
        for sequence in drawn:
            inclusion[sequence] += chance
    outs = TINY.generate_batch(
        [prompt] * runs, sampler=f"stochastic-beam:width={width}", n=width, seed=0, max_new_tokens=2
    )
    counted = Counter()
    for out in outs:
        found = [tuple(result.tokens) for result in everything(out)]
        assert len(set(found)) == width
        counted.update(found)
    # Each count is a sum of `runs` Bernoulli variables; 24 of the counts vary freely.
    value = sum((counted[s] - runs * p) ** 2 / (runs * p * (1 - p)) for s, p in inclusion.items())
    assert value < 25 * 2.2  # exceeded with probability 1e-4 by as many squared normal variables


# --- beam sampling, best of n -------------------------------------------------------------------


def test_cold_beam_sampling_is_beam_search():
    chosen = {"n": 3, "max_new_tokens": 8, "seed": 0}
    cold = LM.generate([5, 6], sampler="beam-sample:width=3,temperature=1e-6", **chosen)
    beam = LM.generate([5, 6], sampler="beam:width=3", **chosen)
    assert [o.tokens for o in everything(cold)] == [o.tokens for o in everything(beam)]


def test_one_beam_draws_from_the_distribution():
    runs = 2000
    outs = TINY.generate_batch(
        [[1, 2]] * runs, sampler="beam-sample:width=1", seed=0, max_new_tokens=1, ignore_eos=True
    )
    counted = Counter(out.tokens[0] for out in outs)
    # Two candidates are drawn and the likelier goes on: the probability of a pair, in either order.
    p = logprobs(TINY.model, [1, 2]).exp().tolist()
    want = Counter()
    for i, j in itertools.permutations(range(5), 2):
        want[max((i, j), key=lambda v: p[v])] += p[i] * p[j] / (1 - p[i])
    tokens = [v for v in range(5) if want[v] > 0]
    value = chi_square([counted[v] for v in tokens], [runs * want[v] for v in tokens])
    assert value < 20  # 4 degrees of freedom: 1 in 2,000
    assert set(counted) <= set(tokens)


@pytest.mark.parametrize("base", ["multinomial", "top-k:k=5", "dola:sampler=top-p"])
def test_best_of_n_is_the_best_of_the_samples(base):
    chosen = {"seed": 4, "max_new_tokens": 10}
    samples = everything(LM.generate([1, 2], sampler=base, n=5, **chosen))
    means = [sum(result.token_logprobs) / len(result.token_logprobs) for result in samples]
    ranked = sorted(range(5), key=lambda i: means[i], reverse=True)
    out = LM.generate([1, 2], sampler=f'best-of-n:n=5,sampler="{base}"', n=2, **chosen)
    assert [result.tokens for result in everything(out)] == [samples[i].tokens for i in ranked[:2]]
    assert out.score == pytest.approx(means[ranked[0]])


def test_best_of_n_with_a_custom_scorer():
    class Shortest(gptk.Scorer):
        """Prefers short texts."""

        name = "shortest"

        def score(self, result):
            return -len(result.tokens)

    class Provider:
        @staticmethod
        @gptk.hookimpl
        def gptk_scorers():
            return [Shortest]

    register(Provider, origin="test")
    try:
        chosen = {"seed": 1, "max_new_tokens": 40}
        out = LM.generate([1], sampler="best-of-n:n=6,scorer=shortest", **chosen)
        samples = everything(LM.generate([1], sampler="multinomial", n=6, **chosen))
        assert len(out.tokens) == min(len(result.tokens) for result in samples) == -out.score
    finally:
        unregister(Provider)


@pytest.mark.parametrize("base", ["greedy", "beam", "best-of-n", "contrastive"])
def test_best_of_n_needs_a_sampler_that_draws(base):
    with pytest.raises(OptionError, match=f"{base} does not draw results one by one"):
        create("sampler", f"best-of-n:sampler={base}", gptk.Sampler)


# --- classifier-free guidance -------------------------------------------------------------------


@pytest.mark.parametrize("name", LMS)
@pytest.mark.parametrize("negative", [None, "[9, 8, 7]"])
@given(prompt=prompts(max_tokens=8), scale=st.sampled_from([0.0, 0.5, 1.0, 1.5, 3.0, -1.0]))
@settings(max_examples=8)
def test_guidance_is_the_papers(name, negative, prompt, scale):
    lm = LMS[name]
    spec = f"cfg:scale={scale}" + (f',negative="{negative}"' if negative else "")
    out = lm.generate(prompt, processors=[spec], max_new_tokens=6, ignore_eos=True)
    other = [9, 8, 7] if negative else prompt[-1:]
    for length, (token, logprob) in enumerate(zip(out.tokens, out.token_logprobs, strict=True)):
        plain = logprobs(lm.model, [*prompt, *out.tokens[:length]])
        away = logprobs(lm.model, [*other, *out.tokens[:length]])
        want = (away + scale * (plain - away)).log_softmax(-1)
        assert logprob == pytest.approx(want[token].item(), abs=1e-4)
        assert want[token] >= want.max() - 1e-4


def test_guidance_with_a_text_and_with_tokens_that_are_not_there():
    text = LM.generate([1], processors=['cfg:scale=2,negative="no"'], max_new_tokens=5)
    ids = LM.generate([1], processors=['cfg:scale=2,negative="[110, 111]"'], max_new_tokens=5)
    assert text.tokens == ids.tokens
    with pytest.raises(OptionError, match="token 300 is not in the model's vocabulary of 257"):
        LM.generate([1], processors=['cfg:negative="[300]"'])
