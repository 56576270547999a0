"""Who may send requests to a server: decided by the Host header and a token."""

from __future__ import annotations

import hmac
import ipaddress
import re
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

from e3rl.errors import UserError

MIN_TOKEN = 16


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def network(host: str) -> str:
    """What counts as one address where something is shared among addresses. Whoever has one of IPv6 has the 2^64 beside it, and
    who is on this machine has all of 127.0.0.0/8."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            return "localhost" if address.is_loopback else str(ipaddress.ip_network((int(address), 64), strict=False))
        address = address.ipv4_mapped
    return "localhost" if address.is_loopback else str(address)


@dataclass(frozen=True)
class Access:
    """The address that a server listens on, and the token it asks for, if any."""

    host: str
    token: str | None = None

    def __post_init__(self) -> None:
        if not is_loopback(self.host) and not self.token:
            raise UserError(
                f"{self.host} can be reached from other machines: set a token with --token, or leave --host out"
            )
        if self.token is not None and not re.fullmatch(rf"[A-Za-z0-9._~-]{{{MIN_TOKEN},}}", self.token):
            raise UserError(f"the token must be at least {MIN_TOKEN} letters, digits or any of - . _ ~")

    def knows_host(self, header: str) -> bool:
        """Whether a Host header names this server: this machine, the name it was given, or a bare address.

        A web page that makes its own name point here is refused by this.
        """
        try:
            name = urlsplit(f"//{header}").hostname
        except ValueError:
            return False
        if name is None or "@" in header:
            return False
        if is_loopback(name) or name == self.host.lower():
            return True
        return not is_loopback(self.host) and (_is_address(name) or name == socket.gethostname().lower())

    def admits(self, token: str) -> bool:
        """Whether this token is accepted; any is where none is set."""
        return self.token is None or hmac.compare_digest(token.encode(errors="replace"), self.token.encode())


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
