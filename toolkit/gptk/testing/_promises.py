"""What a promise is, and those that plug-ins of every kind keep."""

import functools
import inspect
import math
import random
from collections.abc import Callable
from typing import Any, ClassVar, ParamSpec

import hypothesis
import numpy as np
import torch
from hypothesis import HealthCheck, assume, given
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException

from gptk.errors import GptkError, OptionError
from gptk.hooks.base import Plugin
from gptk.options import from_options, option_help
from gptk.spec import parse_spec

P = ParamSpec("P")


class BrokenPromise(AssertionError):  # noqa: N818 - a failure of a test, not an error
    """A plug-in does not keep a promise of its kind."""


def promise(test: Callable[P, None]) -> Callable[P, None]:
    """Mark a contract's method as a promise: what fails in it becomes a BrokenPromise.

    Its name, without `test_`, is the promise in words; its docstring says what is promised, and
    why. The global generators are seeded for each example, so that a plug-in that draws from
    them fails the same way each time.
    """
    words = test.__name__.removeprefix("test_").replace("_", " ")
    page = f"docs/contracts.md#{words.replace(' ', '-')}"

    @functools.wraps(test)
    def kept(*args: P.args, **kwargs: P.kwargs) -> None:
        begin = f"promise broken: {words}. {type(args[0]).__name__}"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                test(*args, **kwargs)
            except (BrokenPromise, HypothesisException):
                raise
            except AssertionError as error:
                raise BrokenPromise(f"{begin}: {error}. See {page}") from None
            except BaseException as error:
                if type(error).__name__ == "PanicException":  # tiktoken's, in Rust
                    raise BrokenPromise(
                        f"{begin}: its vocabulary lacks a byte of the text, at which tiktoken "
                        f"stops; `alphabet` says which characters it can hold. See {page}"
                    ) from None
                if not isinstance(error, Exception):
                    raise
                what = f"{type(error).__name__}: {error}"
                raise BrokenPromise(f"{begin}: it raised {what}. See {page}") from error

    return kept


def examples(count: int) -> hypothesis.settings:
    """Hypothesis settings: how many examples of a promise are tried.

    In proportion to the Hypothesis profile: that many where `max_examples` is 100, as it is by
    default. A profile with more, loaded before gptk.testing is imported, makes all try harder.
    """
    return hypothesis.settings(
        deadline=None,
        report_multiple_bugs=False,  # one at a time, so that it is told with its example
        max_examples=max(1, count * hypothesis.settings().max_examples // 100),
        suppress_health_check=[
            HealthCheck.differing_executors,  # a contract's method runs in many classes
            HealthCheck.too_slow,
            HealthCheck.filter_too_much,
            HealthCheck.data_too_large,
        ],
    )


def check(condition: object, otherwise: str) -> None:
    """Raises AssertionError with what is wrong unless the condition holds."""
    if not condition:
        raise AssertionError(otherwise)


class PluginContract:
    """What plug-ins of every kind promise."""

    make: ClassVar[Any]
    """The plug-in's class, or a function without arguments that returns an instance."""

    def plugin(self) -> Any:
        """A plug-in to test: what `make` makes."""
        make = inspect.getattr_static(type(self), "make")
        make = make.__func__ if isinstance(make, staticmethod) else make
        if isinstance(make, classmethod):
            return self.make()
        if inspect.isfunction(make) and inspect.signature(make).parameters:
            return make(self)  # written as a method
        return make()

    @promise
    def test_it_says_what_it_does(self) -> None:
        """The class has a line of description, and so has every option.

        `gptk plugins` lists them, `gptk plugins show` and the reference explain them.
        """
        plugin = type(self.plugin())
        own = plugin.__dict__.get("__doc__") or ""
        check(own.strip(), f"{plugin.__name__} has no docstring")
        for name, _, _, help_ in option_help(plugin):
            check(help_, f"the option {name} has no description: Field(…, description=…)")

    @promise
    @examples(25)
    @given(data=st.data())
    def test_its_options_round_trip_through_the_spec_string(self, data: st.DataObject) -> None:
        """`plugin.spec` makes an equal plug-in again, whatever its options.

        Configuration files, `--json` output and the trace name plug-ins by their spec strings.
        """
        made = self.plugin()
        try:
            name, texts = parse_spec(made.spec)
        except OptionError:  # it was made with an object
            return
        given_ = made.model_dump(exclude_defaults=True)
        try:
            plugin = type(made)(**{**given_, **data.draw(_options(made), label="options")})
        except OptionError:
            assume(False)
        name, texts = parse_spec(plugin.spec)
        again = from_options(type(made), texts)
        check(name == made.name, f"the spec {plugin.spec!r} has another name than {made.name!r}")
        check(again == plugin, f"the spec {plugin.spec!r} makes {again!r} of {plugin!r}")

    @promise
    def test_bad_options_are_refused(self) -> None:
        """An unknown option, one of another type and one out of bounds raise OptionError.

        The person gets a line that says what is allowed, instead of a result that is wrong.
        """
        made = self.plugin()
        given_ = made.model_dump(mode="python", exclude_defaults=True)
        wrong: list[tuple[str, Any]] = [("surely_not_an_option", 1)]
        for name, field in options_schema(made).items():
            if field.get("type") in ("number", "integer"):
                wrong += [(name, "no number"), (name, math.nan)]
                wrong += [(name, field[key] - 1) for key in ("minimum",) if key in field]
                wrong += [(name, field[key] + 1) for key in ("maximum",) if key in field]
                wrong += [
                    (name, field[key])
                    for key in ("exclusiveMinimum", "exclusiveMaximum")
                    if key in field
                ]
            elif field.get("type") == "boolean" or "enum" in field:
                wrong += [(name, "surely not an allowed value")]
        for name, value in wrong:
            try:
                type(made)(**{**given_, name: value})
            except OptionError as error:
                check("\n" not in str(error), f"the error for {name}={value!r} has several lines")
            else:
                raise AssertionError(f"{name}={value!r} is taken")

    @promise
    def test_it_is_not_changed_by_use(self) -> None:
        """Its options cannot be set, since one instance may serve several calls at once."""
        made = self.plugin()
        for name in type(made).model_fields:
            try:
                setattr(made, name, getattr(made, name))
            except GptkError:
                continue
            raise AssertionError(f"its option {name} can be set")


class undisturbed:  # noqa: N801 - it is used as a function
    """A context in which the global generators must be neither used nor changed."""

    def __enter__(self) -> None:
        self._before = _generators()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            check(_generators() == self._before, "a global random generator was used")


def _generators() -> tuple[object, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())


def options_schema(plugin: Plugin) -> dict[str, dict[str, Any]]:
    """The JSON schema of each option."""
    try:
        schema: dict[str, dict[str, Any]] = type(plugin).model_json_schema(by_alias=False)
    except Exception:  # options of types that JSON has not: their own affair
        return {}
    return schema.get("properties", {})


def _options(plugin: Plugin) -> st.SearchStrategy[dict[str, Any]]:
    """Options by their types and bounds, some of them given; those of other types never."""
    known: dict[str, st.SearchStrategy[Any]] = {}
    for name, field in options_schema(plugin).items():
        if "enum" in field:
            known[name] = st.sampled_from(field["enum"])
        elif field.get("type") == "boolean":
            known[name] = st.booleans()
        elif field.get("type") == "integer":
            low = field.get("minimum", field.get("exclusiveMinimum", -101) + 1)
            high = field.get("maximum", field.get("exclusiveMaximum", max(low, 0) + 101) - 1)
            known[name] = st.integers(low, high)
        elif field.get("type") == "number":
            low = field.get("minimum", field.get("exclusiveMinimum", -100.0))
            high = field.get("maximum", field.get("exclusiveMaximum", max(low, 0) + 100.0))
            known[name] = st.floats(
                low,
                high,
                exclude_min="exclusiveMinimum" in field,
                exclude_max="exclusiveMaximum" in field,
            )
    return st.fixed_dictionaries({}, optional=known)
