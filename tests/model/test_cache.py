"""Rows that share a tree of slots: the same results, with the prompt's keys stored once."""

import dataclasses
import random

import pytest
import torch

import gptk
from gptk import DecodeSession
from gptk.engine import passes
from gptk.engine.engine import ENGINE
from gptk.model import cache
from gptk.testing import tiny_gpt
from toys import CONFIGS
from toys import LLAMA_LIKE as LONG

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
MODELS = {name: tiny_gpt(config) for name, config in CONFIGS.items()}


def walk(model, prompts, steps, seed):
    """Many random moves, each row's logits compared with those of the model without a cache."""
    choose = random.Random(seed)
    session = DecodeSession(model, prompts)
    window = model.config.context_length
    rows = [(list(prompt), len(prompt)) for prompt in prompts]
    for _ in range(steps):
        verb = choose.choice(["extend", "extend", "select", "select", "rewind"])
        if verb == "extend" and max(len(tokens) for tokens, _ in rows) < window - 3:
            new = [[choose.randrange(256) for _ in range(3)] for _ in rows]
            new = [tokens[: choose.choice([1, 3])] for tokens in new[:1]] + new[1:]
            n = len(new[0])
            new = [tokens[:n] for tokens in new]
            session.extend(torch.tensor(new))
            rows = [(row + more, start) for (row, start), more in zip(rows, new, strict=True)]
        elif verb == "select":
            parents = [choose.randrange(len(rows)) for _ in range(choose.randint(1, 6))]
            if choose.random() < 0.7:  # as samplers do: rows of a prompt stay adjacent
                parents.sort()
            session.select(parents)
            rows = [(list(rows[p][0]), rows[p][1]) for p in parents]
        else:
            counts = [choose.randint(0, min(2, len(tokens) - start)) for tokens, start in rows]
            session.rewind(counts)
            rows = [(t[: len(t) - n], start) for (t, start), n in zip(rows, counts, strict=True)]
            session.read()
        with torch.inference_mode():
            for row, (tokens, _) in enumerate(rows):
                if session.known[row]:
                    want = model.logits(model(torch.tensor([tokens])))[0, -1]
                    torch.testing.assert_close(session.logits[row], want, **CLOSE)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("separate_from", [1, 4])
@pytest.mark.parametrize(("spare", "most_rows"), [(0, 64), (6, 64), (0, 2), (6, 1)])
def test_compacting_separating_and_splitting_trees_change_no_logits(
    name, spare, most_rows, separate_from, monkeypatch
):
    monkeypatch.setattr(cache, "_SPARE", spare)
    monkeypatch.setattr(cache, "_MOST_ROWS", most_rows)
    monkeypatch.setattr(cache, "_SEPARATE_FROM", separate_from)
    for seed in range(6):
        walk(MODELS[name], [[1, 2, 3], [4], [5, 6, 7, 8, 9]], steps=24, seed=seed)


def trees(session):
    return session._cache.kv.shape[2]


def test_rows_of_one_tree_may_be_read_again_from_their_first_token():
    model = MODELS["llama-like"]
    session = DecodeSession(model, [[1]])
    session.select([0, 0])
    session.extend(torch.tensor([[5, 6], [7, 8]]))
    session.read(at_least=3)
    got = session.extend(torch.tensor([2, 3]))
    for row, tokens in enumerate([[1, 5, 6, 2], [1, 7, 8, 3]]):
        with torch.inference_mode():
            want = model.logits(model(torch.tensor([tokens])))[0, -1]
        torch.testing.assert_close(got[row, 0], want, **CLOSE)


def test_beams_share_the_keys_of_their_prompt_and_moving_them_moves_no_memory():
    session = DecodeSession(MODELS["llama-like"], [[1, 2, 3, 4], [5, 6]])
    session.select([0, 0, 0, 1, 1, 1])
    session.extend(torch.arange(6))
    memory = session._cache.kv.data_ptr()
    session.select([2, 2, 0, 4, 3, 3])
    assert trees(session) == 2
    assert session._cache.kv.data_ptr() == memory


def test_slots_that_no_beam_sees_are_used_again(monkeypatch):
    monkeypatch.setattr(cache, "_SPARE", 8)
    model = MODELS["llama-like"]
    session = DecodeSession(model, [[1, 2, 3]], capacity=32)
    session.select([0] * 4)
    tokens = [1, 2, 3]
    for step in range(24):
        session.extend(torch.tensor([step, step + 1, step + 2, step + 3]))
        session.select([1] * 4)
        tokens.append(step + 1)
    # 27 tokens of the one row that is left, not 3 + 4 * 24
    assert session._cache._used < 60
    with torch.inference_mode():
        want = model.logits(model(torch.tensor([tokens])))[0, -1]
    torch.testing.assert_close(session.logits, want.expand(4, -1), **CLOSE)


def test_samples_get_trees_of_their_own_once_they_have_little_in_common(monkeypatch):
    monkeypatch.setattr(cache, "_SPARE", 8)
    lm = gptk.LanguageModel(MODELS["llama-like"])
    settings = {"max_new_tokens": 24, "seed": 3, "ignore_eos": True, "sampler": "multinomial"}
    many = lm.generate([1, 2], n=8, **settings)
    single = lm.generate([1, 2], **settings)
    assert many.tokens == single.tokens
    session = DecodeSession(MODELS["llama-like"], [[1, 2]], samples=8)
    assert trees(session) == 1
    for step in range(24):
        session.extend(torch.arange(8) + step)
    assert trees(session) == 8


def test_prompts_without_rows_give_their_memory_back():
    session = DecodeSession(MODELS["gpt2-like"], [[1, 2, 3, 4], [5, 6], [7]])
    session.select([0, 0, 2, 2])
    assert trees(session) == 2
    session.select([2, 3])
    assert trees(session) == 1


@pytest.mark.parametrize("sampler", ["multinomial", "beam:width={n}", "best-of-n:n={n}"])
def test_many_rows_take_no_memory_by_their_square(sampler):
    """Four times the rows may take some four times the memory, and not sixteen times."""
    lm = gptk.LanguageModel(MODELS["llama-like"])

    def taken(n):
        counted = []

        def follow(model, parts, *args, **kwargs):
            states = read_parts(model, parts, *args, **kwargs)
            counted.append(pool.used)
            return states

        pool = ENGINE.passes(lm.model).pool
        with pytest.MonkeyPatch.context() as patch:
            read_parts = passes.read_parts
            patch.setattr(passes, "read_parts", follow)
            settings = {"sampler": sampler.format(n=n), "n": n, "max_new_tokens": 8}
            lm.generate([1, 2], seed=0, ignore_eos=True, **settings)
        return max(counted)

    assert taken(800) < 6 * taken(200)


def test_samples_of_a_long_prompt_share_it():
    """Trees of their own would take 40 times the memory of the prompt."""
    session = DecodeSession(MODELS["llama-like"], [list(range(70))], samples=40, capacity=80)
    for step in range(20):
        session.extend(torch.arange(40) + step)
    assert trees(session) == 1


def test_memory_for_many_new_tokens_is_taken_as_they_come():
    lm = gptk.LanguageModel(tiny_gpt(dataclasses.replace(LONG, context_length=10**9)))
    with lm.stream([1, 2], max_new_tokens=10**9) as stream:
        next(stream)
        assert ENGINE.passes(lm.model).pool.used == 1
    with lm.stream([1, 2], max_new_tokens=10**9, n=100, sampler="multinomial") as stream:
        next(stream)
        assert ENGINE.passes(lm.model).pool.used <= 101
    assert ENGINE.passes(lm.model).pool.used == 0
