"""Says at the end how many cases were tried."""

from __future__ import annotations

import pytest

from tests.fuzz.cases import tried


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if tried:
        terminalreporter.write_line(f"fuzz cases: {sum(tried.values())} in {len(tried)} targets")
