"""The type of an option that is a temperature."""

from typing import Annotated

from pydantic import BeforeValidator

import gptk


def _refuse_zero(value: object) -> object:
    try:
        is_zero = isinstance(value, str | int | float) and float(value) == 0
    except (ValueError, OverflowError):  # pydantic says what is wrong with it
        is_zero = False
    if is_zero:
        raise gptk.OptionError(
            "temperature must be above 0; for the likeliest token at each step (other programs' "
            "temperature 0) take the sampler greedy"
        )
    return value


TemperatureOption = Annotated[float, BeforeValidator(_refuse_zero)]
"""A temperature; for 0, which other programs take for greedy search, the error says so."""
