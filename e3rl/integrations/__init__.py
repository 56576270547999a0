"""Bridges to other libraries: their settings as recipes, and erasable rollouts inside their trainers."""
