"""The process that runs jobs: it claims them, starts and watches their processes, and records how they ended."""
