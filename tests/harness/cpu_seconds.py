"""``--cpu-seconds=N``: the N tests and files that take the most CPU time, child processes included.

Unlike ``--durations``, the figures mean the same on a busy machine. A child process counts for the test that
waits for its end.
"""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Generator

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.addoption(
        "--cpu-seconds", type=int, metavar="N", help="list the N tests and files that take the most"
    )


def _cpu_seconds() -> float:
    parts = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(part.ru_utime + part.ru_stime for part in parts)


class CpuSeconds:
    """Measures the phases of tests, in each worker; reports in the process that collects the reports."""

    def __init__(self, shown: int) -> None:
        self._shown = shown
        self._start = 0.0
        self._tests: Counter[str] = Counter()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self) -> Generator[None, None, None]:
        """Start with a test's set-up."""
        self._start = _cpu_seconds()
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Add what a phase took to its report, which workers send on."""
        report = yield
        now = _cpu_seconds()
        report.cpu_seconds = now - self._start
        self._start = now
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Collect."""
        self._tests[report.nodeid] += getattr(report, "cpu_seconds", 0.0)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print."""
        files: Counter[str] = Counter()
        for test, seconds in self._tests.items():
            files[test.partition("::")[0]] += seconds
        terminalreporter.section(f"CPU seconds: {sum(files.values()):.0f} in {len(self._tests)} tests")
        for table in (files, self._tests):
            for name, seconds in table.most_common(self._shown):
                terminalreporter.line(f"{seconds:8.2f}  {name}")
            terminalreporter.line("")


def pytest_configure(config: pytest.Config) -> None:
    """Measure if asked to."""
    shown = config.getoption("--cpu-seconds")
    if shown is not None:
        config.pluginmanager.register(CpuSeconds(shown), "cpu-seconds-report")
