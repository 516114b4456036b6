"""Expert surgery: whole models with fewer or more experts, made from their folders."""
