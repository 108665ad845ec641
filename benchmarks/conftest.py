"""What benchmarks share: what to run, how to measure, and a readable line each at the end."""

import gc
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import machine
from table import Result, Table, results_markdown, write_section


@dataclass
class Session:
    results: list[Result] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    table: Table = field(default_factory=Table)


_SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser):
    group = parser.getgroup("gptk's benchmarks")
    group.addoption("--full", action="store_true", help="the whole grid, not a quick part of it")
    group.addoption(
        "--write",
        metavar="FOLDER",
        type=Path,
        help="write results.md there, and with -m peers ratios.svg",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "full: run with --full only")
    config.addinivalue_line(
        "markers", "peers(*rows): beside other programs, for these rows of table.ROWS; -m peers"
    )
    config.stash[_SESSION] = Session()
    torch.set_num_threads(machine.THREADS)


def pytest_collection_modifyitems(config, items):
    """Without `-m peers` no peers, without `--full` not the whole grid."""
    left_out = set()
    if "peers" not in config.option.markexpr:
        left_out.add("peers")
    if not config.option.full:
        left_out.add("full")
    kept = [item for item in items if not any(map(item.get_closest_marker, left_out))]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[one for one in items if one not in kept])
        items[:] = kept


@pytest.fixture
def table(request):
    """The table of peers, see table.Table."""
    return request.config.stash[_SESSION].table


@pytest.fixture
def report(request):
    """Call it with a line to print when all benchmarks are done."""
    return request.config.stash[_SESSION].lines.append


@pytest.fixture
def measure(benchmark, request):
    """Time a function in rounds; its median becomes a line, with the share of what is possible.

    work: the least that it takes, a machine.Work or a function that gives one afterwards.
    setup: called before each round, not timed. Returns what the function did at last.
    """

    def run(function, work=None, *, rounds=5, warmup=1, setup=None, device="cpu"):
        gc.collect()
        value = benchmark.pedantic(
            machine.synchronized(function, device),
            setup=setup,
            rounds=rounds,
            warmup_rounds=warmup,
        )
        if benchmark.stats is None:  # --benchmark-disable
            return value
        seconds = benchmark.stats.stats.median
        label = request.node.name.removeprefix("test_").replace("_", " ")
        label = label.replace("[", ": ", 1).removesuffix("]")
        result = Result(label, seconds)
        work = work() if callable(work) else work
        if work is not None:
            limit, bound = work.limit(machine.limits(device))
            speed = work.tokens / seconds if work.tokens else None
            result = Result(label, seconds, speed, limit / seconds, bound)
            benchmark.extra_info |= {
                "tokens_per_second": speed,
                "share_of_limit": result.share,
                "limit": bound,
            }
        request.config.stash[_SESSION].results.append(result)
        return value

    return run


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Why a row of the table is empty."""
    outcome = yield
    report = outcome.get_result()
    marker = item.get_closest_marker("peers")
    if marker is None or report.passed:
        return
    table = item.config.stash[_SESSION].table
    reason = "the benchmark failed"
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
    for key in marker.args:
        if key not in table.measured:
            table.skip(key, reason)


def pytest_terminal_summary(terminalreporter, config):
    session = config.stash[_SESSION]
    if not (session.results or session.lines or session.table):
        return
    limits = machine.limits()
    about = f"{machine.describe()}; {limits}"
    if torch.cuda.is_available():
        about += f"; {torch.cuda.get_device_name()}: {machine.limits('cuda')}"
    terminalreporter.section("benchmarks")
    for line in (about, *session.results, *session.lines, *session.table.lines()):
        terminalreporter.write_line(str(line))
    folder = config.option.write
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "results.md"
    if session.table:
        text = f"{about}.\n\n{session.table.markdown()}"
        if session.table.measured:
            session.table.plot(folder / "ratios.svg")
            text += "\n![Ratios, with what is asked](ratios.svg)\n"
        write_section(page, "peers", text)
    if session.results or session.lines:
        text = f"{about}.\n\n{results_markdown(session.results, session.lines)}"
        write_section(page, "suite", text)
