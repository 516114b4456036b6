"""Branch, train, mix: branches of one model, each trained on a domain, become the experts of one model."""
