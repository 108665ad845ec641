"""The door to the kernels: what each takes is declared, and everything is checked in one place.

C++ gets addresses, and reads and writes there what shapes and dtypes promise. A `Signature` says
what a kernel takes. From it a Python function is written and compiled, as dataclasses' methods are,
that checks tensors and numbers, makes the results, takes the addresses and calls: a loop over the
declaration would take several times as long as the kernels of a decoded token.
"""

import operator
import re
from collections.abc import Callable, Iterable
from ctypes import c_double, c_int64, c_void_p
from dataclasses import dataclass
from math import prod
from typing import Any, NoReturn

import torch
from torch import Tensor

from gptk.kernels.door_code import code_of
from gptk.kernels.formats import packed_bytes
from gptk.kernels.parameters import (
    BFLOAT16,
    FLOAT32,
    INT32,
    INT64,
    Dtype,
    Input,
    Int,
    Made,
    Parameter,
    Real,
)


@dataclass(frozen=True)
class Signature:
    """What a kernel takes.

    The exported function `gptk_NAME` gets what `call` lists: addresses of tensors and of what was
    made, float64 numbers, and int64 numbers. It returns a Status, see cpp/common.h.
    """

    name: str
    parameters: tuple[Parameter, ...]
    """Those of the function in Python, and the results."""
    call: str
    where: tuple[str, ...] = ()
    """What must be true."""
    makes: Callable[..., Any] | None = None
    """Called in place of a kernel: its result is returned."""

    @property
    def ctypes(self) -> list[Any]:
        """The types of what the exported function takes."""
        kinds = {parameter.name: type(parameter) for parameter in self.parameters}
        types: dict[type | None, Any] = {Int: c_int64, Real: c_double, None: c_int64}
        return [types.get(kinds.get(text), c_void_p) for text in self.call.split(", ")]

    def checked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, to be called with tensors and numbers; it returns the results.

        Raises TypeError and ValueError for what it cannot take, MemoryError where the kernel has
        too little memory.
        """
        scope: dict[str, Any] = {
            "Tensor": Tensor,
            "BFLOAT16": BFLOAT16,
            "FLOAT32": FLOAT32,
            "INT32": INT32,
            "INT64": INT64,
            "prod": prod,
            "empty": torch.empty,
            "empty_like": torch.empty_like,
            "function": function,
            "refuse": self._refuse,
            "break_rule": self._break,
            "fail": self._fail,
            "integer": self._integer,
            "packed_bytes": packed_bytes,
            "real": self._real,
        }
        for each in self.parameters:
            if isinstance(each, Made):
                scope[f"type_of_{each.name}"] = each.type
            elif isinstance(each, Input):
                scope[f"dtypes_of_{each.name}"] = each.dtype
        code = code_of(
            self.name, self.parameters, self.call, self.where, makes=self.makes is not None
        )
        exec(code, scope)
        return scope[self.name]  # type: ignore[no-any-return]

    def _refuse(self, name: str, scope: dict[str, Any], why: str = "") -> NoReturn:
        """Raise the exception for an argument. scope: the values of all names so far."""
        (parameter,) = (each for each in self.parameters if each.name == name)
        value = scope[name]
        problem = why or f"it must be {_wanted(parameter, scope)}"
        is_type = isinstance(parameter, Input) and not isinstance(value, Tensor)
        is_type = is_type or (isinstance(parameter, Made) and not why)
        kind = TypeError if is_type else ValueError
        raise kind(f"gptk.kernels.{self.name} cannot take {name}: {_described(value)}; {problem}")

    def _break(self, rule: str, scope: dict[str, Any]) -> NoReturn:
        """Raise the exception for a rule that is broken."""
        values: dict[str, object] = {}
        for name, attribute in re.findall(r"(?<![\w.])([a-z]\w*)(?:\.(\w+))?(?!\w)", rule):
            if isinstance(scope.get(name), Tensor) or not attribute:
                values |= {name: scope[name]} if name in scope else {}
            elif name in scope:
                values[f"{name}.{attribute}"] = getattr(scope[name], attribute)
        got = ", ".join(f"{name}: {_described(value)}" for name, value in values.items())
        raise ValueError(f"gptk.kernels.{self.name} cannot take {got}; it needs {rule}")

    def _fail(self, status: int, scope: dict[str, Any]) -> NoReturn:
        """Raise the exception for a Status."""
        if status == 1:
            raise MemoryError(f"gptk.kernels.{self.name} has too little memory")
        name, allowed = _REFUSED_BY_CPP[status]
        self._refuse(name, scope, f"a number in it is out of range: {allowed}")

    def _integer(self, name: str, value: Any) -> int:
        try:
            return int(operator.index(value))
        except TypeError:
            raise TypeError(self._no_number(name, value, "an integer")) from None

    def _real(self, name: str, value: Any) -> float:
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            raise TypeError(self._no_number(name, value, "a number")) from None

    def _no_number(self, name: str, value: Any, wanted: str) -> str:
        return (
            f"gptk.kernels.{self.name} cannot take {name}: {_described(value)}; it must be {wanted}"
        )


class Door:
    """Kernels, each called by its name."""

    def __init__(
        self, signatures: Iterable[Signature], find: Callable[[Signature], Callable[..., Any]]
    ) -> None:
        """find: the exported function of a kernel."""
        self.signatures, self._find = {each.name: each for each in signatures}, find

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_") or name not in self.signatures:
            raise AttributeError(name)
        signature = self.signatures[name]
        function = signature.checked(self._find(signature))
        setattr(self, name, function)  # by whichever thread is last: they are the same
        return function


_REFUSED_BY_CPP = {
    2: ("codes", "a code has no more than `bits` bits"),
    3: ("targets", "they are tokens of the vocabulary"),
    4: ("sequences", "each token is in one of them, and what it has read fits into its blocks"),
    5: ("tables", "blocks are in the slabs, and nobody else has those that a sequence writes to"),
    6: ("positions", "they are among those of the table"),
    7: ("wanted", "they are tokens of the pass, in ascending order"),
    8: ("kept", "they are layers of the model, in ascending order"),
    9: ("wanted", "they are outputs of the matrix"),
}
"""For each Status of C++ the argument that it could not take, and what is allowed."""


def _wanted(parameter: Parameter, scope: dict[str, Any]) -> str:
    """What an argument must be, in words."""
    if isinstance(parameter, Dtype):
        return "torch.float32 or torch.bfloat16"
    if isinstance(parameter, Made):
        return f"a gptk.kernels {parameter.type.__name__}"
    assert isinstance(parameter, Input)
    dtype = parameter.dtype
    if not isinstance(dtype, str):
        dtype = " or ".join(str(each).removeprefix("torch.") for each in dtype)
    words = f"a tensor on the CPU, of {dtype}"
    if parameter.dims is not None:
        words += f", ({parameter.dims})"
    if parameter.strides is not None:
        words += f" with strides ({parameter.strides})"
    elif not parameter.copied:
        words += " without gaps"
    names = dict.fromkeys(re.findall(r"[a-z]\w*", f"{parameter.dims} {parameter.strides}"))
    sizes = [f"{name} is {scope[name]}" for name in names if type(scope.get(name)) is int]
    return f"{words}, where {', '.join(sizes)}" if sizes else words


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        strides = f" with strides {value.stride()}" if value.layout is torch.strided else ""
        return f"{dtype} {tuple(value.shape)}{strides} on {value.device}"
    if isinstance(value, int | float | str | torch.dtype | None):
        return repr(value)[:100]
    return f"an object of {type(value).__name__}"
