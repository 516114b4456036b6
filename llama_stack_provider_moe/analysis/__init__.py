"""What a person wants to know of a model before (and after) it is trained."""
