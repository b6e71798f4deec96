"""Evaluation: how often a model is right, how sure that is, and a page that shows it."""
