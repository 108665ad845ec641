"""What a model is compared with, and what cannot be recorded of it."""

import pytest
import torch

from gptk.model.attributes import find_by_getattr, find_directly
from gptk.model.captured import Snapshot, why_not_capturable
from gptk.testing import tiny_gpt
from toys import CONFIGS


def load_by_assigning(model, other):
    model.load_state_dict(other.state_dict(), assign=True)
    model.tie()


def replace_parameters(model, other):
    for ours, theirs in zip(model.modules(), other.modules(), strict=True):
        for name, parameter in theirs.named_parameters(recurse=False):
            setattr(ours, name, torch.nn.Parameter(parameter.detach().clone()))
    model.tie()


def replace_data(model, other):
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        ours.data = theirs.detach().clone()


def replace_layers(model, other):
    model.blocks[1] = other.blocks[1]
    model.embed, model.head, model.norm = other.embed, other.head, other.norm
    model.blocks[0].mlp = other.blocks[0].mlp
    model.blocks[0].attn.qkv = other.blocks[0].attn.qkv
    model.blocks[0].attn.out = other.blocks[0].attn.out
    model.blocks[0].attn_norm, model.blocks[0].mlp_norm = (
        other.blocks[0].attn_norm,
        other.blocks[0].mlp_norm,
    )
    assert len(model.blocks) == 2


CHANGES = [load_by_assigning, replace_parameters, replace_data, replace_layers]


class Lora(torch.nn.Module):
    """An update of low rank."""

    def forward(self, weight):
        return weight + 0.5 * weight.roll(1, dims=0)


def parametrize(model):
    for block in model.blocks:
        torch.nn.utils.parametrize.register_parametrization(block.mlp.up, "weight", Lora())


class Scaled(torch.nn.Module):
    """A layer around another one, as adapters have it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) * 3


def wrap(model):
    model.blocks[0].mlp.down = Scaled(model.blocks[0].mlp.down)


def hook(model):
    model.blocks[0].mlp.register_forward_hook(lambda module, inputs, output: output * 3)


def hook_before(model):
    model.blocks[0].mlp.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 3,))


def replace_forward(model):
    model.blocks[0].mlp.forward = lambda x: x * 3


STRANGERS = [parametrize, wrap, hook, hook_before, replace_forward]
CONVERSIONS = {
    "int8": lambda model: model.quantize("int8"),
    "packed": lambda model: model.pack(),
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "a part in bfloat16": lambda model: model.blocks[0].mlp.to(torch.bfloat16),
}


@pytest.fixture
def model():
    return tiny_gpt(CONFIGS["llama-like"])


@pytest.mark.parametrize("change", CHANGES)
def test_weights_and_layers_that_are_replaced_are_noticed(change, model):
    snapshot = Snapshot(model)
    assert snapshot.is_current()
    change(model, tiny_gpt(CONFIGS["llama-like"], seed=5))
    assert not snapshot.is_current()
    assert why_not_capturable(model) is None
    assert Snapshot(model).is_current()


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_conversions_are_noticed(conversion, model):
    snapshot = Snapshot(model)
    CONVERSIONS[conversion](model)
    assert not snapshot.is_current()
    assert why_not_capturable(model) is None


@pytest.mark.parametrize("change", STRANGERS)
def test_what_would_not_be_repeated_is_noticed_and_refused(change, model):
    snapshot = Snapshot(model)
    change(model)
    assert not snapshot.is_current()
    assert "blocks.0.mlp" in why_not_capturable(model)


def test_values_written_into_weights_change_nothing(model):
    snapshot = Snapshot(model)
    model.load_state_dict(tiny_gpt(CONFIGS["llama-like"], seed=5).state_dict())
    assert snapshot.is_current()


@pytest.mark.parametrize("change", [find_directly, find_by_getattr])
def test_weights_that_are_replaced_after_packing_or_unpacking_are_noticed(change, model):
    """Both give modules other dictionaries, also where no weights are packed, as on a GPU."""
    other = {find_directly: find_by_getattr, find_by_getattr: find_directly}[change]
    for module in model.modules():
        other(module)
    snapshot = Snapshot(model)
    for module in model.modules():
        change(module)
    model.norm.weight = torch.nn.Parameter(torch.zeros(32))
    assert not snapshot.is_current()
