"""The provider `inline::moe-guard`: shields on a host's safety API, or on one of its own where the host has none.

host        what this room takes from the host
service     runs shields for callers: sessions, telemetry, feedback
llama_stack the provider on Llama Stack 0.6.1 and 0.7.3, which have a safety API and a registry of shields
host_routes their routes, in place of the host's own
routes      the routes on OGX, which has neither
wire        bodies and answers of these routes
telemetry   OpenTelemetry metrics
feedback    flagged conversations -> rows for training
start       a server that can't start ends with the lines of `moe-train config check`
"""
