"""Models of transformers' run by gptk: equal to transformers, and refused where that cannot be."""

import copy
import functools
import itertools

import pytest
import torch

import gptk
from architectures import ARCHITECTURES, small_model
from gptk import IncompatibleError, TransformersModel
from gptk.engine.engine import ENGINE
from gptk.testing import ModelContract

PROMPTS = [[1, 2, 3], [104, 101, 108, 108, 111, 32], [7, 9, 7, 9, 7, 9, 7, 9, 7, 9, 7]]
ATTENDS_ITSELF = (
    "bart",
    "bloom",
    "codegen",
    "falcon",
    "gpt_neo",
    "gptj",
    "mpt",
    "stablelm",
    "xglm",
)


@functools.cache
def theirs(kind):
    """A model as transformers runs it."""
    return small_model(kind)


@functools.cache
def ours(kind):
    """A copy of it as gptk runs it."""
    return TransformersModel(copy.deepcopy(theirs(kind)))


@pytest.fixture(params=ARCHITECTURES)
def kind(request):
    return request.param


@torch.inference_mode()
def test_logits_are_those_of_transformers(kind):
    """In one pass, in several, and beside a row of another length; to the end of the window."""
    model = ours(kind)
    ids = torch.randint(0, 256, (2, 90), generator=torch.Generator().manual_seed(1))
    want = theirs(kind)(ids, use_cache=False).logits
    tolerance = 1e-5 * float(want.abs().max().clamp(min=1))

    def logits(tokens, cache=None, counts=None):
        return model.logits(model.states(tokens, cache, counts)[:, :, 0])

    assert (logits(ids) - want).abs().max() <= tolerance
    cache = model.new_cache(2, 4)
    ends = (0, 3, 64, 65, 66, 90)
    parts = [logits(ids[:, a:b], cache) for a, b in itertools.pairwise(ends)]
    assert (torch.cat(parts, dim=1) - want).abs().max() <= tolerance
    ragged = logits(ids, counts=[90, 17])
    assert (ragged[0] - want[0]).abs().max() <= tolerance
    assert (ragged[1, :17] - want[1, :17]).abs().max() <= tolerance


@torch.inference_mode()
def test_states_of_layers_are_those_of_transformers(kind):
    model = ours(kind)
    ids = torch.tensor([PROMPTS[1]])
    want = theirs(kind)(ids, use_cache=False, output_hidden_states=True).hidden_states
    layers = range(model.config.n_layers)
    assert len(layers) == 3
    got = model.states(ids, None, None, layers)
    for layer in layers:
        torch.testing.assert_close(got[:, :, 1 + layer], want[layer], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[:, :, 0], want[-1], rtol=1e-4, atol=1e-5)


SEARCHES = {
    "greedy": {},
    "beam:width=4": {"num_beams": 4},
    "beam:width=3,length_penalty=2.0": {"num_beams": 3, "length_penalty": 2.0},
}


@pytest.mark.parametrize("sampler", SEARCHES)
def test_tokens_are_those_of_transformers_generate(kind, sampler):
    lm = gptk.LanguageModel(ours(kind))
    outs = lm.generate_batch(PROMPTS, sampler=sampler, max_new_tokens=24, ignore_eos=True)
    for prompt, out in zip(PROMPTS, outs, strict=True):
        with torch.inference_mode():
            want = theirs(kind).generate(
                torch.tensor([prompt]),
                max_new_tokens=24,
                do_sample=False,
                eos_token_id=None,
                **SEARCHES[sampler],
            )
        assert out.tokens == want[0, len(prompt) :].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_runs_in_16_bits(kind, dtype):
    model = TransformersModel(copy.deepcopy(theirs(kind)).to(dtype))
    assert model.dtype == dtype
    outs = gptk.LanguageModel(model).generate_batch(PROMPTS, max_new_tokens=6, ignore_eos=True)
    assert [len(out.tokens) for out in outs] == [6, 6, 6]


def test_passes_of_runs_are_joined():
    """Three prompts are decoded in about as many passes as one."""
    model = TransformersModel(copy.deepcopy(theirs("olmo2")))
    lm = gptk.LanguageModel(model)
    lm.generate_batch(PROMPTS, max_new_tokens=10, ignore_eos=True)
    assert ENGINE.passes(model).count <= 12


def test_beams_share_the_blocks_of_their_prompt():
    model = ours("gemma2")
    prompt = [number % 250 for number in range(70)]

    def run():
        session = gptk.DecodeSession(model, [prompt], groups=4)
        return ENGINE.passes(model).pool.used - len(session.rows)

    assert ENGINE.call(run) == -2  # two blocks for four rows


@pytest.mark.parametrize("kind", ATTENDS_ITSELF)
def test_a_class_that_computes_attention_itself_is_refused(kind):
    refused(kind, "computes attention itself")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("mamba", "layers of the kind linear_attention"),
        ("jamba", "layers of the kind linear_attention"),
        ("qwen3_next", "layers of the kind linear_attention"),
        ("rwkv", "more than keys and values"),
    ],
)
def test_what_is_not_keys_and_values_alone_is_refused(kind, reason):
    refused(kind, reason)


def test_a_model_that_reads_in_both_directions_is_refused():
    import transformers

    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    with pytest.raises(IncompatibleError, match="neither all before them"):
        TransformersModel(transformers.BertLMHeadModel(config))


def refused(kind, reason):
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "vocab_size": 64, "n_layer": 2, "n_embd": 32, "n_head": 2}
    config = transformers.AutoConfig.for_model(kind)
    for name, size in sizes.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, size)
    with torch.device("meta"):
        names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        module = getattr(transformers, names[kind])(config)
    with pytest.raises(IncompatibleError, match=reason) as raised:
        TransformersModel(module.to_empty(device="cpu"))
    assert str(raised.value).startswith(f"gptk cannot run {type(module).__name__}")
    assert "\n" not in str(raised.value)


def test_a_module_of_another_kind_is_refused():
    with pytest.raises(IncompatibleError, match="Linear is no model of transformers'"):
        TransformersModel(torch.nn.Linear(2, 2))


def test_rows_are_no_longer_than_rotary_positions_are_alike():
    """Beyond the original length, longrope's positions depend on the longest row of a pass."""
    import transformers

    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    rope |= {"rope_theta": 1e4}
    config = transformers.Phi3Config(
        **ARCHITECTURES["phi3"], rope_parameters=rope, original_max_position_embeddings=40
    )
    module = transformers.Phi3ForCausalLM(config)
    assert TransformersModel(module).config.context_length == 40


class TestGemma2(ModelContract):
    make = staticmethod(lambda: TransformersModel(small_model("gemma2")))


class TestGptOss(ModelContract):
    make = staticmethod(lambda: TransformersModel(small_model("gpt_oss")))


class TestLlama4(ModelContract):
    make = staticmethod(lambda: TransformersModel(small_model("llama4_text")))


class TestDeepSeek(ModelContract):
    make = staticmethod(lambda: TransformersModel(small_model("deepseek_v3")))


class TestOPT(ModelContract):
    make = staticmethod(lambda: TransformersModel(small_model("opt")))
