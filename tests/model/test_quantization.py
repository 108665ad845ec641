"""Quantized weights: what they round to, the products with them, and a real model's loss."""

import dataclasses
import math
import pydoc_data.topics
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoints
import gptk
from gptk import kernels
from gptk.cli.info import bytes_in_memory
from gptk.model.levels import GROUP, Levels, to_four_bits
from gptk.model.linear import Linear
from gptk.model.quantization import (
    PyTorchInt4,
    PyTorchInt8,
    PyTorchInt8Groups,
    check_device,
    pack,
    quantized,
)
from gptk.model.torchao import TorchAO
from gptk.testing import tiny_gpt
from gptk.weights.saving import save_checkpoint
from program import failing
from program import gptk as run_gptk
from toys import GPT2_LIKE

PRECISIONS = pytest.mark.parametrize("precision", ["int8", "int4"])
PACKED = {
    "int8": lambda weight: quantized(weight, "int8"),
    "PyTorch's int8": PyTorchInt8,
    "int4": lambda weight: pack(to_four_bits(weight)),
    "PyTorch's int4": lambda weight: PyTorchInt4(to_four_bits(weight)),
}
ALL_KERNELS = pytest.mark.parametrize("kernel", list(PACKED))


@st.composite
def weights(draw):
    """(outputs, inputs): of different sizes, with rows of zeros and groups of one value."""
    outputs, groups = draw(st.integers(1, 130)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    weight = torch.randn(outputs, groups * GROUP, generator=generator)
    weight *= draw(st.sampled_from([1e-4, 0.02, 1.0, 50.0]))
    weight += draw(st.sampled_from([0.0, 0.0, 0.1, -30.0]))
    weight[draw(st.integers(0, outputs - 1))] = 0
    weight[draw(st.integers(0, outputs - 1)), :GROUP] = draw(st.sampled_from([0.5, -3.0]))
    return weight


@pytest.mark.parametrize("kernel", ["int8", "PyTorch's int8"])
@settings(max_examples=60)
@given(weight=weights())
def test_int8_rounds_to_the_nearest_of_its_steps(kernel, weight):
    got = PACKED[kernel](weight).dense().float()
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    # Half a step, rounded up to float16, whose smallest numbers differ by 2⁻²⁴; and the rounding
    # errors of the scale and of the product in bfloat16, 2⁻⁸ each.
    step = 1.01 * step + 2**-24 * (kernel == "int8" and kernels.available())
    assert ((got - weight).abs() <= 0.5 * step + 2**-7 * weight.abs() + 1e-12).all()


@pytest.mark.parametrize("kernel", ["int4", "PyTorch's int4"])
@settings(max_examples=60)
@given(weight=weights())
def test_int4_rounds_to_the_nearest_of_its_groups_levels(kernel, weight):
    got = PACKED[kernel](weight).dense().float()
    groups = weight.view(len(weight), -1, GROUP)
    most, least = groups.amax(2, keepdim=True), groups.amin(2, keepdim=True)
    step = (most - least) / 15
    size = torch.maximum(most.abs(), least.abs())
    error = (got.view_as(groups) - groups).abs()
    # Offset and scale are bfloat16, so the levels may miss the ends of the group.
    assert (error <= 0.5 * step + 2**-7 * (size + 8 * step) + 1e-12).all()


@ALL_KERNELS
@settings(max_examples=40)
@given(
    weight=weights(), rows=st.sampled_from([1, 2, 5, 63, 64, 100]), bias=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float16]), seed=st.integers(0, 100),
)  # fmt: skip
def test_products_are_those_with_the_rounded_weights(kernel, weight, rows, bias, dtype, seed):
    packed = PACKED[kernel](weight)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 1, weight.shape[1], generator=generator).bfloat16().to(dtype)
    b = torch.randn(len(weight), generator=generator).to(dtype) if bias else None
    got = packed.linear(x, b)
    assert got.dtype == dtype
    assert got.shape == (rows, 1, len(weight))
    dense = packed.dense().double()
    want = x.double() @ dense.T + (0 if b is None else b.double())
    # Each product and sum in float32 or better, the result in bfloat16.
    size = x.double().abs() @ dense.abs().T + 1
    assert ((got.double() - want).abs() <= 2**-7 * size).all()


@ALL_KERNELS
def test_a_rows_product_does_not_depend_on_other_rows(kernel):
    torch.manual_seed(0)
    packed = PACKED[kernel](torch.randn(96, 64))
    x = torch.randn(7, 64).bfloat16()
    together = packed.linear(x, None)
    for row in range(7):
        assert torch.equal(packed.linear(x[row : row + 1], None)[0], together[row])


@PRECISIONS
def test_quantizing_frees_packed_weights(precision):
    model = tiny_gpt().bfloat16().pack()
    model.quantize(precision)
    layer = model.blocks[0].attn.out
    layer.unpack()
    layer.__dict__["weight"] = layer.weight  # as `pack` leaves it where the layer is not packed
    layer.quantize(precision)
    assert "weight" not in layer.__dict__
    assert not hasattr(layer, "weight")


@PRECISIONS
def test_inputs_that_no_group_divides_stay_as_they_are(precision):
    assert quantized(torch.randn(8, 40), precision) is None
    layer = Linear(40, 8)
    layer.quantize(precision)
    assert layer.packed is None
    assert layer.weight.shape == (8, 40)


@PRECISIONS
def test_weights_are_rounded_once_from_what_is_stored(precision, tmp_path):
    save_checkpoint(tmp_path / "model", tiny_gpt(GPT2_LIKE), None)  # in float32
    lm = gptk.load(tmp_path / "model", device="cpu", dtype="bfloat16", quantize=precision)
    wants = tiny_gpt(GPT2_LIKE).quantize(precision)
    for got, want in zip(lm.model.modules(), wants.modules(), strict=True):
        if isinstance(want, Linear):
            assert torch.equal(got.packed.dense(), want.packed.dense())


@PRECISIONS
def test_a_model_computes_with_the_rounded_weights(precision):
    model = tiny_gpt(GPT2_LIKE).bfloat16().quantize(precision)
    sizes = model.bytes_by_kind()
    assert set(sizes) == {"bfloat16", precision}
    ids = torch.tensor([[1, 2, 3, 250]])
    with torch.inference_mode():
        got = model.logits(model(ids))
    head = model.head.packed.dense().float()
    rounded = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = tiny_gpt(GPT2_LIKE)
    plain.load_state_dict({**rounded, "head.weight": rounded["embed.weight"]})
    with torch.inference_mode():
        want = plain(ids) @ head.T
    assert (got - want).norm() < 0.03 * want.norm()
    model.train()
    assert all(isinstance(m.weight, torch.nn.Parameter) for m in model.modules()
               if isinstance(m, Linear))  # fmt: skip
    assert model.head.weight is model.embed.weight


@PRECISIONS
def test_generation_with_a_draft_is_the_same(precision):
    lm = gptk.LanguageModel(tiny_gpt().quantize(precision))  # activations are float32
    for sampler in ("greedy", "multinomial"):
        settings = {"sampler": sampler, "max_new_tokens": 20, "seed": 1}
        plain = lm.generate([1, 2, 1, 2], **settings)
        drafted = lm.generate([1, 2, 1, 2], draft="lookup:ngram=1", **settings)
        assert drafted.tokens == plain.tokens
        assert drafted.token_logprobs == pytest.approx(plain.token_logprobs, abs=1e-4)


KEPT = pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])


@KEPT
@pytest.mark.parametrize("case", ["gpt2", "llama", "qwen2-untied"])
def test_levels_of_a_gguf_file_are_its_numbers(case, kind, tmp_path):
    """gguf's own dequantization is the oracle."""
    path = str(tmp_path / "model.gguf")
    checkpoints.write_gguf(Path(path), checkpoints.random_model(case), kind)
    stored, dequantized = gptk.load_checkpoint(path, stored=True), gptk.load_checkpoint(path)
    assert stored.config == dequantized.config
    assert stored.state.keys() == dequantized.state.keys()
    kept = {name for name, tensor in stored.state.items() if isinstance(tensor, gptk.Levels)}
    assert len(kept) >= 1 + 4 * stored.config.n_layers
    for name, tensor in stored.state.items():
        numbers = tensor.dense() if name in kept else tensor
        assert torch.allclose(numbers, dequantized.state[name], rtol=1e-6, atol=1e-9), name


@KEPT
@pytest.mark.parametrize("case", ["gpt2", "llama", "qwen2-untied"])
def test_a_model_keeps_what_its_file_has(case, kind, tmp_path):
    path = str(tmp_path / "model.gguf")
    checkpoints.write_gguf(Path(path), checkpoints.random_model(case), kind)
    lm = gptk.load(path, device="cpu", quantize="stored", tokenizer="bytes")
    sizes = lm.model.bytes_by_kind()
    assert {"Q4_0": "int4", "Q4_1": "int4", "Q8_0": "int8"}[kind] in sizes
    dequantized = gptk.load(path, device="cpu", dtype="float32", tokenizer="bytes").model
    for name, module in lm.model.named_modules():
        if isinstance(module, Linear):
            want = dequantized.get_submodule(name).weight
            got = module.packed.dense().float()
            # Rounded to bfloat16 are the scale, its product with a code (or with the high half of
            # one), and the number: 2⁻⁸ each.
            assert (got - want).abs().max() <= 3 * 2**-8 * want.abs().max(), name
    ids = checkpoints.random_ids()
    with torch.inference_mode():
        got, want = lm.model.logits(lm.model(ids)), dequantized.logits(dequantized(ids))
    assert (got - want).norm() < 0.03 * want.norm()


@KEPT
@pytest.mark.parametrize("case", ["gpt2", "llama", "qwen2-untied"])
@pytest.mark.skipif(not kernels.available(), reason="needs gptk's own kernels")
def test_in_float32_it_computes_as_the_dequantized_model(case, kind, tmp_path):
    """In a pass over few tokens, and in one over more than `matmul_few_rows` is for."""
    path = str(tmp_path / "model.gguf")
    checkpoints.write_gguf(Path(path), checkpoints.random_model(case), kind)
    settings = {"device": "cpu", "dtype": "float32", "tokenizer": "bytes"}
    kept = gptk.load(path, quantize="stored", **settings).model
    dequantized = gptk.load(path, **settings).model
    ids = checkpoints.random_ids()
    with torch.inference_mode():
        for batch in (ids, ids.repeat(1 + 64 // ids.numel(), 1)):
            got, want = (model.logits(model(batch)) for model in (kept, dequantized))
            assert (got - want).norm() < 2e-4 * want.norm()


@settings(max_examples=40)
@given(
    outputs=st.integers(1, 100), groups=st.integers(1, 3), rows=st.sampled_from([1, 3, 64, 70]),
    seed=st.integers(0, 1000), bias=st.booleans(),
)  # fmt: skip
def test_eight_bits_by_groups_are_two_matrices_of_four_bits(outputs, groups, rows, seed, bias):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (outputs, groups * GROUP), generator=generator, dtype=torch.uint8)
    scale = torch.rand(outputs, groups, generator=generator).bfloat16().float()
    packed = PyTorchInt8Groups(Levels(codes, scale, -128 * scale, 8))
    want = (codes.float() - 128).view(outputs, groups, GROUP) * scale[:, :, None]
    # Both halves and their sum are rounded to bfloat16.
    bound = 2**-8 * (2 * want.abs() + 15 * scale[:, :, None])
    assert ((packed.dense().float() - want.flatten(1)).abs() <= bound.flatten(1)).all()
    x = torch.randn(rows, groups * GROUP, generator=generator).bfloat16()
    b = torch.randn(outputs, generator=generator).bfloat16() if bias else None
    got = packed.linear(x, b).double()
    product = x.double() @ want.flatten(1).double().T + (0 if b is None else b.double())
    size = x.double().abs() @ (want.abs() + 15 * scale[:, :, None]).flatten(1).double().T + 1
    assert ((got - product).abs() <= 3 * 2**-8 * size).all()


def test_levels_of_different_bits_do_not_stack():
    four = Levels(torch.zeros(2, 32, dtype=torch.uint8), torch.ones(2, 1), torch.ones(2, 1), 4)
    assert Levels.stack([four, four]).shape == (4, 32)
    with pytest.raises(RuntimeError, match="4 and of 8"):
        Levels.stack([four, dataclasses.replace(four, bits=8)])


def test_on_other_devices_the_error_says_what_is_missing(monkeypatch):
    cuda = torch.device("cuda")
    with pytest.raises(gptk.DeviceError, match="need the device cpu or cuda, not mps"):
        check_device("int8", torch.device("mps"))
    with pytest.raises(gptk.DeviceError, match="needs the device cpu; on cuda it can be int8 or"):
        check_device("stored", cuda)
    monkeypatch.setattr("gptk.model.torchao.is_installed", lambda: False)
    with pytest.raises(
        gptk.DeviceError, match=r"needs torchao; install it: pip .*gptk-decoding\[torchao\]"
    ):
        check_device("int4", cuda)
    monkeypatch.setattr("gptk.model.torchao.is_installed", lambda: True)
    check_device("int4", cuda)


def test_torchaos_int8_is_near_gptks_own():
    pytest.importorskip("torchao", reason="torchao is not installed")
    torch.manual_seed(0)
    weight, bias = torch.randn(96, 64), torch.randn(96).bfloat16()
    theirs, ours = TorchAO(weight, "int8"), PyTorchInt8(weight)
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((theirs.dense().float() - weight).abs() <= 0.6 * step + 2**-7 * weight.abs()).all()
    assert theirs.kind == ours.kind
    assert 96 * 64 <= theirs.nbytes <= 96 * 64 + 8 * 96
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(5, 1, 64).bfloat16().to(dtype)
        got, want = theirs.linear(x, bias), ours.linear(x, bias)
        assert got.dtype == dtype
        assert got.shape == want.shape
        assert (got - want).norm() < 0.02 * want.norm()
    ids = torch.tensor([[1, 2, 3, 250]])
    model, same = tiny_gpt(GPT2_LIKE).bfloat16(), tiny_gpt(GPT2_LIKE).bfloat16().quantize("int8")
    for layer in model.modules():
        if isinstance(layer, Linear):
            layer.use_packed(TorchAO(layer.weight, "int8"))
    with torch.inference_mode():
        got, want = model.logits(model(ids)), same.logits(same(ids))
    assert (got - want).norm() < 0.03 * want.norm()


@PRECISIONS
def test_a_model_on_cuda_is_quantized_by_torchao(precision):
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    pytest.importorskip("torchao", reason="torchao is not installed")
    ids = torch.tensor([[1, 2, 3, 250]])
    plain = tiny_gpt(GPT2_LIKE)
    model = tiny_gpt(GPT2_LIKE).bfloat16().to("cuda").quantize(precision)
    sizes = model.bytes_by_kind()
    assert set(sizes) == {"bfloat16", precision}
    rounded = plain.state_dict() | {
        name: tensor.cpu() for name, tensor in model.state_dict().items()
    }
    head = rounded.pop("head.weight").float()
    plain.load_state_dict(rounded, strict=False)
    with torch.inference_mode():
        got = model.logits(model(ids.cuda())).cpu()
        want = plain(ids) @ head.T
    assert (got - want).norm() < 0.03 * want.norm()
    lm = gptk.LanguageModel(model.pack())
    assert len(lm.generate([1, 2, 3], max_new_tokens=5).tokens) == 5


@pytest.fixture(scope="module")
def losses():
    """SmolLM2's loss on 2,000 tokens of English, by precision."""
    text = pydoc_data.topics.topics["with"] + pydoc_data.topics.topics["compound"]
    found = {}
    for name, options in {
        "float32": {"dtype": "float32"},
        "bfloat16": {"dtype": "bfloat16"},
        "stored": {"quantize": "stored"},
        "int8": {"quantize": "int8"},
        "int4": {"quantize": "int4"},
    }.items():
        lm = gptk.load("smollm2", device="cpu", **options)
        ids = lm.encode(text)[:2000]
        assert len(ids) == 2000
        score = lm.score(ids)
        found[name] = -math.fsum(score.token_logprobs) / len(score.token_logprobs)
    return found


@pytest.mark.slow
def test_stored_weights_keep_the_loss(losses):
    assert losses["stored"] == pytest.approx(losses["float32"], rel=0.005)


@pytest.mark.slow
def test_int8_loses_next_to_nothing(losses):
    assert losses["int8"] == pytest.approx(losses["bfloat16"], rel=0.005)


@pytest.mark.slow
def test_int4_loses_little(losses):
    assert losses["int4"] < 1.08 * losses["bfloat16"]


@pytest.mark.parametrize("case", ["gpt2", "qwen2-untied"])
@pytest.mark.parametrize("kind", ["F32", "Q4_1", "Q8_0"])
def test_info_tells_what_is_in_the_file_and_what_would_be_loaded(case, kind, tmp_path):
    path = str(tmp_path / "model.gguf")
    checkpoints.write_gguf(Path(path), checkpoints.random_model(case), kind)
    out = run_gptk("info", path).stdout
    assert f"MiB {kind}" in next(line for line in out.splitlines() if line.startswith("in the"))
    assert ("--quantize stored" in out) is (kind != "F32")
    checkpoint = gptk.load_checkpoint(path, stored=True)
    kept = {name: m.bits for name, m in checkpoint.state.items() if isinstance(m, gptk.Levels)}
    for options, bits in (
        ({"dtype": "float32"}, {}),
        ({"dtype": "bfloat16"}, {}),
        ({"quantize": "int8"}, {}),
        ({"quantize": "int4"}, {}),
        ({"quantize": "stored"}, kept),
    ):
        model = gptk.load(path, device="cpu", tokenizer="bytes", **options).model
        (precision,) = options.values()
        precision = "bfloat16" if precision == "stored" else precision
        assert bytes_in_memory(checkpoint, precision, bits) == model.bytes_by_kind(), options


def test_the_command_takes_a_precision(tmp_path):
    gptk.LanguageModel(tiny_gpt(), gptk.load_tokenizer("bytes")).save(tmp_path / "model")
    common = ["generate", "abc", "--model", tmp_path / "model", "--max-new-tokens", "3"]
    out = run_gptk(*common, "--quantize", "int4")
    assert out.returncode == 0, out.stderr
    assert "int3" in failing(*common, "--quantize", "int3", code=2)
    with pytest.raises(
        gptk.OptionError, match="quantize is 'int3'; it must be int8, int4 or stored"
    ):
        gptk.load(str(tmp_path / "model"), quantize="int3")
