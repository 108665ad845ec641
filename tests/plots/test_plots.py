"""Plots of training runs: what is drawn, in which formats, and what is refused."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import rc_context, rcParams
from matplotlib.figure import Figure

import gptk
from gptk.plots.curves import smoothed, warmup_steps
from gptk.plots.runs import plot_runs
from gptk.runs.metrics import MetricsFile
from pictures import SIGNATURES, svg_texts
from program import failing
from program import gptk as run_gptk


def write(path, records):
    path.mkdir(parents=True)
    # By json itself, which also writes records that MetricsFile would not.
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def loss_at(step):
    return 1 + 4 / (1 + step)


def make_run(
    path, steps=50, every=10, batch=64, averaged=False, lr=lambda step: 0.1 / step, **more
):
    """A run's metrics, with a loss that falls."""
    path.mkdir(parents=True)
    file = MetricsFile(path / "metrics.jsonl")
    for step in range(steps + 1):
        loss = loss_at(step)
        common = {"step": step, "tokens": batch * step}
        if step:
            file.record({"kind": "step", **common, "loss": loss, "lr": lr(step), **more})
        if every and step % every == 0:
            losses = {"train_loss": loss, "validation_loss": loss + 0.1}
            if averaged:
                losses["averaged_validation_loss"] = loss + 0.05
            file.record({"kind": "evaluation", **common, **losses, "epoch": 0.0})
    file.close()
    return path


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Plot, and return the panels by their y label, without the time that writing takes."""
    figures = []

    def keep(self, file, **_):
        figures.append(self)

    def draw(*runs):
        with monkeypatch.context() as patch:
            patch.setattr(Figure, "savefig", keep)
            plot_runs(runs, tmp_path / "drawn.png")
        figure = figures.pop()
        return SimpleNamespace(
            figure=figure, **{panel.get_ylabel().split()[0]: panel for panel in figure.axes}
        )

    return draw


def lines(axes):
    """By label; matplotlib labels other lines itself, beginning with _."""
    return {line.get_label(): line for line in axes.lines}


def tick_labels(axis):
    low, high = axis.get_view_interval()
    texts = axis.get_major_formatter().format_ticks(axis.get_majorticklocs())
    inside = zip(texts, axis.get_majorticklocs(), strict=True)
    return [text for text, value in inside if text and low <= value <= high]


@pytest.mark.parametrize("suffix", SIGNATURES)
def test_formats_by_suffix_and_the_same_bytes_whatever_the_settings(suffix, tmp_path):
    run = make_run(tmp_path / "run", grad_norm=1.5)
    plot_runs([run], tmp_path / f"one{suffix}")
    with rc_context({"axes.labelsize": 20, "svg.hashsalt": None, "xtick.major.size": 9}):
        before = dict(rcParams)
        plot_runs([run], tmp_path / f"other{suffix}")
        assert dict(rcParams) == before
    data = (tmp_path / f"one{suffix}").read_bytes()
    assert data.startswith(SIGNATURES[suffix])
    assert data == (tmp_path / f"other{suffix}").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"run", f"one{suffix}", f"other{suffix}"}


def test_a_plot_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    def full(self, file, **_):
        file.write(b"half")
        raise OSError("no space left")

    (tmp_path / "plot.png").write_bytes(b"old")
    run = make_run(tmp_path / "run")
    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="no space left"):
        plot_runs([run], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"run", "plot.png"}


def test_the_figure_says_names_and_units(tmp_path):
    run = make_run(tmp_path / "run", grad_norm=1.5, averaged=True)
    plot_runs([run], tmp_path / "plot.svg", title="A run")
    said = svg_texts(tmp_path / "plot.svg")
    for text in (
        "A run",
        "loss (nats/token)",
        "tokens seen",
        "step",
        "perplexity",
        "learning rate",
        "gradient norm, before clipping",
        "training",
        "training, evaluated",
        "validation",
        "validation, averaged weights",
    ):
        assert text in said, text


def test_several_runs_are_told_apart_by_name_whatever_it_holds(tmp_path):
    names = ("a/run", "b/run", "c/_hidden", "d/cost$_{$")
    plot_runs([make_run(tmp_path / name, 5, 5) for name in names], tmp_path / "plot.svg")
    assert set(names) <= set(svg_texts(tmp_path / "plot.svg"))


def test_several_runs_have_a_colour_and_a_marker_each(drawn, tmp_path):
    runs = [make_run(tmp_path / f"{number}", 5, 5) for number in range(8)]
    panels = drawn(*runs)
    (legend,) = panels.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [run.name for run in runs]
    keys = [(line.get_color(), line.get_marker()) for line in legend.get_lines()]
    assert len(set(keys)) == 8
    for axes in (panels.perplexity, panels.learning):
        assert [(line.get_color(), line.get_marker()) for line in axes.lines] == keys


@pytest.mark.parametrize(
    ("rates", "warmup"),
    [
        ([0.1, 0.2, 0.3, 0.3, 0.2], 3),
        ([0.1, 0.2, 0.3], 3),
        ([0.3, 0.3, 0.2], 0),
        ([0.3, 0.2, 0.4], 0),
        ([0.3], 0),
        ([], 0),
    ],
)
def test_warmup_is_the_steps_at_which_the_rate_rises(rates, warmup):
    steps = np.arange(1, len(rates) + 1)
    assert warmup_steps(steps, np.array(rates)) == warmup


def test_a_short_warmup_of_a_long_run_is_written_into_the_plot(tmp_path):
    run = make_run(tmp_path / "run", 1000, 100, lr=lambda step: min(step / 20, 1))
    plot_runs([run], tmp_path / "plot.svg")
    assert "warmup: 20 steps" in svg_texts(tmp_path / "plot.svg")
    flat = make_run(tmp_path / "flat", 1000, 100, lr=lambda step: 1)
    plot_runs([flat], tmp_path / "flat.svg")
    assert not any("warmup" in text for text in svg_texts(tmp_path / "flat.svg"))


class TestLines:
    def test_are_the_numbers_recorded(self, drawn, tmp_path):
        panels = drawn(make_run(tmp_path / "run", steps=40, every=10, averaged=True, grad_norm=2.0))
        steps, evaluated = np.arange(1, 41), np.arange(0, 41, 10)
        raw = panels.loss.lines[0]
        assert raw.get_xdata() == pytest.approx(steps)
        assert raw.get_ydata() == pytest.approx(loss_at(steps))
        for label, more, dashes in (
            ("training, evaluated", 0, "None"),
            ("validation", 0.1, "-"),
            ("validation, averaged weights", 0.05, "--"),
        ):
            loss, perplexity = (lines(axes)[label] for axes in (panels.loss, panels.perplexity))
            assert loss.get_xdata() == pytest.approx(evaluated)
            assert loss.get_ydata() == pytest.approx(loss_at(evaluated) + more)
            assert loss.get_linestyle() == dashes
            assert perplexity.get_xdata() == pytest.approx(64 * evaluated)
            assert perplexity.get_ydata() == pytest.approx(np.exp(loss_at(evaluated) + more))
        assert panels.learning.lines[0].get_ydata() == pytest.approx(0.1 / steps)
        assert panels.gradient.lines[-1].get_ydata() == pytest.approx(2.0)
        assert panels.perplexity.get_yscale() == panels.gradient.get_yscale() == "log"

    def test_of_a_long_run_are_thinned_and_keep_their_peaks(self, drawn, tmp_path):
        values = np.random.default_rng(0).uniform(1, 2, 12_345)
        values[7000] = 50.0
        run = write(
            tmp_path / "run",
            [
                {"kind": "step", "step": n + 1, "tokens": n + 1, "loss": y, "lr": y, "grad_norm": y}
                for n, y in enumerate(values)
            ],
        )
        panels = drawn(run)
        for axes in (panels.loss, panels.learning, panels.gradient):
            x, y = axes.lines[0].get_data()
            assert 1000 < len(x) <= 2002
            assert (np.diff(x) > 0).all()
            assert (x[0], x[-1]) == (1, 12_345)
            assert y == pytest.approx(values[x.astype(int) - 1])
            assert y[x == 7001] == 50
        x, y = lines(panels.loss)["training"].get_data()
        assert len(x) == 2000
        assert y.mean() == pytest.approx(values.mean(), rel=0.01)

    @pytest.mark.parametrize(("steps", "every"), [(1, 0), (0, 1), (1, 1)])
    def test_of_a_single_point_show_it(self, steps, every, drawn, tmp_path):
        panels = drawn(make_run(tmp_path / "run", steps, every, grad_norm=1.0))
        for axes in panels.figure.axes:
            visible = [line for line in axes.lines if line.get_marker() != "None"]
            assert visible, axes.get_ylabel()

    def test_leave_out_what_is_no_number(self, drawn, tmp_path):
        good = {"kind": "step", "loss": 1.0, "lr": 0.1, "grad_norm": 1.0}
        bad = [
            {"loss": None},
            {"loss": float("nan")},
            {"loss": float("inf")},
            {"loss": "1"},
            {"grad_norm": 0.0},
            {"tokens": None},
        ]
        records = [good | {"step": n, "tokens": n} | more for n, more in enumerate(bad, start=1)]
        panels = drawn(write(tmp_path / "run", records))
        assert panels.loss.lines[0].get_xdata().tolist() == [5, 6]
        assert panels.gradient.lines[0].get_xdata().tolist() == [1, 2, 3, 4, 6]

    def test_of_a_run_gone_astray_do_not_overflow(self, tmp_path, recwarn):
        losses = {"train_loss": 1e300, "validation_loss": 1e4}
        records = [{"kind": "evaluation", "step": n, "tokens": n, **losses} for n in range(3)]
        plot_runs([write(tmp_path / "run", records)], tmp_path / "plot.png")
        assert not recwarn.list


class TestSmoothing:
    @given(st.integers(1, 2000), st.integers(0, 99))
    def test_is_a_line_fitted_to_the_neighbours(self, n, seed):
        y = np.random.default_rng(seed).normal(size=n)
        smooth = smoothed(y)
        for i in {0, 1, n // 3, n // 2, n - 2, n - 1} & set(range(n)):
            half = min(i, n // 50)
            near = np.arange(i - half, min(i + half + 1, n))
            degree = 1 if len(near) > 1 else 0
            fitted = np.polynomial.Polynomial.fit(near, y[near], degree)
            assert smooth[i] == pytest.approx(fitted(i), abs=1e-6)

    def test_does_not_lag_behind_a_loss_that_falls(self):
        falling = 3 + 8 * np.exp(-np.arange(1000) / 50)
        running_mean = np.convolve(falling, np.ones(41) / 41)[:1000]  # of as many, all before
        lag = np.abs(running_mean - falling)[41:].max()
        assert lag > 1
        assert np.abs(smoothed(falling) - falling).max() < lag / 10


class TestPanels:
    def test_for_which_nothing_was_recorded_are_left_out(self, drawn, tmp_path):
        panels = drawn(make_run(tmp_path / "steps", every=0))
        assert vars(panels).keys() == {"figure", "loss", "learning"}
        panels = drawn(make_run(tmp_path / "evaluations", steps=0, every=1))
        assert vars(panels).keys() == {"figure", "loss", "perplexity"}
        panels = drawn(make_run(tmp_path / "both"), make_run(tmp_path / "norm", grad_norm=1.0))
        assert vars(panels).keys() == {"figure", "loss", "perplexity", "learning", "gradient"}

    def test_name_only_lines_that_are_there(self, drawn, tmp_path):
        panels = drawn(make_run(tmp_path / "a", every=0), make_run(tmp_path / "b", every=0))
        assert [text.get_text() for text in panels.loss.get_legend().get_texts()] == ["training"]

    @pytest.mark.parametrize(
        "norms", [(1.0, 1.0), (0.41, 0.46), (1.1, 1.9), (4, 6), (0.3, 3.0), (1e-3, 1e4)]
    )
    def test_have_numbers_on_a_logarithmic_axis(self, norms, drawn, tmp_path):
        records = [
            {"kind": "step", "step": n, "tokens": n, "loss": 1.0, "lr": 0.1, "grad_norm": norm}
            for n, norm in enumerate(norms, start=1)
        ]
        labels = tick_labels(drawn(write(tmp_path / "run", records)).gradient.yaxis)
        assert 2 <= len(labels) <= 12
        assert len(set(labels)) == len(labels)

    def test_count_steps_and_tokens_in_whole_numbers(self, drawn, tmp_path):
        assert tick_labels(drawn(make_run(tmp_path / "a", 1)).loss.xaxis) == ["0", "1"]
        long = [{"kind": "step", "step": 8000, "tokens": 3 * 10**9, "loss": 1.0, "lr": 1.0}]
        panels = drawn(write(tmp_path / "b", long))
        assert tick_labels(panels.loss.xaxis) == ["0", "2k", "4k", "6k", "8k"]
        (above,) = panels.loss.child_axes
        panels.figure.draw_without_rendering()
        assert tick_labels(above.xaxis)[-1] == "3B"


class TestTokensAbove:
    def where(self, panels, tokens):
        """The step above which the second axis has that number of tokens."""
        (above,) = panels.loss.child_axes
        panels.figure.draw_without_rendering()
        pixels = above.transData.transform((tokens, 0))
        return panels.loss.transData.inverted().transform(pixels)[0]

    def test_stand_over_their_steps(self, drawn, tmp_path):
        panels = drawn(make_run(tmp_path / "a"), make_run(tmp_path / "b", steps=30))
        for step in (0, 20, 50):
            assert self.where(panels, 64 * step) == pytest.approx(step, abs=1e-6)

    def test_follow_a_batch_that_changed(self, drawn, tmp_path):
        tokens = {10: 100, 20: 200, 30: 1200, 40: 2200}
        records = [
            {"kind": "step", "step": n, "tokens": seen, "loss": 1.0, "lr": 0.1}
            for n, seen in tokens.items()
        ]
        panels = drawn(write(tmp_path / "run", records))
        for step, seen in {0: 0, 5: 50, **tokens, 35: 1700}.items():
            assert self.where(panels, seen) == pytest.approx(step, abs=1e-6)

    def test_are_left_out_where_runs_differ(self, drawn, tmp_path):
        panels = drawn(make_run(tmp_path / "a"), make_run(tmp_path / "b", batch=32))
        assert not panels.loss.child_axes


def test_pyplot_is_left_alone(tmp_path):
    loaded = "matplotlib.pyplot" in sys.modules
    plot_runs([make_run(tmp_path / "run")], tmp_path / "plot.png")
    assert ("matplotlib.pyplot" in sys.modules) == loaded


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(gptk.OptionError, match="no training run"):
        plot_runs([], tmp_path / "plot.png")


class TestCommand:
    def test_says_where_the_plot_is(self, tmp_path, monkeypatch):
        runs = [make_run(tmp_path / name) for name in ("a", "b")]
        assert run_gptk("plot", runs[0]).stdout == f"{runs[0]}/losses.png\n"
        monkeypatch.chdir(tmp_path)
        assert run_gptk("plot", *runs).stdout == "losses.png\n"
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
        (run / "metrics.jsonl").write_text('{"kind": "step", "step": 1}\n{"kind": \n')
        assert "metrics.jsonl, line 2 is damaged" in failing("plot", run, code=1)
