"""Refuses changes that another site makes with a visitor's browser.

A server without authentication trusts its network. A page from elsewhere is not in that network, but the browser that
shows it may be: such a page can send a form to `localhost`. Browsers say so in `Sec-Fetch-Site`, which no page can set.
A page of the same site (another port of `localhost`, another name of the same domain) is as foreign: somebody else may
have written it. A request with a token is fine, because only a page that was given the token can send it.
"""

from collections.abc import Mapping

from llama_stack_provider_moe.errors import Forbidden

_READS = frozenset({"GET", "HEAD", "OPTIONS"})
# `none`: the user typed the address. Other programs send no such header.
_OWN = frozenset({"same-origin", "none"})


def must_not_be_from_another_site(method: str, headers: Mapping[str, str]) -> None:
    """Raise `Forbidden` for a change that a page of another site requests without a token.

    Args:
        method: HTTP method.
        headers: headers of the request, by names in small letters.
    """
    if method in _READS or "authorization" in headers or headers.get("sec-fetch-site", "none") in _OWN:
        return
    raise Forbidden("a page of another site may change nothing here; open this server's own page, or send a token")
