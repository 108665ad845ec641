"""Decoding with each family: greedy and beams as transformers', ragged batches, drafts, caches."""

import pytest
import torch

import checkpoints
import gptk
from gptk.weights.building import build_model
from gptk_plugins.loaders.huggingface import HuggingFace

CASES = [
    "mistral-yarn", "qwen2-windows", "gemma2", "gemma3", "gemma3-scaled", "phi3-longrope", "olmo2",
    "smollm3", "smollm3-windows", "mixtral", "qwen3-moe", "gpt-neox", "gpt-neox-sequential", "opt",
]  # fmt: skip
NEW = 24
PROMPTS = [
    checkpoints.random_ids(length)[0].add(1).remainder(96).add(1).tolist()
    for length in (1, 5, 12, 30)
]


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """transformers' model and gptk's."""
    folder = tmp_path_factory.mktemp(request.param)
    oracle = checkpoints.random_model(request.param)
    oracle.generation_config.eos_token_id = None
    oracle.save_pretrained(folder)
    model = build_model(HuggingFace(path=str(folder)).load(), "cpu", torch.float32, pack=True)
    return oracle, gptk.LanguageModel(model)


def theirs(oracle, prompt, **settings):
    ids = torch.tensor([prompt])
    out = oracle.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, **settings
    )
    return out[0, len(prompt) :].tolist()


def test_greedy_alone_in_a_batch_and_with_drafts(pair):
    oracle, lm = pair
    want = [theirs(oracle, prompt) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in want}) == len(PROMPTS)
    assert [lm.generate(prompt, max_new_tokens=NEW).tokens for prompt in PROMPTS] == want
    batch = lm.generate_batch(PROMPTS, max_new_tokens=NEW)
    assert [out.tokens for out in batch] == want
    drafted = lm.generate_batch(PROMPTS, max_new_tokens=NEW, draft="lookup")
    assert [out.tokens for out in drafted] == want


def test_beams(pair):
    oracle, lm = pair
    for prompt in PROMPTS[1:]:
        want = theirs(oracle, prompt, num_beams=4)
        assert lm.generate(prompt, sampler="beam:width=4", max_new_tokens=NEW).tokens == want


@torch.inference_mode()
def test_a_cache_of_trees_gives_what_a_whole_text_gives(pair):
    """Rows that were forked, rewound, padded, and read token by token, past every window."""
    _, lm = pair
    model = lm.model
    ids = checkpoints.random_ids(40)
    ids[1, 0] = ids[0, 0]
    whole = model.logits(model(ids))
    cache = model.new_cache(1, 4)
    model(ids[:1, :3], cache)
    cache.select([0, 0])
    cache.rewind([2, 2])
    counts = [16, 9]
    padded = model.logits(model(ids[:, 1:17], cache, counts))
    for row, count in enumerate(counts):
        expected = whole[row, 1 : 1 + count]
        torch.testing.assert_close(padded[row, :count], expected, atol=1e-4, rtol=0)
    cache.rewind([7, 0])
    assert cache.lengths == [10, 10]
    for position in range(10, 40):
        step = model.logits(model(ids[:, position : position + 1], cache))[:, 0]
        torch.testing.assert_close(step, whole[:, position], atol=1e-4, rtol=0)
