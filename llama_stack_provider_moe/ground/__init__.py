"""Files, secrets and signs of life: modules that every room may use and that import no other room."""
