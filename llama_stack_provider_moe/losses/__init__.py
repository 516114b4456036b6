"""Losses as pure tensor functions: torch alone, each tested against a hand derivation."""
