"""Displays of a run: a web page of curves, health and rollouts with every erasure, and the terminal."""

from e3rl.report.page import write_report, write_token_view

__all__ = ["write_report", "write_token_view"]
