"""A pass in one call of gptk's kernels, compared with the modules of gptk.model.gpt."""

import gc
import random
import weakref
from array import array
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gptk
from gptk import kernels
from gptk.model import passes
from gptk.model.blocks import BlockCache
from gptk.model.budget import Budget
from gptk.model.config import GPTConfig
from gptk.model.pool import BlockPool
from gptk.model.walk import plan_of
from gptk.testing import tiny_gpt
from gptk.weights.empty import empty_gpt

pytestmark = pytest.mark.skipif(not kernels.available(), reason="gptk's kernels do not run here")

LLAMA = GPTConfig(
    vocab_size=40, context_length=512, n_layers=3, n_heads=6, n_kv_heads=2, width=96, head_dim=32,
    mlp_width=160, norm="rms", positions="rotary", mlp="swiglu", tied_head=True,
)  # fmt: skip
CONFIGS = {
    "llama": LLAMA,
    "qwen3": replace(LLAMA, qk_norm=True, tied_head=False, n_heads=4, n_kv_heads=1),
    "qwen2": replace(LLAMA, qkv_bias=True, head_dim=64),
    "gemma3": replace(
        LLAMA, norms="both", mlp="geglu-tanh", qk_norm=True, embedding_scale=9.8, head_dim=256,
        n_heads=4, n_kv_heads=1, window=70, window_layers=(True, False), window_rope_theta=100.0,
        rope_factors=(8.0,) * 128, logit_softcap=3.0,
    ),
    "smollm3": replace(LLAMA, rotary_layers=(True, False), rotary_dim=24, rope_scale=1.2),
    "mistral": replace(LLAMA, window=20, n_kv_heads=6),
    "gpt2": GPTConfig(
        vocab_size=40, context_length=512, n_layers=2, n_heads=3, n_kv_heads=3, width=96,
        head_dim=32, mlp_width=384, norm="layer", norm_bias=True, positions="learned",
        mlp="gelu-tanh", qkv_bias=True, out_bias=True, mlp_bias=True, tied_head=True,
    ),
}  # fmt: skip
ALL_KINDS = [
    (dtype, kind) for dtype in (torch.float32, torch.bfloat16) for kind in (None, "int4", "int8")
]
KINDS = st.sampled_from(ALL_KINDS)


def packed_gpt(config, dtype, quantize, seed):
    model = tiny_gpt(config, seed=seed).to(dtype)
    if quantize is not None:
        model.quantize(quantize)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape).to(dtype) / 8)
    return model.eval().pack()


def tokens(seed, count):
    return array("q", torch.randint(40, (count,), generator=torch.manual_seed(seed)).tolist())


class Texts:
    """Rows of their own caches in one pool; `read` reads the next tokens of some of them."""

    def __init__(self, model, texts):
        self.model = model
        self.pool = BlockPool(model.config, model.device, model.dtype, Budget(model.device))
        self.texts = texts
        self.caches = [BlockCache(self.pool, 1) for _ in texts]

    def left(self):
        return [text[cache.held[0] :] for text, cache in zip(self.texts, self.caches, strict=True)]

    @torch.inference_mode()
    def read(self, counts, wanted=None, layers=()):
        """counts: how many tokens of each text, in one pass. Returns the wanted states of each."""
        parts = []
        for text, cache, count in zip(self.texts, self.caches, counts, strict=True):
            if count:
                start = cache.held[0]
                part = text[start : start + count]
                asked = len(part) if wanted is None else min(wanted, len(part))
                parts.append(passes.Part(cache, 0, part, asked))
        states = passes.read_parts(self.model, parts, layers)
        pieces = iter(states.split([part.wanted for part in parts]))
        return [next(pieces) if count else states[:0] for count in counts]


@settings(max_examples=60)
@given(
    name=st.sampled_from(sorted(CONFIGS)), kind=KINDS, seed=st.integers(0, 99),
    counts=st.lists(st.tuples(st.integers(0, 150), st.integers(1, 40)), min_size=1, max_size=5),
    wanted=st.sampled_from([None, 0, 1, 3]), layers=st.sampled_from([(), (0, 2), (1,)]),
)  # fmt: skip
def test_it_gives_what_the_modules_give(name, kind, seed, counts, wanted, layers):
    model = packed_gpt(CONFIGS[name], *kind, seed)
    assert plan_in_inference(model) is not None
    texts = [tokens(i, sum(pair)) for i, pair in enumerate(counts)]
    got = []
    for find in (plan_of, lambda model: None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(passes, "plan_of", find)
            rows = Texts(model, texts)
            if any(past for past, _ in counts):
                rows.read([past for past, _ in counts])
            got.append(rows.read([new for _, new in counts], wanted, layers))
    for walked, by_modules in zip(*got, strict=True):
        assert torch.equal(walked, by_modules)


@settings(max_examples=40)
@given(
    name=st.sampled_from(sorted(CONFIGS)), kind=KINDS, seed=st.integers(0, 99),
    sizes=st.lists(st.integers(1, 200), min_size=1, max_size=12),
)  # fmt: skip
def test_states_do_not_depend_on_neighbours_or_parts(name, kind, seed, sizes):
    """To the last bit, however a text is divided among passes, and whatever is read beside it."""
    model, choose = packed_gpt(CONFIGS[name], *kind, seed), random.Random(seed)
    texts = [tokens(i, size) for i, size in enumerate(sizes)]
    together, read = Texts(model, texts), [[] for _ in texts]
    while any(map(len, left := together.left())):
        counts = [choose.randint(0, min(len(tokens), 120)) for tokens in left]
        if any(counts):
            for pieces, piece in zip(read, together.read(counts), strict=True):
                pieces.append(piece)
    for text, pieces in zip(texts, read, strict=True):
        alone = Texts(model, [text]).read([len(text)])[0]
        assert torch.equal(torch.cat(pieces), alone)
        assert torch.equal(model.logits(alone)[-1:], model.logits(alone[-1:]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALL_KINDS, ids=str)
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_rows_logits_are_the_same_among_any_number_of_rows(name, kind):
    """Prompts that begin alike or not, then decoding steps, alone and among up to 256 rows."""
    model = packed_gpt(CONFIGS[name], *kind, 0)
    shared = tokens(0, 130)
    texts = [
        (shared[: 64 * (i % 3)] if i % 2 else array("q")) + tokens(i + 1, 3 + i % 70) + tokens(i, 3)
        for i in range(256)
    ]
    alone = [logits_of(model, [text], range(1))[0] for text in texts]
    assert not torch.equal(alone[0], alone[1])
    for count in (2, 17, 64, 100, 256):
        first = (37 * count) % (257 - count)
        rows = range(first, first + count)
        for row, logits in zip(rows, logits_of(model, texts, rows), strict=True):
            assert torch.equal(logits, alone[row]), (count, row)


def logits_of(model, texts, rows):
    """The logits of the last four tokens of texts: their beginnings are read in one pass, where
    blocks that are known are shared, then the last three tokens one by one."""
    chosen = Texts(model, [texts[row] for row in rows])
    read = chosen.read([len(text) - 3 for text in chosen.texts], wanted=1)
    steps = [read, *(chosen.read([1] * len(rows)) for _ in range(3))]
    with torch.inference_mode():
        # All rows of a step together, as the engine computes them.
        together = [model.logits(torch.cat(step).select(1, 0)) for step in steps]
    return torch.stack(together, dim=1).unbind()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALL_KINDS, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_prompts_logits_are_the_same_however_it_is_split_and_shared(name, kind):
    """By 50 random batches: prompts in parts, beside others, with blocks that others have read."""
    model, choose = packed_gpt(CONFIGS[name], *kind, 0), random.Random(1)
    shared = tokens(0, 200)
    with torch.inference_mode():
        for _ in range(50):
            texts = [
                shared[: choose.choice([0, 63, 64, 128, 200])] + tokens(i, choose.randint(1, 90))
                for i in range(choose.randint(1, 9))
            ]
            rows = Texts(model, texts)
            while any(map(len, left := rows.left())):
                # A row begins with what those before it have read of the same text.
                for cache, text in zip(rows.caches, texts, strict=True):
                    if not cache.held[0]:
                        cache.recall([text])
                left = rows.left()
                counts = [choose.randint(0, min(len(part), 120)) for part in left]
                if any(counts):
                    last = rows.read(counts, wanted=1)
                    for i, count in enumerate(counts):
                        if count and count == len(left[i]):
                            want = Texts(model, [texts[i]]).read([len(texts[i])], wanted=1)[0]
                            got, want = (model.logits(states) for states in (last[i], want))
                            assert torch.equal(got, want)


def plan_in_inference(model):
    with torch.inference_mode():
        return plan_of(model)


def replace_a_norm(model):
    model.blocks[1].mlp_norm.weight = torch.nn.Parameter(torch.full((96,), 0.5))


def replace_data(model):
    model.norm.weight.data = torch.full((96,), 0.5)


def replace_a_layer(model):
    model.blocks[0].attn.out = packed_gpt(LLAMA, torch.float32, None, 7).blocks[0].attn.out


def write_a_weight(model):
    model.blocks[0].mlp.up._parameters["weight"] = torch.nn.Parameter(torch.ones(320, 96) / 9)


def ask_for_a_weight(model):
    with torch.no_grad():
        model.embed.weight.mul_(torch.linspace(1, 2, 96))


def hook(model):
    model.blocks[1].mlp.register_forward_hook(lambda module, inputs, output: output * 2)


def patch_forward(model):
    model.blocks[1].mlp.forward = lambda x: x


CHANGES = [
    replace_a_norm, replace_data, replace_a_layer, write_a_weight, ask_for_a_weight, hook,
    patch_forward, lambda model: model.blocks.__delitem__(1),
    lambda model: model.quantize("int8"), lambda model: model.unpack(),
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_it_follows_the_model(change, monkeypatch):
    model = packed_gpt(LLAMA, torch.float32, None, 0)
    text = tokens(1, 9)
    before = Texts(model, [text]).read([9])[0]
    with torch.no_grad():
        change(model)
    after = Texts(model, [text]).read([9])[0]
    assert not torch.equal(after, before) or change is CHANGES[-1]
    monkeypatch.setattr(passes, "plan_of", lambda model: None)
    assert torch.equal(after, Texts(model, [text]).read([9])[0])


def test_a_head_and_its_embedding_stay_tied_when_their_weight_is_asked_for():
    model = packed_gpt(LLAMA, torch.float32, None, 0)
    values = model.head.packed.dense(torch.float32)
    assert model.embed.packed is model.head.packed
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.embed.weight, values)
    assert model.embed.packed is model.head.packed is None


def test_a_plan_keeps_no_model_alive():
    model = packed_gpt(LLAMA, torch.float32, None, 0)
    model.wrapper = [model]  # as of a program that wraps it
    assert plan_in_inference(model) is not None
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_that_was_made_without_memory_decodes_as_another(name):
    """As loaders and trainers make it."""
    model = tiny_gpt(CONFIGS[name])
    other = empty_gpt(model.config)
    other.load_state_dict(model.state_dict(), assign=True)
    other.eval().pack()
    texts = [
        gptk.LanguageModel(each).generate([1, 2, 3], max_new_tokens=8) for each in (model, other)
    ]
    assert texts[0].tokens == texts[1].tokens


@pytest.mark.parametrize("by_kernels", [True, False])
@pytest.mark.parametrize("walks", [True, False])
def test_a_row_keeps_no_more_blocks_than_its_window(walks, by_kernels, monkeypatch):
    """And some beneath it, to drop tokens; more dropped ones are read again."""
    model = packed_gpt(CONFIGS["mistral"], torch.float32, None, 0)
    text = tokens(1, 500)
    want = model.logits(model(torch.tensor([text.tolist()])))[0]
    if not walks:
        monkeypatch.setattr(passes, "plan_of", lambda model: None)
    if not by_kernels:
        monkeypatch.setattr(kernels.checks, "enabled", False)
    rows = Texts(model, [text])
    cache, found = rows.caches[0], []
    for count in (300, 1, 100, 1, 98):
        found.append(rows.read([count])[0][:, 0])
        assert rows.pool.used <= 6
    torch.testing.assert_close(model.logits(torch.cat(found)), want, atol=1e-4, rtol=0)
    copies = rows.pool.used
    cache.select([0, 0, 0])
    assert rows.pool.used == copies
    cache.rewind([0, 100, 400])
    assert cache.lengths == [500, 400, 100]
    assert cache.held == [500, 400, 0]  # the last row's beginning was given back
    cache.drop()
    assert rows.pool.used == 0
