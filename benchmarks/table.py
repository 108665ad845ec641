"""The goals for gptk beside its peers, the measurements, and the pages made from them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Comparison:
    """A row of the table: a comparison with a peer, and the goal for it."""

    work: str
    peer: str
    goal: float | None = None
    """The least speedup that developers aim at; the page for readers does not show it."""
    group: str = ""
    """One of GROUPS: rows of a group have a table of their own."""


GROUPS = {
    "": "",
    "avx2": "As on a processor with AVX2, without AVX-512",
    "large": "A Llama of 1.1 billion weights, Q4_0",
}
"""Titles of tables."""

_LLAMA, _OPENVINO = "llama.cpp, same file", "OpenVINO GenAI, same file"

ROWS = {
    "q41": Comparison("greedy, the Q4_1 file, bfloat16 activations", "llama.cpp, same file", 1.0),
    "q41-default": Comparison(
        "greedy, the Q4_1 file, without options", "llama.cpp, same file", 1.0
    ),
    "bf16": Comparison("greedy bfloat16", "transformers bfloat16", 1.5),
    "beams-bf16": Comparison("4 beams bfloat16", "transformers bfloat16, 4 beams", 1.7),
    "beams-q41": Comparison(
        "4 beams, the Q4_1 file, bfloat16 activations", "transformers bfloat16, 4 beams", 3.0
    ),
    "gpt2-beams": Comparison(
        "GPT-2 124M, 4 beams, best settings", "CTranslate2, 4 beams, its best", 1.5
    ),
    "gpt2-book": Comparison("GPT-2 124M, generate 64 tokens", "the book's `generate`", 15),
    "beam-positions": Comparison(
        "beam of 4, sequence positions a second, bfloat16", "gptk's own greedy", 0.75
    ),
    "beam-positions-q41": Comparison(
        "beam of 4, sequence positions a second, Q4_1, bfloat16 activations",
        "gptk's own greedy",
        0.75,
    ),
    "top-p": Comparison("top-p sampling, bfloat16", "gptk's own greedy", 0.95),
    "top-p-q41": Comparison(
        "top-p sampling, Q4_1, bfloat16 activations", "gptk's own greedy", 0.95
    ),
    "prompt-default": Comparison(
        "prompt of 512 tokens to first token, Q4_1, without options", "llama.cpp, same file", 1.0
    ),
    "prompt-q41": Comparison(
        "prompt of 512 tokens to first token, Q4_1, bfloat16 activations",
        "llama.cpp, same file",
        2.0,
    ),
    "prompt-bf16": Comparison(
        "prompt of 512 tokens to first token, bfloat16", "transformers bfloat16", 1.1
    ),
    "long-q41": Comparison(
        "greedy after a prompt of 1,500 tokens, Q4_1, bfloat16 activations",
        "llama.cpp, same file",
        1.0,
    ),
    "long-beams": Comparison(
        "4 beams after a prompt of 512 tokens, bfloat16", "transformers bfloat16, 4 beams", 3.0
    ),
    "batch": Comparison(
        "a batch of 16 prompts, bfloat16", "transformers bfloat16, same batch", 1.5
    ),
    "many-vllm": Comparison(
        "300 prompts of 5 to 200 words, 32 new tokens each, bfloat16", "vLLM for CPUs", 1.1
    ),
    "many-transformers": Comparison(
        "64 prompts of 5 to 200 words, bfloat16", "transformers, sorted batches of 16", 2.5
    ),
    "many-continuous": Comparison(
        "16 prompts of 5 to 200 words, bfloat16", "transformers' continuous batching", 6.0
    ),
    "many-beams": Comparison(
        "16 prompts of 5 to 200 words, 4 beams each, bfloat16", "transformers, one batch", 2.0
    ),
    "many-ctranslate2": Comparison(
        "GPT-2 124M, 64 prompts of 5 to 250 tokens, float32", "CTranslate2, its batches", 1.2
    ),
    "training": Comparison("training step, 124M, 2 by 256", "the book's code, float32", 3.5),
    "start": Comparison(
        "process start to first token, expanded to float32", "transformers, GGUF", 8
    ),
    "start-q41": Comparison(
        "process start to first token, without options", "transformers, GGUF", 8
    ),
    "openvino": Comparison("greedy, the Q4_1 file, without options", _OPENVINO, 2.3),
    "openvino-bf16": Comparison("greedy, the Q4_1 file, bfloat16 activations", _OPENVINO),
    "openvino-beams": Comparison("4 beams, the Q4_1 file", f"{_OPENVINO}, 4 beams"),
    "openvino-prompt": Comparison(
        "prompt of 512 tokens to first token, Q4_1, without options", _OPENVINO, 1.05
    ),
    "openvino-prompt-bf16": Comparison(
        "prompt of 512 tokens to first token, Q4_1, bfloat16 activations", _OPENVINO, 1.6
    ),
    "openvino-first": Comparison(
        "first prompt of 512 tokens after loading, Q4_1, without options", _OPENVINO
    ),
    "openvino-first-bf16": Comparison(
        "first prompt of 512 tokens after loading, Q4_1, bfloat16 activations", _OPENVINO
    ),
    "small-load": Comparison("start of loading to first token, Q4_1, loaded before", _LLAMA),
    "avx2": Comparison(
        "greedy, the Q4_1 file, without options", "llama.cpp built for AVX2", 1.3, "avx2"
    ),
    "avx2-prompt": Comparison(
        "prompt of 512 tokens to first token, Q4_1, without options",
        "llama.cpp built for AVX2",
        1.5,
        "avx2",
    ),
    "avx2-beams": Comparison("4 beams bfloat16", "transformers bfloat16, 4 beams", 2.5, "avx2"),
    "avx2-bf16": Comparison("greedy bfloat16", "transformers bfloat16", None, "avx2"),
    "avx2-training": Comparison(
        "training step, 124M, 2 by 256, float32", "the book's code, float32", 1.3, "avx2"
    ),
    "large": Comparison("greedy, without options", _LLAMA, 1.05, "large"),
    "large-bf16": Comparison("greedy, bfloat16 activations", _LLAMA, None, "large"),
    "large-prompt": Comparison("prompt of 256 tokens, without options", _LLAMA, 1.0, "large"),
    "large-prompt-bf16": Comparison(
        "prompt of 256 tokens, bfloat16 activations", _LLAMA, 1.2, "large"
    ),
    "large-load": Comparison(
        "start of loading to first token, loaded before", _LLAMA, 0.7, "large"
    ),
    "large-beams": Comparison(
        "beam of 4, sequence positions a second", "gptk's own greedy", 0.85, "large"
    ),
    "large-batch": Comparison(
        "16 prompts at once, all tokens", "gptk, one prompt after the other", 4.0, "large"
    ),
    "large-openvino": Comparison("greedy, without options", _OPENVINO, None, "large"),
    "large-openvino-prompt": Comparison(
        "prompt of 256 tokens, without options", _OPENVINO, None, "large"
    ),
    # Without a goal
    "greedy-float32": Comparison("greedy, float32", "transformers float32"),
    "top-p-float32": Comparison("top-p sampling, float32", "transformers float32"),
    "beams-float32": Comparison("4 beams, float32", "transformers float32, 4 beams"),
    "top-p-bf16": Comparison("top-p sampling, bfloat16", "transformers bfloat16"),
    "prompt-float32": Comparison(
        "prompt of 512 tokens to first token, float32", "transformers float32"
    ),
    "lookup": Comparison(
        "copying a text, with lookup, float32", "transformers float32, with lookup"
    ),
    "lookup-gain": Comparison("copying a text, with lookup, float32", "gptk without lookup"),
    "training-shared": Comparison(
        "training step, 124M, 2 by 256", "the book's code, float32, in gptk's process"
    ),
    "training-float32": Comparison("training step, float32", "the book's code, float32"),
    "training-bf16": Comparison("training step, bfloat16", "the book's code, bfloat16 autocast"),
    "training-nanogpt": Comparison(
        "training step, bfloat16",
        "transformers' GPT-2 with nanoGPT's optimizer, bfloat16 autocast",
    ),
    "training-nanogpt-float32": Comparison(
        "training step, float32", "transformers' GPT-2 with nanoGPT's optimizer, float32"
    ),
}


@dataclass(frozen=True)
class Measured:
    """The seconds of gptk and of the peer for the same work."""

    ours: float
    theirs: float
    tokens: float | None = None
    """The tokens that the work generates or reads; None to show seconds instead of tokens/s."""
    note: str = ""

    @property
    def ratio(self) -> float:
        """How many times faster gptk is."""
        return self.theirs / self.ours

    def shown(self, seconds: float) -> str:
        return (
            f"{seconds:.2f} s" if self.tokens is None else f"{self.tokens / seconds:.1f} tokens/s"
        )


@dataclass(frozen=True)
class Bound:
    """A measurement of gptk alone, and the bound that it should keep."""

    what: str
    value: str
    goal: str = ""
    is_kept: bool = True


class Table:
    """The measurements for ROWS in this run, and the reasons why others were skipped."""

    def __init__(self) -> None:
        self.measured: dict[str, Measured] = {}
        self.skipped: dict[str, str] = {}
        self.bounds: list[Bound] = []

    def row(
        self,
        key: str,
        times: Mapping[str, float],
        ours: Sequence[str],
        theirs: Sequence[str],
        *,
        tokens: float | None = None,
        note: str = "",
    ) -> None:
        """Record each side's fastest settings, and all in the note. times: seconds by name."""
        best_ours, best_theirs = (min(names, key=times.__getitem__) for names in (ours, theirs))
        measured = Measured(times[best_ours], times[best_theirs], tokens)
        notes = [
            f"{side}: " + ", ".join(f"{name} {measured.shown(times[name])}" for name in names)
            for side, names in (("gptk", ours), ("peer", theirs))
            if len(names) > 1
        ]
        notes = [*notes, note] if note else notes
        self.measured[key] = Measured(measured.ours, measured.theirs, tokens, "; ".join(notes))

    def skip(self, key: str, reason: str) -> None:
        self.skipped[key] = reason

    def bound(self, what: str, value: str, goal: str = "", *, is_kept: bool = True) -> None:
        self.bounds.append(Bound(what, value, goal, is_kept))

    def __bool__(self) -> bool:
        return bool(self.measured or self.skipped or self.bounds)

    def cells(self) -> list[tuple[str, ...]]:
        """Rows of work, gptk, peer, peer's, ratio or why it is missing, as in ROWS."""
        return [cells for group in GROUPS for cells in self._cells(group)]

    def _cells(self, group: str) -> list[tuple[str, ...]]:
        rows = []
        for key, row in ROWS.items():
            if row.group != group:
                continue
            if (measured := self.measured.get(key)) is not None:
                ours, theirs = measured.shown(measured.ours), measured.shown(measured.theirs)
                rows.append((row.work, ours, row.peer, theirs, f"{measured.ratio:.2f}"))
            elif key in self.skipped:
                rows.append((row.work, "", row.peer, "", f"not measured: {self.skipped[key]}"))
        return rows

    def lines(self) -> list[str]:
        """The table as lines for the terminal, with the goals that were missed."""
        lines = [
            f"{work}: gptk {ours}, {peer} {theirs}, ratio {ratio}" if ours else f"{work}: {ratio}"
            for work, ours, peer, theirs, ratio in self.cells()
        ]
        for key, measured in self.measured.items():
            goal = ROWS[key].goal
            if measured.note:
                lines.append(f"  {ROWS[key].work}: {measured.note}")
            if goal is not None and measured.ratio < goal:
                lines.append(f"goal missed: {ROWS[key].work}: {measured.ratio:.2f}, not {goal:g}")
        for bound in self.bounds:
            lines.append(f"{bound.what}: {bound.value}")
            if not bound.is_kept:
                lines.append(f"goal missed: {bound.what}: {bound.value}, not {bound.goal}")
        return lines

    def markdown(self) -> str:
        text = ""
        for group, title in GROUPS.items():
            if cells := self._cells(group):
                text += f"\n### {title}\n\n" if title else ""
                text += _table(("work", "gptk", "peer", "peer's", "ratio"), cells)
        if self.bounds:
            rows = [(bound.what, bound.value) for bound in self.bounds]
            text += "\n" + _table(("gptk alone", "measured"), rows)
        notes = [
            f"- {ROWS[key].work} (beside {ROWS[key].peer}): {measured.note}"
            for key, measured in self.measured.items()
            if measured.note
        ]
        return text + ("\n" + "\n".join(notes) + "\n" if notes else "")

    def plot(self, path: Path) -> None:
        """The ratios as dots on a logarithmic axis; the same results give the same bytes."""
        rows = [(ROWS[key], self.measured[key].ratio) for key in ROWS if key in self.measured]
        titles = {"avx2": "AVX2: ", "large": "1.1 billion weights: "}
        plot_ratios(
            [
                (f"{titles.get(row.group, '')}{row.work}\nbeside {row.peer}", ratio)
                for row, ratio in rows
            ],
            path,
        )


FASTER, SLOWER = "#0072B2", "#D55E00"


def plot_ratios(ratios: Sequence[tuple[str, float]], path: Path) -> None:
    """Draw labelled ratios as dots, filled where gptk is faster and hollow where it is slower."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    with mpl.rc_context({"svg.hashsalt": "gptk", "font.size": 8, "svg.fonttype": "path"}):
        figure = Figure(figsize=(8, 1.2 + 0.4 * len(ratios)), layout="constrained")
        figure.patch.set_facecolor("white")
        axis = figure.subplots()
        for place, (_, ratio) in enumerate(ratios):
            colour = FASTER if ratio >= 1 else SLOWER
            axis.plot([1, ratio], [place, place], color=colour, alpha=0.35, linewidth=1)
            fill = colour if ratio >= 1 else "white"
            axis.plot([ratio], [place], "o", color=colour, markerfacecolor=fill, markersize=6)
            side, gap = ("left", 6) if ratio >= 1 else ("right", -6)
            axis.annotate(
                f"{ratio:.2f}", (ratio, place), (gap, 0), textcoords="offset points",
                va="center", ha=side,
            )  # fmt: skip
        axis.set_yticks(range(len(ratios)), [label for label, _ in ratios])
        axis.set_ylim(len(ratios) - 0.5, -0.5)
        axis.axvline(1, color="#555555", linewidth=0.8)
        axis.set_xscale("log")
        values = [ratio for _, ratio in ratios]
        axis.set_xlim(min([0.6, *values]) * 0.6, max([2, *values]) * 1.5)
        axis.xaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_locator(mpl.ticker.NullLocator())
        axis.set_xlabel("speed of gptk divided by that of the other program (logarithmic axis)")
        axis.grid(axis="both", color="#e4e4e4", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        dot = {"linestyle": "None", "marker": "o"}
        keys = [
            Line2D([], [], color=FASTER, label="gptk is faster", **dot),
            Line2D([], [], color=SLOWER, markerfacecolor="white", label="gptk is slower", **dot),
        ]
        figure.legend(handles=keys, loc="outside upper right", ncols=2, frameon=False)
        figure.savefig(path, metadata={"Date": None})


@dataclass(frozen=True)
class Result:
    """A benchmark of gptk alone."""

    label: str
    seconds: float
    tokens_per_second: float | None = None
    share: float | None = None
    """The share of the machine's limit that was reached."""
    bound: str = ""
    """What that limit is: memory or arithmetic."""

    def cells(self) -> tuple[str, ...]:
        speed = "" if self.tokens_per_second is None else f"{self.tokens_per_second:,.1f}"
        share = "" if self.share is None else f"{100 * self.share:.0f} % of {self.bound}"
        return self.label, f"{1e3 * self.seconds:.2f}", speed, share

    def __str__(self) -> str:
        label, milliseconds, speed, share = self.cells()
        parts = [f"{milliseconds} ms", speed and f"{speed} tokens/s", share]
        return f"{label}: {', '.join(part for part in parts if part)}"


def results_markdown(results: Sequence[Result], lines: Sequence[str]) -> str:
    head = ("benchmark", "ms", "tokens/s", "of the machine's limit")
    text = _table(head, [result.cells() for result in results])
    return text + ("\n" + "\n".join(f"- {line}" for line in lines) + "\n" if lines else "")


def write_section(page: Path, name: str, text: str) -> None:
    """Replace the text between a page's markers of that name; a new page gets both sections."""
    before = page.read_text(encoding="utf-8") if page.exists() else _EMPTY
    between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    if not between.search(before):
        raise ValueError(f"{page} has no section {name}")
    after = between.sub(lambda found: f"{found[1]}\n{text}\n{found[2]}", before)
    page.write_text(after, encoding="utf-8")


_EMPTY = """# Results

Written by `make bench`; [what is measured, and how](../benchmarks.md).

## Beside its peers

<!-- peers -->
<!-- end of peers -->

## gptk alone

<!-- suite -->
<!-- end of suite -->
"""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return (
        "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in lines)
        + "\n"
    )
