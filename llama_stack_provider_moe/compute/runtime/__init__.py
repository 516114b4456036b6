"""This process: its job, its rank, where it reports to, and whether it was asked to stop."""
