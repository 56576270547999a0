"""What is wrong with a machine or a run directory, what it means, and what can be put right."""
