"""What is particular to Mixture-of-Experts models: their parts, their settings, their adapters, their routing."""
