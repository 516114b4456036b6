"""Refuses requests that name another host than this machine, where nothing but the network's border protects a server.

A page from elsewhere may make its own name lead to 127.0.0.1 (DNS rebinding). A browser takes such a server for the
page's own, so that the page reads and changes everything. The browser still sends the page's name in `Host`, which no
page can set. Only a server without authentication is in danger, and only over a loopback address: others are asked by
names that this package can't know. `X-Forwarded-Host` proves nothing, because a page can set it.
"""

import ipaddress
from collections.abc import Collection

from llama_stack_provider_moe.errors import Forbidden, shorten


def must_be_own_name(server: str | None, host: str | None, allowed: Collection[str]) -> None:
    """Raise `Forbidden` for a request over a loopback address whose `Host` is the name of something else.

    Args:
        server: address that the request came in at; None if the web server does not tell.
        host: the header; None without one, which no browser leaves out.
        allowed: further names, in small letters.
    """
    if server is None or host is None or not _is_loopback(server):
        return
    name = _name_of(host)
    if _is_loopback(name) or name == "localhost" or name.endswith(".localhost") or name in allowed:
        return
    raise Forbidden(
        f"Host: {shorten(host, 100)} is not a name of this server, which has no authentication and was reached within "
        "this machine; expected localhost, or a name in its `allowed_hosts`"
    )


def _name_of(host: str) -> str:
    """`[::1]:8321` -> `::1`, `Localhost.:8321` -> `localhost`."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].removesuffix(".").lower()


def _is_loopback(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback
