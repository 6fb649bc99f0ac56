"""What holds in every tier: with CI=true nothing may be skipped or expected to fail."""

import os
from collections.abc import Callable, Generator

import hypothesis
import pytest

IN_CI = os.environ.get("CI", "").lower() == "true"

# The machine is shared: the time of one example says nothing.
hypothesis.settings.register_profile("trimtab", deadline=None)
hypothesis.settings.load_profile("trimtab")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if IN_CI:
        refuse(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if IN_CI:
        refuse(report)
    return report


@pytest.fixture
def counted(record_property: Callable[[str, object], None]) -> Callable[[str, int], None]:
    """Takes what was tried and how often; the end of the test run prints it."""
    return lambda what, cases: record_property("cases", f"{cases} {what}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lines = [
        f"{report.nodeid.rpartition('::')[2]}: {value}"
        for report in (*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed"))
        if report.when == "call"
        for name, value in report.user_properties
        if name == "cases"
    ]
    if lines:
        terminalreporter.section("cases")
        for line in lines:
            terminalreporter.write_line(line)


def refuse(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skip, an expected failure or an unexpected pass into a failure that says why."""
    if report.outcome == "skipped" or hasattr(report, "wasxfail"):
        verdict = "expected to fail" if hasattr(report, "wasxfail") else "skipped"
        report.longrepr = f"{report.nodeid} was {verdict}, which CI=true does not accept\n{report.longrepr or ''}"
        report.outcome = "failed"
        report.__dict__.pop("wasxfail", None)
