"""The drafter for the setting `draft`."""

from gptk.errors import OptionError, shown
from gptk.hooks.drafting import Drafter
from gptk.plugins.asking import matching
from gptk.plugins.creating import create
from gptk.plugins.registry import provided


def make_drafter(draft: object) -> Drafter:
    """A drafter from an instance, a spec string, or what a drafter `matches`, such as a model.

    Raises OptionError if no drafter takes it, and what `gptk.plugins.create` raises.
    """
    if isinstance(draft, Drafter):
        return draft
    known = provided("drafter")
    if isinstance(draft, str) and draft.partition(":")[0] in known:
        return create("drafter", draft, Drafter)
    if drafter := matching("drafter", draft, Drafter):
        return drafter
    if isinstance(draft, str):
        return create("drafter", draft, Drafter)  # raises, with the nearest names
    raise OptionError(f"the draft is {shown(draft)}; it must be a drafter, its spec, or a model")
