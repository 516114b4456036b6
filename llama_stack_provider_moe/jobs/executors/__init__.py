"""Where training processes run; each executor offers submit, poll and stop."""
