"""A generation as HTML, for notebooks: the less probable a token, the stronger its background.

The background is half transparent and text has the notebook's own colour, so that it is readable
on light and dark pages. Everything that comes from the model is escaped.
"""

import html
import math
import re
from collections.abc import Iterable, Sequence

from gptk.hooks.results import Generation, RankedToken, TopTokens

_UNLIKELY = 6.0
"""Nats: a token with log-probability -6, of p = 0.25 %, has the full colour."""
_FULL = 0.6
"""The opacity of the full colour."""
_MOST_ALTERNATIVES = 20


def generation_as_html(generation: Generation) -> str:
    """The texts of a generation and of its alternatives, with a line about each."""
    results = [generation, *generation.alternatives]
    shown = "".join(map(_result, results[:_MOST_ALTERNATIVES]))
    hidden = len(results) - _MOST_ALTERNATIVES
    return shown + (f"<div>… and {hidden} more</div>" if hidden > 0 else "")


def _result(generation: Generation) -> str:
    about = (
        f"{len(generation.tokens)} tokens, score {generation.score:.4f}, "
        f"finish reason: {generation.finish_reason}"
    )
    if generation.complete is False:
        about += ", incomplete"
    return (
        '<div style="margin-bottom: 0.7em">'
        '<div dir="auto" style="white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.6">'
        f"{''.join(_tokens(generation))}</div>"
        f'<div style="opacity: 0.65; font-size: 85%">{html.escape(about)}</div></div>'
    )


def _tokens(generation: Generation) -> Iterable[str]:
    tops: Sequence[TopTokens | None] = generation.top_logprobs or [None] * len(generation.tokens)
    texts = generation.token_texts or [""] * len(generation.tokens)
    entries = zip(generation.tokens, texts, generation.token_logprobs, tops, strict=True)
    for token, text, logprob, top in entries:
        lines = [f"token {token} {text!r}: p = {_p(logprob)}, log p = {logprob:.3f}"]
        if top is not None:
            lines.append(f"before processors: {_ranked(top.before)}")
            lines.append(f"after processors: {_ranked(top.after)}")
        share = min(-logprob / _UNLIKELY, 1) if math.isfinite(logprob) else 1
        opacity = _FULL * max(share, 0)
        yield (
            f'<span title="{_visible(chr(10).join(lines))}" '
            f'style="background-color: rgba(255, 140, 0, {opacity:.2f})">{_visible(text)}</span>'
        )


def _ranked(tokens: Sequence[RankedToken]) -> str:
    return ", ".join(f"{ranked.text!r} {_p(ranked.logprob)}" for ranked in tokens)


def _p(logprob: float) -> str:
    return f"{math.exp(logprob):.3g}"


def _visible(text: str) -> str:
    """A text escaped; control characters, and those that turn the direction, become U+FFFD."""
    return html.escape(_CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text))


_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
