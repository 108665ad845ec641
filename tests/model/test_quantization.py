"""Quantized weights: what they round to, the products with them, and a real model's loss."""

import copy
import dataclasses
import itertools
import math
import pydoc_data.topics
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import checkpoints
import gptk
from gptk import kernels
from gptk.cli.info import bytes_in_memory
from gptk.model.captured import Snapshot
from gptk.model.levels import GROUP, Levels
from gptk.model.linear import Linear
from gptk.model.quantization import (
    KernelGroups,
    PyTorchInt4,
    PyTorchInt8,
    PyTorchInt8Groups,
    check_quantize,
    pack,
    quantized,
)
from gptk.model.rounding import to_four_bits
from gptk.model.segments import Segments
from gptk.model.torchao import TorchAO
from gptk.system.devices import DTYPES
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
    got = PACKED[kernel](weight).dense(torch.float32)
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    # Half a step, rounded up to float16, whose smallest numbers differ by 2⁻²⁴; and the rounding
    # errors of the scale and of the product in bfloat16, 2⁻⁸ each.
    step = 1.01 * step + 2**-24 * (kernel == "int8" and kernels.available())
    assert ((got - weight).abs() <= 0.5 * step + 2**-7 * weight.abs() + 1e-12).all()


@pytest.mark.parametrize("kernel", ["int4", "PyTorch's int4"])
@settings(max_examples=60)
@given(weight=weights())
def test_int4_rounds_to_the_nearest_of_its_groups_levels(kernel, weight):
    got = PACKED[kernel](weight).dense(torch.float32)
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
    weight=weights(), rows=st.sampled_from([1, 2, 5, 63, 64, 100, 256]), bias=st.booleans(),
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
    dense = packed.dense(torch.float64)
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
            assert torch.equal(got.packed.dense(torch.float32), want.packed.dense(torch.float32))


@PRECISIONS
def test_a_model_computes_with_the_rounded_weights(precision):
    model = tiny_gpt(GPT2_LIKE).bfloat16().quantize(precision)
    sizes = model.bytes_by_kind()
    assert set(sizes) == {"bfloat16", precision}
    ids = torch.tensor([[1, 2, 3, 250]])
    with torch.inference_mode():
        got = model.logits(model(ids))
    head = model.head.packed.dense(torch.float32)
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
    lm = gptk.load(path, device="cpu", dtype="bfloat16", tokenizer="bytes")
    sizes = lm.model.bytes_by_kind()
    assert {"Q4_0": "int4", "Q4_1": "int4", "Q8_0": "int8"}[kind] in sizes
    dequantized = gptk.load(path, device="cpu", quantize="none", tokenizer="bytes").model
    for name, module in lm.model.named_modules():
        if isinstance(module, Linear):
            want = dequantized.get_submodule(name).weight
            got = module.packed.dense(torch.float32)
            # Rounded to bfloat16 are the scale, its product with a code (or with the high half of
            # one), and the number: 2⁻⁸ each.
            assert (got - want).abs().max() <= 3 * 2**-8 * want.abs().max(), name
    ids = checkpoints.random_ids()
    with torch.inference_mode():
        got, want = lm.model.logits(lm.model(ids)), dequantized.logits(dequantized(ids))
    assert (got - want).norm() < 0.03 * want.norm()


@KEPT
@pytest.mark.parametrize("case", ["gpt2", "llama", "qwen2-untied"])
def test_by_default_it_computes_as_the_dequantized_model(case, kind, tmp_path):
    """As exactly as float32 does, in a pass over few tokens and over many: with the kernels, from
    the matrices as they are stored; without, from dequantized ones."""
    path = str(tmp_path / "model.gguf")
    checkpoints.write_gguf(Path(path), checkpoints.random_model(case), kind)
    kept, dequantized = (
        gptk.load(path, device="cpu", tokenizer="bytes", **options).model
        for options in ({}, {"quantize": "none"})
    )
    assert (set(kept.bytes_by_kind()) != {"float32"}) is kernels.available()
    ids = checkpoints.random_ids()
    with torch.inference_mode():
        for batch in (ids[:1, :1], ids, ids.repeat(4, 1)):
            got, want = (model.logits(model(batch)) for model in (kept, dequantized))
            assert (got - want).norm() < 3e-6 * want.norm()


def test_without_kernels_matrices_are_expanded_unless_activations_are_rounded(
    tmp_path, monkeypatch
):
    path = str(tmp_path / "model.gguf")
    checkpoints.write_gguf(Path(path), checkpoints.random_model("llama"), "Q4_1")
    monkeypatch.setattr(kernels.checks, "enabled", False)
    plain = gptk.load(path, device="cpu", tokenizer="bytes").model
    assert set(plain.bytes_by_kind()) == {"float32"}
    if torch.backends.cpu.get_cpu_capability() in ("AVX512", "AVX2"):
        rounded = gptk.load(path, device="cpu", dtype="bfloat16", tokenizer="bytes").model
        assert "int4" in rounded.bytes_by_kind()


@pytest.fixture(scope="module")
def tied_gguf(tmp_path_factory):
    """A model with a tied head whose matrices are Q8_0, and whose rows differ in length."""
    path = tmp_path_factory.mktemp("tied") / "model.gguf"
    checkpoints.write_gguf(path, checkpoints.random_model("qwen2"), "Q8_0")
    return lambda **options: gptk.load(path, device="cpu", tokenizer="bytes", **options)


PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3], list(range(70))]


@pytest.mark.parametrize("sampler", ["greedy", "top-p:p=0.9", "beam:width=3"])
def test_the_tokens_are_those_of_the_expanded_model(sampler, tied_gguf):
    settings = {"sampler": sampler, "seed": 3, "max_new_tokens": 24}
    kept, dense = tied_gguf(), tied_gguf(quantize="none")
    for got, want in zip(
        kept.generate_batch(PROMPTS, **settings),
        dense.generate_batch(PROMPTS, **settings),
        strict=True,
    ):
        assert got.tokens == want.tokens
        assert got.token_logprobs == pytest.approx(want.token_logprobs, abs=1e-4)


LIGHTHOUSE = "The lighthouse keeper had not spoken to anyone for"


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["greedy", "top-p:p=0.9"])
def test_smollm2_gives_the_tokens_of_the_expanded_model(sampler):
    settings = {"sampler": sampler, "seed": 5, "max_new_tokens": 160, "ignore_eos": True}
    kept, dense = (gptk.load("smollm2", device="cpu", quantize=q) for q in ("auto", "none"))
    for prompt in (LIGHTHOUSE, "def f(x):", "Once upon a time"):
        got, want = (lm.generate(prompt, **settings) for lm in (kept, dense))
        assert got.tokens == want.tokens
        assert got.token_logprobs == pytest.approx(want.token_logprobs, abs=1e-4)


@ALL_KERNELS
@pytest.mark.parametrize("rows", [1, 5, 100])
def test_in_float32_products_are_as_exact_as_float32(kernel, rows):
    if kernel.startswith("PyTorch") or not kernels.available():
        pytest.skip("PyTorch's kernels round to bfloat16")
    torch.manual_seed(0)
    packed = PACKED[kernel](torch.randn(96, 256))
    x = torch.randn(rows, 256)
    x[:, ::32] *= 100  # one large number in each group
    dense = packed.dense(torch.float32).double()
    error = packed.linear(x, None).double() - x.double() @ dense.T
    # A number is rounded by at most 2⁻²² of its group's largest.
    largest = x.double().abs().view(rows, -1, GROUP).amax(2, keepdim=True).expand(-1, -1, GROUP)
    assert error.norm() < 2**-21 * (largest.flatten(1).square() @ dense.T.square()).sqrt().norm()


def test_embeddings_are_the_rows_of_the_matrix(tied_gguf):
    model = tied_gguf().model
    ids = torch.tensor([[0, 1, 17, 96], [16, 15, 3, 3]])
    want = tied_gguf(quantize="none").model.embed(ids)
    assert (model.embed.packed is None) is not kernels.available()
    torch.testing.assert_close(model.embed(ids), want, rtol=1e-6, atol=1e-7)
    many = torch.arange(97).repeat(8)[:700]
    torch.testing.assert_close(
        model.embed(many), tied_gguf(quantize="none").model.embed(many), rtol=1e-6, atol=1e-7
    )
    assert model.embed(torch.zeros(0, dtype=torch.long)).shape == (0, model.config.width)
    for beyond in (-1, 97):  # a block of the kernel's layout has 16 rows
        with pytest.raises(IndexError):
            model.embed(torch.tensor([beyond]))


class TestWhatNeedsDenseWeights:
    """Of a model as it is loaded by default; the oracle is the model that is loaded expanded."""

    ids = torch.tensor([[1, 2, 3, 96]])

    def logits(self, model):
        with torch.inference_mode():
            return model.logits(model(self.ids.to(model.device))).float()

    @pytest.fixture
    def kept(self, tied_gguf):
        return tied_gguf()

    @pytest.fixture
    def dense(self, tied_gguf):
        return tied_gguf(quantize="none").model

    def test_saving(self, kept, dense, tmp_path):
        kept.save(tmp_path / "saved")
        again = gptk.load(tmp_path / "saved", device="cpu").model
        for name, tensor in dense.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name

    def test_the_state_dict_and_loading_one(self, kept, dense):
        state = kept.model.state_dict()
        assert state.keys() == dense.state_dict().keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in dense.state_dict().items())
        kept.model.load_state_dict({name: 2 * tensor for name, tensor in state.items()})
        assert torch.equal(kept.model.blocks[0].mlp.up.weight, 2 * dense.blocks[0].mlp.up.weight)

    def test_unpacking(self, kept, dense):
        kept.model.unpack()
        assert kept.model.head.weight is kept.model.embed.weight
        assert torch.equal(self.logits(kept.model), self.logits(dense.unpack() or dense))

    def test_training(self, kept, dense):
        windows = gptk.Windows(np.arange(400) % 97, 16)
        config = gptk.TrainConfig(steps=1, batch_size=2, dtype="float32")
        records = [
            gptk.Trainer(model, windows, windows, config).step() for model in (kept.model, dense)
        ]
        assert records[0]["loss"] == records[1]["loss"]
        assert torch.equal(kept.model.embed.weight, dense.embed.weight)

    @PRECISIONS
    def test_rounding_to_another_precision(self, precision, kept, dense):
        kept.model.quantize(precision)
        dense.quantize(precision)
        assert precision in kept.model.bytes_by_kind()
        assert kept.model.head.packed.kind == precision
        # int8 as it is in the file, by groups, differs from int8 by output.
        got, want = self.logits(kept.model), self.logits(dense)
        assert (got - want).norm() < 0.03 * want.norm()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_another_dtype(self, dtype, kept, dense):
        kept.model.to(dtype)
        assert kept.model.dtype == dtype
        assert kept.model.state_dict()["embed.weight"].dtype == dtype
        got, want = self.logits(kept.model), self.logits(dense)
        assert (got - want).norm() < 0.03 * want.norm()
        kept.model.float()
        assert kept.model.head.state_dict()["weight"].dtype == torch.float32

    def test_another_device(self, kept, dense):
        kept.model.to("meta")
        assert kept.model.device.type == "meta"
        assert all(parameter.is_meta for parameter in kept.model.parameters())
        assert kept.model.head.weight is kept.model.embed.weight

    def test_gradients_of_what_comes_before(self, kept, dense):
        found = []
        for model in (kept.model, dense):
            hidden = torch.ones(3, model.config.width, requires_grad=True)
            model.head(model.blocks[0].mlp(hidden)).sum().backward()
            found.append(hidden.grad)
        torch.testing.assert_close(*found)

    def test_a_copy(self, kept, dense):
        again = copy.deepcopy(kept.model)
        assert torch.equal(self.logits(again), self.logits(kept.model))
        assert again.embed.packed is again.head.packed

    def test_strategies_that_read_layers(self, kept, tied_gguf):
        other = tied_gguf(quantize="none")
        for sampler in ("dola:layers=high", "contrastive"):
            got, want = (lm.generate(PROMPTS[1], sampler=sampler) for lm in (kept, other))
            assert got.tokens == want.tokens

    def test_converting(self, tied_gguf, tmp_path, dense):
        path = tmp_path / "model.gguf"
        checkpoints.write_gguf(path, checkpoints.random_model("qwen2"), "Q8_0")
        out = run_gptk(
            "convert", path, tmp_path / "hf", "--to", "huggingface", "--tokenizer", "none"
        )
        assert out.returncode == 0, out.stderr
        again = gptk.load(tmp_path / "hf", device="cpu").model
        assert torch.equal(self.logits(again), self.logits(dense))


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
    assert ((packed.dense(torch.float32) - want.flatten(1)).abs() <= bound.flatten(1)).all()
    x = torch.randn(rows, groups * GROUP, generator=generator).bfloat16()
    b = torch.randn(outputs, generator=generator).bfloat16() if bias else None
    got = packed.linear(x, b).double()
    product = x.double() @ want.flatten(1).double().T + (0 if b is None else b.double())
    size = x.double().abs() @ (want.abs() + 15 * scale[:, :, None]).flatten(1).double().T + 1
    assert ((got - product).abs() <= 3 * 2**-8 * size).all()


def test_levels_of_different_bits_are_kept_side_by_side():
    four = Levels(torch.zeros(2, 32, dtype=torch.uint8), torch.ones(2, 1), torch.ones(2, 1), 4)
    assert Levels.stack([four, four]).shape == (4, 32)
    both = Levels.stack([four, dataclasses.replace(four, bits=8)])
    assert [part.bits for part in both.segments] == [4, 8]
    assert torch.equal(both.dense(), torch.ones(4, 32))


def test_on_other_devices_the_error_says_what_is_missing(monkeypatch):
    cuda = torch.device("cuda")
    with pytest.raises(gptk.DeviceError, match="needs the device cpu or cuda, not mps"):
        check_quantize("int8", torch.device("mps"))
    monkeypatch.setattr("gptk.model.torchao.is_installed", lambda: False)
    with pytest.raises(gptk.DeviceError, match=r"needs torchao; install it: pip .*\[torchao\]"):
        check_quantize("int4", cuda)
    monkeypatch.setattr("gptk.model.torchao.is_installed", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))
    with pytest.raises(gptk.DeviceError, match=r"T4 has compute capability 7\.5.* needs 8\.0"):
        check_quantize("int4", cuda)
    check_quantize("int8", cuda)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    check_quantize("int4", cuda)
    for quantize in ("auto", "none"):
        check_quantize(quantize, torch.device("mps"))


@pytest.mark.slow  # `make test-slow` installs torchao
def test_torchaos_int8_is_near_gptks_own():
    pytest.importorskip("torchao", reason="torchao is not installed")
    torch.manual_seed(0)
    weight, bias = torch.randn(96, 64), torch.randn(96).bfloat16()
    theirs, ours = TorchAO(weight, "int8"), PyTorchInt8(weight)
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((theirs.dense(torch.float32) - weight).abs() <= 0.6 * step + 2**-7 * weight.abs()).all()
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
            layer.use_packed(TorchAO(layer.weight, "int8"), torch.bfloat16)
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
        "float32": {"quantize": "none"},
        "bfloat16": {"quantize": "none", "dtype": "bfloat16"},
        "kept": {},
        "kept, bfloat16": {"dtype": "bfloat16"},
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
def test_weights_that_are_kept_keep_the_loss(losses):
    assert losses["kept"] == pytest.approx(losses["float32"], rel=1e-5)
    assert losses["kept, bfloat16"] == pytest.approx(losses["float32"], rel=0.005)


@pytest.mark.slow
def test_int8_loses_next_to_nothing(losses):
    assert losses["int8"] == pytest.approx(losses["float32"], rel=0.005)


@pytest.mark.slow
def test_int4_loses_little(losses):
    assert losses["int4"] < 1.08 * losses["float32"]


@pytest.mark.parametrize("case", ["gpt2", "qwen2-untied"])
@pytest.mark.parametrize("kind", ["F32", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("by_pytorch", [False, True])
def test_info_tells_what_is_in_the_file_and_what_would_be_loaded(
    case, kind, by_pytorch, tmp_path, monkeypatch
):
    if by_pytorch:
        monkeypatch.setattr(kernels, "available", lambda: False)
    path = str(tmp_path / "model.gguf")
    checkpoints.write_gguf(Path(path), checkpoints.random_model(case), kind)
    out = run_gptk("info", path).stdout
    assert f"MiB {kind}" in next(line for line in out.splitlines() if line.startswith("in the"))
    assert ("--quantize none" in out) is (kind != "F32")
    checkpoint = gptk.load_checkpoint(path, stored=True)
    stored = {
        name: Segments.of(matrix)
        for name, matrix in checkpoint.state.items()
        if isinstance(matrix, gptk.Levels)
    }
    for quantize, dtype in itertools.product(("auto", "none", "int8", "int4"), DTYPES):
        lm = gptk.load(path, device="cpu", tokenizer="bytes", quantize=quantize, dtype=dtype)
        told = bytes_in_memory(checkpoint.config, stored, quantize, DTYPES[dtype])
        assert told == lm.model.bytes_by_kind(), (quantize, dtype)


def test_the_command_takes_a_precision(tmp_path):
    gptk.LanguageModel(tiny_gpt(), gptk.load_tokenizer("bytes")).save(tmp_path / "model")
    common = ["generate", "abc", "--model", tmp_path / "model", "--max-new-tokens", "3"]
    out = run_gptk(*common, "--quantize", "int4")
    assert out.returncode == 0, out.stderr
    assert "int3" in failing(*common, "--quantize", "int3", code=2)
    with pytest.raises(
        gptk.OptionError, match="quantize is 'int3'; it must be auto, none, int8 or int4"
    ):
        gptk.load(str(tmp_path / "model"), quantize="int3")


@pytest.mark.skipif(not kernels.available(), reason="gptk's kernels do not run here")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_row_is_looked_up_as_among_others(bits, dtype):
    """A step of decoding looks up one row, by another way than several. Bit for bit."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (37, 96), generator=generator).to(torch.uint8)
    scale, offset = torch.randn(2, 37, 3, generator=generator).half().float()
    packed = KernelGroups(gptk.Levels(codes, scale, offset, bits))
    together = packed.rows(torch.arange(37), dtype)
    alone = [packed.rows(torch.tensor([row]), dtype) for row in range(37)]
    assert torch.equal(torch.cat(alone), together)
    for row in (-1, 37):
        with pytest.raises(IndexError):
            packed.rows(torch.tensor([row]), dtype)


@pytest.mark.slow  # `make test-slow` installs torchao
def test_a_snapshot_has_the_tensors_that_torchaos_consist_of():
    pytest.importorskip("torchao", reason="torchao is not installed")
    model = tiny_gpt(GPT2_LIKE).bfloat16()
    for layer in model.modules():
        if isinstance(layer, Linear):
            layer.use_packed(TorchAO(layer.weight, "int8"), torch.bfloat16)
    snapshot = Snapshot(model)
    assert torch.int8 in {tensor.dtype for tensor in snapshot.tensors}
    assert snapshot.is_current()
    packed = model.head.packed
    packed._weight.qdata = packed._weight.qdata.clone()
    assert not snapshot.is_current()
