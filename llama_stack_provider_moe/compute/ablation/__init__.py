"""Directional ablation: measure a direction on two sets of prompts, look at it, take it out of the weights."""
