"""A job's processes on a Ray cluster."""
