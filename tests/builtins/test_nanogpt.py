"""nanoGPT's checkpoints, against transformers' GPT-2 with the same weights.

The loader was also compared with nanoGPT's own model on checkpoints that its train.py wrote.
"""

import contextlib
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import gptk
from gptk.weights.building import build_model
from gptk.weights.loading import load_checkpoint
from gptk_plugins.loaders.llms_from_scratch import LLMsFromScratch
from gptk_plugins.loaders.nanogpt import NanoGPT

ARGUMENTS = {
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 32,
    "block_size": 24,
    "bias": True,
    "vocab_size": 65,
    "dropout": 0.1,
}


def oracle(*, bias: bool = True, vocab_size: int = 65, activation: str = "gelu") -> nn.Module:
    """A random GPT-2 of transformers; for a model without biases they are zero."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=vocab_size,
        n_positions=24,
        n_embd=32,
        n_layer=2,
        n_head=4,
        activation_function=activation,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3 if bias else 0.0)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def nanogpt(model: nn.Module, *, bias: bool = True, prefix: str = "") -> dict[str, object]:
    """What nanoGPT's train.py saves: linear layers (out, in), and a head that is the embedding."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(".bias") and not bias:
            continue
        conv1d = ".c_" in name and tensor.dim() == 2
        state[prefix + name] = tensor.T.contiguous() if conv1d else tensor
    state[f"{prefix}lm_head.weight"] = state[f"{prefix}transformer.wte.weight"]
    parameters = list(state.values())
    vocab_size = model.config.vocab_size
    return {
        "model": state,
        "optimizer": {
            "state": {i: {"step": torch.tensor(5.0), "exp_avg": torch.zeros_like(p)}
                      for i, p in enumerate(parameters)},
            "param_groups": [{"lr": 6e-4, "betas": (0.9, 0.95), "params": [0, 1]}],
        },
        "model_args": ARGUMENTS | {"bias": bias, "vocab_size": vocab_size},
        "iter_num": 5,
        "best_val_loss": torch.tensor(4.2),
        "config": {"dataset": "shakespeare_char", "bias": bias, "compile": True},
    }  # fmt: skip


@torch.inference_mode()
def furthest(path: Path, model: nn.Module, **options: str) -> float:
    checkpoint = NanoGPT(path=str(path), **options).load()
    ours = build_model(checkpoint, "cpu", torch.float32)
    ids = torch.randint(0, 65, (2, 24), generator=torch.Generator().manual_seed(1))
    expected = model(ids).logits
    assert expected.std() > 0.5
    return float((ours.logits(ours(ids)) - expected).abs().max())


def refusal(path: Path) -> str:
    with pytest.raises(gptk.SourceError) as caught:
        gptk.build_model(NanoGPT(path=str(path)).load(), "cpu", torch.float32)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
def test_nanogpts_model_predicts_what_gpt2_with_its_gelu_predicts(bias, prefix, tmp_path):
    model = oracle(bias=bias)
    torch.save(nanogpt(model, bias=bias, prefix=prefix), tmp_path / "ckpt.pt")
    assert furthest(tmp_path / "ckpt.pt", model) < 1e-5
    checkpoint = load_checkpoint(str(tmp_path / "ckpt.pt"))
    assert checkpoint.notes == {"format": "nanoGPT", "stored as": "float32"}
    assert checkpoint.config.tied_head
    assert checkpoint.config.norm_bias is bias
    assert checkpoint.tokenizer is None


def test_old_checkpoints_had_the_other_gelu(tmp_path):
    model = oracle(activation="gelu_new")
    found = nanogpt(model)
    del found["model_args"]["bias"]  # from before nanoGPT had the option
    torch.save(found, tmp_path / "ckpt.pt")
    assert furthest(tmp_path / "ckpt.pt", model, gelu="tanh") < 1e-5
    assert furthest(tmp_path / "ckpt.pt", model) > 1e-5


def test_tensors_may_have_any_strides(tmp_path):
    """As torch.save keeps them, such as those of one row, repeated."""
    model = oracle()
    found = nanogpt(model)
    for name in [name for name in found["model"] if name.endswith(("c_fc.weight", "wte.weight"))]:
        row = torch.randn(found["model"][name].shape[1])
        found["model"][name] = row.expand_as(found["model"][name])
    torch.save(found, tmp_path / "ckpt.pt")
    built = gptk.build_model(load_checkpoint(str(tmp_path / "ckpt.pt")), "cpu", torch.float32)
    ids = torch.tensor([[1, 2, 3]])
    assert built.logits(built(ids)).isfinite().all()
    assert all(parameter.is_contiguous() for parameter in built.parameters())


def test_stored_masks_are_dropped_and_a_head_of_its_own_counts(tmp_path):
    model = oracle()
    found = nanogpt(model)
    for layer in range(2):
        mask = torch.ones(1, 1, 24, 24).tril()
        found["model"][f"transformer.h.{layer}.attn.bias"] = mask
    head = torch.randn(65, 32)
    found["model"]["lm_head.weight"] = head
    torch.save(found, tmp_path / "ckpt.pt")
    model.lm_head.weight = nn.Parameter(head)
    assert furthest(tmp_path / "ckpt.pt", model) < 1e-5


@pytest.mark.parametrize("vocab_size", [50257, 50304])
def test_gpt2s_vocabulary_padded_or_not_has_gpt2s_tokenizer(vocab_size, tmp_path):
    torch.save(nanogpt(oracle(vocab_size=vocab_size)), tmp_path / "ckpt.pt")
    checkpoint = load_checkpoint(str(tmp_path / "ckpt.pt"))
    assert checkpoint.config.vocab_size == vocab_size
    assert checkpoint.tokenizer().encode("Hello world") == [15496, 995]


def test_only_nanogpts_files_match(tmp_path):
    for name in ("ckpt.pt", "ckpt.bin"):
        torch.save(nanogpt(oracle()), tmp_path / name)
    torch.save({"model": {}, "model_args": {}}, tmp_path / "other.pt")
    assert NanoGPT.matches(str(tmp_path / "ckpt.pt"))
    assert not LLMsFromScratch.matches(str(tmp_path / "ckpt.pt"))
    for name in ("ckpt.bin", "other.pt", "missing.pt"):
        assert not NanoGPT.matches(str(tmp_path / name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 5}, "a width of 32 does not divide into 5 heads"),
        ({"n_head": 0}, "model_args: n_head is 0; it must be 1 or more"),
        ({"n_embd": "32"}, "model_args: n_embd is '32'; it must be a whole number"),
        ({"block_size": None}, "model_args: block_size is None"),
        ({"n_layer": 3}, "the tensor transformer.h.2.ln_1.weight is missing"),
        ({"n_layer": 1}, "nothing in the model uses the tensors transformer.h.1.attn.c_attn.bias"),
        ({"vocab_size": 64}, "transformer.wte.weight of shape (65, 32) does not make embed.weight"),
        ({"bias": False}, "nothing in the model uses the tensors transformer.h.0.attn.c_attn.bias"),
    ],
)
def test_model_args_that_do_not_fit_are_named(changes, message, tmp_path):
    found = nanogpt(oracle())
    found["model_args"] |= changes
    torch.save(found, tmp_path / "ckpt.pt")
    assert message in refusal(tmp_path / "ckpt.pt")
    (name,) = changes
    del found["model_args"][name]
    torch.save(found, tmp_path / "ckpt.pt")
    if name != "bias":
        assert f"model_args has no {name}" in refusal(tmp_path / "ckpt.pt")


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "sprung"))


def test_files_that_are_something_else_are_refused_and_nothing_is_run(tmp_path):
    path = tmp_path / "ckpt.pt"
    assert "there is no such file" in refusal(path)
    torch.save(oracle().state_dict(), path)
    assert "is not nanoGPT's ckpt.pt: it has no model and model_args" in refusal(path)
    torch.save([1], path)
    assert "holds a list" in refusal(path)
    torch.save(nanogpt(oracle()) | {"config": Trap(tmp_path / "sprung")}, path)
    assert "nothing in it was run" in refusal(path)
    path.write_bytes(pickle.dumps({"stoi": {}, "itos": {}, "vocab_size": 65}, protocol=2))
    assert "\n" not in refusal(path)
    assert not (tmp_path / "sprung").exists()


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_checkpoint_is_read_or_refused(data, whole_checkpoint, tmp_path):
    whole = whole_checkpoint
    end = data.draw(st.integers(0, len(whole)))
    position = data.draw(st.integers(0, len(whole) - 1))
    path = tmp_path / "ckpt.pt"
    damaged = bytearray(whole)
    damaged[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(damaged[:end] if data.draw(st.booleans()) else damaged)
    with contextlib.suppress(gptk.SourceError):
        NanoGPT(path=str(path)).load()


@pytest.fixture(scope="module")
def whole_checkpoint(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "ckpt.pt"
    torch.save(nanogpt(oracle()), path)
    return path.read_bytes()
