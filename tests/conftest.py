"""Rules for the whole session: `gpu` tests run where there is a GPU, and no test may be skipped.

A test of a backend that skips itself because something is missing would leave that backend
untested without anyone noticing. What cannot run here by nature is deselected, which the head of
the report says; and so are kernels compiled for other targets than an H100, unless --all-targets
asks for them, as CI does.
"""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-targets", action="store_true", help="compile for all kinds of GPU")


def pytest_report_header(config: pytest.Config) -> str:
    gpu = "" if has_gpu() else "no GPU here: tests marked gpu are left out; "
    targets = "all targets" if config.getoption("--all-targets") else "an H100"
    return f"{gpu}kernels are compiled for {targets}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpu = has_gpu()
    all_targets = config.getoption("--all-targets")

    def wanted(item: pytest.Item) -> bool:
        if item.get_closest_marker("gpu"):
            return gpu
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        return all_targets or parameters.get("target") not in {"A100", "B200", "MI300"}

    left_out = [item for item in items if not wanted(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if wanted(item)]


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
