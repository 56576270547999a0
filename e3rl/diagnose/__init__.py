"""Whether erasing can help a model on given problems, measured before anything is trained: `e3rl diagnose`."""
