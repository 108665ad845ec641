"""Greedy text of the book's own code (package llms-from-scratch), from its own checkpoint."""

import pytest
import torch
from llms_from_scratch.ch04 import GPTModel
from llms_from_scratch.ch05 import generate

import gptk

BOOK = {
    "vocab_size": 50257,
    "context_length": 32,
    "emb_dim": 64,
    "n_heads": 4,
    "n_layers": 3,
    "drop_rate": 0.1,
    "qkv_bias": True,
}
PROMPT = "Every effort moves you"


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The book's model with random weights, and gptk's reading of its state dict."""
    torch.manual_seed(123)
    oracle = GPTModel(BOOK).eval()
    path = tmp_path_factory.mktemp("book") / "model.pth"
    torch.save(oracle.state_dict(), path)
    return oracle, gptk.load(f'llms-from-scratch:path="{path}",n_heads=4')


def test_its_tokens(both):
    assert both[1].encode(PROMPT) == [6109, 3626, 6100, 345]


@pytest.mark.parametrize(("new_tokens", "overflow"), [(25, "stop"), (60, "slide")])
def test_greedy_text_is_the_books_with_and_without_overflow(both, new_tokens, overflow):
    oracle, lm = both
    ids = lm.encode(PROMPT)
    want = generate(oracle, torch.tensor([ids]), new_tokens, BOOK["context_length"])
    out = lm.generate(PROMPT, max_new_tokens=new_tokens, overflow=overflow, ignore_eos=True)
    assert out.tokens == want[0, len(ids) :].tolist()
    assert out.text == lm.tokenizer.decode(out.tokens)


def test_the_loss_is_the_books(both):
    oracle, lm = both
    ids = lm.encode("Every effort moves you toward the goal you have set.")
    logits = oracle(torch.tensor([ids[:-1]]))
    want = torch.nn.functional.cross_entropy(logits[0], torch.tensor(ids[1:]))
    assert lm.score(ids).loss == pytest.approx(want.item(), abs=1e-5)
