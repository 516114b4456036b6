"""The face to Llama Stack and OGX: routes, wire models, and the service between them and the job store."""
