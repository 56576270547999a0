"""Checks of a machine or a run directory: problems, what they mean, and repairs."""
