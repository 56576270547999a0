"""Estimates a run's memory before any weight is loaded, and its time on any number of GPUs by simulation."""
