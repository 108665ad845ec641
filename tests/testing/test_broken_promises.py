"""Mutation check of the kit: what broken_plugins.py breaks is caught, and named."""

import ast
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

FILE = Path(__file__).with_name("broken_plugins.py")
CASES = {
    node.name: next(
        item.value.value
        for item in node.body
        if isinstance(item, ast.Assign) and item.targets[0].id == "breaks"
    )
    for node in ast.parse(FILE.read_text(encoding="utf-8")).body
    if isinstance(node, ast.ClassDef) and node.name.startswith("Test")
}


@pytest.fixture
def failures(tmp_path):
    """What pytest says of each class: messages by class and promise."""
    report = tmp_path / "report.xml"
    options = ["-p", "no:cacheprovider", "--hypothesis-profile=no-shrinking"]
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=line", *options, f"--junitxml={report}", FILE],
        env={**os.environ, "PYTEST_ADDOPTS": ""},
        check=False,
        capture_output=True,
    )
    found = {name: {} for name in CASES}
    for case in ET.parse(report).iter("testcase"):
        of_class = found[case.get("classname").rpartition(".")[2]]
        for failure in case.iter("failure"):
            promise = case.get("name").removeprefix("test_").replace("_", " ")
            of_class[promise] = failure.get("message")
    return found


def test_each_broken_promise_is_named(failures):
    for name, promise in CASES.items():
        said = failures[name]
        if promise is None:
            assert not said, name
        else:
            assert promise in said, name
        for broken, text in said.items():
            assert f"BrokenPromise: promise broken: {broken}. {name}: " in text
            assert f"See docs/contracts.md#{broken.replace(' ', '-')}" in text
