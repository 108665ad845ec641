"""The four verbs, the KV cache and the window."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptk import DecodeSession, DecodingError, Follower
from gptk.testing import batches, tiny_gpt
from toys import CONFIGS, GPT2_LIKE

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
MODELS = {name: tiny_gpt(config) for name, config in CONFIGS.items()}


def plain_logits(model, tokens):
    """The logits after each token of one row, without a session."""
    with torch.inference_mode():
        return model.logits(model(torch.tensor([tokens])))[0]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("use_cache", [True, False])
@given(batch=batches(), data=st.data())
@settings(max_examples=25)
def test_any_walk_of_verbs_gives_the_logits_of_the_plain_model(name, use_cache, batch, data):
    model = MODELS[name]
    session = DecodeSession(model, batch, use_cache=use_cache)
    rows = [list(prompt) for prompt in batch]
    starts = [len(prompt) for prompt in batch]
    for row, tokens in enumerate(rows):
        torch.testing.assert_close(session.logits[row], plain_logits(model, tokens)[-1], **CLOSE)
    for _ in range(data.draw(st.integers(1, 4))):
        verb = data.draw(st.sampled_from(["extend", "select", "rewind"]))
        if verb == "extend":
            n = data.draw(st.integers(1, 3))
            new = [data.draw(st.lists(st.integers(0, 255), min_size=n, max_size=n)) for _ in rows]
            got = session.extend(torch.tensor(new))
            rows = [row + more for row, more in zip(rows, new, strict=True)]
            for row, tokens in enumerate(rows):
                want = plain_logits(model, tokens)[-n:]
                torch.testing.assert_close(got[row], want, **CLOSE)
        elif verb == "select":
            parents = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=4))
            session.select(parents)
            rows = [list(rows[p]) for p in parents]
            starts = [starts[p] for p in parents]
        else:
            counts = [
                data.draw(st.integers(0, len(row) - start))
                for row, start in zip(rows, starts, strict=True)
            ]
            session.rewind(counts)
            rows = [row[: len(row) - count] for row, count in zip(rows, counts, strict=True)]
        assert list(session.rows.lengths) == [len(row) for row in rows]
        for row, tokens in enumerate(rows):
            assert session.rows.tokens[row][session.rows.mask[row]].tolist() == tokens


def test_select_is_exact():
    session = DecodeSession(MODELS["llama-like"], [[1, 2, 3], [4, 5], [6]])
    copy = DecodeSession(MODELS["llama-like"], [[1, 2, 3], [4, 5], [6]])
    session.select([2, 0, 1])
    session.select([1, 2, 0])
    step = torch.tensor([7, 8, 9])
    assert torch.equal(session.extend(step), copy.extend(step))


def test_rewind_is_exact():
    session = DecodeSession(MODELS["llama-like"], [[1, 2, 3], [4, 5]])
    first = session.extend(torch.tensor([[7, 8, 9], [10, 11, 12]]))
    session.rewind(3)
    assert torch.equal(session.extend(torch.tensor([[7, 8, 9], [10, 11, 12]])), first)


def test_rewind_never_touches_the_prompt():
    session = DecodeSession(MODELS["gpt2-like"], [[1, 2, 3]])
    session.extend(torch.tensor([4]))
    with pytest.raises(DecodingError, match="cannot rewind 2 tokens of a row with 1 new"):
        session.rewind(2)


def test_a_full_window_stops_by_default():
    window = GPT2_LIKE.context_length
    session = DecodeSession(MODELS["gpt2-like"], [[1] * window])
    with pytest.raises(DecodingError, match=f"window of {window}"):
        session.extend(torch.tensor([1]))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_sliding_sees_the_last_window_from_position_zero(name, use_cache):
    model = MODELS[name]
    window = model.config.context_length
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 255, (n,), generator=generator).tolist() for n in (window - 2, 5)]
    session = DecodeSession(model, rows, overflow="slide", use_cache=use_cache)
    for step in range(6):
        new = [step, 100 + step]
        session.extend(torch.tensor(new))
        for row, token in enumerate(new):
            rows[row].append(token)
            want = plain_logits(model, rows[row][-window:])[-1]
            torch.testing.assert_close(session.logits[row], want, **CLOSE)


class Recorder(Follower):
    """A follower that keeps each row's tokens by itself."""

    def __init__(self, rows):
        self.rows = [list(row) for row in rows]

    def extend(self, tokens):
        self.rows = [row + new for row, new in zip(self.rows, tokens.tolist(), strict=True)]

    def select(self, parents):
        self.rows = [list(self.rows[p]) for p in parents]

    def rewind(self, counts):
        self.rows = [row[: len(row) - n] for row, n in zip(self.rows, counts, strict=True)]


def test_followers_move_with_the_rows():
    prompts = [[1, 2, 3], [4]]
    session = DecodeSession(MODELS["gpt2-like"], prompts)
    follower = Recorder(prompts)
    session.follow(follower)
    session.extend(torch.tensor([5, 6]))
    session.select([1, 0, 1])
    session.extend(torch.tensor([[7, 8], [9, 10], [11, 12]]))
    session.rewind([1, 0, 2])
    assert follower.rows == [[4, 6, 7], [1, 2, 3, 5, 9, 10], [4, 6]]


def test_a_refused_extend_changes_nothing():
    model = MODELS["gpt2-like"]
    session = DecodeSession(model, [[1, 2, 3]])
    session.extend(torch.arange(20)[None])
    with pytest.raises(DecodingError, match="longer than the model's window"):
        session.extend(torch.arange(20)[None])
    with pytest.raises(DecodingError, match="cannot extend 1 rows"):
        session.extend(torch.tensor([1, 2]))
    session.rewind(18)
    got = session.extend(torch.tensor([7]))
    want = plain_logits(model, [1, 2, 3, 0, 1, 7])[-1]
    torch.testing.assert_close(got[0, 0], want, **CLOSE)


def test_sliding_over_several_tokens_equals_one_by_one():
    model = MODELS["gpt2-like"]
    new = torch.randint(0, 255, (2, 40), generator=torch.Generator().manual_seed(2))
    prompts = [[1] * 30, [2] * 4]
    at_once = DecodeSession(model, prompts, overflow="slide").extend(new)
    single = DecodeSession(model, prompts, overflow="slide")
    for place, column in enumerate(new.T):
        torch.testing.assert_close(single.extend(column)[:, 0], at_once[:, place], **CLOSE)


def test_after_rewind_logits_are_unknown():
    session = DecodeSession(MODELS["gpt2-like"], [[1, 2, 3]])
    before = session.logits
    session.extend(torch.tensor([4]))
    session.rewind(1)
    with pytest.raises(DecodingError, match="after rewind"):
        _ = session.logits
    session.read()
    torch.testing.assert_close(session.logits, before, **CLOSE)


@pytest.mark.parametrize("parents", [[], [2], [-1]])
def test_parents_that_are_not_rows_are_refused(parents):
    session = DecodeSession(MODELS["gpt2-like"], [[1], [2]])
    with pytest.raises(DecodingError, match="do not select from 2 rows"):
        session.select(parents)


def test_random_streams_are_keyed_by_prompt_ordinal_and_sample():
    model = MODELS["gpt2-like"]
    alone = DecodeSession(model, [[1, 2]], seed=5, ordinals=[1]).rows.uniform()
    session = DecodeSession(model, [[9], [1, 2], [1, 2]], seed=5)
    batch = session.rows.uniform()
    assert session.rows.ordinals == (0, 1, 2)
    assert batch[1] == alone[0]
    assert len(set(batch.tolist())) == 3
    samples = DecodeSession(model, [[9], [1, 2]], samples=2, seed=5).rows.uniform()
    assert samples[2] == alone[0]
    assert len(set(samples.tolist())) == 4
    assert DecodeSession(model, [[1, 2]], seed=6, ordinals=[1]).rows.uniform() != alone
    assert DecodeSession(model, [[1, 2]], seed=5).rows.uniform() != alone
