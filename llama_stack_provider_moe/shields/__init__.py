"""Shields at run time: what a fitted probe says about itself, and what a scorer answers. No torch, no server."""
