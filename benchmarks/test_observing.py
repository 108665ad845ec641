"""What the hooks of decoding observers cost a run that has none: under 1 % of a step.

The decoding loop runs in turns with a copy of itself from which all that is for observers was cut,
on a tiny model (a step as cheap as there is) and on SmolLM2.
"""

import ast
import functools
import inspect

import pytest

from gptk import decoding, language_model
from gptk.testing import tiny_lm
from models import load
from turns import in_turns

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
    full = request.config.option.full
    if request.param == "tiny":
        return request.param, tiny_lm(), *((80, 150) if full else (40, 30))
    return request.param, load("smollm2", "bfloat16"), *((16, 30) if full else (8, 8))


def test_hooks_without_observers(case, report, monkeypatch):
    name, lm, tokens, pairs = case
    results = set()

    def generate_with(loop):
        monkeypatch.setattr(language_model, "Decoding", loop)
        results.add(tuple(lm.generate([1, 2, 3], max_new_tokens=tokens, **SETTINGS).tokens))

    times = in_turns(
        {
            "with": functools.partial(generate_with, decoding.Decoding),
            "without": functools.partial(generate_with, without_observers()),
        },
        rounds=pairs,
    )
    ((made),) = results
    report(
        f"hooks without observers, {name}: {100 * (times['with'] / times['without'] - 1):+.2f} % "
        f"of a step of {1e3 * times['with'] / len(made):.2f} ms, medians of {pairs} runs each, "
        "in turns"
    )
