"""The built-in drafters, one per file."""

from typing import TYPE_CHECKING

from gptk_plugins._homes import names_of

if TYPE_CHECKING:
    from gptk_plugins.drafters.lookup import Lookup as Lookup
    from gptk_plugins.drafters.model import ModelDrafter as ModelDrafter

_HOMES = {
    "Lookup": "lookup",
    "ModelDrafter": "model",
}
__all__ = [*_HOMES]

if not TYPE_CHECKING:  # to a type checker a misspelt name is an error
    __getattr__ = names_of(__name__, _HOMES)
