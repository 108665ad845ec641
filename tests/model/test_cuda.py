"""What needs a CUDA device: skipped where there is none. `benchmarks/on_gpu.sh` runs these first.

The oracle is the same model on the CPU, in float32, unless a test says otherwise. tests/model/
test_graphs.py and tests/kernels/test_triton_attention.py test on CPUs what can be tested there.
"""

import dataclasses

import pytest
import torch

import blocks_by_address
import gptk
from gptk.kernels import gpu
from gptk.model import graphs, passes
from gptk.plugins.registry import provided
from gptk.testing import tiny_gpt
from toys import CONFIGS
from training_runs import SMALL

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = "cuda"
NEEDS_TRITON = pytest.mark.skipif(
    torch.cuda.is_available() and gpu.why_not_triton() is not None, reason="Triton does not run"
)
CLOSE = {"rtol": 1e-3, "atol": 1e-3}
SETTINGS = {"max_new_tokens": 24, "ignore_eos": True}


@pytest.fixture(autouse=True, scope="module")
def _exact_products():
    """Products of float32 matrices in float32, and not in TF32, as on the CPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def config(name, context_length=256):
    return dataclasses.replace(CONFIGS[name], context_length=context_length)


def models(name, context_length=256):
    """The same model on the CPU and on CUDA."""
    ours = tiny_gpt(config(name, context_length))
    return ours, tiny_gpt(config(name, context_length)).to(DEVICE).pack()


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_forward_pass_is_the_cpus(name):
    cpu, cuda = models(name)
    ids = torch.randint(0, 257, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        want, got = cpu.logits(cpu(ids)), cuda.logits(cuda(ids.to(DEVICE))).cpu()
    torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@NEEDS_TRITON
def test_attention_over_blocks_is_that_of_the_reference(dtype, few):
    """The oracle: attention in float64 over the same blocks."""
    from gptk.kernels.triton_attention import attend_blocks

    tiling, (d, heads, kv_heads) = gpu.tiling(dtype, few=few), (64, 9, 3)
    generator = torch.Generator().manual_seed(0)
    slabs = [torch.randn(2, 2, 4, kv_heads, 64, d, generator=generator).to(dtype) for _ in range(6)]
    on_gpu = [slab.to(DEVICE) for slab in slabs]
    tokens, most = [1, 1, 5, 70], tiling.tokens(3)
    tiles, tables, first = [], [], 0
    for count, past in zip(tokens, (0, 300, 63, 10), strict=True):
        table = [(7 * (len(tables) + i)) % 24 for i in range(-(-(past + count) // 64))]
        for start in range(0, count, most):
            size = min(most, count - start)
            tiles.append((first + start, size, past + start, len(tables)))
        first += count
        tables += table
    qkv = torch.randn(sum(tokens), heads + 2 * kv_heads, d, generator=generator).to(dtype)
    numbers = torch.tensor(tiles), torch.tensor(tables)

    def attend(function, slabs, device):
        addresses = torch.tensor([slab.data_ptr() for slab in slabs]).to(device)
        where = [x.to(device) for x in (qkv, *numbers)]
        return function(*where, addresses, slabs[0], 1, heads, tiling)

    want = attend(blocks_by_address.attend_blocks, slabs, "cpu")
    got = attend(attend_blocks, on_gpu, DEVICE).cpu()
    error = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(got, want, rtol=error, atol=error)
    for mine, other in zip(on_gpu, slabs, strict=True):
        assert torch.equal(mine.cpu(), other)  # what was stored


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("sampler", sorted(provided("sampler")))
def test_each_sampler_writes_the_cpus_text(name, sampler):
    item = provided("sampler")[sampler].item
    spec = f"{sampler}:{item.example}" if item.example else sampler
    cpu, cuda = models(name)
    for prompt in ([1, 2, 3], [5, 6, 7, 8, 9]):
        got, want = (
            gptk.LanguageModel(model).generate(prompt, sampler=spec, seed=3, **SETTINGS)
            for model in (cuda, cpu)
        )
        assert got.tokens == want.tokens
        assert got.token_logprobs == pytest.approx(want.token_logprobs, abs=1e-2)


def test_prompts_of_many_lengths_write_the_cpus_texts():
    cpu, cuda = models("llama-like", 1024)
    prompts = [[1 + i % 7, *range(2, 3 + 13 * i)] for i in range(1, 20)]
    got, want = (
        gptk.LanguageModel(model).generate_batch(prompts, **SETTINGS) for model in (cuda, cpu)
    )
    assert [each.tokens for each in got] == [each.tokens for each in want]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 9, 64, 120])
@NEEDS_TRITON
def test_a_graph_is_the_pass_itself(tokens, dtype, monkeypatch):
    """To the last bit: the same kernels with the same division of the work, but for padding, which
    the products of matrices may take into account."""
    model = tiny_gpt(config("llama-like")).to(DEVICE, dtype).pack()
    sampler = {"sampler": f"beam:{tokens}"} if tokens > 1 else {}
    settings = {"max_new_tokens": 12, "ignore_eos": True} | sampler
    with_graphs = gptk.LanguageModel(model).generate([1, 2, 3], **settings)
    known = graphs._graphs[model]._graphs
    assert (graphs.padded(tokens), ()) in known
    monkeypatch.setattr(passes, "graphs_of", lambda *arguments: None)
    without = gptk.LanguageModel(model).generate([1, 2, 3], **settings)
    error = 1e-3 if dtype == torch.float32 else 5e-2
    count = 1 if dtype == torch.bfloat16 and tokens > 1 else 12  # of equal beams any may win
    assert with_graphs.tokens[:count] == without.tokens[:count]
    assert with_graphs.token_logprobs[:count] == pytest.approx(
        without.token_logprobs[:count], abs=error
    )


@NEEDS_TRITON
def test_graphs_follow_the_model():
    cpu, cuda = models("llama-like")
    for scale in (1, 1.5, 0.5):
        for model in (cpu, cuda):
            weight = model.blocks[0].mlp.up.weight
            model.blocks[0].mlp.up.weight = torch.nn.Parameter(weight.detach() * scale)
        got, want = (
            gptk.LanguageModel(model).generate([1, 2, 3], **SETTINGS) for model in (cuda, cpu)
        )
        assert got.tokens == want.tokens
    cuda.blocks[0].mlp.register_forward_hook(lambda module, inputs, output: output * 3)
    cpu.blocks[0].mlp.register_forward_hook(lambda module, inputs, output: output * 3)
    got, want = (gptk.LanguageModel(model).generate([1, 2, 3], **SETTINGS) for model in (cuda, cpu))
    assert got.tokens == want.tokens


@NEEDS_TRITON
def test_graphs_share_their_memory():
    """Of 15 graphs each would have a few MiB of its own."""
    model = tiny_gpt(config("llama-like")).to(DEVICE).pack()
    lm = gptk.LanguageModel(model)
    lm.generate([1, 2, 3], **SETTINGS)
    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved()
    for width in range(8, 121, 8):
        lm.generate([1, 2, 3], sampler=f"beam:{width}", max_new_tokens=4, ignore_eos=True)
    assert torch.cuda.memory_reserved() - before < 200 << 20


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized_weights_are_near_the_plain_ones(precision):
    pytest.importorskip("torchao", reason="torchao is not installed")
    cpu, cuda = tiny_gpt(config("gpt2-like")), tiny_gpt(config("gpt2-like")).to(DEVICE)
    cuda = cuda.to(torch.bfloat16).quantize(precision).pack()
    assert set(cuda.bytes_by_kind()) == {"bfloat16", precision}
    ids = torch.tensor([[1, 2, 3, 250]])
    with torch.inference_mode():
        want, got = cpu.logits(cpu(ids)), cuda.logits(cuda(ids.to(DEVICE))).cpu()
    assert (got - want).norm() < {"int8": 0.05, "int4": 0.25}[precision] * want.norm()
    lm = gptk.LanguageModel(cuda)  # in a graph, too
    first, again = (lm.generate([1, 2, 3], **SETTINGS) for _ in range(2))
    assert first.tokens[:1] == again.tokens[:1]
    assert len(again.tokens) == 24


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_steps_lower_the_loss_as_on_the_cpu(dtype, tmp_path):
    losses = {}
    for device in ("cpu", DEVICE):
        settings = SMALL | {"device": device, "dtype": dtype, "lr": 3e-3}
        trainer = gptk.Trainer.start(gptk.TrainConfig(**settings), tmp_path / device)
        losses[device] = [trainer.step()["loss"] for _ in range(20)]
        trainer.close()
    assert losses[DEVICE][-1] < losses[DEVICE][0] - 0.5
    assert losses[DEVICE][0] == pytest.approx(losses["cpu"][0], abs=2e-2)


def test_a_model_is_saved_and_loaded(tmp_path):
    cuda = tiny_gpt(config("llama-like")).to(DEVICE)
    gptk.LanguageModel(cuda).save(tmp_path / "model")
    back = gptk.load(str(tmp_path / "model"), device=DEVICE, dtype="float32")
    assert back.model.device.type == DEVICE
    got, want = (
        lm.generate([1, 2, 3], **SETTINGS) for lm in (back, gptk.LanguageModel(cuda.pack()))
    )
    assert got.tokens == want.tokens
    assert gptk.load(str(tmp_path / "model"), device=DEVICE).model.dtype == torch.bfloat16
