"""Log-probabilities of continuations: those of one text at a time, in fewer tokens."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gptk
from gptk import LanguageModel, PromptError
from gptk.model import continuations
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
@settings(max_examples=60)
@given(pairs=all_pairs(), batch=st.sampled_from([1, 20, 100, 4096]))
def test_scores_are_those_of_each_pair_alone(name, pairs, batch):
    lm = LMS[name]
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(continuations, "BATCH", batch)
        patch.setattr(continuations, "CHUNK", 3)
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


def test_a_context_with_several_continuations_is_read_once(monkeypatch):
    lm = LMS["llama-like"]
    read = []
    states = type(lm.model).states

    def counted(model, ids, *args, **kwargs):
        read.append(ids.numel())
        return states(model, ids, *args, **kwargs)

    monkeypatch.setattr(type(lm.model), "states", counted)
    context = [1, 2, 3] * 8
    list(lm.score_continuations([(context, [new]) for new in range(40)]))
    assert read == [24]
    read.clear()
    list(lm.score_continuations([(context, [new, new]) for new in range(40)]))
    assert read == [24, 40]


def test_pairs_are_read_as_scores_are_asked_for(monkeypatch):
    monkeypatch.setattr(continuations, "_AHEAD", 50)
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
