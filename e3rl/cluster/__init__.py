"""Rollouts in other processes and on other machines, and training on several ranks."""

TOKEN_VARIABLE = "E3RL_ROLLOUT_TOKEN"
"""The environment variable with the token of rollout servers; one in a recipe would stand in every run directory."""
