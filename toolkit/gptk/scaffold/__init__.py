"""New plug-in packages: `gptk plugins new` writes one from the templates in this folder.

A template is a file of the package with `$placeholders` (string.Template). Each kind of plug-in has
a folder of templates. Their names end in `.template`, so that no tool treats them as code.
"""

import ast
import builtins
import datetime
import importlib.resources
import importlib.util
import keyword
import os
import re
import tempfile
from importlib.resources.abc import Traversable
from pathlib import Path
from string import Template

from gptk import __version__
from gptk.distribution import NAME as DISTRIBUTION
from gptk.distribution import page
from gptk.errors import OptionError, PluginError
from gptk.plugins.checks import name_problem
from gptk.plugins.kinds import KINDS
from gptk.plugins.registry import API_VERSION, provided

TEMPLATES = importlib.resources.files(__name__)
SCAFFOLDS = (*KINDS, "constraint")
"""What there are templates for: each kind of plug-in, and constraints, which are processors."""
LONGEST_NAME = 40


def write_package(name: str, kind: str, target: Path | None = None) -> Path:
    """Write a package with a working plug-in of that kind and name; returns its folder.

    name: as `plugin_name` takes it. target: the folder, by default `gptk-NAME` in the current one.
    It is written completely or not at all. Raises OptionError for a name that is invalid or taken,
    and PluginError for a folder that exists or cannot be written.
    """
    name = plugin_name(name)
    values = _values(name, kind)
    _check(name, kind, values)
    target = Path(values["distribution"]) if target is None else target
    if os.path.lexists(target):
        raise PluginError(f"{target} exists already; it is not overwritten")
    if not target.parent.is_dir():
        raise PluginError(f"there is no folder {target.parent} to write {target.name} in")
    try:
        # In the target's parent folder, so that a single rename moves it to the target.
        with tempfile.TemporaryDirectory(prefix=".gptk-new-", dir=target.parent) as temporary:
            folder = Path(temporary) / "package"
            for path, text in _files(kind, values).items():
                file = folder / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8")
            folder.rename(target)
    except OSError as error:
        raise PluginError(f"{target} cannot be written: {error.strerror}") from None
    return target


def plugin_name(name: str) -> str:
    """The plug-in's name for what a user calls it or its package.

    >>> plugin_name("gptk-top-a"), plugin_name("my_sampler")
    ('top-a', 'my-sampler')
    """
    return re.sub(r"[_\s]+", "-", name).removeprefix("gptk-")


def first_command(kind: str, name: str) -> str:
    """The first command in the README's section on use."""
    use = _filled(TEMPLATES / kind / "use.md.template", _values(plugin_name(name), kind))
    return next(line for line in use.splitlines() if line.startswith("gptk "))


def _files(kind: str, values: dict[str, str]) -> dict[str, str]:
    """The texts of the package's files, by path."""
    module = values["module"]
    values = values | {"use": _filled(TEMPLATES / kind / "use.md.template", values).strip()}
    sources = {
        "pyproject.toml": TEMPLATES / "pyproject.toml.template",
        "README.md": TEMPLATES / "README.md.template",
        "LICENSE": TEMPLATES / "LICENSE.template",
        ".gitignore": TEMPLATES / "gitignore.template",
        f"src/{module}/__init__.py": TEMPLATES / kind / "plugin.py.template",
        f"tests/test_{module.removeprefix('gptk_')}.py": TEMPLATES / kind / "test.py.template",
    }
    return {path: _filled(template, values) for path, template in sources.items()}


def _filled(template: Traversable, values: dict[str, str]) -> str:
    return Template(template.read_text(encoding="utf-8")).substitute(values)


def _values(name: str, kind: str) -> dict[str, str]:
    """The values of the placeholders."""
    parts = re.split(r"[-_.]+", name)
    return {
        "name": name,
        "kind": kind,
        "entry": "-".join(parts).lower(),
        "distribution": f"gptk-{'-'.join(parts).lower()}",
        "module": f"gptk_{'_'.join(parts).lower()}",
        "cls": "".join(part[:1].upper() + part[1:] for part in parts),
        "function": "_".join(parts).lower(),
        "api": str(API_VERSION),
        "gptk": DISTRIBUTION,
        "version": __version__.partition("+")[0],
        "year": str(datetime.date.today().year),
        "tutorial": page("tutorial"),
        "hooks": page("hooks", KINDS[_hooked(kind)].hook),
        "contract": _CONTRACT if _has_contract(kind) else "",
        "promises": f", and [every promise with its reason]({page('contracts')})"
        if _has_contract(kind)
        else "",
    }


_CONTRACT = (
    "The contract has the promises that gptk relies on; when one is broken, its test\n"
    "  names it and shows an example."
)


def _has_contract(kind: str) -> bool:
    """Whether gptk.testing has a contract for that kind."""
    return kind != "command"


def _hooked(kind: str) -> str:
    """The kind of plug-in that a template's is."""
    return "processor" if kind == "constraint" else kind


def _check(name: str, kind: str, values: dict[str, str]) -> None:
    """Raises OptionError for a name that cannot be used."""
    if problem := name_problem(name):
        raise OptionError(f"{name!r} cannot be a plug-in's name; {problem}")
    if len(name) > LONGEST_NAME:
        raise OptionError(f"{name!r} has {len(name)} characters; use {LONGEST_NAME} at most")
    cls, module = values["cls"], values["module"]
    if cls.startswith("Test"):  # pytest would collect the class as tests
        raise OptionError(f"the class of {name!r} would be {cls}, a test's name; choose another")
    what, symbol = ("function", values["function"]) if kind == "command" else ("class", cls)
    if not symbol.isidentifier() or keyword.iskeyword(symbol) or _is_used(symbol, kind):
        raise OptionError(
            f"a {kind} called {name!r} would be a {what} {symbol}, which "
            + ("its module uses already" if symbol.isidentifier() else "is no name in Python")
            + "; choose another name"
        )
    taken = provided(_hooked(kind))
    if name in taken:
        raise OptionError(
            f"there is a {kind} {name} already, in {taken[name].distribution}; choose another name"
        )
    if importlib.util.find_spec(module) is not None:
        raise OptionError(f"there is a module {module} already; choose another name")


def _is_used(symbol: str, kind: str) -> bool:
    """Whether the templates use that name for something else, such as pydantic's Field."""
    values = _values("x", kind) | {"cls": "_", "function": "_"}
    names = set()
    for file in ("plugin", "test"):
        source = _filled(TEMPLATES / kind / f"{file}.py.template", values)
        for node in ast.walk(ast.parse(source)):
            match node:
                case ast.Name(id=name) | ast.alias(name=name):
                    names.add(name)
    return symbol in names or hasattr(builtins, symbol)
