"""Rollouts in other processes and on other machines, and training on several ranks."""

TOKEN_VARIABLE = "E3RL_ROLLOUT_TOKEN"
"""Environment variable with the token of rollout servers. It is no setting, which every run directory would store."""
