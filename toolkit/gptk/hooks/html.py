"""A generation as HTML, for notebooks: the less probable a token, the stronger its background.

The background is half transparent and text has the notebook's own colour, so that it is readable
on light and dark pages. Everything that comes from the model is escaped.
"""

import html
import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_UNLIKELY = 6.0
"""Nats: a token with log-probability -6, of p = 0.25 %, has the full colour."""
_FULL = 0.6
"""The opacity of the full colour."""
_MOST_RESULTS = 20


class Part(NamedTuple):
    """A token to be shown."""

    text: str
    logprob: float
    note: str
    """Shown beside the mouse."""


def results_as_html(results: Sequence[tuple[str, Iterable[Part]]]) -> str:
    """The texts of several results, each with a line about it below. results: the lines and texts,
    of which the first 20 are shown."""
    shown = "".join(_result(about, parts) for about, parts in results[:_MOST_RESULTS])
    hidden = len(results) - _MOST_RESULTS
    return shown + (f"<div>… and {hidden} more</div>" if hidden > 0 else "")


def _result(about: str, parts: Iterable[Part]) -> str:
    return (
        '<div style="margin-bottom: 0.7em">'
        '<div dir="auto" style="white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.6">'
        f"{''.join(map(_span, parts))}</div>"
        f'<div style="opacity: 0.65; font-size: 85%">{html.escape(about)}</div></div>'
    )


def _span(part: Part) -> str:
    share = min(-part.logprob / _UNLIKELY, 1) if math.isfinite(part.logprob) else 1
    opacity = _FULL * max(share, 0)
    return (
        f'<span title="{_visible(part.note)}" '
        f'style="background-color: rgba(255, 140, 0, {opacity:.2f})">{_visible(part.text)}</span>'
    )


def _visible(text: str) -> str:
    """A text escaped; control characters, and those that turn the direction, become U+FFFD."""
    return html.escape(_CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text))


_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
