"""Options, fixtures and the final report of the benchmarks."""

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
    group.addoption(
        "--full", action="store_true", help="run all benchmarks, not only the quick ones"
    )
    group.addoption(
        "--device",
        default="cpu",
        choices=["cpu", "cuda"],
        help="where gptk alone is measured; peers are measured on the CPU",
    )
    group.addoption(
        "--write",
        metavar="FOLDER",
        type=Path,
        help="write results.md there, and with -m peers ratios.svg",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "full: run with --full only")
    config.addinivalue_line(
        "markers",
        "peers(*rows): beside other programs, for these rows of table.ROWS; needs -m peers",
    )
    config.stash[_SESSION] = Session()
    machine.DEVICE = config.option.device
    torch.set_num_threads(machine.THREADS)


def pytest_collection_modifyitems(config, items):
    """Deselect comparisons without `-m peers`, and slow benchmarks without `--full`."""
    skipped_markers = set()
    if "peers" not in config.option.markexpr:
        skipped_markers.add("peers")
    if not config.option.full:
        skipped_markers.add("full")
    kept = [item for item in items if not any(map(item.get_closest_marker, skipped_markers))]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


@pytest.fixture
def table(request):
    """The table of peers, see table.Table."""
    return request.config.stash[_SESSION].table


@pytest.fixture
def report(request):
    """A function that takes a line to print after all benchmarks."""
    return request.config.stash[_SESSION].lines.append


@pytest.fixture
def measure(benchmark, request):
    """A function that times another one in rounds and reports the median and the share of the
    machine's limit.

    work: the least work that the function needs, a machine.Work or a function that returns one,
    called afterwards. setup: called before each round, not timed. Returns the last result.
    """

    def run(function, work=None, *, rounds=5, warmup=1, setup=None, device=None):
        device = device or machine.DEVICE
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
    """Record why a row of the table was not measured."""
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
            text += "\n![How many times as fast gptk is, for each row of the table](ratios.svg)\n"
        write_section(page, "peers", text)
    if session.results or session.lines:
        text = f"{about}.\n\n{results_markdown(session.results, session.lines)}"
        write_section(page, "suite", text)
