"""What was trained, ready to serve: merging an adapter into its base on disk."""
