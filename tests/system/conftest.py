"""Fixtures that modules of this folder share: here, because each module that imported them would have its own."""

from tests.support.shared_server import owner, shared

__all__ = ["owner", "shared"]
