"""Models that Unsloth loads, in a separate environment."""
