"""Comparing samplers: the measures against their definitions, and the command."""

import csv
import json
import math
import random
import time
import types
from dataclasses import replace

import numpy
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

import gptk
from gptk.measure.comparison import METRICS, Comparison, compare
from gptk.measure.means import mean
from gptk.measure.plane import plot_comparison
from gptk.testing import tiny_lm
from gptk_plugins.metrics.distinct import distinct
from gptk_plugins.metrics.self_bleu import bleu, self_bleu
from gptk_plugins.metrics.seq_rep import seq_rep
from pictures import SIGNATURES, svg_texts
from program import failing
from program import gptk as run_gptk

text = st.lists(st.integers(0, 4), max_size=12)
groups = st.lists(text, max_size=5)


# --- Measures ---------------------------------------------------------------------------------


@given(groups, st.integers(1, 4))
@example([[]], 1)
def test_measures_are_shares(texts, n):
    for value in (distinct(texts, n), self_bleu(texts, n), *(seq_rep(text, n) for text in texts)):
        assert value is None or 0 <= value <= 1


@given(groups.flatmap(lambda texts: st.tuples(st.just(texts), st.permutations(texts))))
def test_the_order_of_texts_does_not_matter(both):
    texts, permuted = both
    assert distinct(permuted, 2) == distinct(texts, 2)
    assert self_bleu(permuted) == self_bleu(texts)


@given(groups, st.permutations(range(5)))
def test_what_the_tokens_are_called_does_not_matter(texts, names):
    renamed = [[names[token] for token in text] for text in texts]
    assert distinct(renamed, 2) == distinct(texts, 2)
    assert self_bleu(renamed) == self_bleu(texts)
    assert [seq_rep(text, 2) for text in renamed] == [seq_rep(text, 2) for text in texts]


@given(text, st.integers(2, 4))
@example([], 2)
@example([1], 2)
def test_equal_texts_have_self_bleu_1(tokens, n):
    assert self_bleu([tokens] * n) == pytest.approx(1, abs=1e-12)


@given(text.filter(len), text.filter(len))
def test_texts_without_a_common_token_have_self_bleu_0(tokens, more):
    assert self_bleu([tokens, [token + 5 for token in more]]) == 0


@given(text, st.integers(2, 4))
def test_copies_divide_distinct_n(tokens, copies):
    single = distinct([tokens], 2)
    together = distinct([tokens] * copies, 2)
    assert together == (None if single is None else pytest.approx(single / copies))


def test_measures_of_a_text_by_hand():
    words = ["the", "cat", "sat", "on", "the", "cat", "sat", "on", "the", "mat"]
    assert distinct([words], 1) == 5 / 10  # the, cat, sat, on, mat
    assert distinct([words], 2) == 5 / 9
    assert distinct([words, ["the", "mat"]], 2) == 5 / 10
    assert seq_rep(words, 4) == pytest.approx(1 - 5 / 7)
    assert seq_rep(words[:4], 4) == 0
    assert seq_rep(words[:3], 4) is None
    assert distinct([["a"], []], 2) is None
    assert self_bleu([words]) is None
    assert self_bleu([]) is None
    assert mean([None]) is None
    assert mean([1, None, 2]) == 1.5


@settings(max_examples=200)
@given(text.filter(len), st.lists(text, min_size=1, max_size=4))
@example([1, 2, 3, 4], [[1, 2, 3, 4]])
@example([1, 2], [[1, 2, 3], [1]])
@example([1, 1, 1, 1, 1], [[1, 1], [1, 2, 1, 1]])
def test_bleu_equals_nltks(hypothesis, references):
    expected = sentence_bleu(
        references,
        hypothesis,
        smoothing_function=SmoothingFunction().method1,
        auto_reweigh=True,
    )
    assert bleu(hypothesis, references) == pytest.approx(expected, abs=1e-12)


@given(st.lists(text.filter(len), min_size=2, max_size=4))
def test_self_bleu_is_the_mean_of_nltks_bleus(texts):
    one_by_one = [
        sentence_bleu(
            texts[:number] + texts[number + 1 :],
            hypothesis,
            smoothing_function=SmoothingFunction().method1,
            auto_reweigh=True,
        )
        for number, hypothesis in enumerate(texts)
    ]
    assert self_bleu(texts) == pytest.approx(sum(one_by_one) / len(texts), abs=1e-12)


# --- The comparison ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


PROMPTS = ["one", "two words", "three"]


def test_a_comparison_measures_what_generate_makes(lm):
    processors = ["temperature:temperature=0.7"]
    settings = {"n": 3, "max_new_tokens": 12, "seed": 5, "processors": processors}
    top_k, greedy = compare(lm, PROMPTS, ["top-k:k=5", "greedy"], **settings)
    best = lm.generate_batch(PROMPTS, sampler="top-k:k=5", **settings)
    groups = [[result, *result.alternatives] for result in best]
    assert top_k.texts == [[result.text for result in group] for group in groups]
    assert (top_k.sampler, top_k.random, top_k.results) == ("top-k:k=5", True, 3)
    tokens = [[result.tokens for result in group] for group in groups]
    flat = [result for group in groups for result in group]
    assert top_k.tokens == sum(len(result.tokens) for result in flat)
    metrics = top_k.metrics
    assert metrics["distinct:1"] == pytest.approx(mean(distinct(group, 1) for group in tokens))
    assert metrics["distinct:2"] == pytest.approx(mean(distinct(group, 2) for group in tokens))
    assert metrics["self-bleu"] == pytest.approx(mean(self_bleu(group) for group in tokens))
    assert metrics["seq-rep:4"] == pytest.approx(mean(seq_rep(result.tokens, 4) for result in flat))
    assert top_k.tokens_per_second > 0
    # The model's probabilities, not those from which the sampler chose.
    logprobs = [
        value
        for result in flat
        for value in lm.score(result.prompt_tokens + result.tokens).token_logprobs[
            len(result.prompt_tokens) - 1 :
        ]
    ]
    assert metrics["mean-logprob"] == pytest.approx(math.fsum(logprobs) / len(logprobs), abs=1e-5)
    chosen = [value for result in flat for value in result.token_logprobs]
    assert abs(metrics["mean-logprob"] - math.fsum(chosen) / len(chosen)) > 0.1
    assert (greedy.random, greedy.results, greedy.metrics["self-bleu"]) == (False, 1, None)
    assert [len(texts) for texts in greedy.texts] == [1, 1, 1]


def test_a_sampler_gives_as_many_results_as_it_can(lm):
    samplers = ["greedy", "beam:width=2", "beam:width=9", "multinomial"]
    compared = compare(lm, ["x"], samplers, n=4, max_new_tokens=3)
    assert [c.results for c in compared] == [1, 2, 4, 4]
    assert [len(c.texts[0]) for c in compared] == [1, 2, 4, 4]


def test_samplers_have_processors_of_their_own_after_those_of_all(lm):
    from gptk_plugins.processors import Temperature

    samplers = [
        "top-k:5 + temperature:0.7 + repetition-penalty:1.5",
        ("top-k:5", Temperature(temperature=0.7)),
        "top-k:5",
    ]
    settings = {"n": 2, "max_new_tokens": 8, "seed": 3}
    compared = compare(lm, PROMPTS, samplers, processors=["min-p:0.01"], **settings)
    names = [samplers[0], "top-k:5 + temperature:temperature=0.7", "top-k:5"]
    assert [c.sampler for c in compared] == names
    for c, own in zip(
        compared, [["temperature:0.7", "repetition-penalty:1.5"], ["temperature:0.7"], []],
        strict=True,
    ):  # fmt: skip
        processors = ["min-p:0.01", *own]
        best = lm.generate_batch(PROMPTS, sampler="top-k:5", processors=processors, **settings)
        assert c.texts == [[r.text, *(a.text for a in r.alternatives)] for r in best]
    assert len({str(c.texts) for c in compared}) == 3


def test_measures_are_means_over_seeds_with_standard_errors(lm):
    settings = {"n": 2, "max_new_tokens": 8}
    samplers = ["top-k:5", "greedy", "greedy + repetition-penalty:1.2"]
    together = compare(lm, PROMPTS, samplers, seed=5, seeds=3, **settings)
    top_k, greedy, penalty = together
    alone = [compare(lm, PROMPTS, ["top-k:5"], seed=5 + i, **settings)[0] for i in range(3)]
    assert [(m.seed, m.prompt) for m in top_k.measured] == [
        (seed, prompt) for seed in (5, 6, 7) for prompt in range(3)
    ]
    assert [[r.text for r in m.generations] for m in top_k.measured] == [
        texts for each in alone for texts in each.texts
    ]
    for name, value in top_k.metrics.items():
        values = [each.metrics[name] for each in alone]
        assert value == pytest.approx(numpy.mean(values), abs=1e-5)
        expected = numpy.std(values, ddof=1) / 3**0.5
        assert top_k.standard_errors[name] == pytest.approx(expected, abs=1e-5)
        assert [each.standard_errors[name] for each in alone] == [None] * 3
    assert top_k.standard_errors["mean-logprob"] > 0.01
    assert [m.seed for m in greedy.measured] == [5] * 3  # others would give the same
    assert len(penalty.measured) == 9  # a processor may draw
    with pytest.raises(gptk.OptionError, match="seeds is 0; it must be 1 to 10,000"):
        compare(lm, PROMPTS, ["greedy"], seeds=0)


class Lengths(gptk.Metric):
    """The number of tokens up to a most, weighted by the number of the prompt's tokens."""

    name = "lengths"
    most: int = 100

    def measure(self, results, logprobs):
        if self.most == 99:
            raise ZeroDivisionError
        assert [len(each) for each in logprobs] == [len(result.tokens) for result in results]
        return {98: math.nan, 97: "x"}.get(self.most, min(self.most, len(results[0].tokens)))

    def weight(self, results):
        return len(results[0].prompt_tokens)


@pytest.fixture
def lengths():
    plugin = types.ModuleType("lengths")
    plugin.gptk_metrics = gptk.hookimpl(lambda: [Lengths], specname="gptk_metrics")
    gptk.plugins.register(plugin, origin="their-lengths 1.0")
    yield
    gptk.plugins.unregister(plugin)


def test_a_metric_of_a_plugin_is_measured_besides_the_others(lm, model, lengths, tmp_path):
    metrics = ["lengths:most=3", Lengths(), "distinct:n=1"]
    always_ends = replace(lm.tokenizer, eos=(ord("x"), 256))
    (c,) = compare(
        gptk.LanguageModel(lm.model, always_ends), ["a", "abc"], ["multinomial"], n=1,
        max_new_tokens=5, metrics=metrics,
    )  # fmt: skip
    assert [*c.metrics] == [*METRICS, "lengths:most=3", "lengths"]
    one, two = (len(each.generations[0].tokens) for each in c.measured)
    assert c.metrics["lengths"] == pytest.approx((one * 1 + two * 3) / 4)
    assert [each.metrics["lengths:most=3"] for each in c.measured] == [min(3, one), min(3, two)]
    out = run_gptk(
        "compare", "abc", "--model", model, "--sampler", "greedy", "--max-new-tokens", 3, "--json",
        "--metric", "lengths:most=2",
    )  # fmt: skip
    record = json.loads(out.stdout)
    assert record["samplers"][0]["metrics"]["lengths:most=2"] == 2
    assert record["settings"]["metrics"][-1] == "lengths:most=2"
    assert record["plugins"]["metric lengths"] == "their-lengths 1.0"
    (tmp_path / "record.json").write_text(out.stdout)
    assert run_gptk("repeat", tmp_path / "record.json").returncode == 0


@pytest.mark.parametrize(("most", "words"), [
    (99, r"^metric lengths of their-lengths 1.0 .* failed in Lengths.measure.*ZeroDivisionError"),
    (98, r"^metric lengths of .*measure\(\) returned nan; it must return a finite number or None"),
    (97, r"^metric lengths of .*measure\(\) returned 'x'; it must return a finite number or None"),
])  # fmt: skip
def test_a_metric_that_fails_is_named(lm, lengths, most, words):
    with pytest.raises(gptk.PluginError, match=words):
        compare(lm, ["x"], ["greedy"], n=1, max_new_tokens=2, metrics=[f"lengths:most={most}"])


def test_instances_are_called_by_their_spec_and_progress_is_told(lm):
    from gptk_plugins.samplers.top_k import TopKSampler

    told = []
    samplers = [TopKSampler(k=3), "greedy"]
    compared = compare(
        lm, ["x"], samplers, n=1, max_new_tokens=2, progress=lambda *step: told.append(step)
    )
    assert [c.sampler for c in compared] == ["top-k:k=3", "greedy"]
    assert told == [(1, 2), (2, 2)]


def test_results_without_a_token_have_no_measures(lm):
    always_ends = replace(lm.tokenizer, eos=tuple(range(257)))
    [c] = compare(gptk.LanguageModel(lm.model, always_ends), ["x"], ["greedy"])
    assert [*c.metrics.values()] == [None] * 5
    assert (c.tokens, c.texts) == (0, [[""]])


@pytest.mark.parametrize(
    ("samplers", "words"),
    [
        ([], "no sampler to compare was given"),
        (["greedy", "greedy"], "two samplers to compare are equal: greedy and greedy"),
        (["top-k", "top-k:k=50"], "two samplers to compare are equal: top-k and top-k:k=50"),
        (
            ["top-k + min-p", ("top-k:50", "min-p")],
            r"two samplers to compare are equal: top-k \+ min-p and top-k:50 \+ min-p",
        ),
        (["top-k + greedy"], "no processor is called 'greedy'"),
        (["top-k +"], "cannot read 'top-k \\+' from ' \\+' on"),
        ([""], "not a spec: ''"),
        ([()], "not a spec: ''"),
    ],
)
def test_samplers_that_cannot_be_compared(lm, samplers, words):
    with pytest.raises(gptk.GptkError, match=words):
        compare(lm, ["x"], samplers)


# --- The plot ---------------------------------------------------------------------------------


_NAMES = {"mean_logprob": "mean-logprob", "distinct_2": "distinct:2", "self_bleu": "self-bleu"}


def measured(sampler, *, random=True, results=4, **known):
    known = {_NAMES[name]: value for name, value in known.items()}
    return Comparison(
        sampler=sampler, random=random, results=results, measured=[], tokens=8,
        metrics=dict.fromkeys(METRICS) | known, standard_errors=dict.fromkeys(METRICS),
        tokens_per_second=1.0,
    )  # fmt: skip


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn."""
    from matplotlib.figure import Figure

    drawn = []
    original = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (drawn.append(self), original(self, *a, **k))[1]
    )
    return drawn


def points(figure):
    """The plot's points with whether they are hollow, and the name of the x axis."""
    [axes] = figure.axes
    lines = [
        (line.get_xdata()[0], line.get_ydata()[0], line.get_markerfacecolor() == "white")
        for line in axes.get_lines()
    ]
    return lines, axes.get_xlabel()


def test_the_plane_has_a_point_for_each_sampler(figures, tmp_path):
    compared = [
        measured("multinomial", mean_logprob=-4.0, self_bleu=0.1),
        measured("greedy", mean_logprob=-1.0, random=False, results=1),
        measured("nothing:a=$1$", self_bleu=0.5),
    ]
    plot_comparison(compared, tmp_path / "plane.svg")
    assert points(figures[0]) == (
        [(0.9, -4.0, False), (0, -1.0, True)],
        "diversity (1 − self-BLEU)",
    )
    said = svg_texts(tmp_path / "plane.svg")
    assert {"multinomial", "greedy", "mean log-probability (nats/token)"} <= {*said}
    assert "hollow: always the same result" in said
    assert "nothing:a=$1$" not in said


def test_where_self_bleu_cannot_tell_diversity_is_distinct_2(figures, tmp_path):
    alone = [measured("a", mean_logprob=-1.0, distinct_2=0.7, results=1)]
    plot_comparison(alone, tmp_path / "plane.png")
    unlike = [*alone, measured("b$x$", mean_logprob=-2.0, distinct_2=0.4, self_bleu=0.2)]
    plot_comparison(unlike, tmp_path / "plane.png")
    assert points(figures[0]) == ([(0.7, -1.0, False)], "diversity (distinct-2)")
    expected = [(0.7, -1.0, False), (0.4, -2.0, False)]
    assert points(figures[1]) == (expected, "diversity (distinct-2)")
    assert (tmp_path / "plane.png").read_bytes().startswith(SIGNATURES[".png"])
    assert [path.name for path in tmp_path.iterdir()] == ["plane.png"]


def test_the_same_numbers_give_the_same_file(tmp_path):
    compared = [measured("a", mean_logprob=-1.0, self_bleu=0.7)]
    for name in ("one.svg", "two.svg"):
        plot_comparison(compared, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


# --- The command line -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(lm, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small"
    lm.save(path)
    return path


def test_the_table_has_a_line_for_each_sampler(model):
    out = run_gptk(
        "compare", "abc", "--model", model, "--sampler", "top-p:p=0.9", "--sampler", "greedy",
        "--sampler", "beam:width=2", "--n", 3, "--max-new-tokens", 6,
        "--processor", "repetition-penalty:penalty=1.3", "--metric", "distinct:3",
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    lines = out.stdout.splitlines()
    head = ["Sampler", "Results", *METRICS, "distinct:3", "tokens/s", "Text"]
    assert lines[0].split() == head
    for name in ("top-p:p=0.9    3", "greedy    1 of 3", "beam:width=2    2 of 3"):
        words = name.split()
        assert any(line.split()[: len(words)] == words for line in lines)
    assert "greedy has one result for a prompt." in lines
    assert "beam:width=2 has at most 2 results for a prompt." in lines
    assert "mean-logprob: The mean log-probability of the new tokens" in out.stdout


def test_json_is_one_object_with_settings_metrics_and_texts(model, tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n\ntwo words\n")
    args = (
        "compare", "--model", model, "--prompts-file", tmp_path / "prompts.txt", "--json",
        "--sampler", "top-p:p=0.9", "--sampler", "greedy", "--n", 2, "--max-new-tokens", 5,
        "--seed", 7, "--processor", "temperature:temperature=2",
    )  # fmt: skip
    out = run_gptk(*args)
    object_ = json.loads(out.stdout)
    top_p, greedy = object_["samplers"]
    assert [prompt["prompt"] for prompt in object_["prompts"]] == ["one", "two words"]
    assert object_["settings"] == {
        "processors": ["temperature:temperature=2.0"],
        "n": 2,
        "max_new_tokens": 5,
        "seed": 7,
        "seeds": 1,
        "metrics": [
            "mean-logprob", "distinct:n=1", "distinct:n=2", "seq-rep:n=4", "self-bleu:n=4",
        ],
    }  # fmt: skip
    assert (top_p["sampler"], top_p["random"], top_p["results"]) == ("top-p:p=0.9", True, 2)
    assert [len(each["generations"]) for each in top_p["measured"]] == [2, 2]
    assert [len(each["generations"]) for each in greedy["measured"]] == [1, 1]
    measures = {"mean-logprob", "distinct:1", "distinct:2", "seq-rep:4", "self-bleu"}
    assert top_p["metrics"].keys() == greedy["metrics"].keys() == measures
    assert greedy["metrics"]["self-bleu"] is None
    again = json.loads(run_gptk(*args).stdout)["samplers"][0]
    assert again["measured"] == top_p["measured"]


def test_the_texts_are_those_of_generate(model):
    args = ("abc", "--model", model, "--sampler", "top-k:k=9", "--n", 2, "--seed", 3, "--json")
    compared = json.loads(run_gptk("compare", *args).stdout)["samplers"][0]
    generated = json.loads(run_gptk("generate", *args).stdout)
    groups = [each["generations"] for each in compared["measured"]]
    assert [[result["text"] for result in group] for group in groups] == [
        [generated["text"], generated["alternatives"][0]["text"]]
    ]


def test_the_prompt_can_come_from_standard_input(model):
    args = ("compare", "--model", model, "--sampler", "greedy", "--max-new-tokens", 3, "--json")
    (prompt,) = json.loads(run_gptk(*args, stdin="abc\n").stdout)["prompts"]
    assert prompt["prompt"] == "abc"


def test_the_table_in_a_file_has_a_row_for_each_sampler_prompt_and_seed(model, tmp_path):
    (tmp_path / "prompts.txt").write_text('one\n"two", words\n')
    out = run_gptk(
        "compare", "--model", model, "--prompts-file", tmp_path / "prompts.txt", "--seeds", 2,
        "--sampler", "top-p + min-p:0.1", "--sampler", "greedy", "--n", 2, "--max-new-tokens", 5,
        "--csv", tmp_path / "t.csv",
    )  # fmt: skip
    assert (out.returncode, out.stderr) == (0, f"table: {tmp_path / 't.csv'}\n")
    assert "±" in out.stdout
    with (tmp_path / "t.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    keys = [(row["sampler"], row["index"], row["prompt"], row["seed"]) for row in rows]
    texts = ["one", '"two", words']
    top_p = [("top-p + min-p:0.1", str(i), texts[i], seed) for seed in "01" for i in range(2)]
    assert keys == [*top_p, *[("greedy", str(i), texts[i], "0") for i in range(2)]]
    names = ["mean-logprob", "distinct:1", "distinct:2", "seq-rep:4", "self-bleu"]
    assert [*rows[0]] == ["sampler", "index", "id", "prompt", "seed", "results", "tokens", *names]
    compared = compare(gptk.load(model), texts, ["greedy"], n=2, max_new_tokens=5)[0].measured
    for row, each in zip(rows[4:], compared, strict=True):
        assert (row["results"], row["self-bleu"]) == ("1", "")
        assert float(row["mean-logprob"]) == pytest.approx(each.metrics["mean-logprob"], abs=1e-4)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_plot_is_written(model, tmp_path, suffix):
    target = tmp_path / f"plane{suffix}"
    out = run_gptk(
        "compare", "x", "--model", model, "--sampler", "multinomial", "--sampler", "greedy",
        "--max-new-tokens", 4, "--plot", target,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert out.stderr == f"plot: {target}\n"
    assert target.read_bytes().startswith(SIGNATURES[suffix])


def test_bad_input_is_one_line_before_the_model_is_loaded(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.txt").write_text("\n")
    greedy = ("--sampler", "greedy")
    for args, words, code in [
        ((), "name one sampler or more", 2),
        (("--sampler", "bean"), "no sampler is called 'bean'; did you mean beam?", 2),
        (("--sampler", "top-p:p=2"), "p=2 is not allowed", 2),
        ((*greedy, *greedy), "are equal: greedy and greedy", 2),
        ((*greedy, "--processor", "top-n"), "no processor is called 'top-n'", 2),
        ((*greedy, "--csv", tmp_path / "no" / "x.csv"), "there is no directory", 1),
        ((*greedy, "--seeds", 0), "0 is not in the range 1<=x<=10000", 2),
        ((*greedy, "--metric", "self-blue"), "no metric is called 'self-blue'", 2),
        ((*greedy, "--n", 0), "0 is not in the range 1<=x<=100000", 2),
        ((*greedy, "--plot", tmp_path / "x.txt"), "allowed: .png, .svg", 2),
        ((*greedy, "--plot", tmp_path / "no" / "x.png"), "there is no directory", 1),
        ((*greedy, "--prompts-file", tmp_path / "none.txt"), "none.txt", 2),
        ((*greedy, "--prompts-file", tmp_path / "x.bin"), "line 1: byte 1 is not UTF-8 text", 1),
        ((*greedy, "--prompts-file", tmp_path / "empty.txt"), "has no prompts", 1),
    ]:
        assert words in failing("compare", "--model", "no/such/model", *args, code=code)
    both = ("compare", "x", *greedy, "--prompts-file", tmp_path / "empty.txt")
    assert "not both" in failing(*both, code=2)
    assert "no/such/model" in failing("compare", "x", *greedy, "--model", "no/such/model", code=1)


def test_many_results_are_found_and_measured_in_time_that_grows_with_them(lm):
    """Not with their square: that of 3,000 texts takes minutes; nor one by one, down from 10^9."""
    from gptk.measure.strategies import check_samplers

    assert [s.results for s in check_samplers(["greedy", "beam:width=7"], 10**9)] == [1, 7]
    choose = random.Random(0)
    texts = [[choose.randrange(50) for _ in range(20)] for _ in range(3000)]
    start = time.monotonic()
    value = self_bleu(texts)
    assert time.monotonic() - start < 20
    some = [*texts[:4], *texts[2:4]]
    assert self_bleu(some) == pytest.approx(
        mean(bleu(text, [*some[:i], *some[i + 1 :]]) for i, text in enumerate(some))
    )
    assert 0 < value < 1


class EndedBy(gptk.Sampler):
    """Greedy, but Ctrl-C comes at its third step."""

    name = "ended-by-ctrl-c"

    def step(self, logits, rows):
        if rows.lengths[0] - rows.prompt_lengths[0] == 2:
            raise KeyboardInterrupt
        return gptk.Choice.one_each(logits.argmax(-1), logits, rows)


@pytest.fixture
def ctrl_c():
    """A sampler for the command line during which Ctrl-C comes."""
    plugin = types.ModuleType("ctrl_c")
    plugin.gptk_samplers = gptk.hookimpl(lambda: [EndedBy], specname="gptk_samplers")
    gptk.plugins.register(plugin)
    yield "ended-by-ctrl-c"
    gptk.plugins.unregister(plugin)


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_leaves_the_samplers_that_are_done(model, ctrl_c, as_json):
    out = run_gptk(
        "compare", "abc", "--model", model, "--sampler", "greedy", "--sampler", ctrl_c,
        "--sampler", "top-p", "--max-new-tokens", 5, *(["--json"] if as_json else []),
    )  # fmt: skip
    assert out.returncode == 130
    assert out.stderr == "interrupted: 1 of 3 samplers compared\n"
    if as_json:
        record = json.loads(out.stdout)
        assert [sampler["sampler"] for sampler in record["samplers"]] == ["greedy"]
    else:
        assert "greedy" in out.stdout
        assert "top-p" not in out.stdout


def test_ctrl_c_before_the_first_sampler_leaves_a_valid_object(model, ctrl_c):
    args = ("compare", "abc", "--model", model, "--sampler", ctrl_c)
    assert json.loads(run_gptk(*args, "--json").stdout)["samplers"] == []
    out = run_gptk(*args)
    assert (out.stdout, out.returncode) == ("", 130)
