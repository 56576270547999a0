"""Erasable decoding over HTTP, in the form that OpenAI's clients speak."""
