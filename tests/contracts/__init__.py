"""Promises that tests keep: what the documentation says, what a release holds."""
