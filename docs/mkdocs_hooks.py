"""Hooks of mkdocs for pages from outside this folder, and for links to them (see mkdocs.yml).

Some files from elsewhere (README, the changelog, CONTRIBUTING, SECURITY, the examples' READMEs)
become pages. A pattern in the navigation is replaced by the pages that match. A link to a file
outside this folder, which works in the repository, leads to the file's page, or becomes plain text
if it has none. In code, names with hyphens are marked, so that lines are not broken within them.
"""

import os
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[([^\[\]]*)\]\(([^()\s#]+)(#[^()\s]*)?\)")
PUBLISHED = (".md", ".svg", ".png")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"<code\b.*?</code>", re.DOTALL)
# A tag, or a name such as --max-new-tokens, -v or beam-sample.
TAG_OR_NAME = re.compile(r"<[^>]*>|(?<![\w&-])(?:--?[A-Za-z][\w-]*|\w+(?:-\w+)+)")


def outside():
    """The pages made from files outside docs/, by the files' paths in the repository."""
    pages = {
        f"{name}.md": f"{name.lower()}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY")
    }
    pages["README.md"] = "index.md"
    for readme in sorted(ROOT.glob("examples/*/README.md")):
        pages[readme.relative_to(ROOT).as_posix()] = f"examples/{readme.parent.name}.md"
    return pages


def on_config(config):
    config.nav = [expanded(item) for item in config.nav]
    return config


def expanded(item):
    """A navigation item in which patterns are replaced by the pages that match."""
    if isinstance(item, dict):
        return {title: expanded(value) for title, value in item.items()}
    if isinstance(item, list):
        return [expanded(element) for element in item if element]
    if "*" not in item:
        return item
    folder, _, pattern = item.rpartition("/")
    found = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs" / folder).glob(pattern)]
    found += [Path(page) for page in outside().values() if Path(page).match(item)]
    return [{path.stem: path.as_posix()} for path in sorted(found)]


def on_files(files, config):
    for source, page in outside().items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    return files


def on_page_markdown(markdown, page, config, files):
    """Replace links to files by links to the pages made from them."""
    sources = {page: source for source, page in outside().items()}
    here = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def to_page(match):
        text, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        if ":" in target or not (ROOT / path).exists():
            return match[0]  # mkdocs warns of dead links
        destination = site_path(path)
        if destination is None:
            return text
        start = posixpath.dirname(page.file.src_uri)
        return f"[{text}]({posixpath.relpath(destination, start or '.')}{anchor})"

    parts, end = [], 0
    for fence in FENCE.finditer(markdown):  # code is not changed
        parts += [LINK.sub(to_page, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, LINK.sub(to_page, markdown[end:])])


def on_page_content(html, page, config, files):
    """Mark the names with hyphens in code: a line may be broken after a hyphen, but not in them."""

    def marked(match):
        return match[0] if match[0][0] == "<" else f'<span class="whole">{match[0]}</span>'

    return CODE.sub(lambda code: TAG_OR_NAME.sub(marked, code[0]), html)


def site_path(path):
    """The page made from a file of the repository, or a file beside the pages, or None."""
    if path in outside():
        return outside()[path]
    folder, _, rest = path.partition("/")
    return rest if folder == "docs" and os.path.splitext(rest)[1] in PUBLISHED else None
