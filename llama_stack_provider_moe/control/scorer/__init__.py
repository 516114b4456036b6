"""The server's side of a scorer process: starts it, watches it, and asks it for scores. No torch."""
