"""Every test session: the same hypothesis examples each time, and one torch thread."""

import torch
from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile("ci")
torch.set_num_threads(1)
