"""Rollouts in other processes and on other machines, and training on several ranks."""
