"""The entry of the program `gptk`.

It stands outside the package `gptk` because another project's distribution, which is called `gptk`,
installs a package of that name as well. Where both are installed, files of one have replaced
files of the other, and `import gptk` may give either. This module notices and says so.
"""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from importlib import metadata
    from typing import NoReturn


def main() -> "NoReturn":
    """Run the program, or exit with 1 if the package `gptk` is not, or not only, this project's.

    All imports are in functions, so that Ctrl-C during them ends the program without a traceback.
    """
    import signal

    sys.unraisablehook = _unraisable
    try:
        problem = find_problem()
        if problem is not None:
            print(f"gptk: {problem}", file=sys.stderr)
            sys.exit(1)
        from gptk.cli import main

        main()
    except KeyboardInterrupt as interrupt:
        sys.exit(getattr(interrupt, "exit_code", 130))
    finally:
        # While Python ends, Ctrl-C would print the traceback of whatever it is doing.
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Send Ctrl-C again that came in a destructor, where Python would print and forget it."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    import os
    import signal
    import threading

    threading.Timer(_SOON, os.kill, (os.getpid(), signal.SIGINT)).start()


_SOON = 0.02
"""Seconds in which a destructor has ended."""


def find_problem() -> str | None:
    """What is wrong with the installed package `gptk`, and what to do; None if nothing is."""
    from importlib.util import find_spec

    other = _other_distribution()
    if other is not None:
        return (
            f"another project's package, gptk {other.version}, is installed in this environment "
            f"({other.metadata['Summary']}); both have a folder gptk, so that only one of them can "
            "be installed: pip uninstall --yes gptk gptk-decoding && pip install gptk-decoding"
        )
    package = find_spec("gptk")
    if package is None or package.origin is None or find_spec("gptk.cli") is None:
        return (
            "files of the package gptk are missing, perhaps removed with another package of that "
            "name; install it again: pip install --force-reinstall --no-deps gptk-decoding"
        )
    return None


def _other_distribution() -> "metadata.Distribution | None":
    """The distribution named `gptk`, if it is installed and has files in the folder gptk."""
    from importlib import metadata

    try:
        other = metadata.distribution("gptk")
    except metadata.PackageNotFoundError:
        return None
    has_folder = any(file.parts[0] == "gptk" for file in other.files or ())
    return other if has_folder else None
