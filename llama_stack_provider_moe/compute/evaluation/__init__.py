"""Safety evaluation: refusals, over-refusals, capability and tool calls, with how sure each figure is."""
