"""How much memory the keys and values of all models may take: what the user has set.

It is an amount of bytes, or a share of what is free when the first of it is taken. PyTorch is not
imported, so that the program can check its option at once.
"""

import os
import re
from dataclasses import dataclass

from gptk.errors import OptionError, shown


@dataclass(frozen=True)
class Amount:
    """Of memory. amount: bytes, or with is_share a share of what is free."""

    amount: float
    is_share: bool = False

    def bytes_of(self, free: float) -> int:
        """How many bytes it is where so many are free."""
        return int(self.amount * free if self.is_share else self.amount)


def set_kv_memory(limit: int | str | None) -> None:
    """Set how much memory the keys and values of all models together may take, on each device.

    limit: bytes, a text such as `"2GB"` or `"1500MiB"`, or a share of the memory that is free when
    the first of it is taken, such as `"50%"`. None: what `$GPTK_KV_MEMORY` says, else 25 %. It
    holds from the next pass of a model on, for the whole process. Where it does not suffice, the
    newest texts wait; one that needs more alone gets more.

    Raises OptionError for anything else.
    """
    global _set
    _set = None if limit is None else read_amount(limit)


def kv_memory() -> Amount:
    """What is set now. Raises OptionError if the environment variable is wrong."""
    if _set is not None:
        return _set
    said = os.environ.get(VARIABLE)
    return _DEFAULT if not said else read_amount(said, f"${VARIABLE}")


def read_amount(given: int | str, what: str = "memory for keys and values") -> Amount:
    """An amount of memory as the user gives it. what: names it in an error.

    >>> read_amount("1.5 GB"), read_amount(4096), read_amount("50%")
    (Amount(amount=1500000000.0, is_share=False), Amount(amount=4096, is_share=False), \
Amount(amount=0.5, is_share=True))
    """
    if isinstance(given, int) and not isinstance(given, bool) and 0 < given <= _MOST:
        return Amount(given)
    match = _AMOUNT.fullmatch(given) if isinstance(given, str) else None
    if match is not None:
        number, unit = float(match[1]), match[2].lower()
        if unit == "%" and 0 < number <= 100:
            return Amount(number / 100, is_share=True)
        if unit != "%" and 1 <= number * _UNITS[unit] <= _MOST:
            return Amount(number * _UNITS[unit])
    raise OptionError(
        f"{what}: {shown(given)} is no amount; give bytes (2GB, 1500MiB) or a share of the memory "
        "that is free, above 0% and up to 100%"
    )


VARIABLE = "GPTK_KV_MEMORY"
"""The environment variable."""
_DEFAULT = Amount(0.25, is_share=True)
_MOST = 2**60
_UNITS = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)},
}
_AMOUNT = re.compile(r"\s*([0-9]{1,19}(?:\.[0-9]{1,9})?)\s*(%|(?:[kmgt]i?)?b|)\s*", re.IGNORECASE)
_set: Amount | None = None
