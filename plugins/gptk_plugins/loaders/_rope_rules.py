"""Rules by which rotary frequencies are changed, for contexts longer than those of the training.

The numbers are what transformers 5 computes, from the same fields.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field

import gptk
from gptk.plugins import Fields, shown
from gptk_plugins.loaders._heads import check_head_dim


@dataclass(frozen=True)
class Rope:
    """Rotary positions of a model."""

    theta: float
    """The base of the frequencies."""
    rotary_dim: int
    """How many numbers of a head are rotated."""
    factors: tuple[float, ...] | None = None
    """Divisors of the frequencies."""
    scale: float = 1.0
    """What cosines and sines are multiplied by."""
    context: int | None = None
    """Up to which length the rule is this one."""


class _Linear(Fields):
    factor: float = Field(gt=0)


class _Llama3(Fields):
    factor: float = Field(gt=0)
    low_freq_factor: float = Field(gt=0)
    high_freq_factor: float = Field(gt=0)
    original_max_position_embeddings: int = Field(ge=1, le=2**31 - 1)


class _Yarn(Fields):
    factor: float = Field(ge=1)
    original_max_position_embeddings: int = Field(ge=1, le=2**31 - 1)
    attention_factor: float | None = Field(None, gt=0)
    beta_fast: float | None = Field(None, gt=0)
    beta_slow: float | None = Field(None, gt=0)
    mscale: float | None = Field(None, ge=0)
    mscale_all_dim: float | None = Field(None, ge=0)
    truncate: bool = True


class _LongRope(Fields):
    short_factor: list[float]
    long_factor: list[float]
    factor: float | None = Field(None, ge=1)
    original_max_position_embeddings: int = Field(ge=2, le=2**31 - 1)
    attention_factor: float | None = Field(None, gt=0)


RULES = ("default", "linear", "llama3", "yarn", "longrope")


def rope_by_rule(
    kind: str, given: Mapping[str, Any], where: str, theta: float, rotary_dim: int, context: int
) -> Rope:
    """The rotary positions of a rule.

    given: its fields, named as in `rope_parameters` of transformers. context: the model's.
    Raises SourceError for another rule, and for fields that do not fit it.
    """
    if kind == "default":
        return Rope(theta, rotary_dim)
    if kind not in RULES:
        raise gptk.SourceError(
            f"{where}: rope_type is {shown(kind)}; {', '.join(RULES[:-1])} and {RULES[-1]} are "
            "supported"
        )
    check_head_dim(rotary_dim)
    if kind == "linear":
        factor = _Linear.parse(given, where).factor
        return Rope(theta, rotary_dim, (factor,) * (rotary_dim // 2))
    if kind == "llama3":
        rule = _Llama3.parse(given, where)
        return Rope(theta, rotary_dim, _llama3_divisors(rule, theta, rotary_dim))
    if kind == "yarn":
        return _yarn(_Yarn.parse(given, where), theta, rotary_dim)
    return _longrope(_LongRope.parse(given, where), where, theta, rotary_dim, context)


def _llama3_divisors(rule: _Llama3, theta: float, rotary_dim: int) -> tuple[float, ...]:
    """Llama 3.1's rule: frequencies whose wavelength is long relative to the original context are
    divided by factor, short ones are kept, with a linear transition in original / wavelength."""
    low, high = rule.low_freq_factor, rule.high_freq_factor
    if low >= high:
        raise gptk.SourceError(f"high_freq_factor, {high}, must be above low_freq_factor, {low}")
    divisors = []
    for pair in range(rotary_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * pair / rotary_dim)
        position = rule.original_max_position_embeddings / wavelength
        kept = min(1.0, max(0.0, (position - low) / (high - low)))
        divisors.append(1 / (kept + (1 - kept) / rule.factor))
    return tuple(divisors)


def _yarn(rule: _Yarn, theta: float, rotary_dim: int) -> Rope:
    """YaRN (Peng et al. 2023): as Llama 3.1's rule, but with the transition linear in the number of
    the frequency, between those that turn beta_fast and beta_slow times in the original context."""
    original = rule.original_max_position_embeddings
    if theta == 1:
        raise gptk.SourceError("rope_theta is 1, for which yarn has no frequencies")
    turns = [rule.beta_fast or 32, rule.beta_slow or 1]
    low, high = (
        rotary_dim * math.log(original / (turn * 2 * math.pi)) / (2 * math.log(theta))
        for turn in turns
    )
    if rule.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    high += 0.001 if low == high else 0
    divisors = []
    for pair in range(rotary_dim // 2):
        kept = 1 - min(1.0, max(0.0, (pair - low) / (high - low)))
        divisors.append(1 / (kept + (1 - kept) / rule.factor))
    scale = rule.attention_factor
    if scale is None and rule.mscale and rule.mscale_all_dim:
        scale = yarn_scale(rule.factor, rule.mscale) / yarn_scale(rule.factor, rule.mscale_all_dim)
    return Rope(theta, rotary_dim, tuple(divisors), scale or yarn_scale(rule.factor))


def yarn_scale(factor: float, weight: float = 1.0) -> float:
    """YaRN's attention factor."""
    return 0.1 * weight * math.log(factor) + 1.0


def _longrope(rule: _LongRope, where: str, theta: float, rotary_dim: int, context: int) -> Rope:
    """LongRoPE (Ding et al. 2024) has other factors once a text is longer than the original
    context, for all its tokens. Here a text may be as long as that."""
    original = rule.original_max_position_embeddings
    for name in ("short_factor", "long_factor"):
        count = len(getattr(rule, name))
        if count != rotary_dim // 2:
            raise gptk.SourceError(f"{where}: {name} has {count} factors, not {rotary_dim // 2}")
    factor = rule.factor or context / original
    scale = rule.attention_factor
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return Rope(theta, rotary_dim, tuple(rule.short_factor), scale, original)
