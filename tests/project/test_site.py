"""docs/mkdocs_hooks.py: pages from elsewhere in the repository, and links that lead to them."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("mkdocs_hooks", ROOT / "docs/mkdocs_hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("page", "markdown", "wanted"),
    [
        ("chat.md", "[a](../CHANGELOG.md)", "[a](changelog.md)"),
        ("index.md", "[a](docs/chat.md) ![b](docs/c.svg)", "[a](chat.md) ![b](docs/c.svg)"),
        ("benchmarks/results.md", "![a](ratios.svg)", "![a](ratios.svg)"),
        ("samplers/beam.md", "[a](../../README.md#use-it)", "[a](../index.md#use-it)"),
        ("changelog.md", "[a](docs/chat.md)", "[a](chat.md)"),
        ("chat.md", "[`hookspecs.py`](../toolkit/gptk/hooks/hookspecs.py)", "`hookspecs.py`"),
        ("chat.md", "[a](decoding.md#b) [c](#d)", "[a](decoding.md#b) [c](#d)"),
        ("index.md", "[a](https://pypi.org/project/gptk/)", "[a](https://pypi.org/project/gptk/)"),
        ("index.md", "[a](../is-not-there.md)", "[a](../is-not-there.md)"),
        ("index.md", "```py\nx[0](../README.md)\n```\n", "```py\nx[0](../README.md)\n```\n"),
    ],
)
def test_links_to_files_lead_to_their_pages(page, markdown, wanted, hooks):
    on_site = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    assert hooks.on_page_markdown(markdown, on_site, None, None) == wanted


def test_links_of_an_example_lead_to_the_docs(hooks):
    source = "examples/gptk-lz-penalty/README.md"
    assert (ROOT / source).exists()
    on_site = SimpleNamespace(file=SimpleNamespace(src_uri=hooks.outside()[source]))
    links = "[a](../../docs/hooks.md) [b](../../CHANGELOG.md)"
    got = hooks.on_page_markdown(links, on_site, None, None)
    assert got == "[a](../hooks.md) [b](../changelog.md)"


@pytest.mark.parametrize(
    ("html", "wanted"),
    [
        ("<code>gptk --no-cache x</code>", "<code>gptk WHOLE(--no-cache) x</code>"),
        ("<code>beam-sample:2,a</code>", "<code>WHOLE(beam-sample):2,a</code>"),
        ('<code>"&quot;top-p&quot; - 1</code>', '<code>"&quot;WHOLE(top-p)&quot; - 1</code>'),
        ('<code><a id="a-b">-v</a></code>', '<code><a id="a-b">WHOLE(-v)</a></code>'),
        ("<p>top-p</p> <code>p</code>", "<p>top-p</p> <code>p</code>"),
    ],
)
def test_names_with_hyphens_are_marked_in_code(html, wanted, hooks):
    wanted = wanted.replace("WHOLE(", '<span class="whole">').replace(")", "</span>")
    assert hooks.on_page_content(html, None, None, None) == wanted


def test_every_page_is_in_the_navigation_once(hooks):
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    nav = hooks.expanded(yaml.safe_load(f"nav:{text}")["nav"])
    found = sorted(pages(nav))
    docs = [path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")]
    assert found == sorted([*docs, *hooks.outside().values()])


def pages(nav):
    for item in nav:
        (value,) = item.values()
        yield from [value] if isinstance(value, str) else pages(value)
