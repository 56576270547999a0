"""e3rl: reinforcement learning for reasoning language models that can take back a bad step."""

__version__ = "0.1.0"
