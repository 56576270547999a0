"""A reward function as people write them for TRL."""


def right(completions, answer, **kwargs):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(a in text) for text, a in zip(texts, answer, strict=False)]


def short(completions, **kwargs):
    return [-0.01 * len(c if isinstance(c, str) else c[0]["content"]) for c in completions]
