"""Weights of which each process has only a part."""
