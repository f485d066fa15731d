"""Rules for the whole session: `gpu` tests run where there is a GPU, and no test may be skipped.

A test of a backend that skips itself because something is missing would leave that backend
untested without anyone noticing. What cannot run here by nature is deselected, visibly.
"""

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu and not has_gpu():
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def count_skipped(config: pytest.Config) -> int:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    return len(reporter.stats.get("skipped", ())) if reporter else 0


def pytest_sessionfinish(session: pytest.Session) -> None:
    if count_skipped(session.config) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if count := count_skipped(config):
        terminalreporter.write_line(
            f"FAILED: {count} skipped, and a skipped test fails the session: install what it "
            "needs, or mark it `gpu`.",
            red=True,
        )
