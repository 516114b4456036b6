"""From a model's id to a model that is ready to train."""
