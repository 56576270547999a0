"""The cost model of appendix E (eq 27-30, 32-35), literally: counts of elementary operations, every constant taken as 1.

Nothing runs by it; what a run costs is measured, as r (eq 31).
"""

from __future__ import annotations


def language_model_cost(layers: int, tokens: int, width: int) -> float:
    """Eq 27. C_LM = M T^2 d + M T d^2: attention, then projections and feed-forward."""
    return layers * tokens**2 * width + layers * tokens * width**2


def grpo_cost(siblings: int, layers: int, tokens: int, width: int) -> float:
    """Eq 28. C_GRPO = G C_LM."""
    return siblings * language_model_cost(layers, tokens, width)


def entropy_cost(siblings: int, tokens: int, vocabulary: int) -> float:
    """Eq 29. C_ent = G T |V|: one reduction over the vocabulary per generated token."""
    return siblings * tokens * vocabulary


def segment_cost(siblings: int, segments: float, window: int) -> float:
    """Eq 30. C_seg = G N W: smoothing and threshold, once per segment."""
    return siblings * segments * window


def erasure_cost(ratio: float, siblings: int, layers: int, tokens: int, width: int) -> float:
    """Eq 32. C_erase = r C_GRPO."""
    return ratio * grpo_cost(siblings, layers, tokens, width)


def e3rl_cost(
    ratio: float, siblings: int, layers: int, tokens: int, width: int, vocabulary: int, segments: float, window: int
) -> float:
    """Eq 33. C_E3RL = (1 + r) C_GRPO + C_ent + C_seg."""
    generation = grpo_cost(siblings, layers, tokens, width) + erasure_cost(ratio, siblings, layers, tokens, width)
    return generation + entropy_cost(siblings, tokens, vocabulary) + segment_cost(siblings, segments, window)


def relative_cost(
    ratio: float, layers: int, tokens: int, width: int, vocabulary: int, segment_length: int, window: int
) -> float:
    """Eq 34. C_E3RL / C_GRPO = 1 + r + (|V| + W / l) / (M (T d + d^2))."""
    return 1 + ratio + (vocabulary + window / segment_length) / (layers * (tokens * width + width**2))


def memory_cost(siblings: int, layers: int, tokens: int, width: int, segments: int) -> float:
    """Eq 35. M_E3RL = G M T d + G N: KV cache and segment statistics. No term grows with the erasure budget."""
    return siblings * layers * tokens * width + siblings * segments
