"""What the site needs beside the pages in this folder, called by mkdocs (see mkdocs.yml).

Pages that stand elsewhere (the changelog, the examples' READMEs) come in; a pattern in the
navigation becomes the pages that match; and links that leave this folder, which work where the
repository is browsed, lead to the page that a file has become, or are text where it is none.
"""

import os
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[([^\[\]]*)\]\(([^()\s#]+)(#[^()\s]*)?\)")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)


def outside():
    """Pages of the site that stand outside docs/, by their path in the repository."""
    pages = {"CHANGELOG.md": "changelog.md"}
    for readme in sorted(ROOT.glob("examples/*/README.md")):
        pages[readme.relative_to(ROOT).as_posix()] = f"examples/{readme.parent.name}.md"
    return pages


def on_config(config):
    config.nav = [expanded(item) for item in config.nav]
    return config


def expanded(item):
    """A navigation item with the pages in place of a pattern."""
    if isinstance(item, dict):
        return {title: expanded(value) for title, value in item.items()}
    if isinstance(item, list):
        return [expanded(one) for one in item if one]
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
    """Lead links to where their file stands on the site."""
    sources = {page: source for source, page in outside().items()}
    here = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def moved(match):
        text, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        if ":" in target or not (ROOT / path).exists():
            return match[0]  # mkdocs says so if it leads nowhere
        to = site_path(path)
        if to is None:
            return text
        start = posixpath.dirname(page.file.src_uri)
        return f"[{text}]({posixpath.relpath(to, start or '.')}{anchor})"

    parts, end = [], 0
    for fence in FENCE.finditer(markdown):  # code stays as it is
        parts += [LINK.sub(moved, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, LINK.sub(moved, markdown[end:])])


def site_path(path):
    """The page that a file of the repository has become, or None."""
    if path == "README.md":
        return "index.md"
    if path in outside():
        return outside()[path]
    folder, _, rest = path.partition("/")
    return rest if folder == "docs" and os.path.splitext(rest)[1] == ".md" else None
