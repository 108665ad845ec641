"""The reference pages are up to date with docs/build.py, and their examples run."""

import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gptk
import gptk.testing
from gptk.hooks import hookspecs
from gptk.plugins.kinds import KINDS
from gptk.plugins.registry import provided

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [
    pytest.param(kind, plugin, id=f"{kind}-{plugin.name}")
    for kind in ("sampler", "processor", "drafter")
    for plugin in provided(kind).values()
    if plugin.distribution.startswith("gptk-decoding ")
]


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("build", DOCS / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_up_to_date(build, capsys):
    assert build.main(["--check"]) == 0, capsys.readouterr().out


def test_the_page_of_hooks_says_the_purpose_of_each_once():
    page = (DOCS / "hooks.md").read_text(encoding="utf-8")
    for kind in KINDS.values():
        purpose = " ".join(inspect.getdoc(getattr(hookspecs, kind.hook)).split()).rstrip(".")
        assert page.count(purpose) == 1


@pytest.mark.parametrize(("kind", "plugin"), PAGES)
def test_a_page_has_formula_options_and_a_run(kind, plugin):
    text = (DOCS / f"{kind}s" / f"{plugin.name}.md").read_text(encoding="utf-8")
    docstring = inspect.getmodule(plugin.item).__doc__
    assert docstring.strip() in text
    if kind != "drafter":
        assert re.search(r"^\$\$.+?\$\$$", docstring, re.MULTILINE | re.DOTALL), "no formula"
    for option in plugin.item.model_fields:
        assert f"| `{option}` |" in text
    run = r"```sh\ngptk generate .*\n```\n\n````text\n(.*\n)+````\n\n\d+ tokens?, score "
    assert re.search(run, text)


@pytest.mark.slow
def test_the_picture_on_the_first_page_shows_what_its_commands_print():
    picture = [sys.executable, DOCS / "picture.py", "--check"]
    assert subprocess.run(picture, check=False).returncode == 0


def test_the_index_names_every_page():
    text = (DOCS / "reference.md").read_text(encoding="utf-8")
    for page in DOCS.glob("*ers/*.md"):
        assert f"({page.relative_to(DOCS)})" in text


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_of_hooks_says_what_a_class_may_override(kind):
    hook = KINDS[kind].hook
    text = (DOCS / "hooks.md").read_text(encoding="utf-8")
    section = text.partition(f"\n## {hook}\n")[2].partition("\n## ")[0]
    assert re.search(r"\n- on the command line: `gptk .*NAME.*`\n", section)
    base = KINDS[kind].base
    for name, value in vars(base).items():
        if base.__module__.startswith("gptk.") and inspect.isfunction(value) and name[0] != "_":
            assert f"| `{name}(" in section
            needed = "raise NotImplementedError" in inspect.getsource(value)
            assert (f"| `{name}{_parameters(value)}` (needed) |" in section) == needed


def _parameters(function):
    return "(" + ", ".join(inspect.signature(function).parameters) + ")"


def test_the_api_page_has_every_public_name_once():
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    for prefix, names in ((r"gptk\.", gptk.__all__), (r"gptk\.testing\.", gptk.testing.__all__)):
        shown = re.findall(rf"^::: {prefix}(\w+)$", text, re.MULTILINE)
        assert sorted(shown) == sorted({*names} - {"__version__"})


@pytest.fixture(scope="module")
def lm():
    return gptk.load("smollm2", device="cpu", dtype="float32")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "plugin"), PAGES)
def test_the_example_of_a_page_runs(kind, plugin, build, lm):
    settings = build.arguments(kind, plugin.name, build.example(plugin))
    prompt = build.PROMPTS.get((kind, plugin.name), build.STORY)
    text = build.result(lm, prompt, settings)
    assert text.removeprefix("````text\n").startswith(prompt.splitlines()[0].rstrip())
