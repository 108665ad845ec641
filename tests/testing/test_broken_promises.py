"""Mutation check of the kit: a broken plug-in or model fails the promise that it breaks."""

import ast
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from gptk.testing import ModelContract

FOLDER = Path(__file__).parent
PLUGINS, MODELS = FOLDER / "broken_plugins.py", FOLDER / "broken_models.py"


def promises_by_class(file):
    """For each test class of a file the promise that it breaks, None for one that keeps all."""
    return {
        node.name: next(
            item.value.value
            for item in node.body
            if isinstance(item, ast.Assign) and item.targets[0].id == "breaks"
        )
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name.startswith("Test")
    }


def failures(file, tmp_path):
    """What pytest says of each class of a file: messages by class and promise."""
    report = tmp_path / "report.xml"
    options = ["-p", "no:cacheprovider", "--hypothesis-profile=no-shrinking"]
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=line", *options, f"--junitxml={report}", file],
        env={**os.environ, "PYTEST_ADDOPTS": ""},
        check=False,
        capture_output=True,
    )
    found = {name: {} for name in promises_by_class(file)}
    for case in ET.parse(report).iter("testcase"):
        of_class = found[case.get("classname").rpartition(".")[2]]
        for failure in case.iter("failure"):
            promise = case.get("name").removeprefix("test_").replace("_", " ")
            of_class[promise] = failure.get("message")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("file", [PLUGINS, MODELS], ids=lambda file: file.stem)
def test_each_broken_promise_is_named(file, tmp_path):
    found = failures(file, tmp_path)
    for name, promise in promises_by_class(file).items():
        messages = found[name]
        if promise is None:
            assert not messages, name
        else:
            assert promise in messages, name
        for broken, message in messages.items():
            assert f"BrokenPromise: promise broken: {broken}. {name}: " in message
            assert f"See docs/contracts.md#{broken.replace(' ', '-')}" in message


def test_every_promise_of_models_is_broken_by_one():
    promises = {
        name.removeprefix("test_").replace("_", " ")
        for name in vars(ModelContract)
        if name.startswith("test_")
    }
    assert promises == set(promises_by_class(MODELS).values()) - {None}
