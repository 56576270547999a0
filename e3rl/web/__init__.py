"""Shared by all servers: access control, reading requests within limits, and running an ASGI app."""
