"""Plots of training runs: what is drawn, in which formats, and what is refused."""

import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from gptk.metrics import MetricsFile
from gptk.plotting import _History, _labels, plot_runs
from test_cli import failing, gptk

SIGNATURES = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


def make_run(path, steps=50, every=10, **more):
    """A run's metrics, with a loss that falls."""
    path.mkdir(parents=True)
    file = MetricsFile(path / "metrics.jsonl")
    for step in range(steps + 1):
        loss = 1 + 4 / (1 + step)
        common = {"step": step, "tokens": 64 * step}
        if step:
            file.record({"kind": "step", **common, "loss": loss, "lr": 0.1 / step, **more})
        if every and step % every == 0:
            losses = {"train_loss": loss, "validation_loss": loss + 0.1}
            file.record({"kind": "evaluation", **common, **losses, "epoch": 0.0})
    file.close()
    return path


def texts(path):
    """All that an SVG says: matplotlib leaves each text as a comment."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    root = ElementTree.parse(path, parser).getroot()
    return [one.text.strip() for one in root.iter() if one.tag is ElementTree.Comment]


@pytest.mark.parametrize("suffix", SIGNATURES)
def test_formats_by_suffix_and_the_same_bytes_again(suffix, tmp_path):
    run = make_run(tmp_path / "run", grad_norm=1.5)
    for name in ("one", "other"):
        plot_runs([run], tmp_path / f"{name}{suffix}")
    data = (tmp_path / f"one{suffix}").read_bytes()
    assert data.startswith(SIGNATURES[suffix])
    assert data == (tmp_path / f"other{suffix}").read_bytes()
    assert {one.name for one in tmp_path.iterdir()} == {"run", f"one{suffix}", f"other{suffix}"}


def test_panels_have_names_and_units(tmp_path):
    run = make_run(tmp_path / "run", grad_norm=1.5)
    plot_runs([run], tmp_path / "plot.svg", title="A run")
    said = texts(tmp_path / "plot.svg")
    for text in (
        "A run",
        "loss (nats/token)",
        "tokens seen",
        "step",
        "perplexity",
        "learning rate",
        "Gradient norm",
        "training",
        "validation",
    ):
        assert text in said, text


def test_the_gradient_norm_has_a_panel_only_if_it_was_recorded(tmp_path):
    plot_runs([make_run(tmp_path / "run")], tmp_path / "plot.svg")
    assert "Gradient norm" not in texts(tmp_path / "plot.svg")


def test_several_runs_are_told_apart_by_name(tmp_path):
    runs = [make_run(tmp_path / name) for name in ("a/run", "b/run", "c/other")]
    plot_runs(runs, tmp_path / "plot.svg")
    assert {"a/run", "b/run", "c/other"} <= set(texts(tmp_path / "plot.svg"))
    assert _labels([tmp_path / "x/one", tmp_path / "x/two"]) == ["one", "two"]


@pytest.mark.parametrize(("steps", "every"), [(1, 0), (0, 1), (1, 1)])
def test_a_single_point_or_no_evaluation_is_enough(steps, every, tmp_path):
    plot_runs([make_run(tmp_path / "run", steps, every)], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_long_run_is_thinned_to_means(tmp_path):
    history = _History(make_run(tmp_path / "run", steps=9_999, every=0))
    steps, losses = history.step("step", "loss")
    assert len(steps) == len(losses) <= 2000
    assert steps[0] == np.mean([1, 2, 3, 4, 5])
    assert losses[0] == pytest.approx(np.mean([1 + 4 / (1 + s) for s in range(1, 6)]))


def test_skipped_steps_leave_a_gap_not_an_error(tmp_path):
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 51, "tokens": 1, "loss": null, "lr": 0.1}\n')
    plot_runs([run], tmp_path / "plot.png")


def test_pyplot_is_left_alone(tmp_path):
    loaded = "matplotlib.pyplot" in sys.modules
    plot_runs([make_run(tmp_path / "run")], tmp_path / "plot.png")
    assert ("matplotlib.pyplot" in sys.modules) == loaded


class TestCommand:
    def test_says_where_the_plot_is(self, tmp_path, monkeypatch):
        runs = [make_run(tmp_path / name) for name in ("a", "b")]
        assert gptk("plot", runs[0]).stdout == f"{runs[0]}/losses.png\n"
        monkeypatch.chdir(tmp_path)
        assert gptk("plot", *runs).stdout == "losses.png\n"
        assert (tmp_path / "losses.png").exists()

    def test_refuses_in_one_line(self, tmp_path):
        run = make_run(tmp_path / "run")
        line = failing("plot", run, "--out", tmp_path / "plot.gif", code=2)
        assert "allowed: .png, .svg, .pdf" in line
        assert "it is no directory" in failing("plot", tmp_path / "none", code=1)
        assert "it has no metrics.jsonl" in failing("plot", tmp_path, code=1)
        (tmp_path / "new").mkdir()
        (tmp_path / "new/metrics.jsonl").touch()
        assert "has no metrics yet" in failing("plot", tmp_path / "new", code=1)
        line = failing("plot", run, "--out", tmp_path / "none/plot.png", code=1)
        assert "cannot be written: No such file or directory" in line
