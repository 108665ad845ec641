"""Reading the files of plots."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

SIGNATURES = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
"""What files of these kinds begin with."""


def svg_texts(path: Path) -> list[str]:
    """All that an SVG says: matplotlib leaves each text as a comment."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    root: Any = ElementTree.parse(path, parser).getroot()
    return [node.text.strip() for node in root.iter() if node.tag is ElementTree.Comment]
