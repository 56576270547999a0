"""What a run will need: memory before any weight is loaded, and time on any number of GPUs by simulation."""
