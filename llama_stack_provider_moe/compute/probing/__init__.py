"""Probes on hidden states: how one is fitted, and the process that scores conversations with them at run time."""
