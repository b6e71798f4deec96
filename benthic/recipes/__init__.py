"""Recipes: Python functions that return frozen configs. The only place where numbers live."""
