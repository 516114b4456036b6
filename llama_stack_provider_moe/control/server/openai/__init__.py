"""OpenAI's fine-tuning API on our jobs: requests, objects, events, checkpoints, result files, errors and routes."""
