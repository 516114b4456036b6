"""What guards a model at run time, without a server and without torch: the same code for HTTP and the command line.

messages         messages as anybody may send them -> typed, bounded messages
strict_json      the arguments of a tool call -> one JSON object, or what is wrong with the text
lookalikes       names that look alike
closed_schema    a JSON schema of arguments, closed where it says nothing else
rules            the YAML of rules of ToolGuard, and its checker
argument_tests   rules on single arguments
examples         the examples in a file of rules
tool_guard       ToolGuard: the tool calls of the last assistant message
trajectory       TrajectoryAnalyzer: what the scores of a session add up to
verdict          the answer of a shield
guard            runs a shield of any type
probe_card       what a fitted probe says about itself
scores           what a scorer answers, and how it fails
scorer_settings  how a server runs the process that scores
scorer_wire      what a server and that process send each other
intervals        confidence intervals of rates
"""
