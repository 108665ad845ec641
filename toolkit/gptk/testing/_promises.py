"""What a promise is, and the promises that plug-ins of all kinds keep."""

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

import gptk

P = ParamSpec("P")


class BrokenPromise(AssertionError):  # noqa: N818 - a failure of a test, not an error
    """A plug-in or a model does not keep a promise of its contract."""


def promise(test: Callable[P, None]) -> Callable[P, None]:
    """Mark a contract's method as a promise: every failure in it becomes a BrokenPromise.

    Its name, without `test_`, is the promise in words; its docstring says what is promised, and
    why. The global random generators are seeded for each example, so that a plug-in that draws
    from them fails in the same way each time.
    """
    words = test.__name__.removeprefix("test_").replace("_", " ")
    page = f"docs/contracts.md#{words.replace(' ', '-')}"

    @functools.wraps(test)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
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
                if type(error).__name__ == "PanicException":  # raised by tiktoken's Rust code
                    raise BrokenPromise(
                        f"{begin}: its vocabulary lacks a byte of the text, and tiktoken panics; "
                        f"set `alphabet` to the characters that it can hold. See {page}"
                    ) from None
                if not isinstance(error, Exception):
                    raise
                what = f"{type(error).__name__}: {error}"
                raise BrokenPromise(f"{begin}: it raised {what}. See {page}") from error

    return checked


def examples(count: int) -> hypothesis.settings:
    """Hypothesis settings: how many examples of a promise are tried.

    `count` is for a Hypothesis profile with `max_examples` of 100, the default, and scales with
    it. The profile must be loaded before gptk.testing is imported.
    """
    return hypothesis.settings(
        deadline=None,
        report_multiple_bugs=False,  # one failure, so that its message ends with its example
        max_examples=max(1, count * hypothesis.settings().max_examples // 100),
        suppress_health_check=[
            HealthCheck.differing_executors,  # a contract's method runs in many classes
            HealthCheck.too_slow,
            HealthCheck.filter_too_much,
            HealthCheck.data_too_large,
        ],
    )


def check(condition: object, otherwise: str) -> None:
    """Raises AssertionError with the message `otherwise` unless the condition holds."""
    if not condition:
        raise AssertionError(otherwise)


def instance(test: object) -> Any:
    """What a test's `make` returns; it is a class, a function, a class method or a method."""
    make = inspect.getattr_static(type(test), "make")
    if isinstance(make, staticmethod | classmethod):
        return test.make()  # type: ignore[attr-defined]
    if inspect.isfunction(make) and inspect.signature(make).parameters:
        return make(test)
    return make()


class PluginContract:
    """What plug-ins of every kind promise."""

    make: ClassVar[Any]
    """The plug-in's class, or a function without arguments that returns an instance."""

    def plugin(self) -> Any:
        """A plug-in to test: what `make` makes."""
        return instance(self)

    @promise
    def test_it_says_what_it_does(self) -> None:
        """The class has a line of description, and so has every option.

        `gptk plugins` lists them, `gptk plugins show` and the reference explain them.
        """
        plugin = type(self.plugin())
        docstring = plugin.__dict__.get("__doc__") or ""
        check(docstring.strip(), f"{plugin.__name__} has no docstring")
        for name, _, _, help_ in gptk.plugins.option_help(plugin):
            check(help_, f"the option {name} has no description: Field(…, description=…)")

    @promise
    @examples(25)
    @given(data=st.data())
    def test_its_options_round_trip_through_the_spec_string(self, data: st.DataObject) -> None:
        """`plugin.spec` makes an equal plug-in again, whatever its options.

        Configuration files, `--json` output and the trace name plug-ins by their spec strings.
        """
        first = self.plugin()
        try:
            gptk.plugins.parse_spec(first.spec)
        except gptk.OptionError:  # an option is an object, which has no text
            return
        options = first.model_dump(exclude_defaults=True)
        try:
            plugin = type(first)(**{**options, **data.draw(_options(first), label="options")})
        except gptk.OptionError:
            assume(False)
        name, texts = gptk.plugins.parse_spec(plugin.spec)
        again = gptk.plugins.from_options(type(first), texts)
        check(name == first.name, f"the spec {plugin.spec!r} has another name than {first.name!r}")
        check(again == plugin, f"the spec {plugin.spec!r} of {plugin!r} makes {again!r}")

    @promise
    def test_bad_options_are_refused(self) -> None:
        """An unknown option, one of another type and one out of bounds raise OptionError.

        The user gets a line that says what is allowed, instead of a wrong result.
        """
        plugin = self.plugin()
        options = plugin.model_dump(mode="python", exclude_defaults=True)
        for name, value in [("surely_not_an_option", 1), *_wrong_options(plugin)]:
            try:
                type(plugin)(**{**options, name: value})
            except gptk.OptionError as error:
                check("\n" not in str(error), f"the error for {name}={value!r} has several lines")
            else:
                raise AssertionError(f"it accepts {name}={value!r}")

    @promise
    def test_it_is_not_changed_by_use(self) -> None:
        """Its options cannot be set, since one instance may serve several calls at once."""
        plugin = self.plugin()
        for name in type(plugin).model_fields:
            try:
                setattr(plugin, name, getattr(plugin, name))
            except gptk.GptkError:
                continue
            raise AssertionError(f"its option {name} can be set")


class undisturbed:  # noqa: N801 - it is used as a function
    """A context in which the global random generators must be neither used nor changed."""

    def __enter__(self) -> None:
        self._before = _generators()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            check(_generators() == self._before, "a global random generator was used")


def _generators() -> tuple[object, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())


def options_schema(plugin: gptk.Plugin) -> dict[str, dict[str, Any]]:
    """The JSON schema of each option; empty where an option's type has none."""
    try:
        schema: dict[str, dict[str, Any]] = type(plugin).model_json_schema(by_alias=False)
    except Exception:
        return {}
    return schema.get("properties", {})


def _wrong_options(plugin: gptk.Plugin) -> list[tuple[str, Any]]:
    """Options with values of a wrong type or out of bounds."""
    wrong: list[tuple[str, Any]] = []
    for name, field in options_schema(plugin).items():
        if field.get("type") in ("number", "integer"):
            wrong += [(name, "no number"), (name, math.nan)]
            wrong += [(name, field["minimum"] - 1)] if "minimum" in field else []
            wrong += [(name, field["maximum"] + 1)] if "maximum" in field else []
            wrong += [
                (name, field[key])
                for key in ("exclusiveMinimum", "exclusiveMaximum")
                if key in field
            ]
        elif field.get("type") == "boolean" or "enum" in field:
            wrong += [(name, "surely not an allowed value")]
    return wrong


def _options(plugin: gptk.Plugin) -> st.SearchStrategy[dict[str, Any]]:
    """Values within bounds for any of the options that are numbers, booleans or choices."""
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
