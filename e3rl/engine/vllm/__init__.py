"""vLLM as an engine, with our sampler in its workers."""
