"""Whole jobs made of stages, each resumable."""
