"""What the contracts of weight files share."""

import torch
from torch import Tensor

import gptk
from gptk.testing._promises import check

SMALL = gptk.GPTConfig(
    vocab_size=40,
    context_length=24,
    width=16,
    n_layers=2,
    n_heads=2,
    n_kv_heads=2,
    head_dim=8,
    mlp_width=64,
)
"""A configuration like GPT-2's."""


def state_of(model: gptk.GPT) -> dict[str, Tensor]:
    """Copies of the model's tensors by name, without a tied head."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def check_same(got: gptk.GPT, want: gptk.GPT, whose: str) -> None:
    """Raises AssertionError unless two models have equal tensors and logits."""
    ours, theirs = state_of(got), state_of(want)
    check(ours.keys() == theirs.keys(), f"it has {sorted(ours)}, and {whose} {sorted(theirs)}")
    for name, tensor in theirs.items():
        check(torch.equal(ours[name], tensor), f"{name} has other values than {whose}")
    ids = torch.arange(12)[None] % want.config.vocab_size
    with torch.inference_mode():
        loaded, original = (model.logits(model(ids)) for model in (got, want))
    check(
        torch.allclose(loaded, original, rtol=1e-4, atol=1e-5),
        f"logits differ by up to {(loaded - original).abs().max():.3g}: the configuration differs",
    )
