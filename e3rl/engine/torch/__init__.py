"""The in-process engine: a slot cache, so that rolling back is lowering a length."""
