"""The settings of a generation, checked once."""

import inspect
import logging
import operator
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from gptk.decoding.checks import check_draft, check_groups, check_rows
from gptk.decoding.drafters import make_drafter
from gptk.decoding.limits import StopCondition
from gptk.decoding.other_names import translate_settings
from gptk.errors import OptionError, shown
from gptk.hooks.base import Plugin
from gptk.hooks.drafting import Drafter
from gptk.hooks.observing import DecodingObserver
from gptk.hooks.sampling import LogitsProcessor, Sampler
from gptk.plugins.blame import blaming
from gptk.plugins.creating import create
from gptk.session.session import Overflow
from gptk.system.notices import tell_once

_log = logging.getLogger(__name__)

_SLOW_WITHOUT_CACHE = (
    "use_cache=False reads the whole text again for each token; with the cache the results are the "
    "same"
)

P = TypeVar("P", bound=Plugin)

MAX_ROWS = 100_000
"""The most rows for a prompt. So many take tens of gigabytes even with a small model."""


@dataclass(frozen=True)
class CheckedSettings:
    """What `gptk.Settings` says, checked, with plug-ins made from their specs."""

    sampler: Sampler
    processors: tuple[LogitsProcessor, ...]
    """The user's; the sampler's own come after them."""
    max_new_tokens: int
    n: int
    """Results for each prompt."""
    rows: int
    """The most rows that a prompt has at the same time."""
    seed: int
    ordinal: int
    """The number of the request, which its random stream depends on."""
    stop: tuple[str, ...]
    stop_conditions: tuple[StopCondition, ...]
    drafter: Drafter | None
    overflow: Overflow
    max_seconds: float | None
    ignore_eos: bool
    use_cache: bool
    observers: tuple[DecodingObserver, ...]
    top_logprobs: int

    def plugins(self) -> dict[str, Any]:
        """The plug-ins on which results depend, as arguments of `check_settings`."""
        return {"sampler": self.sampler, "processors": self.processors, "draft": self.drafter}

    @property
    def groups(self) -> int:
        """Groups of competing rows for each prompt; 1 where rows do not compete."""
        return check_groups(self.sampler.groups, self.sampler) if self.sampler.competing else 1


def check_settings(
    *,
    sampler: str | Sampler | None = None,
    processors: Iterable[str | LogitsProcessor] = (),
    max_new_tokens: int = 64,
    n: int = 1,
    seed: int | None = None,
    ordinal: int = 0,
    stop: str | StopCondition | Iterable[str | StopCondition] = (),
    draft: object = None,
    overflow: Overflow = "stop",
    max_seconds: float | None = None,
    ignore_eos: bool = False,
    use_cache: bool = True,
    observers: Iterable[str | DecodingObserver] = (),
    top_logprobs: int = 0,
    **unknown: Any,
) -> CheckedSettings:
    """Check the settings of a generation, and make the plug-ins that they name.

    They are those of `gptk.Settings`. What cannot be combined is refused before any work.
    Raises OptionError, UnknownNameError, SpecError, IncompatibleError, or PluginError.
    """
    if unknown:
        raise OptionError(_unknown_settings(unknown))
    max_new_tokens = _whole_number("max_new_tokens", max_new_tokens, least=1)
    n = _whole_number("n", n, least=1, most=MAX_ROWS)
    seed = secrets.randbits(32) if seed is None else _checked_seed(seed)
    ordinal = _whole_number("ordinal", ordinal, least=0)
    top_logprobs = _whole_number("top_logprobs", top_logprobs, least=0)
    _check_overflow(overflow)
    max_seconds = _seconds(max_seconds)
    ignore_eos, use_cache = _flag("ignore_eos", ignore_eos), _flag("use_cache", use_cache)
    if not use_cache:
        tell_once(_log, _SLOW_WITHOUT_CACHE)
    user_processors = _created("processor", "processors", processors, LogitsProcessor)
    user_observers = _created("decoding-observer", "observers", observers, DecodingObserver)
    chosen = create("sampler", _sampler_or_default(sampler, user_processors), Sampler)
    drafter = None if draft is None else make_drafter(draft)
    rows = _most_rows(chosen, n, drafter)
    stops = _checked_stops(stop)
    return CheckedSettings(
        sampler=chosen,
        processors=user_processors,
        max_new_tokens=max_new_tokens,
        n=n,
        rows=rows,
        seed=seed,
        ordinal=ordinal,
        stop=tuple(text for text in stops if isinstance(text, str)),
        stop_conditions=tuple(condition for condition in stops if not isinstance(condition, str)),
        drafter=drafter,
        overflow=overflow,
        max_seconds=max_seconds,
        ignore_eos=ignore_eos,
        use_cache=use_cache,
        observers=user_observers,
        top_logprobs=top_logprobs,
    )


def _sampler_or_default(
    sampler: str | Sampler | None, processors: Iterable[LogitsProcessor]
) -> str | Sampler:
    """Without a sampler greedy, or multinomial with a processor that is meant for sampling."""
    draws = any(processor.for_sampling for processor in processors)
    default = "multinomial" if draws else "greedy"
    return default if sampler is None else sampler


def _created(kind: str, setting: str, value: Any, base: type[P]) -> tuple[P, ...]:
    """The plug-ins of a setting that takes specs or instances, one or a list."""
    return tuple(create(kind, item, base) for item in _as_list(setting, value, base))


def _as_list(name: str, value: Any, single: type) -> list[Any]:
    """A setting as a list; a single item is a list of one, and None an empty list."""
    if value is None:
        return []
    if isinstance(value, str | single):
        return [value]
    if not isinstance(value, Iterable):
        what = (
            "a text, a function, or a list of these"
            if name == "stop"
            else "a list of specs or instances"
        )
        raise OptionError(f"{name} is {shown(value)}; it must be {what}")
    return list(value)


def _unknown_settings(unknown: Mapping[str, Any]) -> str:
    known = [name for name in inspect.signature(check_settings).parameters if name != "unknown"]
    translation = translate_settings(unknown, known)
    names = " and ".join(unknown)
    what = f"are no settings {names}" if len(unknown) > 1 else f"is no setting {names}"
    return f"there {what}; {f'write {translation}' if str(translation) else f'leave {names} out'}"


def _whole_number(name: str, value: Any, *, least: int, most: int = 2**63 - 1) -> int:
    """A setting that is a whole number, as an int; numpy's and torch's integers serve too."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise OptionError(f"{name} is {shown(value)}; it must be a whole number")
    if number < least:
        raise OptionError(f"{name} is {shown(number)}; it must be {least} or more")
    if number > most:
        raise OptionError(f"{name} is {shown(number)}; it must be {most} or less")
    return number


def _checked_seed(seed: Any) -> int:
    try:
        return _whole_number("seed", seed, least=-(2**63), most=2**64 - 1)
    except OptionError:
        raise OptionError(
            f"seed is {shown(seed)}; it must be a whole number from -2^63 to 2^64 - 1"
        ) from None


def _flag(name: str, value: Any) -> bool:
    if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool"):  # numpy's, too
        return bool(value)
    raise OptionError(f"{name} is {shown(value)}; it must be True or False")


def _most_rows(sampler: Sampler, n: int, drafter: Drafter | None) -> int:
    """The most rows of a prompt at the same time, checked; and whether it can have a draft."""
    with blaming([sampler]):
        rows = check_rows(sampler.max_rows(n), sampler)
        if drafter is not None:
            check_draft(sampler)
    if rows > MAX_ROWS:
        raise OptionError(
            f"sampler {sampler.name} would decode {rows} rows for a prompt; at most {MAX_ROWS:,} "
            "are possible"
        )
    return rows


def _check_overflow(overflow: object) -> None:
    if not isinstance(overflow, str) or overflow not in get_args(Overflow):
        raise OptionError(f"overflow is {shown(overflow)}; it must be stop or slide")


def _seconds(seconds: Any) -> float | None:
    if seconds is None:
        return None
    try:
        if not isinstance(seconds, str | bytes) and float(seconds) >= 0:
            return float(seconds)
    except (TypeError, ValueError, OverflowError):
        pass
    raise OptionError(f"max_seconds is {shown(seconds)}; it must be a number, 0 or more")


def _checked_stops(stop: Any) -> list[str | StopCondition]:
    """Stop strings and conditions, as a list."""
    stops = _as_list("stop", [stop] if callable(stop) else stop, str)
    for text in stops:
        if not callable(text):
            _check_stop(text)
    return stops


def _check_stop(text: Any) -> None:
    if not isinstance(text, str) or not text:
        raise OptionError(f"the stop string {shown(text)} is not a text of at least one character")
    if "\N{REPLACEMENT CHARACTER}" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise OptionError(
            f"the stop string {text!r} has a character that no model writes: U+FFFD or half of a "
            "surrogate pair"
        )
