"""What the servers have in common: who may ask, what is read of a request, and the process around an ASGI app."""
