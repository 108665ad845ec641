"""Benchmarks print a line each, at the end of the run."""

import pytest

_LINES = pytest.StashKey[list[str]]()


def pytest_configure(config):
    config.stash[_LINES] = []


@pytest.fixture
def report(request):
    """Call it with a line to print when all benchmarks are done."""
    return request.config.stash[_LINES].append


def pytest_terminal_summary(terminalreporter, config):
    terminalreporter.section("benchmarks")
    for line in config.stash[_LINES]:
        terminalreporter.write_line(line)
