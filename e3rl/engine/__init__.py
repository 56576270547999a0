"""What generates: the protocol, the torch engine, vLLM, and the slow oracle they are compared with."""
