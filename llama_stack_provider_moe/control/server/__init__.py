"""The HTTP server inside Llama Stack or OGX: routes, wire models, and the service between them and the job store."""
