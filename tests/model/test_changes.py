"""A packed model follows whatever changes its weights, or refuses the change."""

import copy
import io

import pytest
import torch

from gptk import kernels
from gptk.model.linear import OneDNNPacked
from gptk.testing import tiny_gpt
from toys import CONFIGS

CONFIG = CONFIGS["llama-like"]
IDS = torch.tensor([[1, 2, 3]])


def other():
    return tiny_gpt(CONFIG, seed=5)


@torch.no_grad()
def logits(model):
    return model.logits(model(IDS))


def call_functionally(model):
    """torch.func.functional_call writes into the dictionaries of the modules."""
    with torch.no_grad():
        parameters = dict(other().named_parameters())
        return model.logits(torch.func.functional_call(model, parameters, (IDS,)))


def register_again(model):
    layer = model.blocks[0].mlp.up
    del layer.weight
    layer.register_parameter("weight", other().blocks[0].mlp.up.weight)


def write_into_the_dictionary(model):
    model.blocks[0].mlp.up._parameters["weight"] = other().blocks[0].mlp.up.weight


def convert_to_new_parameters(model):
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.to(torch.float64).to(torch.float32)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)


def empty_and_load(model):
    model.to("meta").to_empty(device="cpu")
    model._rope = torch.empty(1, 2, 0, CONFIG.head_dim)
    model.load_state_dict(other().state_dict())


def normalize_weights(model):
    model.unpack()  # PyTorch refuses it for a layer without a parameter
    layer = torch.nn.utils.parametrizations.weight_norm(model.blocks[0].mlp.up)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(3)


CHANGES = [
    call_functionally,
    register_again,
    write_into_the_dictionary,
    convert_to_new_parameters,
    empty_and_load,
    normalize_weights,
    lambda model: model.load_state_dict(other().state_dict()),
    lambda model: model.load_state_dict(other().state_dict(), strict=False),
    lambda model: model.load_state_dict(other().state_dict(), assign=True),
    lambda model: model.blocks.__delitem__(1),
    lambda model: model.to(torch.bfloat16).to(torch.float32),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("copied", [False, True])
def test_a_packed_model_follows_every_change(change, copied):
    """The oracle is a model that was not packed."""
    plain, model = tiny_gpt(CONFIG), tiny_gpt(CONFIG).pack()
    if copied:
        model = copy.deepcopy(model)
    want = change(plain) if change is call_functionally else (change(plain), logits(plain))[1]
    got = change(model) if change is call_functionally else (change(model), logits(model))[1]
    assert torch.equal(got, want)


def test_a_copy_of_a_packed_model_has_weights_of_its_own():
    model = tiny_gpt(CONFIG).pack()
    before = logits(model)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for twin in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        write_into_the_dictionary(twin)
        assert not torch.equal(logits(twin), before)
        assert torch.equal(logits(model), before)


def test_unpacked_modules_have_their_parameters_in_one_place():
    model = tiny_gpt(CONFIG).pack()
    model.unpack()
    for module in model.modules():
        assert type(module._parameters) is type(module._modules) is dict
        assert not {*module._parameters, *module._modules} & set(vars(module))


@pytest.mark.parametrize("options", [{}, {"strict": False}, {"assign": True}])
def test_quantized_layers_become_those_that_are_loaded(options):
    model = tiny_gpt(CONFIG).quantize("int8").pack()
    model.load_state_dict(other().state_dict(), **options)
    assert torch.equal(logits(model), logits(other()))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.load_state_dict(other().state_dict()),
        lambda model: model.load_state_dict(other().state_dict(), strict=False),
        lambda model: model.to(torch.float32),
        copy.deepcopy,
    ],
)
def test_weights_that_are_packed_for_onednn_follow(change, monkeypatch):
    """They are a layout of the same numbers; without gptk's kernels every bfloat16 model has it."""
    monkeypatch.setattr(kernels.checks, "enabled", False)
    plain, model = (tiny_gpt(CONFIG).to(torch.bfloat16) for _ in range(2))
    model.pack()
    if not isinstance(model.head.packed, OneDNNPacked):
        pytest.skip("oneDNN is not there")
    change(plain)
    change(model)
    torch.testing.assert_close(logits(model), logits(plain), rtol=2**-5, atol=2**-5)
