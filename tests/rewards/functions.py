"""Reward functions as users write them, for tests that load them by name."""

from __future__ import annotations

import os
import signal
import time

from e3rl.rewards.batch import BatchReward, Part


def length(completions, **kwargs):
    return [float(len(c)) for c in completions]


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(solution_str == ground_truth), "chars": len(solution_str), "note": "text"}


def treacherous(completions, log_metric, log_extra, **kwargs):
    (text,) = completions
    log_metric("chars", len(text))
    log_extra("shout", [text.upper()])
    if text == "hang":
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        time.sleep(60)
    if text == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if text == "raise":
        raise RuntimeError("no")
    return [1.0]


class CountErasures(BatchReward):
    def score(self, batch):
        return [Part(float(len(t.erasures))) for t in batch.trajectories]


not_a_function = 7
