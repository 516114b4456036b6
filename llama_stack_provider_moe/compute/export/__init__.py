"""Export of trained models for serving: merge an adapter on disk, write GGUF, check, and push."""
