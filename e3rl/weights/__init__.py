"""Weights: in files, in a model, in memory that several processes share, on their way to vLLM."""
