"""What is in files of plots."""

from xml.etree import ElementTree

SIGNATURES = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
"""What files of these kinds begin with."""


def svg_texts(path):
    """All that an SVG says: matplotlib leaves each text as a comment."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    root = ElementTree.parse(path, parser).getroot()
    return [one.text.strip() for one in root.iter() if one.tag is ElementTree.Comment]
