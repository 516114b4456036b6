"""How a job's processes start and end."""
