"""Drafts: with them the results are the very same, and guesses are counted."""

import dataclasses
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gptk
from gptk import DecodeSession, Drafter, IncompatibleError, OptionError
from gptk.testing import batches, tiny_gpt, tiny_lm
from toys import GPT2_LIKE, LLAMA_LIKE

LM = tiny_lm()
OTHER = tiny_lm(seed=1)
NEAR = tiny_lm()
with torch.no_grad():
    for weight in NEAR.model.parameters():
        weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class Fixed(Drafter):
    """Guesses the same tokens always, for some rows fewer."""

    name = "fixed"
    tokens: tuple[int, ...]

    def start(self, decoding):
        return self

    def propose(self, decoding, count):
        guesses = torch.tensor([self.tokens] * len(decoding.live))[:, :count].clone()
        for row, one in enumerate(decoding.live):
            guesses[row, one.length % (len(self.tokens) + 1) :] = -1
        return guesses


DRAFTS = {
    "lookup": "lookup:ngram=2,tokens=4",
    "itself": LM,
    "a near model": NEAR,
    "another model": OTHER,
    "bad guesses": Fixed(tokens=(7, 256, 7)),
}
SAMPLERS = ["greedy", "multinomial:temperature=0.7", "top-k:k=4", "top-p:p=0.6,temperature=1.5"]


def same(one, other):
    assert (one.tokens, one.finish_reason) == (other.tokens, other.finish_reason)
    assert one.token_logprobs == pytest.approx(other.token_logprobs, abs=1e-4)


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("sampler", SAMPLERS)
@given(batch=batches(max_prompts=3), seed=st.integers(0, 1000), data=st.data())
@settings(max_examples=8)
def test_with_a_draft_the_results_are_the_same(draft, sampler, batch, seed, data):
    chosen = {
        "sampler": sampler,
        "seed": seed,
        "max_new_tokens": data.draw(st.integers(1, 20)),
        "processors": data.draw(st.sampled_from([[], ["repetition-penalty:penalty=1.3"]])),
        "use_cache": data.draw(st.booleans()),
        "n": 1 if sampler == "greedy" else data.draw(st.integers(1, 2)),
    }
    with_draft = LM.generate_batch(batch, draft=DRAFTS[draft], **chosen)
    without = LM.generate_batch(batch, **chosen)
    for one, other in zip(with_draft, without, strict=True):
        same(one, other)
        for more, another in zip(one.alternatives, other.alternatives, strict=True):
            same(more, another)


@pytest.mark.parametrize("overflow", ["stop", "slide"])
def test_a_draft_goes_as_far_as_the_window(overflow):
    prompt = [1, 2, 3, 1, 2, 3] * 13
    chosen = {"max_new_tokens": 30, "overflow": overflow}
    for draft in ("lookup", LM, tiny_lm(GPT2_LIKE)):
        same(LM.generate(prompt, draft=draft, **chosen), LM.generate(prompt, **chosen))


def run(draft, **chosen):
    stream = LM.stream([1, 2, 3], draft=draft, **chosen)
    for _ in stream:
        pass
    return stream


def test_a_model_that_drafts_for_itself_is_always_right():
    for sampler in SAMPLERS:
        acceptance = run(LM, sampler=sampler, seed=3, max_new_tokens=30).acceptance
        assert acceptance.accepted == acceptance.guessed > 20


def test_guesses_and_acceptances_are_counted():
    plain = LM.generate([1, 2, 3], max_new_tokens=9).tokens

    class Known(Drafter):
        name = "known"

        def start(self, decoding):
            return self

        def propose(self, decoding, count):
            at = decoding.live[0].length
            return torch.tensor([[*plain[at : at + 1], 0 if plain[at + 1] else 1, 5]])[:, :count]

    stream = run(Known(), max_new_tokens=8)
    assert stream.result.tokens == plain[:8]
    # Each time one right guess, then a wrong one: 3 + 3 + 3 + 1 guesses for 8 tokens.
    assert (stream.acceptance.guessed, stream.acceptance.accepted) == (10, 4)
    assert run(None, max_new_tokens=2).acceptance is None


def test_the_model_reads_all_guesses_at_once():
    passes = []
    model = tiny_gpt()
    hook = model.norm.register_forward_hook(lambda *_: passes.append(1))
    lm = gptk.LanguageModel(model)
    lm.generate([1, 2, 3], draft=LM, max_new_tokens=24)
    hook.remove()
    assert len(passes) == 1 + 4  # the prompt, then six tokens a pass


def test_rows_of_a_batch_run_ahead_of_each_other():
    passes = []
    model = tiny_gpt()
    hook = model.norm.register_forward_hook(lambda *_: passes.append(1))
    lm = gptk.LanguageModel(model)
    prompts = [[5, 6, 7, 8] * 4, [9] * 12, [1, 2, 3]]
    chosen = {"max_new_tokens": 20, "ignore_eos": True, "draft": NEAR}
    alone = []
    for prompt in prompts:
        passes.clear()
        lm.generate(prompt, **chosen)
        alone.append(len(passes))
    passes.clear()
    lm.generate_batch(prompts, **chosen)
    hook.remove()
    assert len(passes) <= max(alone) + 2


@given(batch=batches(max_prompts=3), data=st.data())
@settings(max_examples=25)
def test_any_walk_of_guesses_gives_the_logits_of_the_plain_model(batch, data):
    model = LM.model
    session = DecodeSession(model, batch, use_cache=data.draw(st.booleans()))
    rows = [list(prompt) for prompt in batch]
    starts = [len(prompt) for prompt in batch]
    token = st.sampled_from([3, 4])
    for _ in range(data.draw(st.integers(1, 8))):
        verb = data.draw(st.sampled_from(["move", "move", "read", "select", "rewind"]))
        if verb == "move":
            new = [data.draw(token) for _ in rows]
            session.move(torch.tensor(new))
            rows = [[*row, more] for row, more in zip(rows, new, strict=True)]
        elif verb == "read":
            d = data.draw(st.integers(0, 3))
            guesses = [data.draw(st.lists(token, min_size=d, max_size=d)) for _ in rows]
            session.read(torch.tensor(guesses) if d else None)
            assert all(session.known)
        elif verb == "select":
            parents = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=4))
            session.select(parents)
            rows, starts = [list(rows[p]) for p in parents], [starts[p] for p in parents]
        else:
            counts = [
                data.draw(st.integers(0, min(2, len(row) - start)))
                for row, start in zip(rows, starts, strict=True)
            ]
            session.rewind(counts)
            rows = [row[: len(row) - count] for row, count in zip(rows, counts, strict=True)]
        assert list(session.rows.lengths) == [len(row) for row in rows]
        for row, known in enumerate(session.known):
            assert session.rows.tokens[row][session.rows.mask[row]].tolist() == rows[row]
            if known:
                with torch.inference_mode():
                    plain = model.logits(model(torch.tensor([rows[row]])))[0, -1]
                torch.testing.assert_close(session.logits[row], plain, **CLOSE)


def test_beams_refuse_a_draft():
    with pytest.raises(IncompatibleError, match="beam does not go with a draft: its rows compete"):
        LM.generate([1], sampler="beam", draft="lookup")


def test_a_draft_of_another_vocabulary_is_refused():
    small = dataclasses.replace(LLAMA_LIKE, vocab_size=100)
    with pytest.raises(OptionError, match="vocabulary of 100 tokens and the model one of 257"):
        LM.generate([1], draft=gptk.LanguageModel(tiny_gpt(small)))


def test_a_draft_may_be_padded_or_unpadded():
    padded = tiny_lm(dataclasses.replace(LLAMA_LIKE, vocab_size=300))
    for one, other in ((LM, padded), (padded, LM)):
        same(one.generate([1], draft=other), one.generate([1]))


@pytest.mark.parametrize("draft", ["another model", "lookup"])
def test_with_a_draft_tokens_are_drawn_as_often_as_they_are_likely(draft):
    """All 25 texts of two tokens, 4,000 drawn: fixed seed, chi-square."""
    tiny = dataclasses.replace(LLAMA_LIKE, vocab_size=5)
    lm, other = (gptk.LanguageModel(tiny_gpt(tiny, seed=seed)) for seed in (3, 4))
    prompt, runs = [1, 2, 1], 4000
    chosen = {"sampler": "multinomial:temperature=1.5", "max_new_tokens": 2, "seed": 0}
    outs = lm.generate_batch([prompt] * runs, draft=other if "model" in draft else draft, **chosen)
    drawn = Counter(tuple(out.tokens) for out in outs)
    statistic = 0.0
    with torch.inference_mode():
        for first in range(5):
            logits = lm.model.logits(lm.model(torch.tensor([[*prompt, first]])))[0] / 1.5
            p = logits.softmax(-1)
            for second in range(5):
                expected = runs * (p[-2, first] * p[-1, second]).item()
                statistic += (drawn[first, second] - expected) ** 2 / expected
    assert statistic < 60  # 24 degrees of freedom: 1 in 15,000


# --- A draft model that is named by its path ---------------------------------------------------


def accepted(path):
    """How many guesses of the model at a path are right for LM's greedy text, of how many."""
    acceptance = run(f"model:{path}", max_new_tokens=12, ignore_eos=True).acceptance
    return acceptance.accepted, acceptance.guessed


def test_a_draft_model_whose_files_have_changed_is_loaded_again(tmp_path):
    OTHER.save(tmp_path / "draft")
    assert accepted(tmp_path / "draft")[0] == 0
    LM.save(tmp_path / "draft")
    right, guessed = accepted(tmp_path / "draft")
    assert right == guessed > 0


def test_a_relative_path_is_looked_up_in_the_folder_of_now(tmp_path, monkeypatch):
    for name, lm in {"one": OTHER, "two": LM}.items():
        lm.save(tmp_path / name / "draft")
    monkeypatch.chdir(tmp_path / "one")
    assert accepted("draft")[0] == 0
    monkeypatch.chdir(tmp_path / "two")
    assert accepted("draft")[0] > 0


def test_threads_that_need_the_same_draft_model_load_it_once(tmp_path, monkeypatch):
    LM.save(tmp_path / "draft")
    loaded, load = [], gptk.load

    def slowly(*args, **options):
        loaded.append(args)
        time.sleep(0.2)
        return load(*args, **options)

    monkeypatch.setattr(gptk, "load", slowly)
    with ThreadPoolExecutor() as pool:
        results = [*pool.map(accepted, [tmp_path / "draft"] * 3)]
    assert len(loaded) == 1
    assert len({*results}) == 1
