"""A single Python file as a plug-in."""

import importlib.util
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType

from gptk.errors import (
    PluginError,
    brief,
)
from gptk.plugins.registry import quiet, register, unregister
from gptk.system.metadata import open_regular
from gptk.system.read_files import ReadFile


def register_file(path: str | os.PathLike[str]) -> ModuleType:
    """Import a single Python file as a plug-in module and `register` it, for this process.

    Returns the module, whose name is `gptk_file_` and the file's. A file that was registered
    before is read again, and takes the place of what it was; if it is refused, that stays. What
    the file prints goes to standard error.

    Raises PluginError, in one line, for a file that does not exist, fails to import (with the line
    number), has no hook (with what to add), or breaks a rule.
    """
    file, origin = Path(os.path.abspath(path)), str(path)
    if file.suffix != ".py":
        raise PluginError(f"{origin} is not a .py file; a plug-in is a Python module")
    with open_regular(file, lambda said: PluginError(said.replace(str(file), origin))) as opened:
        source = opened.read(_MOST_BYTES + 1)
        read = ReadFile.of(file)
    if len(source) > _MOST_BYTES:
        raise PluginError(f"{origin} has more than {_MOST_BYTES:,} bytes; a plug-in is shorter")
    module = ModuleType(_file_module(file))
    module.__file__ = str(file)
    before = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module  # in which pydantic looks up the names in annotations
    try:
        _execute(module, source, origin)
        _replace(before, module, origin)
    except BaseException as error:
        if before is None:
            del sys.modules[module.__name__]
        else:  # what the file was before it was broken stays, until it is mended
            sys.modules[module.__name__] = before
        if isinstance(error, PluginError) and origin not in str(error):
            raise PluginError(f"{origin}: {error}") from error
        raise
    _read[module.__name__] = read
    return module


def source_file(plugin: type) -> ReadFile | None:
    """The file that `register_file` read a plug-in's class from; None for a class of elsewhere."""
    return _read.get(plugin.__module__)


_read: dict[str, ReadFile] = {}
"""The files of modules, by the modules' names."""
_MOST_BYTES = 1 << 20


def _replace(before: ModuleType | None, module: ModuleType, origin: str) -> None:
    """Register a module in place of what its file was before; if it is refused, that stays."""
    unregister(before)
    try:
        register(module, origin=origin)
    except PluginError:
        if before is not None:
            register(before, origin=origin)
        raise


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
        text = importlib.util.decode_source(source)
        with quiet():
            exec(compile(text, file, "exec"), module.__dict__)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        problem = brief(error)
        if isinstance(error, UnicodeDecodeError):
            problem = f"byte {error.start} is not {error.encoding}"
        frames = traceback.walk_tb(error.__traceback__)
        lines = [line for frame, line in frames if frame.f_code.co_filename == file]
        if isinstance(error, SyntaxError) and error.filename == file:
            problem, lines = f"{type(error).__name__}: {error.msg}", [error.lineno or 1]
        where = f", line {lines[-1]}" if lines else ""
        raise PluginError(f"{origin}{where}: {problem}") from error
