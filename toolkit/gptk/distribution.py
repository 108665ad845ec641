"""What gptk is called where it is installed from, and where its documentation is."""

NAME = "gptk-decoding"
"""The distribution, as `pip install` takes it: `gptk` is another project's name there."""

DOCS = "https://gptk-decoding.readthedocs.io/en/latest/"


def install_command(extra: str) -> str:
    """The command that installs gptk with one of its extras.

    >>> install_command("constraints")
    "pip install 'gptk-decoding[constraints]'"
    """
    return f"pip install '{NAME}[{extra}]'"


def page(path: str, anchor: str = "") -> str:
    """The address of a page of the documentation, or of a section of it.

    >>> page("contracts", "rows-are-independent")
    'https://gptk-decoding.readthedocs.io/en/latest/contracts/#rows-are-independent'
    """
    return f"{DOCS}{path}/" + (f"#{anchor}" if anchor else "")
