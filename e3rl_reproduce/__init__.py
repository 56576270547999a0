"""The papers' tables and figures from one command: cells that are run once, shared, resumed, and reported with intervals."""
