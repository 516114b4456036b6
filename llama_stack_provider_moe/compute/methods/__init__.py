"""Formulas of the methods as pure functions, tested against hand derivations, and what each method decides."""
