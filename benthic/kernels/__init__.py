"""Arithmetic that is worth its own code. Each file: the operation, and a reference in plain torch."""
