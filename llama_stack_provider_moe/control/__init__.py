"""The server's side: store, supervisor, HTTP API, command line. Nothing here imports torch, or the other tower."""
