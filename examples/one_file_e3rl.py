"""E³RL in one file: the whole method, read in one sitting and run with `python examples/one_file_e3rl.py`.

Only torch and transformers are used; `e3rl.lab` gives the model and its problems, which are data. The library does the
same, fast, for any model, with every choice a setting; a test holds that both make the same decisions and gradients.

The method: write a response in segments (1), measure how uncertain each was (2), compare that with what the other
samples of the prompt showed (3), erase and redraw what stands out (4), divide the reward among the segments that stayed
(5), compare the samples segment by segment (6), and improve the policy segment by segment (7). "eq" numbers are those of
the paper, arXiv 2606.17735.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from e3rl.lab import lab_directory
from e3rl.lab.problems import FAMILIES, generate


@dataclass(frozen=True)
class Settings:
    """The paper's symbols. It gives values for few of them; the others are this project's defaults."""

    siblings: int = 4  # G: samples of one prompt, at least 2
    segment_length: int = 12  # L, in tokens
    max_segments: int = 5  # N
    temperature: float = 1.0
    max_erasures: int = 5  # E_max, for each segment
    smoothing_window: int = 1  # W of eq 11
    smoothing_decay: float = 0.5  # alpha of eq 11
    base_weight: float = 1.0  # of the smoothed entropy in U
    gradient_weight: float = 0.5  # lambda_G
    extremum_weight: float = 0.1  # lambda_M
    perturbation_weight: float = 0.0  # lambda_P: above 0 the method is E³RL+ε
    kappa0: float = 1.0  # eq 16
    kappa1: float = 0.0
    sigma0: float = 0.1
    eta: float = 0.05  # eq 17
    delta: float = 1.5
    rho: float = 0.1  # eq 18
    attribution_window: int = 64  # L' of eq 19
    advantage_eps: float = 1e-4  # eq 20
    clip: float = 0.2  # eq 21
    kl_coef: float = 0.04  # beta of eq 21


Floats = Sequence[float]
Draws = Callable[[int, int, int], Floats]
"""(sibling, segment, attempt) → uniform numbers, one a token. A retry must get others, or it repeats what was erased."""

EPS = 1e-6


# ---- 1. Segmented generation (eq 1-9) ----
@dataclass
class Candidate:
    """A segment that was generated: its tokens, and of each the entropy (eq 10) and the perturbation (eq 5)."""

    ids: list[int]
    entropies: list[float]
    perturbations: list[float]
    next_logits: Tensor  # what the model says after the segment
    ended: bool


@dataclass
class Decision:
    """What was made of a candidate and why."""

    segment: int
    attempt: int
    uncertainty: float
    threshold: float
    verdict: str  # commit, erase, or forced: above the threshold, but the budget is spent
    candidate: Candidate


@dataclass
class Sibling:
    """One sample of the prompt: its committed segments, and the model's cache, which holds exactly these."""

    number: int
    cache: DynamicCache
    next_logits: Tensor
    segments: list[Candidate] = field(default_factory=list)
    smoothed: list[float] = field(default_factory=list)  # H~ of each committed segment
    decisions: list[Decision] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        return [i for s in self.segments for i in s.ids]


@torch.no_grad()
def draw(model: Any, sibling: Sibling, uniforms: Floats, eos: frozenset[int], s: Settings) -> Candidate:
    """Up to L tokens behind the sibling's committed segments. The cache grows with them."""
    logits, ids, entropies, perturbations = sibling.next_logits, [], [], []
    for number in uniforms[: s.segment_length]:
        logp = torch.log_softmax(logits.float() / s.temperature, -1)
        running = logp.exp().double().cumsum(-1)
        token = int((running > float(number) * running[-1]).nonzero()[0])
        ids.append(token)
        entropies.append(float(-(logp.exp() * logp).sum()))
        perturbations.append(float(logp.max() - logp[token]))
        logits = model(torch.tensor([[token]]), None, None, sibling.cache).logits[0, -1]
        if token in eos:
            break
    return Candidate(ids, entropies, perturbations, logits, ids[-1] in eos)


# ---- 2. Uncertainty (eq 10-13) ----
def moments(values: Floats) -> tuple[float, float]:
    """Mean and population standard deviation."""
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))


def smoothed_entropy(means: Floats, s: Settings) -> float:
    """Eq 11, looking back only: when a segment is judged, later ones do not exist."""
    recent = means[::-1][: s.smoothing_window + 1]  # this segment, then those before it
    weights = [s.smoothing_decay**distance for distance in range(len(recent))]
    return sum(w * m for w, m in zip(weights, recent, strict=True)) / sum(weights)


def uncertainty(candidate: Candidate, sibling: Sibling, usual: tuple[float, float], s: Settings) -> tuple[float, float]:
    """Eq 13. (U, H~) of a candidate; ``usual``: mean and standard deviation of the group's token entropies."""
    entropies = candidate.entropies
    smoothed = smoothed_entropy([moments(c.entropies)[0] for c in [*sibling.segments, candidate]], s)
    steps = [abs(b - a) for a, b in pairwise(entropies)]
    variation = sum(steps) / max(len(steps), 1)
    extremum = 1 / (1 + math.exp(-(max(entropies) - usual[0]) / (usual[1] + EPS)))
    terms = (smoothed, variation, extremum, moments(candidate.perturbations)[0])
    weights = (s.base_weight, s.gradient_weight, s.extremum_weight, s.perturbation_weight)
    return sum(w * t for w, t in zip(weights, terms, strict=True)), smoothed


# ---- 3. Threshold (eq 14-18) ----
def group_baseline(uncertainties: Floats, s: Settings) -> float:
    """Eq 14-16. B_n from the siblings' first candidates: above 0, and a hair higher, so that equal siblings are accepted."""
    mean, std = moments(uncertainties)
    baseline = mean + (s.kappa0 + s.kappa1 * math.tanh((std - s.sigma0) / (s.sigma0 + EPS))) * std
    return EPS if baseline <= 0 < mean else baseline * (1 + 1e-9)


def threshold(baselines: Floats, smoothed: Floats, attempt: int, s: Settings) -> float:
    """Eq 17-18. Theta = B_n x penalty of the attempt x modulation by the sibling's own history."""
    past = [(h - b) / (b + EPS) for h, b in zip(smoothed, baselines, strict=False)]
    modulation = 1 + s.rho * math.tanh(sum(past) / len(past)) if past else 1.0
    return baselines[-1] * math.exp(s.eta * attempt**s.delta) * modulation


# ---- 4. Erasure (eq 23-26) ----
@torch.no_grad()
def roll_out(model: Any, prompt: list[int], eos: frozenset[int], draws: Draws, s: Settings) -> list[Sibling]:
    """All siblings of a prompt, segment by segment."""
    caches = [DynamicCache() for _ in range(s.siblings)]  # given by place: its name depends on transformers' version
    starts = [model(torch.tensor([prompt]), None, None, cache).logits[0, -1] for cache in caches]
    siblings = [Sibling(i, cache, start) for i, (cache, start) in enumerate(zip(caches, starts, strict=True))]
    baselines: list[float] = []
    entropies: list[float] = []
    for n in range(s.max_segments):
        live = [x for x in siblings if not (x.segments and x.segments[-1].ended)]
        if not live:
            break
        firsts = [draw(model, x, draws(x.number, n, 0), eos, s) for x in live]
        entropies += [h for c in firsts for h in c.entropies]
        usual = moments(entropies)
        totals = [uncertainty(c, x, usual, s)[0] for c, x in zip(firsts, live, strict=True)]
        baselines.append(group_baseline(totals, s) if len(totals) > 1 else baselines[-1])
        for sibling, first in zip(live, firsts, strict=True):
            settled = settle(model, sibling, first, draws, eos, usual, baselines, s)
            entropies += [] if settled is first else settled.entropies
    return siblings


def settle(
    model: Any, sibling: Sibling, candidate: Candidate, draws: Draws, eos: frozenset[int],
    usual: tuple[float, float], baselines: Floats, s: Settings,
) -> Candidate:  # fmt: skip
    """Eq 23-25. Erase and redraw until a candidate is below its threshold or the budget is spent; then commit it."""
    n, attempt = len(sibling.segments), 0
    while True:
        u, smoothed = uncertainty(candidate, sibling, usual, s)
        theta = threshold(baselines, sibling.smoothed, attempt, s)
        verdict = "commit" if u <= theta else "erase" if attempt < s.max_erasures else "forced"
        sibling.decisions.append(Decision(n, attempt, u, theta, verdict, candidate))
        if verdict != "erase":
            sibling.segments.append(candidate)
            sibling.smoothed.append(smoothed)
            sibling.next_logits = candidate.next_logits
            return candidate
        sibling.cache.crop(-len(candidate.ids))  # the erasure: keys and values of the candidate go, the prefix stays
        attempt += 1
        candidate = draw(model, sibling, draws(sibling.number, n, attempt), eos, s)


# ---- 5. Attribution (eq 19) ----
def score(model: Any, prompt: list[int], response: list[int], s: Settings) -> tuple[Tensor, Tensor]:
    """Log-probability of every response token (with gradient), and its share of the attention that the end pays.

    For once the whole attention matrix is made; the library computes only the last L' rows of it.
    """
    output = model(torch.tensor([prompt + response]), output_attentions=True, use_cache=False)
    logits = output.logits[0, len(prompt) - 1 : -1].float() / s.temperature
    logprobs = torch.log_softmax(logits, -1).gather(-1, torch.tensor(response)[:, None])[:, 0]
    window = min(s.attribution_window, len(response))
    attention = output.attentions[-1][0].detach().mean(0)[-window:, len(prompt) :].mean(0)  # last layer, all heads
    return logprobs, attention / attention.sum()


# ---- 6. Advantages (eq 20) ----
def segment_advantages(rewards: Floats, shares: list[Tensor], lengths: list[list[int]], s: Settings) -> Tensor:
    """Eq 19-20. Each segment's part of the reward, against that of the siblings at the same segment, [G, N]."""
    divided = torch.zeros(len(rewards), max(map(len, lengths)), dtype=torch.float64)  # 0: no such segment
    if len(set(rewards)) == 1:  # no signal: eq 20 would only blow up attention noise
        return divided
    for row, reward, share, sizes in zip(divided, rewards, shares, lengths, strict=True):
        row[: len(sizes)] = reward * torch.stack([part.sum() for part in share.split(sizes)])
    return (divided - divided.mean(0)) / (divided.std(0, correction=0) + s.advantage_eps)


# ---- 7. Objective (eq 21-22) ----
def sequence_loss(
    logprobs: Tensor, old: Tensor, reference: Tensor, advantages: Tensor, lengths: list[int], s: Settings
) -> Tensor:
    """Eq 21-22. Minus one sibling's clipped segment surrogates, plus its KL to the reference policy (k3 estimate)."""
    log_ratios = torch.stack([part.sum() for part in (logprobs - old).split(lengths)])
    ratios, advantages = log_ratios.exp(), advantages[: len(lengths)].float()
    surrogate = torch.minimum(ratios * advantages, ratios.clamp(1 - s.clip, 1 + s.clip) * advantages)
    difference = reference - logprobs
    kl = difference.exp() - difference - 1
    return s.kl_coef * kl.sum() - surrogate.sum()


def group_loss(
    model: Any, reference: Any, prompt: list[int], siblings: list[Sibling], rewards: Floats, s: Settings
) -> Tensor:
    """Eq 21. Mean over the siblings of a prompt. A second pass over them would keep ``old`` from the first."""
    lengths = [[len(c.ids) for c in x.segments] for x in siblings]
    scored = [score(model, prompt, x.ids, s) for x in siblings]
    advantages = segment_advantages(rewards, [shares for _, shares in scored], lengths, s)
    losses = []
    for x, (logprobs, _), row, sizes in zip(siblings, scored, advantages, lengths, strict=True):
        before = score(reference, prompt, x.ids, s)[0].detach()
        losses.append(sequence_loss(logprobs, logprobs.detach(), before, row, sizes, s))
    return torch.stack(losses).mean()


# ---- The loop ----
def seeded_draws(name: str, length: int) -> Draws:
    """Random numbers that depend on their name alone, so that a run can be repeated."""

    def draws(sibling: int, segment: int, attempt: int) -> list[float]:
        random = Random(f"{name}|{sibling}|{segment}|{attempt}")
        return [random.random() for _ in range(length)]

    return draws


def train(s: Settings, steps: int = 3, prompts: int = 4, learning_rate: float = 1e-4, seed: int = 0) -> None:
    """A few steps on the embedded model: reward, erase rate, and r, erased tokens for each committed one (eq 31)."""
    tokenizer: Any = AutoTokenizer.from_pretrained(lab_directory())
    model: Any = AutoModelForCausalLM.from_pretrained(lab_directory(), attn_implementation="eager")  # shows its weights
    reference = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    problems = iter(generate("chain", 3, "train", steps * prompts))
    for step in range(1, steps + 1):
        everyone: list[Sibling] = []
        rewards: list[float] = []
        for problem in islice(problems, prompts):
            question, answer = str(problem.prompt), str(problem.answer)
            turn = [{"role": "user", "content": question}]
            ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
            draws = seeded_draws(f"{seed}|{step}|{problem.id}", s.segment_length)
            siblings = roll_out(model, ids, frozenset({tokenizer.eos_token_id}), draws, s)
            texts = [tokenizer.decode(x.ids, skip_special_tokens=True) for x in siblings]
            found = [float(FAMILIES["chain"].grade(question, answer, text)) for text in texts]
            (group_loss(model, reference, ids, siblings, found, s) / prompts).backward()
            everyone, rewards = everyone + siblings, rewards + found
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decisions = [d for x in everyone for d in x.decisions]
        erased = [len(d.candidate.ids) for d in decisions if d.verdict == "erase"]
        rate, r = len(erased) / len(decisions), sum(erased) / sum(len(x.ids) for x in everyone)
        print(f"step {step}  reward {moments(rewards)[0]:.3f}  erase rate {rate:.3f}  r {r:.3f}", flush=True)


if __name__ == "__main__":
    train(Settings())
