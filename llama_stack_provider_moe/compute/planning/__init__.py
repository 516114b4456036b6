"""Whether a job fits into the available memory, before any weight is loaded."""
