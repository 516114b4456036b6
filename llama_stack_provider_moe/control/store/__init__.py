"""Rows of the database, and the transactions that change them."""
