"""Addresses to listen at: who reaches them, and by which names."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def own_names(host: str) -> list[str]:
    """The names, as in a Host header, by which this machine may call a server at a loopback address.

    A server should refuse others: a web page elsewhere can have a name of its own resolve to this machine (DNS
    rebinding), and its scripts then read what the server answers.
    """
    return ["localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host]
