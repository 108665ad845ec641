"""Mutation check of the kit: a broken plug-in or model fails the promise that it breaks."""

import ast
import importlib
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from environments import fresh_environment
from gptk import distribution, testing

FOLDER = Path(__file__).parent
PLUGINS, MODELS = FOLDER / "broken_plugins.py", FOLDER / "broken_models.py"
SECONDS = 10
"""How long the tests of a broken plug-in may take, all promises together."""
NOT_BROKEN = {"it decodes the same in every way"}
"""What breaks this breaks a promise before it; it is tried all the same, as all others serve it."""


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


def run_pytest(file, tmp_path, *options, shuffle=None):
    """What pytest says of a file: by class the messages of failures by test, and seconds.

    shuffle: a seed for the order of the tests, the hashes of texts and Hypothesis.
    """
    report = tmp_path / "report.xml"
    settings = {
        "PYTEST_ADDOPTS": "",
        "PYTHONPATH": f"{FOLDER}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    options = ["-p", "no:cacheprovider", "-p", "shuffled", *options]
    if shuffle is not None:
        settings |= {"SHUFFLE": str(shuffle), "PYTHONHASHSEED": str(shuffle)}
        options.append(f"--hypothesis-seed={shuffle}")
    out = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=line", *options, f"--junitxml={report}", file],
        env=os.environ | settings,
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
    )
    assert report.exists(), out.stdout + out.stderr
    messages, seconds = {}, {}
    for case in ET.parse(report).iter("testcase"):
        name = case.get("classname").rpartition(".")[2]
        messages.setdefault(name, {})
        seconds[name] = seconds.get(name, 0) + float(case.get("time"))
        for failure in case.iter("failure"):
            messages[name][case.get("name")] = failure.get("message")
        assert not list(case.iter("error")), ET.tostring(case)
    return messages, seconds


def check_named(file, found, *, once=True):
    """Each class fails with the promise that it breaks, and with no other.

    once: a single test fails. In another order a test of a later promise may have failed first, and
    named the cause; then the test of the cause itself fails, too.
    """
    for name, promise in promises_by_class(file).items():
        messages = found[name]
        if promise is None:
            assert not messages, name
            continue
        assert messages, f"{name} is not caught"
        anchor = promise.replace(" ", "-")
        for message in messages.values():
            assert f"BrokenPromise: promise broken: {promise}. {name}: " in message
            assert f"See {distribution.page('contracts', anchor)}" in message
            assert "\n" not in message.partition(". See ")[0]
        if once:
            assert len(messages) == 1, f"{name}: {list(messages)}"


@pytest.mark.slow
@pytest.mark.parametrize("file", [PLUGINS, MODELS], ids=lambda file: file.stem)
def test_each_broken_promise_is_named_alone_and_soon(file, tmp_path):
    found, seconds = run_pytest(file, tmp_path)
    check_named(file, found)
    assert {name: time for name, time in seconds.items() if time > SECONDS} == {}


@pytest.mark.slow
@pytest.mark.parametrize("file", [PLUGINS, MODELS], ids=lambda file: file.stem)
@pytest.mark.parametrize("seed", range(2))
def test_each_is_named_in_any_order_of_the_tests(file, seed, tmp_path):
    check_named(file, run_pytest(file, tmp_path, shuffle=seed)[0], once=False)


@pytest.mark.parametrize(
    ("name", "test"),
    [
        ("TestWander", "test_masked_tokens_are_never_chosen"),
        pytest.param(  # here its cause is not seen by itself
            *("TestTires", "test_its_state_follows_the_rows"), marks=pytest.mark.slow
        ),
    ],
)
def test_a_promise_that_is_tried_alone_names_the_cause_too(name, test, tmp_path):
    found, _ = run_pytest(PLUGINS, tmp_path, f"-k={name} and {test}")
    for message in found[name].values():
        assert f"promise broken: {promises_by_class(PLUGINS)[name]}. {name}" in message


@pytest.mark.parametrize("file", [PLUGINS, MODELS], ids=lambda file: file.stem)
def test_every_promise_is_broken_by_one(file, monkeypatch):
    """For models and for each kind of plug-in."""
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module(file.stem)
    broken = {}
    for name, promise in promises_by_class(file).items():
        for contract in getattr(module, name).__mro__:
            broken.setdefault(contract, set()).add(promise)
    for name in testing.__all__:
        contract = getattr(testing, name)
        if name.endswith("Contract") and (contract is testing.ModelContract) == (file == MODELS):
            tests = [attribute for attribute in vars(contract) if attribute.startswith("test_")]
            promises = {test.removeprefix("test_").replace("_", " ") for test in tests}
            assert promises - broken.get(contract, set()) <= NOT_BROKEN, name


FAULTY = """
    def step(self, logits, rows):
        tokens = logits.topk(2).indices
        second = rows.uniform() < 0.25
        return gptk.Choice.one_each(tokens[:, 1].where(second, tokens[:, 0]), logits, rows)


@gptk.hookimpl
"""


@pytest.mark.slow
def test_a_new_sampler_with_the_tutorials_fault_is_caught_each_time(tmp_path):
    """A package of `gptk plugins new`, installed, with the fault that the tutorial has in it."""
    environment = fresh_environment(tmp_path / "environment")
    folder = tmp_path / "package"
    environment.run("gptk", "plugins", "new", "wander", "--kind", "sampler", "--out", folder)
    (source,) = (folder / "src").glob("*/__init__.py")
    begin, _, rest = source.read_text().partition("\n    def step")
    source.write_text(begin + FAULTY + rest.partition("@gptk.hookimpl\n")[2])
    environment.install(f"{folder}[test]", editable=True)
    named = "promise broken: masked tokens are never chosen. TestWander: with only the tokens {"
    for seed in range(20):
        ran = environment.run(
            "pytest", "-q", "-p", "no:cacheprovider", f"--hypothesis-seed={seed}",
            "-k", "TestWander", cwd=folder, check=False,
        )  # fmt: skip
        assert named in ran.stdout, ran.stdout
        assert ran.stdout.count("FAILED") == 1
