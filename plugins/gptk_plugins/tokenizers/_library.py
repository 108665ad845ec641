"""The library `tokenizers`, an optional dependency."""

from typing import Any

import gptk


class NotInstalledError(gptk.TokenizerError):
    """The library is not installed."""


def library(what: str) -> Any:
    """The module. Raises NotInstalledError, saying what needs it, if it is not installed."""
    try:
        import tokenizers
    except ImportError:
        install = gptk.distribution.install_command("tokenizers")
        raise NotInstalledError(f"{what} needs the package tokenizers: {install}") from None
    return tokenizers
