"""Environments with tools, and the sandbox that programs run in."""
