"""Every test session: the same hypothesis examples each time, one torch thread, and Ctrl-C as it is in a terminal."""

import signal

import torch
from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile("ci")
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a script's job in the background is started with SIGINT ignored, and so would be every process that tests interrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)
