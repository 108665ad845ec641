"""Log-probabilities of continuations: those of one text at a time, in fewer tokens."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import LM as TINY
from mixtures import forget, memory_for, sizes_of_passes

import gptk
from gptk import LanguageModel, PromptError, kernels
from gptk.engine import passes, scoring
from gptk.engine.engine import ENGINE
from gptk.engine.run import Run
from toys import CONFIGS, byte_tokenizer, table_model


def random_lm(name):
    torch.manual_seed(0)
    model = gptk.GPT(CONFIGS[name]).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return LanguageModel(model, byte_tokenizer())


LMS = {name: random_lm(name) for name in CONFIGS}
LMS["table"] = LanguageModel(table_model(), byte_tokenizer())
WINDOW = 32
tokens = st.integers(0, 9)


@st.composite
def all_pairs(draw):
    """Contexts, some of them several times, with continuations that fit into the window."""
    contexts = draw(st.lists(st.lists(tokens, min_size=1, max_size=WINDOW), min_size=1, max_size=4))
    pairs = []
    for context in draw(st.lists(st.sampled_from(contexts), max_size=12)):
        longest = WINDOW + 1 - len(context)
        pairs.append((context, draw(st.lists(tokens, max_size=longest))))
    return pairs


def alone(lm, context, new):
    """By the logits of one pass over context and continuation."""
    states = lm.model.states(torch.tensor([[*context, *new]]), None, None, ())[:, :, 0]
    logits = lm.model.logits(states)[0, len(context) - 1 : -1]
    logprobs = logits.log_softmax(-1)[torch.arange(len(new)), new]
    return logprobs, logits.argmax(-1).tolist()


@pytest.mark.parametrize("name", LMS)
@settings(max_examples=60, deadline=None)
@given(
    pairs=all_pairs(),
    size=st.sampled_from([1, 20, 128]),
    ahead=st.sampled_from([2, 50, 2**16]),
    rows=st.sampled_from([1, 2, 64]),
)
def test_scores_are_those_of_each_pair_alone(name, pairs, size, ahead, rows):
    lm = LMS[name]
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(passes, "TOKENS", size)
        patch.setattr(passes, "MOST_LOGITS", 5)
        patch.setattr(scoring, "CHUNK", 3)
        patch.setattr(scoring, "_MOST_ROWS", rows)
        patch.setattr(scoring, "_AHEAD", ahead)
        scores = list(lm.score_continuations(pairs))
        assert len(scores) == len(pairs)
        for (context, new), score in zip(pairs, scores, strict=True):
            assert score.tokens == new
            if len(context) + len(new) > WINDOW:
                continue  # the oracle reads the last token, too
            logprobs, greedy = alone(lm, context, new)
            assert score.token_logprobs == pytest.approx(logprobs.tolist(), abs=2e-5)
            assert score.logprob == pytest.approx(float(logprobs.double().sum()), abs=1e-4)
            assert score.is_greedy == (greedy == new)


def test_what_greedy_search_writes_is_greedy():
    lm = LMS["gpt2-like"]
    new = lm.generate("Once", max_new_tokens=8, ignore_eos=True).tokens
    other = [*new[:-1], (new[-1] + 1) % 256]
    context = lm.encode("Once")
    pairs = [(context, new), (context, other), (context, []), (context, new[:1])]
    scores = lm.score_continuations(pairs)
    assert [score.is_greedy for score in scores] == [True, False, True, True]


def test_texts_are_encoded():
    lm = LMS["gpt2-like"]
    (score,) = lm.score_continuations([("Once", " upon")])
    assert score.tokens == list(b" upon")
    assert score.token_logprobs == pytest.approx(lm.score("Once upon").token_logprobs[-5:])
    (score,) = lm.score_continuations([("", "a")])
    (other,) = lm.score_continuations([([lm.tokenizer.start], [97])])
    assert score == other


@pytest.fixture
def read(monkeypatch):
    """How many tokens each pass of TINY reads, and of how many states each asks for logits."""
    sizes, logits_of = sizes_of_passes(monkeypatch), []
    logits = TINY.model.logits
    monkeypatch.setattr(
        TINY.model,
        "logits",
        lambda states: logits_of.append(states[..., 0].numel()) or logits(states),
    )
    forget(TINY)
    return sizes, logits_of


def test_a_context_with_several_continuations_is_read_once(read):
    sizes, logits_of = read
    context = [1, 2, 3] * 8
    list(TINY.score_continuations([(context, [new]) for new in range(40)]))
    assert (sizes, logits_of) == ([24], [1])
    sizes.clear()
    list(TINY.score_continuations([(context, [new, new]) for new in range(40)]))
    assert sizes == [24, 40]


def test_texts_that_begin_alike_are_read_from_where_they_differ(read):
    """As the questions of a task do that begin with the same examples."""
    sizes, _ = read
    examples = [5, 6, 7, 8] * 16
    for question in range(1, 4):
        list(TINY.score_continuations([([*examples, question], [1, 2])]))
    assert sizes == [66, 2, 2]


def test_texts_to_score_and_to_write_share_passes(read):
    sizes, _ = read
    written = Run(lambda: TINY.generate([1], max_new_tokens=2, ignore_eos=True), 1)
    scored = Run(lambda: list(TINY.score_continuations([([4], [5] * 30)])), 1)
    ENGINE.start([written, scored])
    assert scored.result() == list(TINY.score_continuations([([4], [5] * 30)]))
    assert len(written.result().tokens) == 2
    assert sizes[0] == 1 + 30


def test_logits_of_many_texts_are_not_in_memory_together(read):
    _, logits_of = read
    pairs = [([number], [1] * 50) for number in range(40)]
    list(TINY.score_continuations(pairs))
    assert sum(logits_of) == 2000
    assert max(logits_of) <= passes.MOST_LOGITS


def test_blocks_that_run_out_change_no_score():
    pairs = [([number % 7, *range(number)], [3] * 20) for number in range(40, 60)]
    want = list(TINY.score_continuations(pairs))
    with memory_for(TINY, 4):
        scores = list(TINY.score_continuations(pairs))
    if kernels.available():  # else the last bits depend on what is read together
        assert scores == want
    for score, wanted in zip(scores, want, strict=True):
        assert score.token_logprobs == pytest.approx(wanted.token_logprobs, abs=1e-5)
    assert ENGINE.passes(TINY.model).pool.used == 0


def test_a_run_can_score():
    """A stop function, a metric or a sampler that asks for scores is in the engine's thread."""
    pairs = [([1, 2], [3, 4]), ([1, 2], [5]), ([9], [])]
    want = list(TINY.score_continuations(pairs))
    assert ENGINE.call(lambda: list(TINY.score_continuations(pairs))) == want
    seen = []
    TINY.generate([1], max_new_tokens=2, stop=lambda _: bool(seen.append(TINY.score([1, 2, 3]))))
    assert seen[-1] == TINY.score([1, 2, 3])


def test_what_is_under_way_is_cancelled_when_the_scores_are_closed():
    scores = TINY.score_continuations(([number], [1] * 60) for number in itertools.cycle(range(99)))
    next(scores)
    scores.close()
    ENGINE.call(lambda: None)
    assert ENGINE.rows_in_use == 0
    assert ENGINE.passes(TINY.model).pool.used == 0


def test_a_pass_that_fails_is_told(monkeypatch):
    monkeypatch.setattr(TINY.model, "logits", lambda states: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(TINY.score_continuations([([1], [2])]))


def test_pairs_are_read_as_scores_are_asked_for(monkeypatch):
    monkeypatch.setattr(scoring, "_AHEAD", 50)
    numbers = itertools.count()
    scores = LMS["table"].score_continuations(
        ([1, 2, 3], [next(numbers) % 9]) for _ in iter(int, 1)
    )
    first = [next(scores).logprob for _ in range(30)]
    assert len(set(first)) == 9
    assert next(numbers) < 50


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (([1] * 20, [2] * 14), "a context of 20 tokens and a continuation of 14 do not fit"),
        (([1], [300]), "token 300 is not in the model's vocabulary"),
        (([], [1]), "the prompt has no tokens"),
    ],
)
def test_pairs_that_cannot_be_scored(pair, message):
    with pytest.raises(PromptError, match=message):
        list(LMS["gpt2-like"].score_continuations([pair]))
