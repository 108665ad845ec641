"""What a promise is: how its examples are tried, and how one that is broken is told.

The promises of a contract are in an order: a later one rests on the earlier ones. Where several
are broken, the first is the cause, or must be mended first in any case. So it is the only one that
is named; the later ones are skipped.
"""

import contextlib
import contextvars
import copy
import functools
import inspect
import itertools
import random
import tempfile
import textwrap
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException, Unsatisfiable

import gptk

P = ParamSpec("P")
Test = Callable[P, None]

SHRINKING_SECONDS = 2.0
"""How long Hypothesis looks for a smaller example of a promise that is broken."""


class BrokenPromise(AssertionError):  # noqa: N818 - a failure of a test, not an error
    """A plug-in or a model does not keep a promise of its contract."""


def promise(test: Test[P]) -> Test[P]:
    """Mark a contract's method as a promise: every failure in it becomes a BrokenPromise.

    Its name, without `test_`, is the promise in words; its docstring says what is promised, and
    why. It rests on the promises that come before it in the contract: where one of these is broken,
    that one is named, and once that is told, this one is skipped.
    """
    return _promise(test, supports=True)


def separate_promise(test: Test[P]) -> Test[P]:
    """As `promise`, for one on which no other rests: the others are tried although it is broken."""
    return _promise(test, supports=False)


def examples(count: int) -> hypothesis.settings:
    """Hypothesis settings: how many examples of a promise are drawn.

    They are the same in each run. `count` is for a Hypothesis profile with `max_examples` of 100,
    the default, and scales with it. The profile must be loaded before gptk.testing is imported.
    """
    return hypothesis.settings(
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        report_multiple_bugs=False,  # one failure, so that its message ends with its example
        max_examples=max(1, count * hypothesis.settings().max_examples // 100),
        suppress_health_check=[
            HealthCheck.differing_executors,  # a contract's method runs in many classes
            HealthCheck.too_slow,
            HealthCheck.filter_too_much,
            HealthCheck.data_too_large,
        ],
    )


def worst_and_drawn(count: int) -> Callable[[Test[P]], Test[P]]:
    """Call a test once with data=None, for examples built by hand, then with `count` drawn data.

    The examples built by hand are those that a fault is most likely to need: ties, all tokens but
    one masked, a single row, many rows, the bounds of a range.
    """

    def decorate(test: Test[P]) -> Test[P]:
        return examples(count)(given(data=st.data())(example(data=None)(test)))

    return decorate


def check(condition: object, otherwise: str) -> None:
    """Raises AssertionError with the message `otherwise` unless the condition holds."""
    if not condition:
        raise AssertionError(otherwise)


def instance(test: object) -> Any:
    """A new object from a test's `make`: a class, a function, a class method or a method."""
    make = inspect.getattr_static(type(test), "make")
    if isinstance(make, staticmethod | classmethod):
        return test.make()  # type: ignore[attr-defined]
    if inspect.isfunction(make) and inspect.signature(make).parameters:
        return make(test)
    return make()


class undisturbed:  # noqa: N801 - it is used as a function
    """A context in which the global random generators must be neither used nor changed."""

    def __enter__(self) -> None:
        self._before = _generators()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            check(_generators() == self._before, "a global random generator was used")


def _generators() -> tuple[object, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())


class _EnoughShrinking(BaseException):
    """Ends a search for a smaller example; no Exception, so that Hypothesis lets it pass."""


class _Search:
    """The examples of a promise that is being tried: the last that failed, and since when."""

    failure: Exception | None = None
    _ends = float("inf")

    def try_example(self, test: Callable[[], None]) -> None:
        """Call a test of an example. The global random generators are seeded for each."""
        if time.monotonic() > self._ends:
            raise _EnoughShrinking
        torch.manual_seed(0)
        try:
            test()
        except HypothesisException:  # the example is discarded
            raise
        except Exception as error:
            self._ends = min(self._ends, time.monotonic() + SHRINKING_SECONDS)
            self.failure = error
            raise


_search: contextvars.ContextVar[_Search] = contextvars.ContextVar("search")

_outcomes: "weakref.WeakKeyDictionary[type, dict[str, BrokenPromise | None]]"
_outcomes = weakref.WeakKeyDictionary()
"""For each test class its promises that have been tried, and how each was broken."""
_told: "weakref.WeakKeyDictionary[type, set[str]]" = weakref.WeakKeyDictionary()
"""For each test class the promises whose break a failure has named."""


def _promise(test: Test[P], *, supports: bool) -> Test[P]:
    if hypothesis.is_hypothesis_test(test):
        inner = test.hypothesis.inner_test  # type: ignore[attr-defined]

        @functools.wraps(inner)
        def tried(*args: Any, **kwargs: Any) -> None:
            _search.get().try_example(functools.partial(inner, *args, **kwargs))

        test.hypothesis.inner_test = tried  # type: ignore[attr-defined]

    @functools.wraps(test)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        contract = args[0]
        earlier = _earlier(type(contract), test.__name__)
        told = _told.setdefault(type(contract), set())
        for name in earlier:
            if name in told:
                pytest.skip(f"not tried, because the promise “{_words(name)}” is broken")
        broken = _try(test, contract, *args[1:], **kwargs)
        if broken is None:
            return
        for name in earlier:
            if first := _outcome(contract, name):
                told.add(name)
                raise first
        told.add(test.__name__)
        raise broken

    checked.gptk_promise = test  # type: ignore[attr-defined]
    checked.gptk_supports = supports  # type: ignore[attr-defined]
    return checked


def _words(name: str) -> str:
    return name.removeprefix("test_").replace("_", " ")


def _earlier(contract: type, name: str) -> list[str]:
    """The promises on which a promise of a test class rests, in order; the base's come first."""
    names = dict.fromkeys(
        attribute
        for base in reversed(contract.__mro__)
        for attribute in vars(base)
        if hasattr(getattr(contract, attribute, None), "gptk_supports")
    )
    before = itertools.takewhile(lambda other: other != name, names)
    return [other for other in before if getattr(contract, other).gptk_supports]


def _outcome(contract: Any, name: str) -> BrokenPromise | None:
    """How an earlier promise is broken; it is tried if it has not been yet."""
    outcomes = _outcomes.setdefault(type(contract), {})
    if name not in outcomes:
        test = getattr(type(contract), name).gptk_promise
        fresh = copy.copy(contract)
        for made in ("_made", "model", "tokenizer"):
            vars(fresh).pop(made, None)
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(pytest.skip.Exception):
            parameters = set(inspect.signature(test).parameters)
            if parameters <= {"self", "tmp_path"}:
                given_path = {"tmp_path": Path(folder)} if "tmp_path" in parameters else {}
                _try(test, fresh, **given_path)
    return outcomes.get(name)


def _try(test: Any, contract: Any, *args: Any, **kwargs: Any) -> BrokenPromise | None:
    """Try all examples of a promise; returns how it is broken, None if it is kept."""
    search = _Search()
    outcomes = _outcomes.setdefault(type(contract), {})
    begin = f"promise broken: {_words(test.__name__)}. {type(contract).__name__}: "
    url = gptk.distribution.page("contracts", _words(test.__name__).replace(" ", "-"))
    with torch.random.fork_rng(devices=[]), _searching(search):
        torch.manual_seed(0)
        try:
            test(contract, *args, **kwargs)
        except pytest.skip.Exception as skipped:
            outcomes[test.__name__] = None
            pytest.skip(str(skipped.msg))  # without Hypothesis' notes on the example
        except Unsatisfiable:
            outcomes[test.__name__] = None
            pytest.skip("none of the examples can be tried with this plug-in")
        except BaseException as error:
            outcomes[test.__name__] = None
            cause = search.failure or error
            if isinstance(cause, HypothesisException) or not _is_failure(cause):
                raise
            broken = BrokenPromise(f"{begin}{_told_in_a_line(cause)}. See {url}")
            for note in getattr(error, "__notes__", ()):
                if not note.startswith("Failing explicit example"):  # one built by hand
                    broken.add_note(note)
            if not isinstance(cause, AssertionError):
                broken.__cause__ = cause
            outcomes[test.__name__] = broken
            return broken
    outcomes[test.__name__] = None
    return None


@contextlib.contextmanager
def _searching(search: _Search) -> Iterator[None]:
    token = _search.set(search)
    try:
        yield
    finally:
        _search.reset(token)


def _is_failure(error: BaseException) -> bool:
    """Whether an error is the plug-in's, and not pytest's or the user's interrupt."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _told_in_a_line(error: BaseException) -> str:
    text = textwrap.shorten(str(error), 600, placeholder=" …")
    if isinstance(error, AssertionError):
        return text
    if type(error).__name__ == "PanicException":  # raised by tiktoken's Rust code
        return (
            "its vocabulary lacks a byte of the text, and tiktoken panics; set `alphabet` to the "
            "characters that it can hold"
        )
    return f"it raised {type(error).__name__}: {text}"
