"""A single Python file as a plug-in."""

import os
import sys
import traceback
from pathlib import Path
from types import ModuleType

from gptk.errors import (
    PluginError,
    brief,
)
from gptk.plugins.registry import register, unregister


def register_file(path: str | os.PathLike[str]) -> ModuleType:
    """Import a single Python file as a plug-in module and `register` it, for this process.

    Returns the module, whose name is `gptk_file_` and the file's; a file that was registered
    before is read again. Raises PluginError, in one line, for a file that does not exist, fails
    to import (with the line number), has no hook (with what to add), or breaks a rule.
    """
    file, origin = Path(path).absolute(), str(path)
    if file.suffix != ".py":
        raise PluginError(f"{origin} is not a .py file; a plug-in is a Python module")
    try:
        source = file.read_bytes()
    except FileNotFoundError:
        raise PluginError(f"there is no file {origin}") from None
    except OSError as error:
        raise PluginError(f"{origin} cannot be read: {error.strerror}") from None
    module = ModuleType(_file_module(file))
    module.__file__ = str(file)
    before = sys.modules.pop(module.__name__, None)
    sys.modules[module.__name__] = module  # in which pydantic looks up the names in annotations
    try:
        _execute(module, source, origin)
        unregister(before)
        register(module, origin=origin)
    except PluginError as error:
        del sys.modules[module.__name__]
        if origin not in str(error):
            raise PluginError(f"{origin}: {error}") from error
        raise
    return module


def _file_module(file: Path) -> str:
    """The module name of a file: always the same, and no other module's."""
    name = f"gptk_file_{file.parent.name if file.stem == '__init__' else file.stem}"
    while getattr(sys.modules.get(name), "__file__", str(file)) != str(file):
        name += "_"
    return name


def _execute(module: ModuleType, source: bytes, origin: str) -> None:
    """Fill a module from its file's source. Raises PluginError if it fails."""
    file = str(module.__file__)
    try:
        # Compiled here and not by importlib, which would leave a __pycache__ beside the file.
        exec(compile(source, file, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        problem = brief(error)
        frames = traceback.walk_tb(error.__traceback__)
        lines = [line for frame, line in frames if frame.f_code.co_filename == file]
        if isinstance(error, SyntaxError) and error.filename == file:
            problem, lines = f"{type(error).__name__}: {error.msg}", [error.lineno or 1]
        where = f", line {lines[-1]}" if lines else ""
        raise PluginError(f"{origin}{where}: {problem}") from error
