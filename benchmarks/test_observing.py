"""The cost of the hooks for decoding observers in a run without observers: under 1 % of a step.

The decoding loop runs in turns with a copy of itself without the code for observers, on a tiny
model (with the cheapest steps) and on SmolLM2.
"""

import ast
import functools
import inspect

import pytest

from gptk.decoding import run, stream
from gptk.testing import tiny_lm
from models import load
from turns import in_turns

SETTINGS = {
    "sampler": "multinomial",
    "processors": ["temperature:temperature=0.9", "top-k:k=40", "top-p:p=0.9"],
    "ignore_eos": True,
    "seed": 0,
}


class _ObserverRemover(ast.NodeTransformer):
    """Removes what a choice does for those who look at its logits."""

    removed = 0

    def visit_Attribute(self, node):
        if ast.unparse(node) != "self._watched":
            return self.generic_visit(node)
        self.removed += 1
        return ast.Constant(value=False)

    def visit_If(self, node):
        if not ast.unparse(node.test).startswith("self._listeners"):
            return self.generic_visit(node)
        self.removed += 1
        return None

    def visit_Expr(self, node):
        if not ast.unparse(node).startswith("self._observed.moved"):
            return self.generic_visit(node)
        self.removed += 1
        return None


def without_observers():
    """The class Decoding without its code for observers."""
    remover = _ObserverRemover()
    tree = remover.visit(ast.parse(inspect.getsource(run)))
    assert remover.removed == 4
    names = dict(vars(run))
    exec(compile(ast.fix_missing_locations(tree), "decoding without observers", "exec"), names)
    return names["Decoding"]


@pytest.fixture(params=["tiny", "smollm2"])
def case(request):
    full = request.config.option.full
    if request.param == "tiny":
        return request.param, tiny_lm(), *((80, 150) if full else (40, 30))
    return request.param, load("smollm2", "bfloat16"), *((16, 30) if full else (8, 8))


def test_hooks_without_observers(case, report, monkeypatch):
    name, lm, tokens, pairs = case
    results = set()

    def generate_with(loop):
        monkeypatch.setattr(stream, "Decoding", loop)
        results.add(tuple(lm.generate([1, 2, 3], max_new_tokens=tokens, **SETTINGS).tokens))

    times = in_turns(
        {
            "with": functools.partial(generate_with, run.Decoding),
            "without": functools.partial(generate_with, without_observers()),
        },
        rounds=pairs,
    )
    (text,) = results
    report(
        f"hooks without observers, {name}: {100 * (times['with'] / times['without'] - 1):+.2f} % "
        f"of a step of {1e3 * times['with'] / len(text):.2f} ms, medians of {pairs} runs each, "
        "in turns"
    )
