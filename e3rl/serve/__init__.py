"""Erasable decoding over HTTP with an OpenAI-compatible API."""
